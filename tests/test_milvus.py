"""The Milvus engine on Milvus Lite, against float64 brute force in NumPy. A real server: test_milvus_server."""

from __future__ import annotations

import copy
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mutate
import numpy as np
import pytest
import torch
from small import random_net
from torch import Tensor

from robustknn import ASK, KNN, PGD, FeatureExtractor, ReferenceSet, RetrievalClassifier, ThreatModel, registry, store
from robustknn.errors import InputError, IntegrityError, MissingExtraError, NotReadyError, RobustKNNError
from robustknn.neighbors import (
    MISSING,
    MilvusIndex,
    milvus_build,
    milvus_client,
    milvus_collection,
    milvus_index,
    milvus_kinds,
)
from robustknn.neighbors.milvus_collection import Collection
from robustknn.payload import TopSoftmax
from robustknn.store import StorageError

pymilvus = pytest.importorskip("pymilvus", reason="left out: needs the extra milvus")
lite_manager = pytest.importorskip("milvus_lite.server_manager", reason="left out: needs the extra milvus")

N, D, C = 2000, 16, 5
METRICS = ("l2", "cosine", "ip")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VECTORS, QUERIES, LABELS, PAYLOAD = draw(0, N, D), draw(1, 30, D), torch.arange(N) % C, draw(2, N, 3)


def brute(metric: str, vectors: Tensor = VECTORS, queries: Tensor = QUERIES) -> np.ndarray[Any, Any]:
    """All distances (B, n) in float64."""
    x, q = vectors.double().numpy(), queries.double().numpy()
    if metric == "l2":
        return np.sqrt(((q[:, None] - x[None]) ** 2).sum(2))
    product = q @ x.T
    if metric == "ip":
        return -product
    return 1 - product / (np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(x, axis=1))


def nearest(distances: np.ndarray[Any, Any], k: int) -> np.ndarray[Any, Any]:
    """The ids (B, k) of the least distances, equal ones by the smaller id."""
    return np.argsort(distances, axis=1, kind="stable")[:, :k]


