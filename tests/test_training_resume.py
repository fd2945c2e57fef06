"""Runs that are stopped, killed, or short of disk, and go on as if nothing had happened."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mutate
import pytest
import torch
from small import Pixels
from torch import Tensor, nn

from robustknn import models, rng, store
from robustknn.errors import InputError, IntegrityError, ResumeError
from robustknn.models import checkpoint
from robustknn.progress import Silent
from robustknn.training import Standard, TrainConfig, accuracy, initialise, train

EPOCHS, STEPS = 4, 3
CONFIG = TrainConfig(epochs=EPOCHS, batch_size=16, lr=0.05, schedule="one-cycle", augment=True, select="best")


def pixels(n: int, seed: int) -> Pixels:
    """Random images of 8×8 whose class shows in their brightness."""
    ids = torch.arange(n)
    labels = rng.bits(ids, 1, seed, "labels")[:, 0] % 3
    return Pixels(0.6 * rng.uniform(ids, (1, 8, 8), seed) + 0.2 * labels.view(n, 1, 1, 1), labels)


DATA = SimpleNamespace(train=pixels(45, 0), validation=pixels(20, 1))


class Tiny(nn.Module):
    """Batch normalisation, dropout and tied weights."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.again = self.conv
        self.bn = nn.BatchNorm2d(1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(64, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.bn(self.again(self.conv(x))).relu())
        return self.fc(x.flatten(1))


def tiny() -> nn.Module:
    return initialise(Tiny, 0)


def weights(run: Path, which: str) -> dict[str, Tensor]:
    model = Tiny()
    models.load_weights(model, run / which)
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(), DATA, CONFIG, run)
    return run


@dataclass
class Steps(Silent):
    """Records progress and, at a number of finished steps, does something."""

    at: int = -1
    do: Callable[[], None] = lambda: None
    total: int = 0
    first: int = 0
    done: int = 0

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.total, self.first, self.done = total, done, done

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        if self.done == self.at:
            self.do()

    def stop(self) -> None:
        return None


def interrupt() -> None:
    raise KeyboardInterrupt


# ----------------------------------------------------------------------------------- what is on disk


def test_a_run_leaves_its_last_and_best_epoch_and_a_table(tmp_path: Path) -> None:
    model = tiny()
    result = train(model, DATA, CONFIG, tmp_path / "run")
    epochs = sorted({result.best_epoch, EPOCHS})
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [*(f"epoch-{e:05d}" for e in epochs), "epochs.csv"]
    assert result.last == tmp_path / "run" / f"epoch-{EPOCHS:05d}"
    assert result.checkpoint == tmp_path / "run" / f"epoch-{result.best_epoch:05d}"
    assert result.log is not None
    with result.log.open() as file:
        rows = list(csv.DictReader(file))
    assert [{k: float(v) if v else None for k, v in row.items()} for row in rows] == [r.row() for r in result.history]
    assert set(rows[0]) == {
        *("epoch", "loss", "validation_accuracy", "lr", "seconds", "robust_accuracy", "loss/cross-entropy")
    }
    manifest = store.read_manifest(result.last, "checkpoint", 1)
    assert set(manifest.files) == {"weights.safetensors", "optimizer.safetensors"}
    assert manifest.meta["epoch"] == EPOCHS
    assert manifest.meta["made_with"]["lr"] == 0.05
    assert equal(weights(tmp_path / "run", "."), dict(model.state_dict()))


def test_the_run_its_best_and_its_last_load_by_name(whole: Path) -> None:
    last = checkpoint.open_last(whole)
    assert last is not None
    best = last.meta["history"][last.meta["best_epoch"] - 1]
    model = Tiny()
    models.load_weights(model, whole / "best")
    assert accuracy(model, DATA.validation) == best["validation_accuracy"]
    assert equal(weights(whole, "best"), weights(whole, "."))
    assert equal(weights(whole, "last"), weights(whole, f"epoch-{EPOCHS:05d}"))
    assert not equal(weights(whole, "best"), weights(whole, "last"))


def test_a_run_without_validation_has_no_best(tmp_path: Path) -> None:
    data = SimpleNamespace(train=DATA.train, validation=None)
    train(tiny(), data, replace(CONFIG, select="last", epochs=1), tmp_path)
    assert equal(weights(tmp_path, "."), weights(tmp_path, "last"))
    with pytest.raises(InputError, match="no best epoch"):
        models.load_weights(Tiny(), tmp_path / "best")


