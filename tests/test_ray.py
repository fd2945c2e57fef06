"""Work over a Ray cluster: the same files as on one machine, whatever happens to its workers."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import call, refuse, results
from ray_source import MoodySource
from small import digits

from robustknn import KNN, FeatureExtractor, InputError, ReferenceSet, RobustKNNError, registry
from robustknn.cluster import RayCluster, start_ray
from robustknn.database import build_database
from robustknn.database.ray_executor import ray_executor
from robustknn.errors import NotReadyError
from robustknn.evaluation import RunDirectory, evaluate, finish
from robustknn.evaluation.experiment import prepare
from robustknn.evaluation.experiment_config import read_config
from robustknn.payload import TopSoftmax
from robustknn.progress import Silent

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.ray
ROWS = 300


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    """Workers import the parts that these tests bring along; no other test sees these."""
    known = {kind: set(parts._entries) for kind, parts in registry.ALL.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # a test machine is busy with the other tests
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        registry.load_plugin("ray_parts")
        yield
    sys.modules.pop("ray_parts")
    for kind, parts in registry.ALL.items():
        for name in set(parts._entries) - known[kind]:
            del parts._entries[name]


@pytest.fixture(scope="module")
def session(_importable: None) -> Iterator[None]:
    """One small cluster for the tests that do not bring their own."""
    start_ray(ray, "local", num_cpus=2, object_store_memory=100_000_000)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("ray") / "model"
    assert call("train", "--epochs", 1, "--out", out).code == 0
    return str(out)


def experiment(checkpoint: str, **changes: Any) -> Any:
    """40 digits, two classifiers, two attacks, and the plugin."""
    settings = {
        "model.checkpoint": checkpoint,
        "plugins": ["ray_parts"],
        "data.n": 40,
        "references.per_class": 20,
        "classifiers": ["knn", "dknn"],
        "attacks": [{"name": "pgd", "steps": 3}, {"name": "ask", "steps": 3}],
        "published": False,
        "worst_case": "off",
        "threat.eps": [0.1],
        "batch_size": 16,
        "controls": 10,
        "examples": 5,
    }
    return prepare(read_config(None, {**settings, **changes}))


def moody(how: str, folder: Path) -> dict[str, Any]:
    """An experiment's changes for an attack that misbehaves in workers, over the first samples: number 0 is there."""
    attack = {"name": "moody", "how": how, "home": os.getpid(), "marker": str(folder / "marker")}
    return {"attacks": [attack], "classifiers": ["knn"], "controls": 0, "data.subset": "first"}


def figures(run: RunDirectory) -> Any:
    """The summary without its times and the machine."""
    finish(run)
    summary = json.loads((run.path / "summary.json").read_text())
    for classifier in summary["classifiers"]:
        for attack in classifier["attacks"]:
            attack.pop("seconds")
    return {**summary, "sha256": None, "environment": None}


def same(a: RunDirectory, b: RunDirectory) -> None:
    assert figures(a) == figures(b)
    assert results(a.path) == results(b.path)
    assert len(results(a.path)) > 5


# ------------------------------------------------------------------------------------------ evaluation


@pytest.mark.usefixtures("session")
def test_the_rows_are_those_of_one_machine_though_a_worker_was_killed(checkpoint: str, tmp_path: Path) -> None:
    dying = moody("die once", tmp_path)
    changes = {**dying, "classifiers": ["knn", "dknn"], "attacks": [*dying["attacks"], {"name": "ask", "steps": 3}]}
    made = experiment(checkpoint, **{**changes, "controls": 10})
    run = made.run(tmp_path / "run", executor=RayCluster(workers=2, cpus=0.5))
    assert int((tmp_path / "marker").read_text()) != os.getpid()
    same(run, made.run(tmp_path / "local"))
    assert ray.is_initialized()  # the caller's session is the caller's


