"""Names for parts, a user's own parts, and parts as plain data and back."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from robustknn import registry
from robustknn.attacks import FGSM, PGD
from robustknn.config import from_config, to_config
from robustknn.errors import InputError, RobustKNNError
from robustknn.objectives import ASK, Adaptive, AdvKNN, CrossEntropy
from robustknn.registry import Registry, load_installed_plugins, load_object, load_plugin


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a test registers and imports is forgotten after it; imports look into its own folder."""
    held = {name: dict(part._entries) for name, part in registry.ALL.items() if list(part) is not None}
    modules = set(sys.modules)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield
    for name, entries in held.items():
        registry.ALL[name]._entries = entries
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def refusal(work: Callable[[], object]) -> str:
    """The one sentence with which the work is refused."""
    with pytest.raises(InputError) as caught:
        work()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 300 + len(str(Path.cwd())) + 100
    assert text.endswith((".", "?"))
    return text


@pytest.fixture
def things(monkeypatch: pytest.MonkeyPatch) -> Registry[Any]:
    """A registry whose home holds nothing."""
    monkeypatch.setitem(sys.modules, "home_of_things", types.ModuleType("home_of_things"))
    return Registry("thing", "home_of_things")


@dataclass(frozen=True)
class Thing:
    """A thing of a certain size.

    More about it.
    """

    size: int = 1
    color: str = "red"
    inner: Any = None


def big(size: int = 100, **options: Any) -> Thing:
    """A big thing."""
    return Thing(size, **options)


# ------------------------------------------------------------------------------------------- registry


def test_parts_are_found_by_name(things: Registry[Any]) -> None:
    assert things.register("thing")(Thing) is Thing
    things.register("big")(big)
    things.register("small", summary="A small one.")(functools.partial(Thing, 0))
    assert [(e.name, e.summary) for e in things] == [
        ("big", "A big thing."),
        ("small", "A small one."),
        ("thing", "A thing of a certain size."),
    ]
    assert "thing" in things
    assert "thin" not in things
    assert 5 not in things
    assert things.entry("thing").build is Thing
    assert things.create("thing") == Thing()
    assert things.create("thing", size=3, color="blue") == Thing(3, "blue")
    assert things.create("big", color="blue") == Thing(100, "blue")
    assert things.create("small") == Thing(0)
    assert things.name_of(Thing) == "thing"
    assert things.name_of(big) == "big"
    assert things.name_of(dict) is None


def test_what_is_not_known_is_refused_with_what_is_close(things: Registry[Any]) -> None:
    assert refusal(lambda: things.create("thing")) == "unknown thing 'thing'; none is known."
    things.register("thing")(Thing)
    things.register("big")(big)
    assert refusal(lambda: things.create("thinng")) == "unknown thing 'thinng'; did you mean 'thing'?"
    assert refusal(lambda: things.entry("zzz")) == "unknown thing 'zzz'; known: big, thing."
    assert (
        refusal(lambda: things.create("thing", colour="red"))
        == "unknown option of thing 'thing': 'colour'; did you mean 'color'?"
    )
    assert (
        refusal(lambda: things.create("thing", q=1))
        == "unknown option of thing 'thing': 'q'; known: color, inner, size."
    )
    # A recipe hands its options on to the class that it returns.
    assert (
        refusal(lambda: things.create("big", colour="red"))
        == "unknown option of thing 'big': 'colour'; did you mean 'color'?"
    )


def test_values_that_a_part_cannot_take_are_refused(things: Registry[Any]) -> None:
    def needs(a: int, b: int) -> int:
        return a + b

    def passes_on(**options: Any) -> Any:
        return needs(**options)

    def of_unknown_type(**options: Any) -> NoSuchType:  # type: ignore[name-defined]  # noqa: F821
        return needs(**options)

    things.register("needs")(needs)
    things.register("passes on")(passes_on)
    things.register("unknown")(of_unknown_type)
    assert refusal(lambda: things.create("needs", a=1)) == "thing 'needs' needs b; name it among its options."
    assert refusal(lambda: things.create("needs")) == "thing 'needs' needs a and b; name them among its options."
    refused = refusal(lambda: things.create("needs", a=1, b="x" * 1000))
    assert refused.startswith("thing 'needs' cannot be made with {'a': 1, ")
    assert "unsupported operand" in refused
    for name in ("passes on", "unknown"):
        assert "unexpected keyword argument 'c'" in refusal(lambda name=name: things.create(name, a=1, b=2, c=3))  # type: ignore[misc]