def test_a_checkpoint_of_another_model_is_refused(whole: Path) -> None:
    with pytest.raises(IntegrityError, match=r"another architecture than this Tiny: fc.weight is \(3, 64\)"):
        models.load_weights(Tiny(5), whole / "last")


# --------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("at", [1, STEPS, STEPS + 1, 3 * STEPS + 2])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, optimizer: str, at: int) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    straight, resumed = tiny(), tiny()
    expected = train(straight, DATA, config)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), DATA, config, tmp_path / "run", progress=Steps(at, interrupt))
    finished = (at - 1) // STEPS
    assert checkpoint.epochs(tmp_path / "run")[-1:] == ([finished] if finished else [])
    steps = Steps()
    torch.manual_seed(77)
    result = train(resumed, DATA, config, tmp_path / "run", progress=steps)
    assert (steps.first, steps.done, steps.total) == (finished * STEPS, EPOCHS * STEPS, EPOCHS * STEPS)
    assert equal(dict(straight.state_dict()), dict(resumed.state_dict()))
    assert result.best_epoch == expected.best_epoch
    assert [(r.loss, r.validation_accuracy, r.lr) for r in result.history] == [
        (r.loss, r.validation_accuracy, r.lr) for r in expected.history
    ]


def test_a_finished_run_is_read_not_trained(whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.glob("epoch-*/*")}
    model, steps = tiny(), Steps()
    result = train(model, DATA, CONFIG, whole, progress=steps)
    assert (steps.first, steps.done) == (EPOCHS * STEPS, EPOCHS * STEPS)
    assert equal(dict(model.state_dict()), weights(whole, "best"))
    assert len(result.history) == EPOCHS
    assert before == {p: p.stat().st_mtime_ns for p in whole.glob("epoch-*/*")}


def _with_train(**changes: Tensor) -> Any:
    split = Pixels(changes.get("data", DATA.train.data), changes.get("labels", DATA.train.labels))
    return SimpleNamespace(train=split, validation=DATA.validation)


@dataclass(frozen=True)
class Scaled(Standard):
    """Cross-entropy times a number."""

    by: float = float("inf")


OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("lr", {"config": replace(CONFIG, lr=0.01)}, "another lr: 0.05, now 0.01; choose another folder or the same"),
    ("epochs", {"config": replace(CONFIG, epochs=9)}, "another epochs: 4, now 9"),
    ("seed", {"config": replace(CONFIG, seed=3)}, "another seed: 0, now 3"),
    (
        "schedule",
        {"config": replace(CONFIG, schedule="step", milestones=(2,))},
        "another schedule: 'one-cycle', now 'step'",
    ),
    ("model", {"model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3))}, "another model: 'Tiny', now 'Sequ"),
    ("structure", {"model": lambda: initialise(lambda: Tiny(5), 0)}, "another model structure: "),
    ("method", {"method": Scaled()}, "another method setting by: None, now 'inf'"),
    ("labels", {"data": _with_train(labels=DATA.train.labels.flip(0))}, "another training data: '45 samples, "),
    ("pixels", {"data": _with_train(data=DATA.train.data * 0.5)}, "another training data: '45 samples, "),
    ("size", {"data": SimpleNamespace(train=pixels(44, 0), validation=DATA.validation)}, "now '44 samples, "),
    (
        "validation",
        {"data": SimpleNamespace(train=DATA.train, validation=pixels(20, 5))},
        "another validation data: '20 samples, ",
    ),
]


@pytest.mark.parametrize(("what", "changes", "part"), OTHERS, ids=[row[0] for row in OTHERS])
def test_a_run_is_not_continued_with_something_else(whole: Path, what: str, changes: dict[str, Any], part: str) -> None:
    model = changes.get("model", tiny)()
    untouched = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ResumeError) as caught:
        train(model, changes.get("data", DATA), changes.get("config", CONFIG), whole, method=changes.get("method"))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert equal(untouched, dict(model.state_dict()))


