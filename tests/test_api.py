"""What the package promises as a whole: its names, a quick import, floors, and nothing that runs code from a file."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.resources
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import robustknn
from robustknn.errors import RobustKNNError

ROOT = Path(robustknn.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}

# ------------------------------------------------------------------------------------------ public names


@pytest.mark.parametrize("name", robustknn.__all__)
def test_every_public_name_is_there_and_explained(name: str) -> None:
    value = getattr(robustknn, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__doc__
        # A generated docstring repeats the signature: "Tap(module, ...)".
        assert not value.__doc__.startswith(f"{name}(")
        assert value.__module__.startswith("robustknn.")
        for member, part in vars(value).items():
            if inspect.isfunction(part) and not member.startswith("_"):
                assert inspect.getdoc(getattr(value, member)), f"{name}.{member} has no docstring"


def test_the_list_of_public_names_is_sorted_whole_and_typed() -> None:
    names = robustknn.__all__
    assert len(set(names)) == len(names)
    assert dir(robustknn) == sorted(names)
    assert set(names) == {*robustknn._HOME_OF, "__version__"}
    # What a type checker is told is what is imported.
    (block,) = (
        node.body
        for node in TREES[ROOT / "__init__.py"].body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    told = {alias.name: node.module for node in block if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == robustknn._HOME_OF
    with pytest.raises(AttributeError, match="module 'robustknn' has no attribute 'no_such_name'"):
        robustknn.no_such_name  # noqa: B018


def test_errors_are_exported_so_that_they_can_be_caught() -> None:
    from robustknn import errors

    for kind in vars(errors).values():
        if inspect.isclass(kind) and issubclass(kind, RobustKNNError):
            assert getattr(robustknn, kind.__name__) is kind


def test_star_import_gives_the_public_names() -> None:
    space: dict[str, object] = {}
    exec("from robustknn import *", space)
    assert set(robustknn.__all__) <= set(space)


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name == "__init__.py"], ids=lambda p: p.parent.name)
def test_every_package_exports_what_it_lists(path: Path) -> None:
    name = ".".join(path.parent.relative_to(ROOT.parent).parts)
    package = importlib.import_module(name)
    for listed in getattr(package, "__all__", ()):
        assert hasattr(package, listed), f"{name}.{listed}"


# ------------------------------------------------------------------------------------------ installation


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


HEAVY = ("torch", "numpy", "scipy", "sklearn", "matplotlib", "faiss", "pyarrow", "pydantic", "rich", "typer", "PIL")


def test_importing_the_package_imports_nothing_heavy() -> None:
    found = fresh(f"import sys, robustknn; print([m for m in {HEAVY!r} if m in sys.modules], robustknn.__version__)")
    assert found == f"[] {robustknn.__version__}\n"


def test_the_parts_import_no_more_than_they_need() -> None:
    """torchvision never, plots and optional engines not before they are used."""
    light = ("attacks", "classifiers", "evaluation", "recipes", "datasets", "models", "training", "threat")
    rare = ("matplotlib", "faiss", "torchvision", "PIL", "jinja2", "typer")
    code = f"import sys\nfor p in {light!r}: __import__('robustknn.' + p)\n"
    assert fresh(code + f"print([m for m in {rare!r} if m in sys.modules])") == "[]\n"


def test_the_version_is_the_distributions() -> None:
    assert importlib.metadata.version("robustknn") == robustknn.__version__
    assert all(part.isdigit() for part in robustknn.__version__.split(".")[:2])


def test_the_package_is_typed() -> None:
    assert importlib.resources.files("robustknn").joinpath("py.typed").is_file()


def test_every_module_and_every_public_class_is_explained() -> None:
    for path, tree in TREES.items():
        # `protocol.py` and the like may hold a single line; a module without one says nothing of why it is there.
        assert ast.get_docstring(tree) or path.name == "_version.py", path
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


# ------------------------------------------------------------------------------- no code from a file, ever


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "jsonpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(value.value) for value in node.args[:1] if isinstance(value, ast.Constant))


def offences(tree: ast.AST) -> Iterator[str]:
    """Everything in a file that could run code which another file holds."""
    for module in imported(tree):
        if module.split(".")[0] in FORBIDDEN_MODULES:
            yield f"imports {module}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in FORBIDDEN_CALLS:
            yield f"calls {called}"
        if called.endswith("torch.load") and options.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        numpy = called.endswith(("np.load", "numpy.load", "np.save", "numpy.save", "read_array", "write_array"))
        if options.get("allow_pickle", "not said" if numpy else "False") != "False":
            yield f"{called} without allow_pickle=False"
        if called.endswith(("yaml.load", "torch.save", "jit.load")):
            yield f"calls {called}"
        if called.endswith((".extractall", ".extract")) and options.get("filter") not in ("'data'", '"data"'):
            yield f"{called} without filter='data'"
        if called.endswith(("os.system", "os.popen")) or options.get("shell") == "True":
            yield f"{called} runs a shell"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    assert list(offences(TREES[path])) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import joblib",
        "from sklearn.externals import x; import dill as d",
        "importlib.import_module('marshal')",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p)",
        "numpy.load(p, allow_pickle=True)",
        "np.load(p, **options)",
        "np.lib.format.read_array(f)",
        "yaml.load(f)",
        "eval(x)",
        "exec('x')",
        "__import__(name)",
        "torch.save(m, p)",
        "tar.extractall(p)",
        "subprocess.run(c, shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(code: str) -> None:
    assert list(offences(ast.parse(code)))


def test_the_search_lets_the_rest_pass() -> None:
    code = "model.eval()\nnp.load(p, allow_pickle=False)\ntorch.load(p, weights_only=True)\nspec.loader.exec_module(m)"
    assert not list(offences(ast.parse(code)))


# -------------------------------------------------------------------------------------------------- floors


FLOORS = (
    ("_version", "errors", "code_version"),
    ("checks", "registry", "rng", "progress", "payload", "cluster"),
    ("store", "config", "batching"),
    ("threat", "transforms", "features", "fitting"),
    ("neighbors",),
    ("reference",),
    ("classifiers",),
    ("objectives",),
    ("attacks",),
    ("recipes",),
    ("datasets", "models"),
    ("database",),
    ("training",),
    ("certification",),
    ("evaluation",),
    ("reports", "adapters"),
    ("reproduce",),
    ("cli",),
    ("__main__",),
)
"""From the ground up. A module imports what stands below it, and of its own floor only the modules listed before."""

ORDER = {name: place for place, name in enumerate(name for floor in FLOORS for name in floor)}
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def room(path: Path) -> str:
    """The part of the house a file belongs to."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def rooms_entered(tree: ast.AST) -> set[str]:
    """The parts of the house a file imports from, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("robustknn.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            parts = (node.module or "").split(".")
            if parts == ["robustknn"]:
                found |= {a.name for a in node.names}
            elif parts[0] == "robustknn":
                found.add(parts[1])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_down_the_floors(path: Path) -> None:
    if path == ROOT / "__init__.py":
        return  # the face of the house names every floor, and imports none until it is asked
    here = room(path)
    assert here in ORDER, f"give {here!r} a place in FLOORS"
    for other in rooms_entered(TREES[path]) - {here}:
        assert other in ORDER, f"{path.name} imports {other!r}, which has no place in FLOORS"
        assert FLOOR[other] < FLOOR[here] or (FLOOR[other] == FLOOR[here] and ORDER[other] < ORDER[here]), (
            f"{here} imports {other}, which stands above it"
        )


def test_the_ground_floors_stand_alone() -> None:
    """In a fresh interpreter too, however the imports are written."""
    low = [name for name in ORDER if FLOOR[name] <= FLOOR["threat"]]
    above = [name for name in ORDER if FLOOR[name] > FLOOR["threat"]]
    code = f"import sys\nfor m in {low!r}: __import__('robustknn.' + m)\n"
    assert fresh(code + f"print([m for m in {above!r} if 'robustknn.' + m in sys.modules])") == "[]\n"