def of_class(distances: np.ndarray[Any, Any], number: int, labels: Tensor = LABELS) -> np.ndarray[Any, Any]:
    return np.where(labels.numpy() == number, distances, np.inf)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Milvus Lite file for all tests, which ends with them."""
    path = str(tmp_path_factory.mktemp("milvus") / "lite.db")
    yield path
    lite_manager.server_manager_instance.release_server(path)


@pytest.fixture(scope="module")
def built(uri: str) -> dict[str, MilvusIndex]:
    """The references indexed by each metric, vectors at hand."""
    return {m: MilvusIndex(m, uri, f"shared_{m}").build(VECTORS, LABELS, PAYLOAD) for m in METRICS}


@pytest.fixture
def client(uri: str) -> Iterator[Any]:
    """pymilvus itself, as another program would use it."""
    made = pymilvus.MilvusClient(uri)
    yield made
    made.close()


def bare(index: MilvusIndex) -> MilvusIndex:
    """The same collection without vectors at hand."""
    made = MilvusIndex(index.metric.name, index._connection.uri, index._here.name, keep_vectors=False)
    return made.build(VECTORS, LABELS, PAYLOAD)


def one_sentence(error: BaseException) -> str:
    said = str(error)
    assert said.endswith((".", "?"))
    assert "\n" not in said
    assert ". " not in said
    assert len(said) < 400
    return said


# ----------------------------------------------------------------------------------------- searches


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_found_is_what_brute_force_finds(built: dict[str, MilvusIndex], metric: str) -> None:
    truth, index = brute(metric), built[metric]
    assert (index.exact, index.distributed, index.reconstructs, index.differentiable) == (False, True, True, False)
    for engine, error in ((index, 1e-6), (bare(index), 2e-5)):
        for k, queries in ((1, QUERIES[:1]), (20, QUERIES), (N, QUERIES[:3])):
            found, expected = engine.search(queries, k), nearest(truth[: len(queries)], k)
            assert np.array_equal(found.ids, expected) or k == N  # in float32 far ones may change places
            want = np.take_along_axis(truth[: len(queries)], found.ids.numpy(), 1)
            np.testing.assert_allclose(found.distances, want, rtol=error, atol=error)
            assert sorted(found.ids[0].tolist()) == sorted(expected[0].tolist())
            assert found.distances.dtype == torch.float32


@pytest.mark.parametrize("metric", METRICS)
def test_by_class_with_vectors_at_hand_and_without(built: dict[str, MilvusIndex], metric: str) -> None:
    truth = brute(metric)
    for engine in (built[metric], bare(built[metric])):
        near, classes = engine.search_both(QUERIES, 7, 4)
        assert np.array_equal(near.ids, nearest(truth, 7))
        assert classes.ids.shape == (30, C, 4)
        for number in range(C):
            expected = nearest(of_class(truth, number), 4)
            assert np.array_equal(classes.ids[:, number], expected)
            np.testing.assert_allclose(classes.distances[:, number], np.take_along_axis(truth, expected, 1), atol=2e-5)


def test_equal_distances_are_ordered_by_id(uri: str) -> None:
    some = VECTORS[:300].repeat(3, 1)[torch.randperm(900, generator=torch.Generator().manual_seed(0))]
    truth = brute("l2", some)
    for keep in (True, False):
        index = MilvusIndex("l2", uri, f"tied_{keep}", keep_vectors=keep).build(some)
        assert np.array_equal(index.search(QUERIES, 12).ids, nearest(truth, 12))


def test_a_class_with_few_references_has_missing_neighbors(uri: str) -> None:
    labels = torch.zeros(50, dtype=torch.int64)
    labels[[3, 30]] = 2  # and none of class 1
    index = MilvusIndex("l2", uri, "few", keep_vectors=False).build(VECTORS[:50], labels)
    classes = index.search_classes(QUERIES, 4)
    assert bool((classes.ids[:, 1] == MISSING).all())
    assert bool((classes.ids[:, 2, 2:] == MISSING).all())
    assert torch.equal(classes.ids == MISSING, classes.distances.isinf())
    assert sorted(classes.ids[0, 2, :2].tolist()) == [3, 30]
    assert index.search_classes(QUERIES[:2], 60).ids.shape == (2, 3, 60)


@pytest.mark.parametrize("metric", METRICS)
def test_beyond_the_limits_of_a_request(
    built: dict[str, MilvusIndex], metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (milvus_collection, milvus_index):
        monkeypatch.setattr(module, "MOST_NEIGHBORS", 300)
    monkeypatch.setattr(milvus_collection, "_MOST_QUERIES", 4)
    asked: list[tuple[int, int]] = []
    request = milvus_client.Connection.ask

    def watched(self: Any, name: str, *args: Any, **options: Any) -> Any:
        if name == "search":
            asked.append((len(options["data"]), options["limit"]))
        return request(self, name, *args, **options)

    monkeypatch.setattr(milvus_client.Connection, "ask", watched)
    truth = brute(metric)
    for engine in (built[metric], bare(built[metric])):
        found = engine.search(QUERIES[:6], 700)
        expected = nearest(truth[:6], 700)
        np.testing.assert_allclose(found.distances, np.take_along_axis(truth[:6], expected, 1), atol=2e-5)
        assert all(len(set(row.tolist()) ^ set(want)) <= 2 for row, want in zip(found.ids, expected, strict=True))
    assert {m for _, m in asked} == {300, 200}
    assert {b for b, _ in asked} == {4, 2}
    monkeypatch.setattr(milvus_collection, "REQUEST_BYTES", 16 * 300 * 3)
    asked.clear()
    built[metric].search(QUERIES[:6], 290)
    assert [b for b, _ in asked] == [3, 3]


def test_an_index_that_is_approximate_finds_what_it_finds(uri: str) -> None:
    truth = brute("l2")
    for kind, least in (("HNSW", 0.95), ("IVF_FLAT", 0.3), ("IVF_SQ8", 0.3), ("AUTOINDEX", 0.95)):
        index = MilvusIndex("l2", uri, f"kind_{kind}", kind).build(VECTORS)
        found = index.search(QUERIES, 20)
        recall = (found.ids.numpy()[:, :, None] == nearest(truth, 20)[:, None]).any(2).mean()
        assert recall >= least
        known = found.ids >= 0
        want = np.take_along_axis(truth, found.ids.clamp_min(0).numpy(), 1)[known]
        np.testing.assert_allclose(found.distances[known], want, rtol=1e-6)


# --------------------------------------------------------------------------------- what it gives back


def test_vectors_and_their_sums(built: dict[str, MilvusIndex]) -> None:
    ids = torch.tensor([[3, MISSING, 3], [N - 1, 0, 7]])
    want = VECTORS[ids.clamp_min(0)].masked_fill((ids < 0)[..., None], 0)
    weights = torch.tensor([[0.5, 9.0, 1.0], [2.0, -1.0, 0.25]])
    sums = (want * weights.masked_fill(ids < 0, 0)[..., None]).sum(1)
    for engine in (built["l2"], bare(built["l2"])):
        assert torch.equal(engine.reconstruct(ids), want)
        torch.testing.assert_close(engine.combine(ids, weights), sums)
        assert torch.equal(engine.payload(ids), PAYLOAD[ids.clamp_min(0)])
        with pytest.raises(InputError, match="id 2000 was asked of an index that holds 2000"):
            engine.reconstruct(torch.tensor([N]))
    lengths = want.norm(dim=2, keepdim=True)
    unit = torch.where(lengths > 0, want / lengths, 0)
    for engine in (built["cosine"], bare(built["cosine"])):
        torch.testing.assert_close(engine.reconstruct(ids), want)
        torch.testing.assert_close(engine.reconstruct_unit(ids), unit)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (3,)),
        (torch.float16, (2, 2)),
        (torch.bfloat16, (2,)),
        (torch.float64, (3,)),
        (torch.int64, (1,)),
        (torch.uint8, (4,)),
    ],
    ids=str,
)
def test_payload_and_labels_come_back_from_milvus(uri: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    payload = (draw(3, 40, *shape) * 50).abs().to(dtype)
    name = f"payload_{str(dtype)[6:]}"
    built = MilvusIndex("l2", uri, name).build(VECTORS[:40], LABELS[:40], payload)
    built._payload = built._labels = None  # as in another process
    ids = torch.tensor([[5, 5, 0], [39, MISSING, 2]])
    found = built.payload(ids)
    assert found.dtype == dtype
    assert torch.equal(found, payload[ids.clamp_min(0)])
    built._plain = type(built._plain)("l2")
    expected = [nearest(of_class(brute("l2", VECTORS[:40]), c, LABELS[:40]), 2) for c in range(C)]
    assert np.array_equal(built.search_classes(QUERIES, 2).ids, np.stack(expected, 1))


def test_without_labels_or_payload_it_says_so(uri: str) -> None:
    index = MilvusIndex("l2", uri, "nothing_beside", keep_vectors=False).build(VECTORS[:20])
    with pytest.raises(NotReadyError, match="no payload; build it with payload="):
        index.payload(torch.tensor([1]))
    with pytest.raises(NotReadyError, match="searching by class needs labels"):
        index.search_classes(QUERIES, 2)


# ------------------------------------------------------------------------------- stopped and gone on with


class Stop(BaseException):
    """The end of a process, as far as a test can play it."""


def stopping_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let inserting end after so many batches; returns where the first row of each batch is noted."""
    put, seen = Collection.put, []

    def watched(self: Collection, first: int, *content: Any) -> None:
        if len(seen) == batches:
            raise Stop
        seen.append(first)
        put(self, first, *content)

    monkeypatch.setattr(Collection, "put", watched)
    return seen


