"""The Milvus engine on a real server process: restarts, a kill in the middle of inserting, the limits it sets.

`make test-milvus` installs the server (58 MB, Linux on x86-64) and runs this; `make test` leaves it out.
"""

from __future__ import annotations

import platform
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from milvus_server import Server
from torch import Tensor

from robustknn.errors import InputError
from robustknn.neighbors import ExactIndex, MilvusIndex
from robustknn.neighbors.milvus_collection import Collection
from robustknn.store import StorageError

pytestmark = pytest.mark.milvus

N, D, K = 100_000, 32, 50


def clustered(n: int, seed: int) -> Tensor:
    """n vectors around 100 centers."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(100, D, generator=torch.Generator().manual_seed(0))
    return centers[torch.randint(100, (n,), generator=generator)] + 0.4 * torch.randn(n, D, generator=generator)


VECTORS, QUERIES, LABELS = clustered(N, 1), clustered(200, 2), torch.arange(N) % 10


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("left out: the package milvus has a server for Linux on x86-64 only")
    for package in ("pymilvus", "milvus"):
        pytest.importorskip(package, reason=f"left out: needs the package {package}, run make test-milvus")
    made = Server(tmp_path_factory.mktemp("server"))
    try:
        made.start()
        yield made
    finally:
        made.kill()


@pytest.fixture(scope="module")
def truth() -> Tensor:
    """The ids of the K nearest of every query in float64."""
    squared = (QUERIES.double()[:, None] ** 2).sum(2) - 2 * QUERIES.double() @ VECTORS.double().T
    return (squared + (VECTORS.double() ** 2).sum(1)).topk(K, largest=False).indices


def recall(ids: Tensor, truth: Tensor) -> float:
    return float((ids[:, :, None] == truth[:, None]).any(2).double().mean())


def ids_of(index: MilvusIndex) -> np.ndarray[Any, Any]:
    """Every primary key the collection holds, in order, doubled ones twice."""
    held = index._here
    assert held.count() == len(index)
    return np.concatenate([sorted(held.ids(first, first + 10_000)) for first in range(0, len(index), 10_000)])


def test_a_hundred_thousand_survive_a_restart(server: Server, truth: Tensor, tmp_path: Path) -> None:
    flat = MilvusIndex("l2", server.uri, "flat", shards=2).build(VECTORS, LABELS)
    ivf = MilvusIndex("l2", server.uri, "ivf", "IVF_FLAT", "nlist=256", "nprobe=32", keep_vectors=False).build(VECTORS)
    assert np.array_equal(ids_of(flat), np.arange(N))
    before = [index.search(QUERIES, K) for index in (flat, ivf)]
    assert torch.equal(before[0].ids, truth)  # as exact: found by Milvus, ordered in float64 here
    assert torch.equal(before[0].distances, ExactIndex().build(VECTORS).search(QUERIES, K).distances)
    assert recall(before[1].ids, truth) > 0.95
    measured = (VECTORS.double()[before[1].ids] - QUERIES.double()[:, None]).norm(dim=2)
    np.testing.assert_allclose(before[1].distances, measured, rtol=1e-4)
    flat.save(tmp_path / "flat")
    ivf.save(tmp_path / "ivf")
    server.stop()
    server.start()
    after = [MilvusIndex.load(tmp_path / name) for name in ("flat", "ivf")]
    for one, two in zip(before, after, strict=True):
        found = two.search(QUERIES, K)
        assert recall(found.ids, one.ids) > 0.999  # ties in float32 aside
        np.testing.assert_allclose(found.distances, one.distances, rtol=1e-4)
    assert torch.equal(flat.search(QUERIES, K).ids, before[0].ids)  # the one from before connects anew
    assert torch.equal(after[0].reconstruct(torch.tensor([5, N - 1])), VECTORS[[5, N - 1]])
    by_class = after[0].search_classes(QUERIES[:20], 5)
    want = ExactIndex().build(VECTORS, LABELS).search_classes(QUERIES[:20], 5)
    assert recall(by_class.ids.flatten(0, 1), want.ids.flatten(0, 1)) > 0.999


def test_killed_in_the_middle_of_inserting(server: Server, truth: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    make = lambda: MilvusIndex("l2", server.uri, "killed", "IVF_FLAT", "nlist=64", batch_rows=10_000, retries=1)  # noqa: E731
    put, seen, kills = Collection.put, [], [threading.Timer(0.05, server.kill)]

    def watched(self: Collection, first: int, *content: Any) -> None:
        seen.append(first)
        if first == 40_000 and kills:
            kills.pop().start()  # while this request is on its way
        put(self, first, *content)

    monkeypatch.setattr(Collection, "put", watched)
    with pytest.raises(StorageError, match="cannot be reached or is not ready") as error:
        make().build(VECTORS)
    assert "\n" not in str(error.value)
    assert 40_000 <= max(seen) < 90_000
    server.kill()
    server.start()
    seen.clear()
    index = make().build(VECTORS)
    assert 90_000 in seen
    assert 0 not in seen
    assert np.array_equal(ids_of(index), np.arange(N))
    some = torch.arange(0, N, 997)
    assert torch.equal(index.search(VECTORS[some], 1).ids[:, 0], some)
    assert np.array_equal(index._here.fetch(some, "vector", D).astype(np.float32), VECTORS[some].numpy())
    assert recall(index.search(QUERIES, K).ids, truth) > 0.95


def test_what_the_server_refuses_is_one_sentence(server: Server) -> None:
    index = MilvusIndex("l2", server.uri, "killed_not").build(VECTORS[:2000])
    for mistake in (
        lambda: index._here._ask("query", filter="colour == 3", output_fields=["id"]),
        lambda: MilvusIndex("l2", server.uri, "wide").build(torch.zeros(3, 40_000)),
        lambda: MilvusIndex("l2", server.uri, "many", shards=1000).build(VECTORS[:10]),
    ):
        with pytest.raises(InputError, match=r"refused \w+: ") as error:
            mistake()
        assert "\n" not in str(error.value)


def test_more_neighbors_than_a_request_may_ask_for(server: Server) -> None:
    index = MilvusIndex("l2", server.uri, "deep").build(VECTORS[:40_000])
    found = index.search(QUERIES[:3], 20_000)
    want = ExactIndex().build(VECTORS[:40_000]).search(QUERIES[:3], 20_000)
    assert recall(found.ids, want.ids) == 1
    assert torch.equal(found.distances, want.distances)


@pytest.mark.parametrize(
    ("metric", "kind", "params", "least"),
    [
        ("ip", "FLAT", "", 0.999),
        ("cosine", "FLAT", "", 0.999),
        ("cosine", "IVF_SQ8", "nlist=16", 0.9),
        ("ip", "SCANN", "nlist=16", 0.9),
        ("l2", "HNSW", "M=8 efConstruction=50", 0.9),
        ("l2", "IVF_PQ", "nlist=4 m=4 nbits=6", 0.1),
    ],
)
def test_the_other_metrics_and_kinds(server: Server, metric: str, kind: str, params: str, least: float) -> None:
    some, payload = VECTORS[:3000], torch.rand(3000, 4, generator=torch.Generator().manual_seed(3))
    want = ExactIndex(metric).build(some).search(QUERIES, 10)
    index = MilvusIndex(metric, server.uri, f"{metric}_{kind}", kind, params, keep_vectors=False)
    found = index.build(some, LABELS[:3000], payload).search(QUERIES, 10)
    assert least < recall(found.ids, want.ids)
    index._payload = None
    assert torch.equal(index.payload(torch.tensor([7, 2999])), payload[[7, 2999]])
    same = MilvusIndex.open(server.uri, f"{metric}_{kind}", label_field="label", payload_field="payload")
    assert (same.metric.name, same.index_type, len(same)) == (metric, kind, 3000)
    assert recall(same.search(QUERIES, 10).ids, found.ids) > 0.95
    if kind == "FLAT":
        np.testing.assert_allclose(same.search(QUERIES, 10).distances, want.distances, atol=1e-4)


def test_a_server_that_was_ended_is_told(server: Server) -> None:
    """The last test of this file: the server is not there after it."""
    index = MilvusIndex("l2", server.uri, "ended", retries=1).build(VECTORS[:2000])
    server.stop()
    with pytest.raises(StorageError, match=f"Milvus at '{server.uri}' cannot be reached") as error:
        index.search(QUERIES, 3)
    assert "\n" not in str(error.value)