@pytest.mark.slow
@pytest.mark.usefixtures("session")
def test_a_run_begun_here_goes_on_over_there(checkpoint: str, tmp_path: Path) -> None:
    class Stop(Silent):
        def advance(self, amount: int = 1) -> None:
            raise KeyboardInterrupt

    made = experiment(checkpoint)
    for executor in ("local", "ray"):  # each leaves one batch more
        with pytest.raises(KeyboardInterrupt):
            made.run(tmp_path / "run", progress=Stop(), executor=executor)
    for _ in range(100):  # those who worked for the second are gone
        if ray.available_resources().get("CPU") == 2:
            break
        time.sleep(0.1)
    assert ray.available_resources().get("CPU") == 2
    assert len(list((tmp_path / "run" / "cells").rglob("*.time"))) == 2
    same(made.run(tmp_path / "run", executor="ray"), made.run(tmp_path / "local"))


@pytest.mark.slow
@pytest.mark.usefixtures("session")
def test_a_batch_that_kills_every_worker_is_given_up(checkpoint: str, tmp_path: Path) -> None:
    made = experiment(checkpoint, **moody("die", tmp_path))
    with pytest.raises(
        RobustKNNError, match=r"4 Ray workers died over the samples 0 to 15 of 'knn/moody@0.1', .* kept"
    ):
        made.run(tmp_path / "run", executor=RayCluster(workers=1))
    run = RunDirectory(tmp_path / "run")
    assert len(run.done(run.cells[0])) == 40  # the clean cell came before
    same(made.run(tmp_path / "run"), made.run(tmp_path / "local"))


@pytest.mark.usefixtures("session")
def test_an_error_of_a_worker_is_the_one_it_met(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(NotReadyError) as refused:
        experiment(checkpoint, **moody("refuse", tmp_path)).run(tmp_path / "run", executor="ray")
    assert str(refused.value) == "the attack is tired; let it sleep."


@pytest.mark.slow
@pytest.mark.usefixtures("session")
@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (
            "others",
            r"the Ray node \S+ has another data than this machine; install the same version of everything there",
        ),
        ("gone", r"on the Ray node \S+: digits.npz is missing; put it there."),
    ],
)
def test_a_node_with_other_data_is_refused(checkpoint: str, tmp_path: Path, how: str, sentence: str) -> None:
    options = {"how": how, "home": os.getpid()}
    made = experiment(checkpoint, **{"data.name": "moody-digits", "data.options": options})
    with pytest.raises(InputError, match=sentence):
        made.run(tmp_path / "run", executor=RayCluster(workers=1))
    assert not list((tmp_path / "run").rglob("*.time"))