def test_a_name_belongs_to_one_part(things: Registry[Any]) -> None:
    things.register("a")(Thing)
    things.register("a")(Thing)  # the same once more
    twin = types.new_class("Thing", (Thing,))  # its module imported again
    twin.__module__, twin.__qualname__ = Thing.__module__, Thing.__qualname__
    things.register("a")(twin)
    assert things.entry("a").build is twin
    assert things.name_of(Thing) == "a"
    for other in (big, lambda: 1, functools.partial(big), dict):
        assert (
            refusal(lambda other=other: things.register("a")(other))  # type: ignore[misc]
            == "the thing name 'a' is registered already; choose another name."
        )


def test_functions_without_a_name_of_their_own_are_told_apart(things: Registry[Any]) -> None:
    def made(value: int) -> Callable[[], int]:
        def inner() -> int:
            return value

        return inner

    for first, second in ((lambda: 1, lambda: 2), (made(1), made(2))):
        things._entries.clear()
        things.register("first")(first)
        things.register("second")(second)
        assert things.create("first") == 1
        assert things.create("second") == 2
        assert things.name_of(second) == "second"
        assert "registered already" in refusal(lambda second=second: things.register("first")(second))  # type: ignore[misc]


def test_the_home_is_imported_on_the_first_look(tmp_path: Path) -> None:
    (tmp_path / "late_home.py").write_text(
        "import test_things_registry as t\nassert 'b' not in t.parts\nt.parts.register('b')(dict)\n"
    )
    holder = types.ModuleType("test_things_registry")
    sys.modules["test_things_registry"] = holder
    parts: Registry[Any] = Registry("part", "late_home")
    holder.parts = parts  # type: ignore[attr-defined]
    parts.register("a")(Thing)
    assert "late_home" not in sys.modules
    assert [e.name for e in parts] == ["a", "b"]
    assert "late_home" in sys.modules


def test_a_home_that_fails_to_import_fails_every_time() -> None:
    parts: Registry[Any] = Registry("part", "no_such_home")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_home"):
            parts.create("a")


@pytest.mark.parametrize("kind", registry.ALL)
def test_what_ships_is_registered_with_a_line_about_it(kind: str) -> None:
    entries = list(registry.ALL[kind])
    assert all(e.summary and "\n" not in e.summary and len(e.summary) < 120 for e in entries)
    assert len({e.name for e in entries}) == len(entries)
    assert {
        "attacks": "pgd",
        "objectives": "ask",
        "classifiers": "dknn",
        "datasets": "mnist",
        "transformations": "jpeg",
        "models": "resnet18",
        "methods": "ask-def",
        "certifiers": "poisoning-insert",
    }.get(kind, "exact") in {e.name for e in entries}


# --------------------------------------------------------------------------------------------- plugins


PLUGIN = """
from dataclasses import dataclass
from robustknn import registry
from robustknn.attacks import PGD

@registry.attacks.register("mine")
@dataclass(frozen=True)
class Mine(PGD):
    "My attack."
    strength: int = 3
"""


@pytest.mark.parametrize("how", ["file", "module", "package", "working directory"])
def test_a_plugin_is_an_equal_of_what_ships(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub folder ü" / "my-attack.py" if how == "file" else tmp_path / "my_attack.py"
    if how == "package":
        path = tmp_path / "my_package" / "attacks.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(PLUGIN)
    if how == "working directory":
        monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
        monkeypatch.chdir(tmp_path)
    where = {"file": str(path), "package": "my_package.attacks"}.get(how, "my_attack")
    for _ in range(2):  # once more changes nothing
        load_plugin(where)
        made = registry.attacks.create("mine", strength=5, steps=2)
        assert isinstance(made, PGD)
        assert registry.attacks.entry("mine").summary == "My attack."
        assert from_config(json.loads(json.dumps(to_config(made, registry.attacks))), registry.attacks) == made


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("def f(:\n", "(SyntaxError: invalid syntax"),
        ("1 / 0", "(ZeroDivisionError: division by zero)"),
        ("import no_such_module_x", "(ModuleNotFoundError: No module named 'no_such_module_x')"),
        ("raise ValueError('two\\nlines.')", "(ValueError: two lines)"),
        ("raise ValueError('x' * 10000)", "(ValueError: xxx"),
        ("raise ValueError", "(ValueError: ValueError)"),
        ("import sys\nsys.exit(0)", "(SystemExit: 0)"),
        ("x = '\udcff'".encode("utf-8", "surrogateescape"), "(SyntaxError: "),
    ],
)
@pytest.mark.parametrize("how", ["file", "module"])
def test_a_plugin_that_fails_is_one_sentence(content: str | bytes, said: str, how: str, tmp_path: Path) -> None:
    path = tmp_path / "broken_plugin.py"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    where = str(path) if how == "file" else "broken_plugin"
    text = refusal(lambda: load_plugin(where))
    assert text.startswith(f"plugin {where!r} failed to import (")
    assert said in text
    assert text.endswith("; correct it or its path.")
    assert not any("broken_plugin" in name for name in sys.modules)