def test_another_option_of_a_registered_model_is_named(tmp_path: Path) -> None:
    config = TrainConfig(epochs=1)
    train(models.create("digits-cnn", n_classes=3), DATA, config, tmp_path)
    with pytest.raises(ResumeError, match="another model option n_classes: 3, now 4"):
        train(models.create("digits-cnn", n_classes=4), DATA, config, tmp_path)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "manifest.json"])
def test_an_altered_checkpoint_is_not_continued(whole: Path, tmp_path: Path, name: str) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    path = run / f"epoch-{EPOCHS:05d}" / name
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        train(tiny(), DATA, CONFIG, run)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        train(tiny(), DATA, CONFIG, tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_state_that_is_no_tensor_is_refused_before_training(tmp_path: Path) -> None:
    class Odd(Tiny):
        def get_extra_state(self) -> str:
            return "odd"

        def set_extra_state(self, state: str) -> None:
            return None

    with pytest.raises(InputError, match="which is no tensor"):
        train(Odd(), DATA, CONFIG, tmp_path / "run")


# ----------------------------------------------------------------------- kill -9, and a disk that is full

# One process is killed just before its n-th call that changes the disk, for every n, and after steps in the
# middle of epochs; another goes on. Children are forked from a process that has imported everything.
KILLER = """
import itertools, json, os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_training_resume as t
from robustknn import store

CALLS = ("replace", "fsync", "unlink", "rmdir", "mkdir")

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def forked(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(3)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def run(out, **how):
    t.train(t.tiny(), t.DATA, t.CONFIG, out, **how)

def until(n, out):
    calls = itertools.count(1)
    def counted(call):
        def wrapper(*args, **kwargs):
            if next(calls) == n:
                kill()
            return call(*args, **kwargs)
        return wrapper
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    run(out)

def full(out, limit):
    # The third epoch finds a disk that takes no file above the limit; the epochs before stay.
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run(out, progress=t.Steps(2 * t.STEPS + 1, fill))
    except store.StorageError as error:
        assert "is kept" in str(error), error
        assert "\\n" not in str(error), error
        assert t.checkpoint.open_last(out).meta["epoch"] == 2
        os._exit(5)

t.train(t.tiny(), t.DATA, t.CONFIG)  # imports what torch imports late, once for all children
os.fsync = lambda handle: None  # a killed process, unlike a power failure, loses nothing that was written
folder, whole = Path(sys.argv[2]), Path(sys.argv[3])
expected = {which: t.weights(whole, which) for which in ("best", "last")}
ended = {}

def check(name, out):
    assert forked(lambda: run(out)) == 0, name
    ended[name] = all(t.equal(t.weights(out, which), expected[which]) for which in expected)
    ended[name] &= sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())

for n in itertools.count(1):
    out = folder / f"call-{n}"
    status = forked(lambda: until(n, out))
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, (n, status)
    check(f"call {n}", out)
for step in (1, 2, t.STEPS, t.STEPS + 1, 3 * t.STEPS + 2):
    out = folder / f"step-{step}"
    status = forked(lambda: run(out, progress=t.Steps(step, kill)))
    assert os.WTERMSIG(status) == signal.SIGKILL, (step, status)
    check(f"step {step}", out)
for limit in (0, 300, 1500):
    out = folder / f"full-{limit}"
    status = forked(lambda: full(out, limit))
    assert os.waitstatus_to_exitcode(status) == 5, (limit, status)
    check(f"full disk at {limit}", out)
print(json.dumps(ended))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(Path(__file__).parent), str(tmp_path), str(whole)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    assert [name for name, same in ended.items() if not same] == []
    assert len(ended) > 60  # about twenty calls an epoch


# ------------------------------------------------------------------------------------------------- damage


def test_no_damaged_checkpoint_is_taken_up(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    last, model = checkpoint.directory(run, EPOCHS), tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for turn, _ in enumerate(mutate.damaged(last, 10_000, seed=4)):
        with pytest.raises(IntegrityError) as caught:
            models.load_weights(model, run / "last")
        assert "\n" not in str(caught.value)
        if turn % 100 == 0:
            with pytest.raises(IntegrityError):
                train(tiny(), DATA, CONFIG, run)
    assert equal(before, dict(model.state_dict()))
    assert equal(weights(run, "last"), weights(whole, "last"))