def test_a_build_that_was_stopped_goes_on(uri: str, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make = lambda: MilvusIndex("l2", uri, "resumed", batch_rows=300)  # noqa: E731
    with monkeypatch.context() as patch:
        stopping_after(2, patch)
        with pytest.raises(Stop):
            make().build(VECTORS, LABELS, PAYLOAD)
    assert client.query("resumed", output_fields=["count(*)"])[0]["count(*)"] == 600
    client.delete("resumed", filter="id >= 310 and id < 420")  # a request of which only a part arrived
    seen = stopping_after(100, monkeypatch)
    index = make().build(VECTORS, LABELS, PAYLOAD)
    assert seen == [300, 600, 900, 1200, 1500, 1800]  # the first batch is whole
    rows = client.query("resumed", filter="id >= 0", output_fields=["id", "vector", "label"])
    assert sorted(row["id"] for row in rows) == list(range(N))
    assert all(np.array_equal(np.float32(row["vector"]), VECTORS[row["id"]].numpy()) for row in rows)
    assert np.array_equal(index.search(QUERIES, 20).ids, nearest(brute("l2"), 20))
    seen.clear()
    make().build(VECTORS, LABELS, PAYLOAD)
    assert not seen


def test_stopped_before_anything_was_put(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in ("prepare", "settle"):
        make = lambda: MilvusIndex("l2", uri, f"early_{step}")  # noqa: B023, E731
        with monkeypatch.context() as patch:
            patch.setattr(Collection, step, lambda *_: (_ for _ in ()).throw(Stop))
            with pytest.raises(Stop):
                make().build(VECTORS[:100])
        assert np.array_equal(
            make().build(VECTORS[:100]).search(QUERIES, 9).ids, nearest(brute("l2", VECTORS[:100]), 9)
        )


def test_rows_are_added_and_an_add_that_was_stopped_leaves_nothing(
    uri: str, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    index = MilvusIndex("l2", uri, "grown", batch_rows=50).build(VECTORS[:200], LABELS[:200], PAYLOAD[:200])
    with monkeypatch.context() as patch:
        stopping_after(2, patch)
        with pytest.raises(Stop):
            index.add(VECTORS[500:800], LABELS[500:800], PAYLOAD[500:800])
    assert len(index) == 200
    index.add(VECTORS[200:260], LABELS[200:260], PAYLOAD[200:260])
    assert len(index) == 260
    assert client.query("grown", output_fields=["count(*)"])[0]["count(*)"] == 260
    truth = brute("l2", VECTORS[:260])
    assert np.array_equal(index.search(QUERIES, 20).ids, nearest(truth, 20))
    index.save(tmp_path / "grown")
    loaded = MilvusIndex.load(tmp_path / "grown")
    assert np.array_equal(loaded.search(QUERIES, 20).ids, nearest(truth, 20))
    loaded.add(VECTORS[260:270], LABELS[260:270], PAYLOAD[260:270])
    assert np.array_equal(loaded.search(QUERIES, 20).ids, nearest(brute("l2", VECTORS[:270]), 20))
    assert torch.equal(loaded.payload(torch.tensor([265])), PAYLOAD[265:266])
    for more, message in (
        ((VECTORS[:2, :8], LABELS[:2], PAYLOAD[:2]), "vectors of length 8 cannot join an index of length 16"),
        ((VECTORS[:2], None, PAYLOAD[:2]), "carry labels or none"),
        ((VECTORS[:2], LABELS[:2], None), "another shape or dtype"),
        ((VECTORS[:2], LABELS[:2], PAYLOAD[:2].double()), "another shape or dtype"),
    ):
        with pytest.raises(InputError, match=message):
            loaded.add(*more)
    with pytest.raises(IntegrityError, match="holds something else than when it was saved") as error:
        MilvusIndex.load(tmp_path / "grown")
    one_sentence(error.value)


def test_the_same_without_a_name_is_the_same_collection(uri: str, client: Any) -> None:
    names = []
    for vectors, kind in (
        (VECTORS[:60], "FLAT"),
        (VECTORS[:60], "FLAT"),
        (VECTORS[1:61], "FLAT"),
        (VECTORS[:60], "HNSW"),
    ):
        index = MilvusIndex("l2", uri, index_type=kind).build(vectors)
        names.append(index._here.name)
        assert np.array_equal(index.search(QUERIES, 5).ids, nearest(brute("l2", vectors), 5))
    assert names[0] == names[1]
    assert len(set(names)) == 3
    assert set(names) <= set(client.list_collections())


# ---------------------------------------------------------------------------------------- refusals


MISTAKES: dict[str, tuple[Callable[[str], Any], str]] = {
    "no uri": (lambda uri: MilvusIndex(), "must be the address of a Milvus server"),
    "a path without .db": (lambda uri: MilvusIndex("l2", "/tmp/milvus"), "a path that ends in '.db'"),
    "a number": (lambda uri: MilvusIndex("l2", 19530), "not 19530"),  # type: ignore[arg-type]
    "no folder": (
        lambda uri: MilvusIndex("l2", "/no/such/folder/x.db"),
        "folder '/no/such/folder' of uri= does not exist",
    ),
    "a password": (lambda uri: MilvusIndex("l2", "http://me:secret@host:1"), "holds no password; pass token="),
    "a name": (lambda uri: MilvusIndex("l2", uri, "a b"), "a name of letters, digits and '_', not 'a b'"),
    "an index type": (lambda uri: MilvusIndex("l2", uri, index_type="IVFFLAT"), "did you mean 'IVF_FLAT'"),
    "no index type": (lambda uri: MilvusIndex("l2", uri, index_type=3), "unknown Milvus index type"),  # type: ignore[arg-type]
    "Lite has none": (
        lambda uri: MilvusIndex("l2", uri, index_type="DISKANN"),
        "Milvus Lite has no index type 'DISKANN'",
    ),
    "nor this": (lambda uri: MilvusIndex("l2", uri, index_type="IVF_PQ"), "Milvus Lite has no index type 'IVF_PQ'"),
    "a setting": (
        lambda uri: MilvusIndex("l2", uri, index_type="HNSW", params={"nlist": 3}),
        "params of HNSW: 'nlist'",
    ),
    "a value": (
        lambda uri: MilvusIndex("l2", uri, index_type="HNSW", params="M=few"),
        "M among params of HNSW must be",
    ),
    "settings": (lambda uri: MilvusIndex("l2", uri, params=3), "are a mapping such as"),  # type: ignore[arg-type]
    "of a search": (lambda uri: MilvusIndex("l2", uri, search_params={"ef": 3}), "search_params of FLAT: 'ef'"),
    "metric": (lambda uri: MilvusIndex("l7", uri), "metric must be one of"),
    "timeout": (lambda uri: MilvusIndex("l2", uri, timeout=0), "timeout must be a number above 0"),
    "retries": (lambda uri: MilvusIndex("l2", uri, retries=-1), "retries must be a whole number of at least 0"),
    "shards": (lambda uri: MilvusIndex("l2", uri, shards=0), "shards must be"),
    "float64": (lambda uri: MilvusIndex("l2", uri).build(VECTORS.double()), "Milvus holds float32 .* index='exact'"),
    "NaN": (lambda uri: MilvusIndex("l2", uri).build(torch.full((3, 2), torch.nan)), "NaN or infinite"),
    "labels": (lambda uri: MilvusIndex("l2", uri).build(VECTORS, LABELS[:9]), "9 labels for 2000 references"),
    "payload": (
        lambda uri: MilvusIndex("l2", uri).build(VECTORS[:2], None, torch.zeros(2, 5000)),
        "1 to 4096 real numbers",
    ),
    "complex": (lambda uri: MilvusIndex("l2", uri).build(VECTORS, None, PAYLOAD.to(torch.complex64)), "of complex64"),
    "other vectors": (
        lambda uri: MilvusIndex("l2", uri, "shared_l2").build(VECTORS + 1, LABELS, PAYLOAD),
        "from other vectors",
    ),
    "other labels": (
        lambda uri: MilvusIndex("l2", uri, "shared_l2").build(VECTORS, 1 - LABELS % 2, PAYLOAD),
        "labels or payload",
    ),
    "fewer": (
        lambda uri: MilvusIndex("l2", uri, "shared_l2").build(VECTORS[:9]),
        "a number of references of 2000, not 9",
    ),
    "other length": (
        lambda uri: MilvusIndex("l2", uri, "shared_l2").build(VECTORS[:, :8]),
        "vectors of length 16, not 8",
    ),
    "other metric": (lambda uri: MilvusIndex("ip", uri, "shared_l2").build(VECTORS), "the metric l2, not ip"),
    "other type": (
        lambda uri: MilvusIndex("l2", uri, "shared_l2", "HNSW").build(VECTORS),
        "the index type FLAT, not HNSW",
    ),
    "not built": (lambda uri: MilvusIndex("l2", uri).search(QUERIES, 3), "the index is empty; call build"),
    "not built to save": (lambda uri: MilvusIndex("l2", uri).save(Path("never")), "the index is empty; call build"),
    "no collection": (lambda uri: MilvusIndex.open(uri, "nowhere"), "there is no collection 'nowhere'"),
    "pickle": (lambda uri: pickle.dumps(MilvusIndex("l2", uri)), "write it with save"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_one_sentence(built: dict[str, MilvusIndex], uri: str, what: str) -> None:
    mistake, message = MISTAKES[what]
    with pytest.raises((InputError, NotReadyError), match=message) as error:
        mistake(uri)
    one_sentence(error.value)


def test_every_kind_knows_its_settings() -> None:
    """Those of the docstring, and no setting that does not fit the vectors."""
    made = milvus_kinds.build_settings("IVF_PQ", {}, 10_000, 30)
    assert made == {"nlist": 400, "m": 6, "nbits": 8}
    assert milvus_kinds.build_settings("IVF_FLAT", {"nlist": 7}, 10**12, 3) == {"nlist": 7}
    assert milvus_kinds.build_settings("IVF_FLAT", {}, 10**12, 3) == {"nlist": 65536}
    with pytest.raises(InputError, match="m = 4 parts do not divide vectors of length 30 evenly"):
        milvus_kinds.build_settings("IVF_PQ", {"m": 4}, 100, 30)
    assert milvus_kinds.search_settings("HNSW", {}, 500) == {"ef": 500}
    assert milvus_kinds.search_settings("HNSW", {"ef": 700}, 500) == {"ef": 700}
    assert milvus_kinds.search_settings("SCANN", {}, 50) == {"nprobe": 32, "reorder_k": 200}
    assert milvus_kinds.search_settings("FLAT", {}, 50) == {}
    for kind in milvus_kinds.KINDS:
        assert set(milvus_kinds.search_settings(kind, {}, 9)) <= set(milvus_kinds.KINDS[kind].search)


def test_what_milvus_refuses_is_one_sentence(built: dict[str, MilvusIndex]) -> None:
    with pytest.raises(InputError, match="refused query: unknown field 'colour'") as error:
        built["l2"]._here._ask("query", filter="colour == 3", output_fields=["id"])
    one_sentence(error.value)


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_server_that_is_not_there_is_told_soon(monkeypatch: pytest.MonkeyPatch, capfd: Any, caplog: Any) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(milvus_client.time, "sleep", pauses.append)
    where = f"http://127.0.0.1:{closed_port()}"
    index = MilvusIndex("l2", where)
    with pytest.raises(StorageError, match=f"Milvus at '{where}' cannot be reached") as error:
        index.build(VECTORS)
    one_sentence(error.value)
    assert pauses == [0.5, 1.0, 2.0]
    pauses.clear()
    with pytest.raises(StorageError):
        MilvusIndex("l2", where, retries=0).build(VECTORS)
    assert not pauses
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_server_that_is_silent_is_not_waited_for() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        where = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(StorageError, match="cannot be reached") as error:
            MilvusIndex("l2", where, timeout=0.3, retries=0).build(VECTORS)
    one_sentence(error.value)


class Failing:
    """A client whose requests fail as told, then are answered."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.asked = list(errors), []

    def __getattr__(self, name: str) -> Any:
        def request(*args: Any, **options: Any) -> str:
            self.asked.append(name)
            if name == "query" and self.errors:
                raise self.errors.pop(0)
            return "answer"

        return request


def milvus_error(code: int) -> Exception:
    return pymilvus.MilvusException(code=code, message="told why")


@pytest.mark.parametrize(
    ("errors", "asked"),
    [
        ([], ["query"]),
        ([milvus_error(503)], ["query", "query"]),
        ([milvus_error(101)], ["query", "load_collection", "query"]),  # a restarted server has not loaded it
        (
            [milvus_error(2), milvus_error(101), milvus_error(904)],
            ["query", "query", "load_collection", "query", "query"],
        ),
    ],
)
def test_what_passes_is_tried_again(
    uri: str, errors: list[Exception], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus_client.time, "sleep", lambda _: None)
    client = Failing(*errors)
    monkeypatch.setattr(pymilvus, "MilvusClient", lambda *_, **__: client)
    connection = MilvusIndex("l2", uri)._connection
    assert connection.ask("query", "c") == "answer"
    assert [name for name in client.asked if name != "close"] == asked


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (milvus_error(1100), InputError, "refused query: told why"),
        (milvus_error(1), InputError, "refused query: told why"),
        (ValueError("odd"), InputError, "refused query: odd"),
        (milvus_error(503), StorageError, r"is not ready \(told why\)"),
    ],
)
def test_what_does_not_pass_is_told(
    uri: str, error: Exception, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus_client.time, "sleep", lambda _: None)
    client = Failing(*[error] * 4)
    monkeypatch.setattr(pymilvus, "MilvusClient", lambda *_, **__: client)
    with pytest.raises(kind, match=message) as told:
        MilvusIndex("l2", uri)._connection.ask("query", "c")
    one_sentence(told.value)
    assert client.asked.count("query") == (4 if kind is StorageError else 1)


def test_an_index_that_fails_or_is_never_ready(built: dict[str, MilvusIndex], monkeypatch: pytest.MonkeyPatch) -> None:
    held = built["l2"]._here
    monkeypatch.setattr(milvus_collection, "_LOOK_AGAIN", 0.0)
    monkeypatch.setattr(Collection, "index", lambda _: {"state": "Failed", "index_state_fail_reason": "no room"})
    with pytest.raises(InputError, match=r"could not build the index of collection 'shared_l2' \('no room'\)") as error:
        held.settle()
    one_sentence(error.value)
    monkeypatch.setattr(Collection, "index", lambda _: {"state": "InProgress"})
    monkeypatch.setattr(held, "patience", 0.2)
    with pytest.raises(StorageError, match="had not finished the index") as error:
        held.settle()
    one_sentence(error.value)
    states = [{"state": "Finished", "pending_index_rows": 5}, {"state": "Finished", "pending_index_rows": 0}]
    monkeypatch.setattr(Collection, "index", lambda _: states.pop(0))
    held.settle()
    assert not states


def test_rows_that_go_missing_are_noticed(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = Collection.count
    monkeypatch.setattr(Collection, "count", lambda self, *a, **k: count(self, *a, **k) - 1)
    with pytest.raises(StorageError, match="holds 19 rows after 20 were put into it; do the same again") as error:
        MilvusIndex("l2", uri, "short").build(VECTORS[:20])
    one_sentence(error.value)


def test_another_process_has_the_file(uri: str, built: dict[str, MilvusIndex]) -> None:
    code = (
        "import sys, torch\nfrom robustknn.neighbors import MilvusIndex\n"
        "try: MilvusIndex('l2', sys.argv[1]).build(torch.zeros(2, 2))\nexcept ValueError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True, check=True)
    assert told.stdout == (
        f"Milvus Lite cannot open {uri!r}: another process has it open, or it is none of its databases; close the "
        "other one or choose another path.\n"
    )
    assert told.stderr == ""


def test_missing_extras_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(milvus_client, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"milvus-lite is not installed; .*robustknn\[milvus\]"):
        MilvusIndex("l2", tmp_path / "x.db")
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(MissingExtraError, match=r"pymilvus is not installed; .*robustknn\[milvus\]"):
        registry.indexes.create("milvus", metric="l2", uri="http://localhost:19530")


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_saved_is_found_again(built: dict[str, MilvusIndex], metric: str, tmp_path: Path) -> None:
    built[metric].save(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["labels.npy", "manifest.json", "payload.npy"]
    loaded = MilvusIndex.load(tmp_path / "saved")
    assert (len(loaded), loaded.dim, loaded.metric.name, loaded.updatable) == (N, D, metric, True)
    assert np.array_equal(loaded.search(QUERIES, 10).ids, nearest(brute(metric), 10))
    assert torch.equal(loaded.payload(torch.tensor([4])), PAYLOAD[4:5])
    assert len(loaded._plain) == 0
    loaded.attach(lambda: (VECTORS, None) if metric != "cosine" else _unit(), LABELS, PAYLOAD)
    found = loaded.search(QUERIES, 10)
    np.testing.assert_allclose(found.distances, np.sort(brute(metric), 1)[:, :10], rtol=1e-6, atol=1e-6)


def _unit() -> tuple[Tensor, Tensor]:
    lengths = VECTORS.norm(dim=1)
    return VECTORS / lengths[:, None], lengths


def test_a_token_is_written_nowhere(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILVUS_TOKEN", "from-outside")
    assert MilvusIndex("l2", uri)._connection._token == "from-outside"
    index = MilvusIndex("l2", uri, "guarded", token="me:secret").build(VECTORS[:20])
    assert index._connection._token == "me:secret"
    index.save(tmp_path / "saved")
    assert all(b"secret" not in p.read_bytes() for p in (tmp_path / "saved").iterdir())
    assert copy.deepcopy(index)._connection._token == "me:secret"


def test_what_changed_since_is_refused(uri: str, client: Any, tmp_path: Path) -> None:
    def saved(name: str) -> Path:
        MilvusIndex("l2", uri, name).build(VECTORS[:50]).save(tmp_path / name)
        return tmp_path / name

    def refused(where: Path, message: str) -> None:
        with pytest.raises(IntegrityError, match=message) as error:
            MilvusIndex.load(where)
        one_sentence(error.value)

    fewer = saved("fewer")
    client.delete("fewer", filter="id in [7]")
    refused(fewer, "holds 49 rows where 50 were saved; build it again with the same vectors")
    MilvusIndex("l2", uri, "fewer").build(VECTORS[:50])
    assert MilvusIndex.load(fewer).search(VECTORS[7:8], 1).ids.item() == 7
    gone = saved("gone")
    client.drop_collection("gone")
    refused(gone, "collection 'gone' is not at .* any more")
    MilvusIndex("l2", uri, "gone").build(VECTORS[50:100])
    refused(gone, "holds something else than when it was saved")
    client.alter_collection_properties("gone", {"robustknn.record": "{}"})
    refused(gone, "record of collection 'gone' is not one that this version writes")
    whole = saved("whole")
    manifest = whole / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"whole", b"other"))
    refused(whole, "truncated or altered")


def test_damage_is_noticed(built: dict[str, MilvusIndex], tmp_path: Path) -> None:
    built["l2"].save(tmp_path / "saved")
    for _ in mutate.damaged(tmp_path / "saved", 60, seed=1):
        with pytest.raises(IntegrityError):
            MilvusIndex.load(tmp_path / "saved")
    MilvusIndex.load(tmp_path / "saved")
    meta = store.read_manifest(tmp_path / "saved", "milvus-index", 1).meta
    for number, change in enumerate(
        (
            {"uri": 3},
            {"record": 3},
            {"record": "3"},
            {"record": "{}"},
            {"fields": 3},
            {"fields": ["a"] * 9},
            {"settings": []},
            {"settings": {}},
            {"settings": {**meta["settings"], "timeout": "long"}},
            {"search_params": {"ef": 3}},
        )
    ):
        where = tmp_path / f"sealed{number}"
        with store.artifact(where, "milvus-index", 1, {**meta, **change}):
            pass
        with pytest.raises(IntegrityError):
            MilvusIndex.load(where)


def test_a_copy_has_a_connection_of_its_own(built: dict[str, MilvusIndex]) -> None:
    other = copy.deepcopy(built["ip"])
    assert other._connection is not built["ip"]._connection
    assert torch.equal(other.search(QUERIES, 5).ids, built["ip"].search(QUERIES, 5).ids)
    other._connection.close()
    assert torch.equal(other.search(QUERIES, 5).ids, built["ip"].search(QUERIES, 5).ids)
    assert len(copy.deepcopy(MilvusIndex("l2", built["ip"]._connection.uri))) == 0
    assert other.to("cpu") is other


def test_a_closed_file_is_opened_again(tmp_path: Path, capfd: Any, caplog: Any) -> None:
    index = MilvusIndex("l2", tmp_path / "own.db").build(VECTORS[:100])
    index.close()
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    code = "import sys; from pymilvus import MilvusClient; print(len(MilvusClient(sys.argv[1]).list_collections()))"
    command = [sys.executable, "-c", code, str(tmp_path / "own.db")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"
    assert np.array_equal(index.search(QUERIES, 5).ids, nearest(brute("l2", VECTORS[:100]), 5))
    index.close()


# ----------------------------------------------------------------------------- a collection of the user's


def users(client: Any, name: str, ids: Any, metric: str = "IP", index: bool = True, **fields: Any) -> None:
    """A collection as somebody else makes one."""
    kind = pymilvus.DataType
    schema = pymilvus.MilvusClient.create_schema(auto_id=False)
    schema.add_field("number", kind.INT64, is_primary=True)
    schema.add_field("embedding", kind.FLOAT_VECTOR, dim=D)
    schema.add_field("kind", kind.INT64)
    schema.add_field("title", kind.VARCHAR, max_length=20)
    schema.add_field("probabilities", kind.ARRAY, element_type=kind.FLOAT, max_capacity=8)
    client.create_collection(name, schema=schema)
    if index:
        params = client.prepare_index_params()
        params.add_index("embedding", index_type="FLAT", metric_type=metric)
        client.create_index(name, params)
    rows = [
        {
            "number": int(i),
            "embedding": VECTORS[place].tolist(),
            "kind": int(LABELS[place]),
            "title": "t",
            "probabilities": PAYLOAD[place].tolist(),
        }
        for place, i in enumerate(ids)
    ]
    if rows:
        client.insert(name, rows)


NAMES = {"id_field": "number", "vector_field": "embedding"}


def test_a_users_collection_is_searched_as_it_is(uri: str, client: Any, tmp_path: Path) -> None:
    users(client, "theirs", range(300))
    index = MilvusIndex.open(uri, "theirs", **NAMES, label_field="kind", payload_field="probabilities")
    assert (index.metric.name, index.index_type, len(index), index.dim, index.updatable) == (
        "ip",
        "FLAT",
        300,
        D,
        False,
    )
    truth = brute("ip", VECTORS[:300])
    assert np.array_equal(index.search(QUERIES, 9).ids, nearest(truth, 9))
    expected = [nearest(of_class(truth, c, LABELS[:300]), 2) for c in range(C)]
    assert np.array_equal(index.search_classes(QUERIES, 2).ids, np.stack(expected, 1))
    assert torch.equal(index.payload(torch.tensor([5, 7])), PAYLOAD[[5, 7]])
    assert torch.equal(index.reconstruct(torch.tensor([5, 7])), VECTORS[[5, 7]])
    with pytest.raises(InputError, match="an opened collection is not changed from here"):
        index.add(VECTORS[:3])
    index.save(tmp_path / "theirs")
    loaded = MilvusIndex.load(tmp_path / "theirs")
    assert np.array_equal(loaded.search(QUERIES, 9).ids, nearest(truth, 9))
    with pytest.raises(InputError, match="an opened collection is not changed"):
        loaded.add(VECTORS[:3])
    given = MilvusIndex.open(uri, "theirs", **NAMES, labels=LABELS[:300], vectors=VECTORS[:300])
    np.testing.assert_allclose(given.search(QUERIES, 9).distances, np.sort(truth, 1)[:, :9], rtol=1e-6)
    with pytest.raises(InputError, match=r"vectors have shape \(200, 16\) where the collection holds 300"):
        MilvusIndex.open(uri, "theirs", **NAMES, vectors=VECTORS[:200])
    with pytest.raises(InputError, match="was not built by this library") as error:
        MilvusIndex("ip", uri, "theirs").build(VECTORS[:300])
    one_sentence(error.value)
    client.upsert("theirs", [{"number": 0, "embedding": [0.0] * D, "kind": 0, "title": "", "probabilities": [1.0]}])
    with pytest.raises(IntegrityError, match="holds something else than when it was saved"):
        MilvusIndex.load(tmp_path / "theirs")
    client.upsert("theirs", [{"number": 300, "embedding": [9.0] * D, "kind": 0, "title": "", "probabilities": [1.0]}])
    with pytest.raises(InputError, match="gave the row 300 where it held 300; something else adds to it") as added:
        index.search(torch.full((1, D), 9.0), 1)
    one_sentence(added.value)


def test_a_users_collection_that_cannot_be_searched(uri: str, client: Any) -> None:
    users(client, "from_one", range(1, 51))
    users(client, "with_a_gap", [*range(20), *range(21, 50), 20_000])
    users(client, "void", [])
    users(client, "unindexed", range(20), index=False)
    users(client, "right", range(20))
    for name, names, message in (
        ("from_one", NAMES, r"are not the numbers 0\.\.49, once each"),
        ("with_a_gap", NAMES, r"are not the numbers 0\.\.49, once each"),
        ("void", NAMES, "holds no row"),
        ("unindexed", NAMES, "has no index over 'embedding'"),
        ("right", {}, "unknown field of collection 'right': 'id'"),
        ("right", {**NAMES, "id_field": "kind"}, "field 'kind' of collection 'right' cannot be the primary key"),
        ("right", {**NAMES, "vector_field": "title"}, "need a field of type FLOAT_VECTOR"),
        ("right", {**NAMES, "label_field": "title"}, "cannot be the labels"),
        ("right", {**NAMES, "payload_field": "title"}, "is no ARRAY of numbers"),
        ("right", {**NAMES, "label_field": "sort"}, "unknown field of collection 'right': 'sort'"),
        ("right", {**NAMES, "labels": LABELS}, "2000 labels for 20 references"),
        ("right", {**NAMES, "search_params": {"ef": 9}}, "search_params of FLAT: 'ef'"),
    ):
        with pytest.raises((InputError, NotReadyError), match=message) as error:
            MilvusIndex.open(uri, name, **names)
        one_sentence(error.value)


def test_rows_between_those_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many rows some are looked at, from the first to the last."""
    looked: list[tuple[int, int]] = []

    class Held:
        name = "many"

        def count(self, *_: int) -> int:
            return 10_000_000

        def ids(self, first: int, last: int) -> range:
            looked.append((first, last))
            return range(first, last)

    milvus_build._check_rows(Held(), 10_000_000)  # type: ignore[arg-type]
    assert len(looked) == 64
    assert looked[0] == (0, 1024)
    assert all(last - first == 1024 for first, last in looked)


# --------------------------------------------------------------------------------- under a classifier

X, Y = torch.rand(360, 6, generator=torch.Generator().manual_seed(5)), torch.arange(360) % 4
THREAT = ThreatModel("linf", 0.1)


@pytest.fixture(scope="module")
def references() -> ReferenceSet:
    extractor = FeatureExtractor(random_net(dtype=torch.float32), ["3"])
    return ReferenceSet.build(extractor, (X[:300], Y[:300]), payload="softmax")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("keep", [True, False])
def test_classifiers_decide_as_on_the_exact_engine(uri: str, references: ReferenceSet, metric: str, keep: bool) -> None:
    def own() -> MilvusIndex:
        vectors = references.rows("3", torch.arange(300))
        made = MilvusIndex(metric, uri, f"classifier_{metric}", keep_vectors=keep)
        return made.build(vectors, references.labels, references.stored_payload)  # type: ignore[arg-type]

    for make in (KNN, RetrievalClassifier):
        ours, exact = make(references, 9, metric=metric, index=own()), make(references, 9, metric=metric)
        assert torch.equal(ours.predict(X[300:]), exact.predict(X[300:]))
        torch.testing.assert_close(ours.predict_proba(X[300:]), exact.predict_proba(X[300:]))


def test_attacks_want_to_be_asked_and_find_the_same(uri: str, references: ReferenceSet) -> None:
    own = MilvusIndex("l2", uri, "attacked").build(references.rows("3", torch.arange(300)))
    ours, exact = KNN(references, 9, index=own), KNN(references, 9)
    with pytest.raises(InputError, match="approximate"):
        PGD(steps=5)(ours, X[300:], Y[300:], THREAT)
    attack = PGD(ASK(allow_approximate=True), steps=5)
    results = [attack(c, X[300:320], exact.predict(X[300:320]), THREAT) for c in (ours, exact)]
    assert torch.equal(results[0].success, results[1].success)
    assert torch.equal(results[0].x_adv, results[1].x_adv)
    assert bool(results[0].success.any())


def test_a_short_payload_stays_with_the_references(uri: str) -> None:
    extractor = FeatureExtractor(random_net(dtype=torch.float32), ["3"])
    references = ReferenceSet.build(extractor, (X[:300], Y[:300]), payload=TopSoftmax(2))
    index = MilvusIndex("l2", uri).build(references.rows("3", torch.arange(300)))
    ours, exact = RetrievalClassifier(references, 9, index=index), RetrievalClassifier(references, 9)
    assert torch.equal(ours.predict_proba(X[300:]), exact.predict_proba(X[300:]))


def test_it_is_registered() -> None:
    assert registry.indexes.entry("milvus").build is MilvusIndex
    with pytest.raises(RobustKNNError, match="must be the address of a Milvus server"):
        registry.indexes.create("milvus", metric="l2")