def test_plugins_that_are_not_there_are_one_sentence(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.py")
    assert refusal(lambda: load_plugin(missing)) == (
        f"plugin file {missing!r} does not exist; give the path of a Python file."
    )
    (tmp_path / "folder.py").mkdir()
    assert "does not exist" in refusal(lambda: load_plugin(str(tmp_path / "folder.py")))
    for where in ("no_such_module_y", "no.such.module", "", ".", "..", "a b", "x\0y"):
        assert "failed to import" in refusal(lambda where=where: load_plugin(where))  # type: ignore[misc]


def test_a_plugin_keeps_its_own_words_and_cannot_take_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from robustknn.errors import NotReadyError\nraise NotReadyError('set it up.')")
    with pytest.raises(RobustKNNError, match=r"^set it up\.$"):
        load_plugin(str(tmp_path / "a.py"))
    (tmp_path / "b.py").write_text(PLUGIN.replace('"mine"', '"pgd"'))
    assert refusal(lambda: load_plugin(str(tmp_path / "b.py"))).startswith(
        "the attack name 'pgd' is registered already"
    )
    (tmp_path / "c.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_plugin(str(tmp_path / "c.py"))


def entry_points(*values: str) -> Callable[..., Any]:
    points = [importlib.metadata.EntryPoint(f"p{i}", value, "robustknn.plugins") for i, value in enumerate(values)]

    def found(group: str) -> list[importlib.metadata.EntryPoint]:
        assert group == "robustknn.plugins"
        return points

    return found


def test_installed_plugins_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "installed_one.py").write_text(PLUGIN)
    (tmp_path / "installed_two.py").write_text("def setup(): ...\n" + PLUGIN.replace('"mine"', '"other"'))
    monkeypatch.setattr(registry, "entry_points", entry_points("installed_one", "installed_two:setup"))
    load_installed_plugins()
    assert {"mine", "other"} <= {e.name for e in registry.attacks}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("no_such_plugin_z", "ModuleNotFoundError: No module named 'no_such_plugin_z'"),
        ("json:no_such_name", "AttributeError: "),
        ("broken_installed", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_installed_plugin_that_fails_is_one_sentence(
    value: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_installed.py").write_text("1 / 0")
    monkeypatch.setattr(registry, "entry_points", entry_points(value))
    text = refusal(load_installed_plugins)
    assert text.startswith(f"the installed plugin {value!r} failed to import (")
    assert said in text
    assert text.endswith("repair or uninstall it.")


def test_nothing_is_installed_by_default() -> None:
    load_installed_plugins()


# ----------------------------------------------------------------------------------------- load_object


def test_objects_are_found_by_module_and_name(tmp_path: Path) -> None:
    (tmp_path / "my_models.py").write_text("def net(): return 5\n_hidden = 1\n")
    assert load_object("my_models:net", "model")() == 5
    assert load_object("os.path:join", "model") is __import__("os").path.join


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("net", "model 'net' is not of the form module:function; write it so."),
        (":net", "model ':net' is not of the form module:function; write it so."),
        ("my_models:", "model 'my_models:' is not of the form module:function; write it so."),
        ("", "model '' is not of the form module:function; write it so."),
        ("my_models:nat", "unknown name in module 'my_models': 'nat'; did you mean 'net'?"),
        ("my_models:zzz", "unknown name in module 'my_models': 'zzz'; known: net."),
        ("my_models:net.x", "unknown name in module 'my_models': 'net.x'; did you mean 'net'?"),
        (
            "no_such_module_w:f",
            "module 'no_such_module_w' of model 'no_such_module_w:f' failed to import (ModuleNotFoundError: "
            "No module named 'no_such_module_w'); correct it or its name.",
        ),
        (
            "broken_models:f",
            "module 'broken_models' of model 'broken_models:f' failed to import (ZeroDivisionError: division by "
            "zero); correct it or its name.",
        ),
    ],
)
def test_objects_that_are_not_there_are_one_sentence(reference: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "my_models.py").write_text("def net(): return 5\n_hidden = 1\n")
    (tmp_path / "broken_models.py").write_text("1 / 0")
    assert refusal(lambda: load_object(reference, "model")) == said


# ---------------------------------------------------------------------------------------------- config


def variants(part: Any) -> Iterator[Any]:
    """The part with each of its numbers, choices and nested parts changed, where it can be."""
    for f in fields(part):
        value = getattr(part, f.name)
        others: list[Any] = []
        if isinstance(value, bool):
            others = [not value]
        elif isinstance(value, int):
            others = [value + 1]
        elif isinstance(value, float):
            others = [value / 2, value + 0.1, (0.5, 0.25)]
        elif isinstance(value, str):
            others = ["clean", "constant", "last", "instance-wise", "cross-entropy", "arithmetic", "none"]
        elif value is None:
            others = [3, 0.25, ("a", "b"), "l2"]
        elif hasattr(value, "__dataclass_fields__"):
            others = [CrossEntropy(), ASK(temperature=(0.5, 0.25), layers=("a", "b"))]
        for other in others:
            try:
                made = replace(part, **{f.name: other})
                hash(made)
            except (InputError, TypeError):
                continue
            if made != part:
                yield made


@pytest.mark.parametrize("kind", ["attacks", "objectives"])
def test_every_registered_part_goes_through_json_and_back(kind: str) -> None:
    parts = registry.ALL[kind]
    names, changed = set(), 0
    for entry in parts:
        made = parts.create(entry.name)
        for part in (made, *variants(made)):
            config = to_config(part, parts)
            again = from_config(json.loads(json.dumps(config, allow_nan=False)), parts)
            assert again == part
            assert hash(again) == hash(part)
            assert type(again) is type(part)
            assert to_config(again, parts) == config
            changed += part is not made
        names.add(entry.name)
        assert from_config(entry.name, parts) == made
        assert from_config({"name": entry.name}, parts) == made
    assert names >= ({"pgd", "bim", "fgsm", "ask"} if kind == "attacks" else {"ask", "cross-entropy"})
    assert changed > 10


def test_configurations_say_every_parameter() -> None:
    part = PGD(objective=ASK(temperature=(0.1, 0.2), layers=("a",)), steps=7)
    config = to_config(part, registry.attacks)
    assert config["name"] == "pgd"
    assert config["steps"] == 7
    assert config["objective"]["name"] == "ask"
    assert config["objective"]["temperature"] == [0.1, 0.2]
    assert set(config) == {"name", *(f.name for f in fields(PGD))}
    assert set(config["objective"]) == {"name", *(f.name for f in fields(ASK))}
    assert from_config({"name": "pgd", "objective": "cross-entropy"}, registry.attacks) == PGD(objective=CrossEntropy())
    assert from_config({"name": "fgsm", "objective": {"name": "ask", "n_neighbors": 2}}, registry.attacks) == FGSM(
        objective=ASK(n_neighbors=2)
    )


@dataclass(frozen=True)
class Unregistered:
    """Nobody registered it."""

    values: tuple[Any, ...] = ()
    more: Any = field(default=None)


def test_a_part_nobody_registered_is_described_by_its_place() -> None:
    config = to_config(Unregistered((1, (2.5, "x")), None), registry.attacks)
    assert config == {"name": f"{__name__}:Unregistered", "values": [1, [2.5, "x"]], "more": None}
    assert "unknown attack" in refusal(lambda: from_config(config, registry.attacks))


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda: to_config(5, registry.attacks), "5 is no frozen dataclass, so it cannot be described; make it one."),
        (lambda: to_config(PGD, registry.attacks), "is no frozen dataclass"),
        (
            lambda: to_config(torch.zeros(3, 3), registry.attacks),
            "tensor([[0., 0., 0.], [0., 0., 0.], [0., 0., 0.]]) is no",
        ),
        (
            lambda: to_config(Unregistered(more=torch.zeros(2)), registry.attacks),
            "a parameter of type Tensor cannot be written down; use numbers and text.",
        ),
        (lambda: to_config(Unregistered((len,)), registry.attacks), "a parameter of type builtin_function_or_method"),
        (lambda: to_config(Unregistered(more={"a": 1}), registry.attacks), "a parameter of type dict"),
        (lambda: from_config({}, registry.attacks), "a part of kind attack needs a name, e.g. name = 'ask'; got {}."),
        (lambda: from_config({"steps": 3}, registry.attacks), "needs a name"),
        (lambda: from_config({"name": 5}, registry.attacks), "needs a name, e.g. name = 'ask'; got {'name': 5}."),
        (lambda: from_config(5, registry.attacks), "needs a name, e.g. name = 'ask'; got 5."),  # type: ignore[arg-type]
        (lambda: from_config(["pgd"], registry.attacks), "needs a name"),  # type: ignore[arg-type]
        (lambda: from_config({"name": None, "x": "y" * 5000}, registry.attacks), "needs a name"),
        (lambda: from_config("pgdd", registry.attacks), "unknown attack 'pgdd'; did you mean 'pgd' or 'apgd'"),
        (
            lambda: from_config({"name": "pgd", "step_size": 1}, registry.attacks),
            "unknown option of attack 'pgd': 'step_size'; did you mean 'step",
        ),
        (
            lambda: from_config({"name": "ask", "restart": 2}, registry.attacks),
            "unknown option of attack 'ask': 'restart'; did you mean 'restarts'",
        ),
        (lambda: from_config({"name": "pgd", "steps": "ten"}, registry.attacks), "steps must be a whole number"),
        (
            lambda: from_config({"name": "pgd", "momentum": "a"}, registry.attacks),
            "momentum must be in [0, 1), not 'a'",
        ),
        (
            lambda: from_config({"name": "pgd", "objective": "asc"}, registry.attacks),
            "unknown objective 'asc'; did you mean 'ask'?",
        ),
        (
            lambda: from_config({"name": "pgd", "objective": {"name": "ask", "kinds": 1}}, registry.attacks),
            "unknown option of objective 'ask': 'kinds'; did you mean 'kind'",
        ),
        (lambda: from_config({"name": "pgd", "objective": 5}, registry.attacks), "objective must be an Objective"),
        (lambda: from_config({"name": "ask", "objective": "ask"}, registry.attacks), "sets objective itself"),
    ],
)
def test_what_cannot_be_described_or_made_is_one_sentence(work: Callable[[], object], said: str) -> None:
    assert said in refusal(work)


