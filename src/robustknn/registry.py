"""Names for parts: what the command line and configuration files can ask for, built in or a user's own.

A registry knows the package that registers its built-in entries and imports it on the first look-up, so that
`import robustknn` stays quick and a user's plugin is an equal of what ships.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from robustknn.errors import InputError, RobustKNNError, brief, reason, unknown_name

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered factory: `build(**options)` makes the part; `summary` is one line for `robustknn list`."""

    name: str
    build: Callable[..., T]
    summary: str


class Registry(Generic[T]):
    """Factories of one kind of part, by name."""

    def __init__(self, kind: str, home: str) -> None:
        self.kind = kind
        self._home = home
        self._entries: dict[str, Entry[T]] = {}
        self._loaded = False

    def register(self, name: str, summary: str | None = None) -> Callable[[F], F]:
        """Decorator: make a class or function available under `name`.

        Registering a name twice is refused unless it is the same object (a module imported again).
        """

        def add(factory: F) -> F:
            known = self._entries.get(name)
            if known is not None and not _same(known.build, factory):
                raise InputError(f"the {self.kind} name {name!r} is registered already; choose another name.")
            doc = summary or _first_sentence(inspect.getdoc(factory) or "")
            self._entries[name] = Entry(name, factory, doc)
            return factory

        return add

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True  # before the import: what is imported may look names up
            try:
                importlib.import_module(self._home)
            except BaseException:
                self._loaded = False
                raise

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[Entry[T]]:
        self._load()
        return iter(sorted(self._entries.values(), key=lambda e: e.name))

    def entry(self, name: str) -> Entry[T]:
        """The entry called `name`; an unknown name raises InputError that names close matches."""
        self._load()
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def name_of(self, factory: Callable[..., Any]) -> str | None:
        """The name a class or function is registered under, or None."""
        self._load()
        return next((e.name for e in self._entries.values() if _same(e.build, factory)), None)

    def create(self, name: str, **options: Any) -> T:
        """Build the part called `name`; an option it does not take raises InputError with close matches."""
        factory = self.entry(name).build
        own = _named(factory)
        kinds = {p.kind for p in inspect.signature(factory).parameters.values()}
        for option in options:
            if option not in own and inspect.Parameter.VAR_KEYWORD not in kinds:
                raise unknown_name(f"option of {self.kind} {name!r}:", option, own)
        missing = [option for option in _required(factory) if option not in options]
        if missing:
            them = "it" if len(missing) == 1 else "them"
            raise InputError(f"{self.kind} {name!r} needs {' and '.join(missing)}; name {them} among its options.")
        for option, value in options.items():
            if _is_flag(factory, option) and not isinstance(value, bool):
                raise InputError(f"{option} of {self.kind} {name!r} must be true or false, not {brief(value)}.")
        try:
            return factory(**options)
        except TypeError as error:
            further = _named_of_result(factory)
            for option in options:
                if f"multiple values for keyword argument {option!r}" in str(error):
                    raise InputError(
                        f"{self.kind} {name!r} sets {option} itself; leave that out, or take another {self.kind}."
                    ) from error
                if further and option not in own | further and repr(option) in str(error):
                    raise unknown_name(f"option of {self.kind} {name!r}:", option, own | further) from error
            raise InputError(
                f"{self.kind} {name!r} cannot be made with {brief(options)}: {reason(error)}; correct the options."
            ) from error


