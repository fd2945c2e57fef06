"""A database holds, byte for byte, what the network gives, however it was stopped and whoever made the blocks."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import LAYERS, digits
from torch import Tensor

from robustknn import FeatureExtractor, ReferenceSet
from robustknn.classifiers import KNN, RetrievalClassifier
from robustknn.database import (
    Block,
    Database,
    Executor,
    Settings,
    build_database,
    extract_block,
    fit_projection,
    is_database,
    local_executor,
)
from robustknn.datasets import DataSource, Source
from robustknn.errors import InputError, IntegrityError, NotReadyError, ResumeError, RobustKNNError
from robustknn.models import DigitsCNN
from robustknn.payload import TopPayload, TopSoftmax
from robustknn.store import StorageError
from robustknn.training import initialise

BLOCK, BATCH = 64, 24
N = 300


@pytest.fixture(scope="module")
def world() -> tuple[DataSource, DigitsCNN]:
    return digits(epochs=1)


@pytest.fixture(scope="module")
def x(world: tuple[DataSource, DigitsCNN]) -> Tensor:
    return world[0].train.batch(torch.arange(N))


@pytest.fixture(scope="module")
def y(world: tuple[DataSource, DigitsCNN]) -> Tensor:
    return world[0].train.labels[:N]


@pytest.fixture(scope="module")
def model(world: tuple[DataSource, DigitsCNN]) -> DigitsCNN:
    return world[1]


@pytest.fixture(scope="module")
def whole(model: DigitsCNN, x: Tensor, y: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished database that tests copy."""
    path = tmp_path_factory.mktemp("whole") / "db"
    make(path, model, (x, y))
    return path


def make(
    path: Path, model: DigitsCNN, data: Any, layers: Sequence[str] = ("relu2", "relu3"), **options: Any
) -> Database:
    settings = {"block_rows": BLOCK, "batch_size": BATCH, **options}
    return build_database(path, FeatureExtractor(model, layers), data, **settings)


def contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def stopping(after: int, error: BaseException) -> Executor:
    """Makes so many blocks and then fails."""

    def run(features: Any, source: Any, todo: Any, settings: Any, offset: int) -> Iterator[Any]:
        for block in todo[:after]:
            yield block, extract_block(features, source, block, settings, offset)
        raise error

    return run


# ------------------------------------------------------------------------------------------ what it holds


