"""Joining and leaving Ray clusters: what was started is ended, what was there is left, and what is wrong is said."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import refuse
from small import digits

from robustknn import FeatureExtractor, InputError, MissingExtraError, RobustKNNError
from robustknn.cluster import START_TRIES, RayCluster, cause_of
from robustknn.database import build_database
from robustknn.database.ray_executor import ray_executor
from robustknn.errors import Carried, ResumeError
from robustknn.progress import Silent

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def _left() -> Iterator[None]:
    """Nothing keeps running, whatever a test does."""
    yield
    ray.shutdown()


def test_a_cluster_that_was_started_is_ended(capfd: pytest.CaptureFixture[str]) -> None:
    with RayCluster().connected() as connected:
        assert connected is ray
        assert ray.is_initialized()
    assert not ray.is_initialized()
    assert capfd.readouterr() == ("", "")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"workers": 0}, "workers must be a whole number of at least 1, not 0."),
    ({"cpus": 0}, "cpus of a Ray worker must be a number above 0, not 0."),
    ({"cpus": float("nan")}, "cpus of a Ray worker must be a number above 0, not nan."),
    ({"cpus": 1.5}, "cpus of a Ray worker above 1 must be whole, not 1.5."),
    ({"gpus": -1}, "gpus of a Ray worker must be a number at least 0, not -1."),
    ({"address": "head"}, "the address of a Ray cluster is auto or HOST:PORT (of its head), not 'head'."),
    ({"address": "ray://head:10001"}, "the address of a Ray cluster is auto or HOST:PORT (of its head), not"),
    ({"address": 6379}, "the address of a Ray cluster is auto or HOST:PORT (of its head), not 6379."),
]


@pytest.mark.parametrize(("given", "sentence"), BAD, ids=[str(given) for given, _ in BAD])
def test_what_is_no_cluster_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        RayCluster(**given)
    assert str(refused.value).startswith(sentence)


def test_nobody_answers() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(InputError, match=f"no Ray cluster answers at {address} "), RayCluster(address).connected():
        pass


@pytest.mark.parametrize(
    ("address", "error", "kind", "sentence"),
    [
        ("auto", ConnectionError("Could not find any running Ray instance."), InputError, "belongs to no running Ray"),
        (
            "auto",
            RuntimeError("Version mismatch: 2.60"),
            InputError,
            "at auto cannot be joined: Version mismatch: 2.60; ",
        ),
        (None, RuntimeError("no room"), RobustKNNError, "Ray cannot be started on this machine: no room."),
        (None, RuntimeError("timed out"), RobustKNNError, "Ray cannot be started on this machine: timed out."),
    ],
)
def test_ray_refuses(
    address: str | None, error: Exception, kind: type[Exception], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(kind, match=sentence), RayCluster(address).connected():
        pass


def test_a_start_that_timed_out_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, tries = ray.init, []

    def init(**options: Any) -> None:
        tries.append(options["address"])
        if len(tries) < START_TRIES:
            raise RuntimeError("The current node timed out during startup.")
        begin(**options)

    monkeypatch.setattr(ray, "init", init)
    with RayCluster().connected():
        assert ray.is_initialized()
    assert tries == ["local"] * START_TRIES


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"ray is not installed; .*robustknn\[ray\]"):
        RayCluster()
    few = ["--n", 5, "--out", tmp_path / "r", "--checkpoint", "none"]
    assert "pip install 'robustknn[ray]'" in refuse("evaluate", *few, "--executor", "ray")


class Nodes:
    """What stands in for ray where only its nodes are asked for."""

    def __init__(self, *resources: dict[str, float]) -> None:
        self._nodes = [{"Alive": True, "Resources": r} for r in resources]

    def nodes(self) -> list[dict[str, Any]]:
        """All nodes, one of them dead."""
        return [*self._nodes, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}]


def test_workers_are_as_many_as_fit_on_the_nodes() -> None:
    nodes = Nodes({"CPU": 4.0}, {"CPU": 3.0, "GPU": 2.0}, {})
    assert RayCluster().room(nodes, 100) == 7
    assert RayCluster(cpus=2).room(nodes, 100) == 3
    assert RayCluster(cpus=0.1).room(nodes, 100) == 70
    assert RayCluster(cpus=0.5, gpus=1).room(nodes, 100) == 2
    assert RayCluster().room(nodes, 5) == 5
    assert RayCluster(workers=20).room(nodes, 100) == 20  # more may join
    with pytest.raises(InputError, match=r"has 5 CPUs and 0 GPUs for a worker \(the most: 4 and 2\)"):
        RayCluster(workers=2, cpus=5).room(nodes, 100)


def test_errors_come_home_as_what_they_are() -> None:
    for error in (InputError("a."), ResumeError("b."), MissingExtraError("p", "e")):
        home = Carried.of(error).error()
        assert type(home) is type(error)
        assert str(home) == str(error)
    assert type(Carried("OfAnotherVersion", "x.").error()) is RobustKNNError
    assert str(Carried.of(InputError("a."), "there: ").error()) == "there: a."


def test_the_cause_is_one_piece_of_a_sentence() -> None:
    assert cause_of(RuntimeError("The actor died:\n  File x\nModuleNotFoundError: No module named 'y'\n")) == (
        "ModuleNotFoundError: No module named 'y'"
    )
    assert cause_of(RuntimeError("")) == "RuntimeError"


class Remove(Silent):
    """Takes a node away when the first block is there."""

    def __init__(self, cluster: Any, node: Any) -> None:
        self._cluster, self._nodes = cluster, [node]

    def advance(self, amount: int = 1) -> None:
        """A block is done."""
        if self._nodes:
            self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)


@pytest.mark.slow
def test_two_nodes_of_one_cpu_each(tmp_path: Path) -> None:
    """Workers that take whole CPUs leave none over; a node that goes takes nothing with it; the cluster stays."""
    from ray.cluster_utils import Cluster

    source, model = digits(epochs=1)
    features, samples = FeatureExtractor(model, ["relu3"]), source.train.first(300)
    build_database(tmp_path / "here", features, samples, block_rows=10)
    cluster = Cluster()
    try:
        memory = {"object_store_memory": 80_000_000}
        cluster.add_node(num_cpus=1, include_dashboard=False, **memory)
        second = cluster.add_node(num_cpus=1, **memory)
        assert ":" in cluster.address

        build_database(
            tmp_path / "there",
            features,
            samples,
            block_rows=10,
            executor=ray_executor(cluster.address),
            progress=Remove(cluster, second),
        )
        assert not ray.is_initialized()
        with RayCluster(cluster.address).connected():
            assert sum(node["Alive"] for node in ray.nodes()) == 1
    finally:
        ray.shutdown()
        cluster.shutdown()
    for file in (tmp_path / "here").rglob("*"):
        if file.is_file():
            assert (tmp_path / "there" / file.relative_to(tmp_path / "here")).read_bytes() == file.read_bytes()