def _named(factory: Callable[..., Any]) -> set[str]:
    """The parameters that can be passed by name."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name for name, p in inspect.signature(factory).parameters.items() if p.kind in by_name}


def _required(factory: Callable[..., Any]) -> list[str]:
    """The parameters without a default that can be passed by name."""
    given = inspect.signature(factory).parameters
    return [name for name in given if name in _named(factory) and given[name].default is inspect.Parameter.empty]


def _is_flag(factory: Callable[..., Any], option: str) -> bool:
    """Whether an option is annotated as true or false, of the factory or of what it says it returns."""
    for takes in (factory, _result(factory)):
        parameter = None if takes is None else inspect.signature(takes).parameters.get(option)
        if parameter is not None and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            return parameter.annotation in (bool, "bool")
    return False


def _named_of_result(recipe: Callable[..., Any]) -> set[str]:
    """The parameters of the class that a recipe is annotated to return, to which it hands its further options."""
    result = _result(recipe)
    return set() if result is None else _named(result)


def _result(recipe: Callable[..., Any]) -> Callable[..., Any] | None:
    """The class that a recipe is annotated to return."""
    try:
        found = inspect.signature(recipe, eval_str=True).return_annotation
        inspect.signature(found)
    except Exception:  # no annotation, no class, or one that only the type checker can find
        return None
    return found if callable(found) and found is not inspect.Signature.empty else None


def _same(a: Callable[..., Any], b: Callable[..., Any]) -> bool:
    """Whether two factories are one, or one and its twin from a module that was imported again."""
    place = getattr(a, "__module__", None), getattr(a, "__qualname__", "<none>")
    named = "<" not in place[1]  # a lambda or a function made inside another shares its name with others
    return a is b or (named and place == (getattr(b, "__module__", None), getattr(b, "__qualname__", None)))


attacks: Registry[Any] = Registry("attack", "robustknn.recipes")
objectives: Registry[Any] = Registry("objective", "robustknn.objectives")
classifiers: Registry[Any] = Registry("classifier", "robustknn.classifiers")
indexes: Registry[Any] = Registry("index", "robustknn.neighbors")
datasets: Registry[Any] = Registry("dataset", "robustknn.datasets")
transformations: Registry[Any] = Registry("input transformation", "robustknn.classifiers")
models: Registry[Any] = Registry("model", "robustknn.models")
methods: Registry[Any] = Registry("training method", "robustknn.training")
certifiers: Registry[Any] = Registry("certifier", "robustknn.certification")

ALL: dict[str, Registry[Any]] = {
    "attacks": attacks,
    "objectives": objectives,
    "classifiers": classifiers,
    "indexes": indexes,
    "datasets": datasets,
    "transformations": transformations,
    "models": models,
    "methods": methods,
    "certifiers": certifiers,
}

ENTRY_POINT_GROUP = "robustknn.plugins"


def load_installed_plugins() -> None:
    """Import every installed distribution's `robustknn.plugins` entry points, which register themselves.

    Raises:
        InputError: one fails to import.
    """
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            point.load()
        except RobustKNNError:
            raise
        except Exception as error:
            raise InputError(
                f"the installed plugin {point.value!r} failed to import ({type(error).__name__}: {reason(error)}); "
                "repair or uninstall it."
            ) from error


def load_plugin(where: str) -> None:
    """Import a user's plugin: a Python file (`my_attack.py`) or an importable module (`my_package.attacks`).

    Raises:
        InputError: the file or module is not there or fails to import.
    """
    path = Path(where)
    try:
        if path.suffix == ".py":
            _import_file(path)
        else:
            _import_module(where)
    except (RobustKNNError, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:  # a script that ends with sys.exit() would end us
        raise InputError(
            f"plugin {where!r} failed to import ({type(error).__name__}: {reason(error)}); correct it or its path."
        ) from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"plugin file {str(path)!r} does not exist; give the path of a Python file.")
    name = f"robustknn_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _import_module(name: str) -> Any:
    """Import a module, looking in the working directory too, as `python -m` does."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def load_object(reference: str, kind: str) -> Any:
    """The object named by `module:attribute`, for a user's own model or data set.

    Raises:
        InputError: the reference is malformed, the module fails to import, or it has no such attribute.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise InputError(f"{kind} {reference!r} is not of the form module:function; write it so.")
    try:
        module = _import_module(module_name)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"module {module_name!r} of {kind} {reference!r} failed to import ({type(error).__name__}: "
            f"{reason(error)}); correct it or its name."
        ) from error
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise unknown_name(f"name in module {module_name!r}:", attribute, public)
    return getattr(module, attribute)


def _first_sentence(doc: str) -> str:
    """The first sentence of a docstring's first paragraph, on one line."""
    paragraph = " ".join(doc.split("\n\n", 1)[0].split())
    end = re.search(r"(?<!eqs)(?<!eq)[.:;] ", paragraph)
    return paragraph if end is None else paragraph[: end.start()] + "."