def test_the_arrays_hold_what_the_network_gives(whole: Path, model: DigitsCNN, x: Tensor, y: Tensor) -> None:
    """Read with NumPy alone, beside forward passes written out here."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda m, i, o, n=n: found.update({n: o})) for n in LAYERS[1:]
    ]
    model.eval()
    with torch.no_grad():
        probabilities = model(x).softmax(1)
    for hook in hooks:
        hook.remove()
    for place, layer in enumerate(LAYERS[1:]):
        held = np.load(whole / f"vectors-{place}.npy", allow_pickle=False)
        assert held.dtype == np.float32
        assert np.allclose(held, found[layer].flatten(1).numpy(), rtol=1e-5, atol=1e-6)
    assert np.array_equal(np.load(whole / "labels.npy"), y.numpy())
    assert np.allclose(np.load(whole / "payload.npy"), probabilities.numpy(), atol=1e-6)
    assert len(list((whole / "blocks").iterdir())) == -(-N // BLOCK)


@pytest.mark.parametrize("payload", ["softmax", TopSoftmax(3), None])
def test_references_equal_those_built_in_memory_to_the_bit(
    payload: Any, model: DigitsCNN, x: Tensor, y: Tensor, tmp_path: Path
) -> None:
    database = make(tmp_path / "db", model, (x, y), payload=payload)
    mine = database.references(model)
    theirs = ReferenceSet.build(FeatureExtractor(model, ("relu2", "relu3")), (x, y), payload=payload)
    assert mine.layers == theirs.layers
    for layer in mine.layers:
        assert torch.equal(mine.vectors(layer)[0], theirs.vectors(layer)[0])
    assert torch.equal(mine.labels, theirs.labels)
    if isinstance(payload, TopSoftmax):
        a, b = mine.stored_payload, theirs.stored_payload
        assert isinstance(a, TopPayload)
        assert isinstance(b, TopPayload)
        assert torch.equal(a.values, b.values)
        assert torch.equal(a.classes, b.classes)
        assert a.settings() == b.settings()
    elif payload:
        assert torch.equal(mine.stored_payload, theirs.stored_payload)  # type: ignore[arg-type]
    else:
        assert mine.stored_payload is None
    assert mine.features is not None
    assert mine.features.preprocessing() == FeatureExtractor(model, ("relu2", "relu3")).preprocessing()


def test_unit_vectors_and_half_precision(model: DigitsCNN, x: Tensor, y: Tensor, tmp_path: Path) -> None:
    raw = ReferenceSet.build(FeatureExtractor(model, "relu3"), (x, y)).vectors("relu3")[0].double()
    lengths = raw.norm(dim=1)
    for dtype, tolerance in (("float32", 1e-6), ("float16", 1e-3)):
        database = make(tmp_path / dtype, model, (x, y), layers=["relu3"], unit=True, dtype=dtype)
        references = database.references(model)
        unit, kept = references.vectors("relu3", unit=True)
        assert kept is not None
        assert str(unit.dtype) == f"torch.{dtype}"
        assert torch.allclose(unit.double(), raw / lengths[:, None], atol=tolerance)
        assert torch.allclose(kept.double(), lengths, rtol=1e-6)
        assert torch.allclose(references.rows("relu3", torch.arange(9)).double(), raw[:9], rtol=5e-3, atol=5e-3)
    exact = ReferenceSet.build(FeatureExtractor(model, "relu3"), (x, y))
    held = Database.open(tmp_path / "float32").references(model)
    assert torch.equal(exact.vectors("relu3", unit=True)[0], held.vectors("relu3", unit=True)[0])
    victims = [KNN(r, 5, metric="cosine") for r in (exact, held)]
    assert np.array_equal(*(v.predict(x[:40]) for v in victims))


def test_labels_that_the_network_gives(model: DigitsCNN, x: Tensor, y: Tensor, tmp_path: Path) -> None:
    database = make(tmp_path / "db", model, x, labels="payload", payload=TopSoftmax(2))
    expected = ReferenceSet.build(FeatureExtractor(model, "relu3"), x, labels="payload", payload=TopSoftmax(2))
    references = database.references(model)
    assert torch.equal(references.labels, expected.labels)
    assert not references.labelled
    assert references.n_classes == expected.n_classes == 10
    # Labels that come along are not looked at, even of no class.
    make(tmp_path / "other", model, (x, torch.full((N,), 77)), labels="payload", payload=TopSoftmax(2))
    assert (tmp_path / "other/labels.npy").read_bytes() == (tmp_path / "db/labels.npy").read_bytes()


@pytest.mark.parametrize("weighting", ["entropy", "gap"])
@pytest.mark.parametrize("payload", ["softmax", TopSoftmax(4)])
def test_retrieval_over_the_disk_decides_as_over_memory(
    weighting: str,
    payload: Any,
    model: DigitsCNN,
    world: tuple[DataSource, DigitsCNN],
    x: Tensor,
    y: Tensor,
    tmp_path: Path,
) -> None:
    test = world[0].test.batch(torch.arange(80))
    memory = ReferenceSet.build(FeatureExtractor(model, "relu3"), (x, y), payload=payload)
    disk = make(tmp_path / "db", model, (x, y), layers=["relu3"], payload=payload).references(model)
    a, b = (RetrievalClassifier(r, 20, weighting=weighting) for r in (memory, disk))
    assert np.array_equal(a.predict_proba(test), b.predict_proba(test))
    assert np.array_equal(a.predict(test), b.predict(test))


def test_what_pca_learned_is_kept_and_checked(model: DigitsCNN, x: Tensor, y: Tensor, tmp_path: Path) -> None:
    learned = fit_projection(FeatureExtractor(model, ["relu2"]), Source(*parts(x, y)), 12, sample=200)
    path = tmp_path / "db"
    database = build_database(path, learned, (x, y), block_rows=BLOCK)
    references = Database.open(path).references(model)  # the bare model
    assert references.dim("relu2") == 12
    again = references.extractor()(x[:32])["relu2"]
    assert torch.allclose(again, references.rows("relu2", torch.arange(32)), atol=1e-5)
    with pytest.raises(IntegrityError, match="made with other transform of 'relu2'"):
        database.references(FeatureExtractor(model, ["relu2"]))
    file = path / "transform-0.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match="the numbers of a transform"):
        database.references(model)
    assert any("the numbers of a transform" in said for said in database.verify())


def parts(x: Tensor, y: Tensor) -> tuple[Any, Tensor, dict[str, Any]]:
    from robustknn.datasets.base import TensorItems

    return TensorItems(x), y, {"name": "arrays"}


def test_fingerprints_tell_content_apart_without_reading_it(
    whole: Path, model: DigitsCNN, x: Tensor, y: Tensor, tmp_path: Path
) -> None:
    first = Database.open(whole)
    same = make(tmp_path / "same", model, (x, y))
    assert first.fingerprint() == same.fingerprint()
    assert first.references(model).fingerprint() == same.references(model).fingerprint()
    moved = x.clone()
    moved[200] += 0.01
    others = [
        make(tmp_path / "a", model, (moved, y)),
        make(tmp_path / "b", model, (x, y.flip(0))),
        make(tmp_path / "c", model, (x, y), layers=["relu3"]),
        make(tmp_path / "d", model, (x, y), payload=None),
        make(tmp_path / "e", model, (x, y), unit=True),
        make(tmp_path / "f", initialise(DigitsCNN, 5), (x, y)),
    ]
    assert len({d.fingerprint() for d in [first, *others]}) == 7
    assert len({d.references().fingerprint() for d in [first, *others]}) == 7
    references = first.references(model)
    assert references.labelled_by_payload().fingerprint() != references.fingerprint()


# -------------------------------------------------------------------------------- the same bytes by any road


def test_processes_that_read_change_no_byte(
    whole: Path, model: DigitsCNN, x: Tensor, y: Tensor, tmp_path: Path
) -> None:
    make(tmp_path / "db", model, (x, y), executor=local_executor(2))
    assert contents(tmp_path / "db") == contents(whole)


def test_any_order_of_blocks_gives_the_same_bytes(
    whole: Path, model: DigitsCNN, x: Tensor, y: Tensor, tmp_path: Path
) -> None:
    def backwards(features: Any, source: Any, todo: Any, settings: Any, offset: int) -> Iterator[Any]:
        for block in reversed(todo):
            yield block, extract_block(features, source, block, settings, offset)

    make(tmp_path / "db", model, (x, y), executor=backwards)
    assert contents(tmp_path / "db") == contents(whole)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no")])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_stopped_build_goes_on(
    after: int, error: BaseException, whole: Path, model: DigitsCNN, x: Tensor, y: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "db"
    with pytest.raises(type(error)):
        make(path, model, (x, y), executor=stopping(after, error))
    assert len(list(path.glob("blocks/*"))) == after
    opened = Database.open(path)
    assert [b.number for b in opened.missing] == list(range(after, 5))
    with pytest.raises(NotReadyError, match=f"lacks {5 - after} of 5 blocks; run the command that built it again"):
        opened.references(model)
    asked: list[Block] = []

    def watching(features: Any, source: Any, todo: Any, settings: Any, offset: int) -> Iterator[Any]:
        asked.extend(todo)
        return local_executor()(features, source, todo, settings, offset)

    make(path, model, (x, y), executor=watching)
    assert [b.number for b in asked] == list(range(after, 5))  # nothing is made twice
    assert contents(path) == contents(whole)
    asked.clear()
    make(path, model, (x, y), executor=watching)
    assert not asked


def test_a_damaged_ledger_file_makes_its_block_again(
    whole: Path, model: DigitsCNN, x: Tensor, y: Tensor, tmp_path: Path
) -> None:
    path = copied(whole, tmp_path)
    file = path / "blocks" / "00000002.json"
    file.write_bytes(file.read_bytes()[:-20])
    assert [b.number for b in Database.open(path).missing] == [2]
    make(path, model, (x, y))
    assert contents(path) == contents(whole)


KILLED = """
import sys, time, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from robustknn import FeatureExtractor
from robustknn.database import build_database, extract_block, local_executor
from robustknn.models import DigitsCNN
from robustknn.training import initialise

