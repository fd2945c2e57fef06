"""A hook of MkDocs: the pages of the API, made of the docstrings.

One page a package with every public name, one with the names that `robustknn` itself exports, one with the names that
registries know. What is public is what `__all__` says; modules without it give the names that are defined in them.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File

import robustknn
from robustknn import registry

PACKAGES = {
    "threat": "Threat models",
    "features": "Features",
    "reference": "References",
    "neighbors": "Neighbor search",
    "classifiers": "Classifiers",
    "objectives": "Objectives",
    "attacks": "Attacks",
    "recipes": "Published attacks and recipes",
    "adapters": "Other libraries",
    "training": "Training",
    "certification": "Certificates",
    "evaluation": "Evaluation",
    "reports": "Reports",
    "reproduce": "The papers' tables",
    "datasets": "Data sets",
    "models": "Networks",
    "database": "References on the disk",
    "transforms": "Transforms of features",
    "registry": "Registries",
    "errors": "Errors",
}
"""Every package with a page, and the page's title, in the order of a first reading."""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the API."""
    pages = {f"api/{package}.md": package_page(package) for package in PACKAGES}
    pages |= {"api/README.md": front_page(), "api/registered.md": registered_page()}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def public_names(package: str) -> list[str]:
    """The public names of `robustknn.PACKAGE`."""
    module = importlib.import_module(f"robustknn.{package}")
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
    return sorted(name for name in own if not name.startswith("_"))


def package_page(package: str) -> str:
    """Every public name of a package."""
    module = importlib.import_module(f"robustknn.{package}")
    names = "\n\n".join(f"::: robustknn.{package}.{name}" for name in public_names(package))
    return f"# {PACKAGES[package]}\n\n`robustknn.{package}`: {inspect.getdoc(module)}\n\n{names}\n"


def front_page() -> str:
    """The names of `import robustknn`, each with its first sentence."""
    lines = [
        "# API",
        "",
        "Every name below is imported by `import robustknn as rk`. The pages beside this one have all public names of",
        "a package; [names for the command line](registered.md) lists what `--attack`, `--classifier`, … take.",
    ]
    for home, names in _homes().items():
        page = home.removeprefix("robustknn.")
        lines += ["", f"## {PACKAGES[page]}", "", "| name | what it is |", "|---|---|"]
        lines += [f"| [`{name}`]({page}.md#{home}.{name}) | {_says(getattr(robustknn, name))} |" for name in names]
    return "\n".join([*lines, "", f"`__version__` is the installed version, here {robustknn.__version__}.", ""])


def registered_page() -> str:
    """What every registry knows, and the options of each entry."""
    lines = [
        "# Names for the command line",
        "",
        "What `robustknn list` shows, with the options that `--attack-option`, `--method-option`, … and configuration",
        'files take. In Python: `registry.attacks.create("pgd", steps=20)`.',
    ]
    for kind, entries in registry.ALL.items():
        lines += ["", f"## {kind.capitalize()}", "", "| name | what | options |", "|---|---|---|"]
        lines += [f"| {_made_by(entry)} | {_cell(entry.summary)} | {_options(entry.build)} |" for entry in entries]
    return "\n".join([*lines, ""])


def _homes() -> dict[str, list[str]]:
    """The names of `robustknn.__all__` by the package they come from, in the order of `PACKAGES`."""
    names = [name for name in robustknn.__all__ if name != "__version__"]
    found: dict[str, list[str]] = {f"robustknn.{package}": [] for package in PACKAGES}
    for name in names:
        found[robustknn._HOME_OF[name]].append(name)
    return {home: names for home, names in found.items() if names}


def _says(thing: Any) -> str:
    paragraph = " ".join((inspect.getdoc(thing) or "").split("\n\n", 1)[0].split())
    return _cell(paragraph)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _made_by(entry: Any) -> str:
    for package in PACKAGES:
        name = getattr(entry.build, "__name__", "")
        if name in public_names(package) and _is(package, name, entry.build):
            return f"[`{entry.name}`]({package}.md#robustknn.{package}.{name})"
    return f"`{entry.name}`"


def _is(package: str, name: str, thing: Any) -> bool:
    return getattr(importlib.import_module(f"robustknn.{package}"), name) is thing


def _options(build: Any) -> str:
    return ", ".join(f"`{option}`" for option in _written(build))


def _written(build: Any) -> Iterator[str]:
    for name, parameter in inspect.signature(build).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            yield "…"
        elif parameter.default is inspect.Parameter.empty:
            yield name
        else:
            yield _cell(f"{name}={_default(build, parameter)}")


def _default(build: Any, parameter: inspect.Parameter) -> str:
    fields = {field.name: field for field in dataclasses.fields(build)} if dataclasses.is_dataclass(build) else {}
    factory = fields[parameter.name].default_factory if parameter.name in fields else dataclasses.MISSING
    return repr(parameter.default) if factory is dataclasses.MISSING else f"{type(factory()).__name__}()"