@pytest.mark.usefixtures("session")
def test_a_node_with_another_version_is_refused(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustknn.evaluation.given.code_fingerprint", lambda: "0.0.0+other")
    with pytest.raises(InputError, match=r"the Ray node \S+ has another code version than this machine"):
        experiment(checkpoint).run(tmp_path / "run", executor=RayCluster(workers=1))


def test_objects_are_not_sent(tmp_path: Path) -> None:
    source, model = digits(epochs=1)
    knn = KNN(ReferenceSet.build(FeatureExtractor(model, ["relu3"]), source.test.first(50)), 5)
    with pytest.raises(InputError, match="evaluate from a configuration"):
        evaluate(knn, source.test.first(5), out=tmp_path / "r", executor=RayCluster())  # type: ignore[arg-type]
    assert not (tmp_path / "r").exists()


@pytest.mark.usefixtures("session")
def test_the_command_line_spreads_too(checkpoint: str, tmp_path: Path) -> None:
    few = ["--checkpoint", checkpoint, "--n", 20, "--references-per-class", 10, "--controls", 0, "-a", "ask"]
    few += ["--no-published", "--worst-case", "off"]
    one = call("evaluate", *few, "--out", tmp_path / "a")
    two = call("evaluate", *few, "--out", tmp_path / "b", "--executor", "ray", "--ray-workers", 2, "--ray-cpus", 0.5)
    assert (one.code, two.code, two.err) == (0, 0, "")
    same(RunDirectory(tmp_path / "a"), RunDirectory(tmp_path / "b"))
    refused = "evaluate", *few, "--out", tmp_path / "c"
    assert "--ray-workers is for work over Ray; ask for it: --executor ray." in refuse(*refused, "--ray-workers", 2)
    assert "--executor must be one of 'local', 'ray', not 'spark'." in refuse(*refused, "--executor", "spark")
    assert "no node of the Ray cluster has 3 CPUs" in refuse(*refused, "--executor", "ray", "--ray-cpus", 3)


# -------------------------------------------------------------------------------------------- database


@pytest.fixture(scope="module")
def features() -> FeatureExtractor:
    return FeatureExtractor(digits(epochs=1)[1], ["relu2", "relu3"])


def moody_source(how: str, marker: Path, place: int = 200) -> MoodySource:
    split = digits(epochs=1)[0].train.first(ROWS)
    return MoodySource(split.batch(torch.arange(ROWS)), split.labels, how, place, marker)


def build(folder: Path, features: FeatureExtractor, source: Any, **given: Any) -> dict[str, bytes]:
    """Every file of a database of 10 blocks."""
    settings: dict[str, Any] = {"payload": TopSoftmax(3), "dtype": "float16", "unit": True}
    build_database(folder, features, source, **{"block_rows": 32, "batch_size": 20, **settings, **given})
    return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    kept = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in kept}


@pytest.mark.usefixtures("session")
@pytest.mark.parametrize("how", [pytest.param("work", marks=pytest.mark.slow), "die once"])
def test_the_database_is_that_of_one_machine(how: str, features: FeatureExtractor, tmp_path: Path) -> None:
    source = moody_source(how, tmp_path / "marker")
    here = build(tmp_path / "here", features, source)
    assert len([name for name in here if name.startswith("blocks/")]) == 10
    assert build(tmp_path / "there", features, source, executor=ray_executor(workers=2)) == here
    assert (tmp_path / "marker").exists() == (how == "die once")


@pytest.mark.slow
@pytest.mark.usefixtures("session")
def test_a_block_that_kills_every_worker_is_given_up(features: FeatureExtractor, tmp_path: Path) -> None:
    source = moody_source("die", tmp_path / "marker")
    with pytest.raises(RobustKNNError, match=r"4 Ray workers died over block 6 \(rows 192 to 223\); what .* is kept"):
        build(tmp_path / "db", features, source, executor=ray_executor(workers=1))
    assert "blocks/00000006.json" not in files(tmp_path / "db")
    assert build(tmp_path / "db", features, source) == build(tmp_path / "here", features, source)


@pytest.mark.usefixtures("session")
def test_an_error_in_a_block_is_the_one_that_was_met(features: FeatureExtractor, tmp_path: Path) -> None:
    with pytest.raises(NotReadyError) as refused:
        build(tmp_path / "db", features, moody_source("refuse", tmp_path), executor=ray_executor(workers=1))
    assert str(refused.value) == "the attack is tired; let it sleep."


@pytest.mark.usefixtures("session")
def test_workers_of_another_version_build_nothing(
    features: FeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustknn.database.ray_executor.code_fingerprint", lambda: "0.0.0+other")
    with pytest.raises(InputError, match=r"the Ray node \S+ has another code version than this machine"):
        build(tmp_path / "db", features, moody_source("work", tmp_path), executor=ray_executor(workers=1))
    assert not (tmp_path / "db" / "blocks").exists()


@pytest.mark.usefixtures("session")
def test_what_cannot_be_sent_is_said(features: FeatureExtractor, tmp_path: Path) -> None:
    source = moody_source("work", tmp_path)
    source.held = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"cannot be sent to other processes \(.*lock.*\); build on this machine"):
        build(tmp_path / "db", features, source, executor=ray_executor(workers=1))