class Slow:
    labels = torch.arange({n}) % 10
    def __len__(self): return {n}
    def batch(self, positions):
        time.sleep(0.005)
        return torch.linspace(0, 1, {n})[positions][:, None, None, None].expand(-1, 1, 8, 8) ** (1 + torch.arange(8.))
build_database(sys.argv[1], FeatureExtractor(initialise(DigitsCNN, 0), "relu3"), Slow(), block_rows=16, batch_size=16,
               executor=local_executor({workers}))
"""


def killed_at(path: Path, workers: int, blocks: int | None) -> int:
    """Build in a process of its own, killed when so many blocks are done (None: left alone); how it ended."""
    code = KILLED.format(paths=[str(Path(__file__).parents[1] / "src")], n=800, workers=workers)
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    if blocks is not None:
        while process.poll() is None and len(list(path.glob("blocks/0*.json"))) < blocks:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    return process.wait()


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("never") / "db"
    assert killed_at(path, 0, None) == 0
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_build_ends_with_the_bytes_of_one_that_was_not(
    workers: int, never_killed: Path, tmp_path: Path
) -> None:
    path = tmp_path / "killed"
    for blocks in (3, 30):
        assert killed_at(path, workers, blocks) == -signal.SIGKILL
        assert blocks <= len(list(path.glob("blocks/0*.json"))) < 50
    assert killed_at(path, workers, None) == 0

    def kept(path: Path) -> dict[str, bytes]:
        return {name: data for name, data in contents(path).items() if not name.split("/")[-1].startswith(".")}

    assert kept(path) == kept(never_killed)


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"payload": TopSoftmax(3)}, "was begun with payload = 'softmax', not {'top': 3"),
        ({"dtype": "float16"}, "was begun with dtype = 'float32', not 'float16'"),
        ({"unit": True}, "was begun with unit = False, not True"),
        ({"labels": "payload"}, "was begun with labels = 'data'"),
        ({"block_rows": 32}, "was begun with block_rows = 64, not 32"),
        ({"layers": ["relu3"]}, "was begun with layers ="),
        ({"options": {"pca": 3}}, "was begun with pca = None, not 3"),
    ],
)
def test_going_on_with_other_settings_is_refused(
    change: dict[str, Any], said: str, whole: Path, model: DigitsCNN, x: Tensor, y: Tensor
) -> None:
    before = contents(whole)
    with pytest.raises(ResumeError) as caught:
        make(whole, model, (x, y), **change)
    assert said in sentence(caught.value)
    assert sentence(caught.value).endswith("use the same, or choose another folder.")
    assert contents(whole) == before


def test_another_model_or_source_is_refused(whole: Path, model: DigitsCNN, x: Tensor, y: Tensor) -> None:
    before = contents(whole)
    with pytest.raises(IntegrityError, match="made with another model"):
        make(whole, initialise(DigitsCNN, 3), (x, y))
    with pytest.raises(IntegrityError, match="made with another model"):
        Database.open(whole).references(initialise(DigitsCNN, 3))
    for data in ((x[:-1], y[:-1]), (x, y.flip(0)), (x.flip(0), y), x):
        with pytest.raises(ResumeError, match="was made of other samples"):
            make(whole, model, data)
    with pytest.raises(IntegrityError, match="other pooling of 'relu2'"):
        build_database(whole, FeatureExtractor(model, ["relu2", "relu3"], pool="avg"), (x, y))
    assert contents(whole) == before


class Unread:
    """Samples that fail when they are read at a place."""

    def __init__(self, x: Tensor, y: Tensor, wrong: int, value: Tensor | Exception) -> None:
        self._x, self.labels, self._wrong, self._value = x, y, wrong, value

    def __len__(self) -> int:
        return len(self._x)

    def batch(self, positions: Tensor) -> Tensor:
        if self._wrong not in positions.tolist():
            return self._x[positions]
        if isinstance(self._value, Exception):
            raise self._value
        return torch.where((positions == self._wrong)[:, None, None, None], self._value, self._x[positions])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.tensor(float("nan")), r"block 2 \(rows 128 to 191\) has NaN or infinite values"),
        (IntegrityError("image 'a.png' cannot be read; restore or remove it."), "^image 'a.png' cannot be read"),
    ],
)
def test_a_bad_sample_ends_the_build_and_nothing_else(
    value: Any, said: str, workers: int, whole: Path, model: DigitsCNN, x: Tensor, y: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "db"
    with pytest.raises(RobustKNNError, match=said) as caught:
        make(path, model, Unread(x, y, 140, value), executor=local_executor(workers))
    assert type(caught.value) is (InputError if isinstance(value, Tensor) else IntegrityError)
    sentence(caught.value)
    assert len(list(path.glob("blocks/*"))) == 2
    make(path, model, Unread(x, y, -1, value))  # repaired
    assert {k: v for k, v in contents(path).items() if k.endswith(".npy")} == {
        k: v for k, v in contents(whole).items() if k.endswith(".npy")
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"payload": "sofmax"}, "payload must be 'softmax', a TopSoftmax or None"),
        ({"labels": "none"}, "labels must be one of"),
        ({"labels": "payload", "payload": None}, "labels='payload' takes the class of the largest payload"),
        ({"dtype": "float64"}, "dtype must be one of"),
        ({"block_rows": 0}, "block_rows must be a whole number"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"n_classes": 5}, "label"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    options: dict[str, Any], said: str, model: DigitsCNN, x: Tensor, y: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        make(tmp_path / "db", model, (x, y), **options)
    sentence(caught.value)
    assert not is_database(tmp_path / "db")


def test_bad_data_and_places_are_refused(model: DigitsCNN, x: Tensor, y: Tensor, tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        (x, "the samples come without labels"),
        ((x, torch.where(y == 3, 4, y)), "class 3 of 10 has no reference"),
        ((x[:0], y[:0]), "holds no value|at least one"),
        ((x.long(), y), "dtype int64"),
        (7, "not of int"),
    ]
    for data, said in cases:
        with pytest.raises(InputError, match=said):
            make(tmp_path / "db", model, data)
        assert not is_database(tmp_path / "db")
    with pytest.raises(InputError, match="features must be a FeatureExtractor"):
        build_database(tmp_path / "db", model, (x, y))  # type: ignore[arg-type]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="exists and holds no database"):
        make(tmp_path / "mine", model, (x, y))
    with pytest.raises(InputError, match="holds no database; build one with"):
        Database.open(tmp_path / "mine")
    big = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with torch.no_grad():
        big[1].weight.fill_(1e6)
    with pytest.raises(InputError, match="has numbers beyond half precision; store it as float32"):
        build_database(tmp_path / "half", FeatureExtractor(big), (x, y), dtype="float16")
    # A class may be empty when its number is known and it comes later.
    some = y != 3
    build_database(tmp_path / "later", FeatureExtractor(model, "relu3"), (x[some], y[some]), n_classes=10)
    with pytest.raises(InputError, match="class 3 of 10 has no reference"):
        Database.open(tmp_path / "later").references(model)
    database = Database.open(tmp_path / "later").add(model, (x[~some], y[~some]))
    assert torch.equal(database.references(model).labels, torch.cat([y[some], y[~some]]))


def test_an_executor_that_gives_something_else_is_refused(
    model: DigitsCNN, x: Tensor, y: Tensor, tmp_path: Path
) -> None:
    def altered(change: Callable[[Block, dict[str, Tensor]], Any], times: int = 1) -> Executor:
        def run(features: Any, source: Any, todo: Any, settings: Any, offset: int) -> Iterator[Any]:
            for block in todo:
                for _ in range(times):
                    yield change(block, extract_block(features, source, block, settings, offset))

        return run

    def fewer(block: Block, rows: dict[str, Tensor]) -> Any:
        return block, {name: value[1:] for name, value in rows.items()}

    cases: list[tuple[Executor, str]] = [
        (altered(fewer), "give all samples one size"),
        (altered(lambda b, r: (b, {k: v.double() for k, v in r.items()})), "give all samples one size"),
        (altered(lambda b, r: (b, {"labels": r["labels"]})), "the database keeps"),
        (altered(lambda b, r: (b, r), times=2), "was not asked for or given already"),
        (altered(lambda b, r: (replace(b, number=9), r)), "was not asked for"),
        (lambda *_: iter(()), "did not give 5 of the 5 blocks"),
    ]
    for number, (executor, said) in enumerate(cases):
        with pytest.raises(InputError, match=said):
            make(tmp_path / str(number), model, (x, y), executor=executor)


def test_two_processes_do_not_write_one_database(whole: Path, tmp_path: Path) -> None:
    from robustknn.database.arrays import writing

    path = copied(whole, tmp_path)

    def refused_elsewhere() -> bool:
        child = os.fork()
        if child == 0:
            try:
                with writing(path):
                    os._exit(0)
            except ResumeError as error:
                os._exit(7 if "another process is writing to" in str(error) else 1)
            except BaseException:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 7)
        return code == 7

    with writing(path):
        assert refused_elsewhere()
    assert not refused_elsewhere()


def test_a_full_disk_keeps_what_is_done(model: DigitsCNN, x: Tensor, y: Tensor, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "db"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (N * 4 * 300, before[1]))  # no room for relu2's 1024 numbers a row
    try:
        with pytest.raises(StorageError, match="what was finished before is kept") as caught:
            make(path, model, (x, y))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sentence(caught.value)
    make(path, model, (x, y))
    assert contents(path) == contents(whole)


@pytest.mark.parametrize("call", range(1, 24, 3))
def test_a_disk_that_fails_at_any_write_keeps_what_is_done(
    call: int, model: DigitsCNN, x: Tensor, y: Tensor, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = 0, os.fsync

    def failing(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(28, "No space left on device")
        real(handle)

    path = tmp_path / "db"
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError, match="No space left on device; what was finished before is kept"):
        make(path, model, (x, y))
    monkeypatch.setattr(os, "fsync", real)
    if is_database(path):
        noted = {int(p.stem) for p in path.glob("blocks/0*.json")}
        assert noted == set(range(5)) - {b.number for b in Database.open(path).missing}
    make(path, model, (x, y))
    assert contents(path) == contents(whole)


def test_a_disk_without_room_is_told_before_the_work(
    model: DigitsCNN, x: Tensor, y: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(StorageError, match=r"needs 1\.6 MB more and its disk has 1\.0 kB left"):
        make(tmp_path / "db", model, (x, y))


# ------------------------------------------------------------------------------------------------- adding


def test_adding_appends_and_equals_one_build(
    whole: Path, model: DigitsCNN, world: Any, x: Tensor, y: Tensor, tmp_path: Path
) -> None:
    path = copied(whole, tmp_path)
    test = world[0].test.first(90)
    database = Database.open(path)
    old = database.fingerprint()
    database = database.add(model, test)
    assert len(database) == N + 90
    assert database.fingerprint() != old
    both = torch.cat([x, test.batch(torch.arange(90))]), torch.cat([y, test.labels])
    expected = ReferenceSet.build(FeatureExtractor(model, ("relu2", "relu3")), both, payload="softmax")
    references = database.references(model)
    for layer in references.layers:
        assert torch.equal(references.vectors(layer)[0], expected.vectors(layer)[0])
    assert torch.equal(references.labels, expected.labels)
    assert torch.equal(references.stored_payload, expected.stored_payload)  # type: ignore[arg-type]
    assert np.load(path / "labels.npy", allow_pickle=False).shape == (N + 90,)
    before = contents(path)
    assert len(database.add(model, test)) == N + 90  # each source once
    assert len(make(path, model, (x, y))) == N + 90  # and the build itself knows its part
    assert contents(path) == before
    assert not database.verify(model)


def test_an_addition_that_was_stopped_changes_nothing_until_it_is_finished(
    whole: Path, model: DigitsCNN, world: Any, tmp_path: Path
) -> None:
    path = copied(whole, tmp_path)
    test, other = world[0].test.first(200), world[0].test.subset(torch.arange(200, 300))
    database = Database.open(path)
    fingerprint = database.fingerprint()
    with pytest.raises(KeyboardInterrupt):
        database.add(model, test, executor=stopping(2, KeyboardInterrupt()))
    database = Database.open(path)
    assert len(database) == N
    assert database.fingerprint() == fingerprint
    assert torch.equal(database.references(model).labels, Database.open(whole).references(model).labels)
    assert len(database.missing) == 2
    with pytest.raises(ResumeError, match=r"is not finished \(Split, 200 rows\)"):
        database.add(model, other)
    # Taken back, the other one takes its place, and none of its blocks is taken for done.
    dropped = database.drop_unfinished()
    assert len(dropped.missing) == 0
    assert len(dropped.add(model, other)) == N + 100
    assert torch.equal(Database.open(path).references(model).labels[N:], other.labels)
    assert not Database.open(path).verify(model)
    with pytest.raises(InputError, match="there is nothing to drop"):
        Database.open(path).drop_unfinished()
    # Or it is finished.
    again = copied(whole, tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        Database.open(again).add(model, test, executor=stopping(2, KeyboardInterrupt()))
    assert len(Database.open(again).add(model, test)) == N + 200
    assert not Database.open(again).verify(model)


def test_what_cannot_be_added_is_refused(whole: Path, model: DigitsCNN, x: Tensor, y: Tensor, tmp_path: Path) -> None:
    path = copied(whole, tmp_path)
    before = contents(path)
    with pytest.raises(IntegrityError, match="another model"):
        Database.open(path).add(initialise(DigitsCNN, 9), (x[:5], y[:5]))
    with pytest.raises(InputError, match="without labels"):
        Database.open(path).add(model, x[:5])
    assert {k: v for k, v in contents(path).items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


# ----------------------------------------------------------------------------------------------- verifying


def flipped(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["vectors-0", "vectors-1", "labels", "payload", "lengths-0"])
def test_a_flipped_byte_is_found_and_named(name: str, model: DigitsCNN, x: Tensor, y: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "db"
    database = make(path, model, (x, y), unit=name.startswith("lengths"))
    assert database.verify(model) == []
    file = path / f"{name}.npy"
    row = (file.stat().st_size - 128) // N
    for place, block in ((128, 0), (128 + 64 * row - 1, 0), (128 + 64 * row, 1), (file.stat().st_size - 1, 4)):
        flipped(file, place)
        found = database.verify()
        assert len(found) == 1
        assert found[0].startswith(
            f"block {block} (rows {64 * block} to {min(N, 64 * block + 64) - 1}) of {name}.npy is altered"
        )
        assert f"remove blocks/{block:08d}.json" in found[0]
        flipped(file, place)
    assert database.verify() == []
    flipped(file, 130)
    (path / "blocks" / "00000000.json").unlink()  # what the sentence says to do
    make(path, model, (x, y), unit=name.startswith("lengths"))
    assert Database.open(path).verify(model) == []


def test_other_damage_is_found_and_named(whole: Path, model: DigitsCNN, tmp_path: Path) -> None:
    def found(damage: Callable[[Path], object], network: Any = None) -> list[str]:
        path = copied(whole, tmp_path)
        damage(path)
        said = Database.open(path).verify(network)
        shutil.rmtree(path)
        for text in said:
            assert "\n" not in text
            assert text.endswith(".")
        return said

    def cut(path: Path) -> None:
        with (path / "vectors-1.npy").open("rb+") as file:
            file.truncate(128 + 200 * 256 * 4)

    said = found(lambda p: (p / "blocks" / "00000003.json").unlink())
    assert len(said) == 1
    assert said[0].startswith("block 3 (rows 192 to 255) is missing: it was not made, or its ledger file is gone")
    said = found(lambda p: flipped(p / "blocks" / "00000003.json", 30))
    assert said[0].startswith("block 3 (rows 192 to 255) is missing: its ledger file is altered")
    said = found(cut)
    assert "vectors-1.npy has 204928 bytes where 307328 were written" in said[0]
    assert [s.split(" (")[0] for s in said[1:]] == ["block 3", "block 4"]
    said = found(lambda p: flipped(p / "labels.npy", 66))
    assert len(said) == 1
    assert said[0].startswith("labels.npy has another header than was written; it is altered, or of another database:")
    said = found(lambda p: (p / "payload.npy").unlink())
    assert len(said) == 1
    assert said[0].startswith("payload.npy cannot be read")
    said = found(lambda _: None, initialise(DigitsCNN, 3))
    assert len(said) == 1
    assert "made with another model" in said[0]
    assert found(lambda _: None, model) == []
    path = copied(whole, tmp_path)
    flipped(path / "database.json", 300)
    with pytest.raises(IntegrityError, match="truncated or altered"):
        Database.open(path)


def test_arrays_of_another_size_are_not_mapped(whole: Path, model: DigitsCNN, tmp_path: Path) -> None:
    path = copied(whole, tmp_path)
    with (path / "vectors-0.npy").open("rb+") as file:
        file.truncate(5000)
    with pytest.raises(IntegrityError, match=r"vectors-0\.npy' is not a whole \.npy array"):
        Database.open(path).references(model)


# ------------------------------------------------------------------------------------------------- indexes


def test_an_index_is_kept_used_and_known_to_be_stale(whole: Path, model: DigitsCNN, world: Any, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    path = copied(whole, tmp_path)
    database = Database.open(path)
    with pytest.raises(InputError, match=r"holds 2 layers .*; choose one"):
        database.build_index("hnsw")
    with pytest.raises(InputError, match="exact search needs no index"):
        database.build_index("exact", layer="relu3")
    with pytest.raises(InputError, match="cannot name an index"):
        database.build_index("hnsw", layer="relu3", name="../x")
    database.build_index("ivf-flat:nlist=4,nprobe=4", layer="relu3", name="lists")
    with pytest.raises(InputError, match="was built as 'ivf-flat:nlist=4,nprobe=4' by l2"):
        database.build_index("hnsw", layer="relu3", name="lists")
    assert not (path / "indexes" / "lists" / "vectors.npy").exists()  # the database has them
    test = world[0].test.batch(torch.arange(50))
    references = database.references(model)
    exact = KNN(references, 7, layer="relu3")
    listed = KNN(references, 7, layer="relu3", index=database.index_spec("lists"))
    # All lists are searched, so what it finds is exact.
    assert all(np.array_equal(a, b) for a, b in zip(exact.kneighbors(test), listed.kneighbors(test), strict=True))
    assert database.verify(model) == []
    assert database.index_spec("hnsw") == "hnsw"
    before = contents(path)
    database.build_index("ivf-flat:nlist=4,nprobe=4", layer="relu3", name="lists")  # it is there
    assert contents(path) == before
    with pytest.raises(KeyboardInterrupt):
        database.add(model, world[0].test.first(90), executor=stopping(1, KeyboardInterrupt()))
    assert [i["stale"] for i in Database.open(path).describe()["indexes"]] == [False]  # nothing is added yet
    database = database.add(model, world[0].test.first(90))
    assert [i["stale"] for i in database.describe()["indexes"]] == [True]
    with pytest.raises(InputError, match="index 'lists' was built over other references"):
        database.index_spec("lists")
    assert database.verify() == [
        "index 'lists' was built over other content than the database holds now; build it again."
    ]
    database.build_index("ivf-flat:nlist=4,nprobe=4", layer="relu3", name="lists")
    assert database.verify() == []
    file = path / "indexes" / "lists" / "index.faiss"
    flipped(file, 400)
    assert "is altered (its sha256 does not match" in database.verify()[0]
    (path / "indexes" / "lists.json").unlink()
    assert "lacks the note" in database.verify()[0]


def test_lists_on_the_disk_lie_in_the_database(whole: Path, model: DigitsCNN, world: Any, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    path = copied(whole, tmp_path)
    database = Database.open(path)
    database.build_index("ivf-sq8-disk:nlist=4,nprobe=4", "cosine", layer="relu3")
    assert (path / "indexes" / "ivf-sq8-disk" / "lists.ivfdata").is_file()
    test = world[0].test.batch(torch.arange(50))
    victims = [
        KNN(database.references(model), 7, layer="relu3", metric="cosine", index=i)
        for i in ("exact", database.index_spec("ivf-sq8-disk"))
    ]
    # Every list is searched and what is found is measured again: 8 bits lose little.
    assert int((victims[0].predict(test) == victims[1].predict(test)).sum()) >= 48
    database = database.add(model, world[0].test.first(90))
    database.build_index("ivf-sq8-disk:nlist=4,nprobe=4", "cosine", layer="relu3")
    assert (
        len(
            KNN(
                database.references(model), 7, layer="relu3", metric="cosine", index=database.index_spec("ivf-sq8-disk")
            )
            .voters[0]
            .index
        )
        == N + 90
    )
    assert database.verify() == []


# -------------------------------------------------------------------------------------------------- memory


MEMORY = """
import sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from robustknn import FeatureExtractor
from robustknn.classifiers import KNN
from robustknn.database import Database, build_database