def test_a_flag_that_is_no_flag_is_refused() -> None:
    """From a command line or a file "no" is text, and true."""
    for name, options in (
        ("ask", {"refresh": "no"}),
        ("sw2", {"narrow": 0}),
        ("tanh-box", {"hard_box": "true"}),
        ("advknn-bim", {"consistency": 1}),
    ):
        with pytest.raises(InputError, match="must be true or false"):
            registry.attacks.create(name, **options)
    assert registry.attacks.create("ask", refresh=False).refresh is False


def test_adaptive_by_name_takes_the_options_of_its_objective() -> None:
    made = registry.attacks.create("adaptive", loss="rival", floor=0.02, reach=0.3, smooth=0.4, steps=7)
    assert made.objective == Adaptive(loss="rival", floor=0.02, reach=0.3, smooth=0.4)
    assert made.steps == 7


@pytest.mark.parametrize("layers", [3, (), ("1", 2), {"1"}])
@pytest.mark.parametrize("objective", [ASK, AdvKNN])
def test_layers_that_are_no_names_are_refused(objective: Callable[..., Any], layers: Any) -> None:
    with pytest.raises(InputError, match="layers must be names of layers"):
        objective(layers=layers)


@pytest.mark.parametrize("final_step", ["a", -3, float("nan"), None])
def test_a_last_step_that_is_none_is_refused(final_step: Any) -> None:
    with pytest.raises(InputError, match="final_step must be a number"):
        registry.attacks.create("pgd", final_step=final_step)