class Noise:
    labels = torch.arange({n}) % 10
    def __len__(self): return {n}
    def batch(self, positions):
        return torch.rand(len(positions), 16, generator=torch.Generator().manual_seed(int(positions[0])))

def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024

torch.manual_seed(0)
features = FeatureExtractor(torch.nn.Sequential(torch.nn.Linear(16, 1024), torch.nn.Linear(1024, 10)), "0")
build_database(sys.argv[2], features, Noise(), block_rows=512)   # of a few blocks: what torch itself takes
before = anonymous()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="left out: there is no /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """80 MB of vectors are built and searched: anonymous memory grows by less than a quarter of that."""
    root = [str(Path(__file__).parents[1] / "src")]
    n = 20_000
    small = MEMORY.format(paths=root, n=1500)
    big = f"Noise.labels = torch.arange({n}) % 10\nNoise.__len__ = lambda self: {n}\n" + (
        "database = build_database(sys.argv[1], features, Noise(), block_rows=512)\n"
        "built = anonymous()\n"
        "references = Database.open(sys.argv[1]).references(features)\n"
        "opened = anonymous()\n"
        "knn = KNN(references, 5)\n"
        "knn.predict(Noise().batch(torch.arange(20)))\n"
        "print(*(round(v - before, 1) for v in (built, opened, anonymous())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", small + big, str(tmp_path / "big"), str(tmp_path / "small")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    built, opened, searched = map(float, done.stdout.split())
    assert (tmp_path / "big" / "vectors-0.npy").stat().st_size > 80e6
    assert built < 20
    assert opened - built < 2
    assert searched - opened < 60  # the search's own working memory, bounded by memory_mb


def test_settings_go_through_json() -> None:
    for settings in (Settings(), Settings(payload=TopSoftmax(3, "drop"), dtype="float16", unit=True), Settings(None)):
        assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
