"""What is faiss's own: wrapped indexes, their honesty, process-wide settings, files. The rest: test_neighbors."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutate
import numpy as np
import pytest
import torch
from torch import Tensor

from robustknn import DkNN, ReferenceSet, registry
from robustknn.errors import InputError, IntegrityError, MissingExtraError, NotReadyError
from robustknn.neighbors import MISSING, ExactIndex, FaissIndex, Neighbors

faiss = pytest.importorskip("faiss")

N, D = 2000, 16
METRICS = ("l2", "cosine", "ip")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


VECTORS, QUERIES, LABELS, PAYLOAD = draw(0, N, D), draw(1, 30, D), torch.arange(N) % 5, draw(2, N, 3)
UNIT = unit(VECTORS)


def filled(description: str, vectors: Tensor = VECTORS, metric: int = faiss.METRIC_L2) -> Any:
    """A faiss index made by its own factory, as a user makes one."""
    index = faiss.index_factory(vectors.shape[1], description, metric)
    index.train(vectors.numpy())
    if description.startswith("IDMap"):
        index.add_with_ids(vectors.numpy(), np.arange(len(vectors)))
    else:
        index.add(vectors.numpy())
    return index


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.ids, other.ids) and torch.equal(one.distances, other.distances)


def true_distances(metric: str, ids: Tensor, queries: Tensor = QUERIES, vectors: Tensor = VECTORS) -> Tensor:
    """Distances of references to their queries in float64, ∞ for a missing one."""
    rows, q = vectors.double()[ids.clamp_min(0)], queries.double()[:, None]
    if metric == "l2":
        distances = (rows - q).norm(dim=2)
    elif metric == "ip":
        distances = -(rows * q).sum(2)
    else:
        distances = 1 - torch.cosine_similarity(rows, q.expand_as(rows), dim=2)
    return distances.masked_fill(ids < 0, float("inf"))


def assert_in_order(found: Neighbors) -> None:
    """Ascending, equal distances by id, missing ones last."""
    distances, ids = found.distances, found.ids
    assert bool((distances[:, :-1] <= distances[:, 1:]).all())
    tied = (distances[:, :-1] == distances[:, 1:]) & (ids[:, :-1] >= 0)
    assert bool((ids[:, :-1] < ids[:, 1:])[tied].all())
    assert torch.equal(ids == MISSING, distances.isinf())


# ----------------------------------------------------------------------------------- flat, and the same


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", [1, 5, 6, 100])
def test_the_two_engines_give_the_same_bits(metric: str, size: int) -> None:
    vectors = torch.cat([VECTORS, VECTORS[:50], torch.zeros(3, D)])
    labels = torch.arange(len(vectors)) % 7
    queries = torch.cat([QUERIES, VECTORS[:70]])[:size]
    mine, theirs = (kind(metric).build(vectors, labels) for kind in (ExactIndex, FaissIndex))
    assert same(mine.search(queries, 40), theirs.search(queries, 40))
    for one, other in zip(mine.search_both(queries, 40, 6), theirs.search_both(queries, 40, 6), strict=True):
        assert same(one, other)


def test_a_classifier_on_faiss_decides_as_on_the_exact_engine() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    from robustknn import FeatureExtractor

    references = ReferenceSet.build(FeatureExtractor(net, ["1", "2"]), (draw(3, 300, 6), torch.arange(300) % 3))
    ours, theirs = (DkNN(references, 9, index=index) for index in ("exact", "faiss"))
    assert torch.equal(torch.as_tensor(ours.predict_proba(draw(4, 50, 6))), theirs.predict_proba(draw(4, 50, 6)))


@pytest.mark.parametrize(
    ("make", "metric", "vectors"),
    [
        (lambda: faiss.IndexFlatL2(D), "l2", VECTORS),
        (lambda: faiss.IndexFlatIP(D), "ip", VECTORS),
        (lambda: faiss.IndexFlat(D), "l2", VECTORS),
        (lambda: faiss.IndexFlat(D, faiss.METRIC_INNER_PRODUCT), "ip", VECTORS),
        (lambda: faiss.IndexFlatIP(D), "cosine", UNIT),
    ],
)
def test_a_flat_index_is_wrapped_exactly_and_in_place(make: Callable[[], Any], metric: str, vectors: Tensor) -> None:
    index = make()
    index.add(vectors.numpy())
    before = index.reconstruct_n(0, N).copy()
    wrapped = FaissIndex.wrap(index, metric, LABELS, PAYLOAD)
    assert (wrapped.exact, wrapped.reconstructs, wrapped.differentiable, wrapped.updatable) == (True, True, True, False)
    want = ExactIndex(metric).adopt(vectors, torch.ones(N), LABELS, PAYLOAD)
    for one, other in zip(wrapped.search_both(QUERIES, 30, 4), want.search_both(QUERIES, 30, 4), strict=True):
        assert same(one, other)
    assert same(wrapped.search(QUERIES, 30), want.search(QUERIES, 30))
    ids = torch.tensor([[3, MISSING], [N - 1, 0]])
    assert torch.equal(wrapped.reconstruct(ids), want.reconstruct(ids))
    assert torch.equal(wrapped.payload(ids), PAYLOAD[ids.clamp_min(0)])
    assert wrapped._plain.vectors.data_ptr() == int(index.get_xb())
    assert np.array_equal(index.reconstruct_n(0, N), before)
    del index, want
    gc.collect()
    assert len(wrapped.search(QUERIES, 30).ids) == 30


def test_a_metric_is_known_from_the_index() -> None:
    assert FaissIndex.wrap(filled("Flat")).metric.name == "l2"
    assert FaissIndex.wrap(filled("Flat", metric=faiss.METRIC_INNER_PRODUCT)).metric.name == "ip"
    assert FaissIndex.wrap(filled("IVF8,Flat", UNIT, faiss.METRIC_INNER_PRODUCT), "cosine").metric.name == "cosine"


def test_vectors_are_held_once() -> None:
    index = FaissIndex("cosine").build(VECTORS, LABELS)
    assert index._plain.vectors.data_ptr() == int(index._index.get_xb())
    np.testing.assert_allclose(index._plain.vectors, UNIT, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(index.reconstruct(torch.arange(N)), VECTORS, rtol=1e-6)
    kept = VECTORS.clone()
    FaissIndex("cosine").build(kept)
    assert torch.equal(kept, VECTORS)


# -------------------------------------------------------------------------------------- other kinds

KINDS = {
    "IVF16,Flat": 0.25,  # it looks at one list of 16
    "HNSW16": 0.8,
    "PQ4x4": 0.1,
    "SQ8": 0.9,
    "IVF16,PQ4x4": 0.1,
    "PCA8,Flat": 0.2,
    "IDMap,Flat": 1.0,
    "PQ4x4fs,RFlat": 0.2,
}


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_not_called_exact(kind: str, metric: str) -> None:
    index = filled(kind, metric={"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT}[metric])
    exact = ExactIndex(metric).build(VECTORS).search(QUERIES, 20)
    for vectors in (None, VECTORS):
        wrapped = FaissIndex.wrap(index, labels=LABELS, payload=PAYLOAD, vectors=vectors)
        assert (wrapped.exact, wrapped.updatable, wrapped.differentiable) == (False, False, False)
        assert wrapped.reconstructs == (kind == "HNSW16" or vectors is not None)
        found = wrapped.search(QUERIES, 20)
        assert_in_order(found)
        recall = (found.ids[:, :, None] == exact.ids[:, None, :]).any(2).double().mean()
        assert recall >= KINDS[kind]
        if vectors is not None:  # then distances are the true ones, not those of codes
            np.testing.assert_allclose(found.distances, true_distances(metric, found.ids), rtol=1e-6)
            assert torch.equal(
                wrapped.reconstruct(found.ids),
                VECTORS[found.ids.clamp_min(0)].masked_fill((found.ids < 0)[..., None], 0),
            )
            near, by_class = wrapped.search_both(QUERIES, 20, 3)
            assert same(near, found)
            assert same(by_class, ExactIndex(metric).build(VECTORS, LABELS).search_classes(QUERIES, 3))
        else:
            with pytest.raises(NotReadyError, match="wrap the faiss index with vectors="):
                wrapped.search_classes(QUERIES, 3)


def test_cosine_through_a_quantizer() -> None:
    index = filled("IVF16,SQ8", UNIT, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = 16
    with_vectors = FaissIndex.wrap(index, "cosine", vectors=VECTORS).search(QUERIES, 10)
    np.testing.assert_allclose(with_vectors.distances, true_distances("cosine", with_vectors.ids), atol=1e-6)
    without = FaissIndex.wrap(index, "cosine").search(QUERIES, 10)
    np.testing.assert_allclose(without.distances, true_distances("cosine", without.ids), atol=0.02)
    assert_in_order(without)
    assert (with_vectors.ids == ExactIndex("cosine").build(VECTORS).search(QUERIES, 10).ids).double().mean() > 0.9


def test_missing_neighbors_are_told() -> None:
    index = filled("IVF64,Flat")
    index.nprobe = 1
    for vectors in (None, VECTORS):
        found = FaissIndex.wrap(index, vectors=vectors).search(QUERIES, 200)
        assert bool((found.ids == MISSING).any(1).all())
        assert_in_order(found)
        np.testing.assert_allclose(found.distances, true_distances("l2", found.ids), rtol=1e-5)


@pytest.mark.parametrize("kind", ["IVF16,Flat", "IVF16,PQ4x4", "SQ8"])
def test_reconstruction_where_faiss_offers_it(kind: str) -> None:
    index = filled(kind)
    ids = torch.tensor([[0, MISSING], [7, N - 1]])
    if kind.startswith("IVF"):
        with pytest.raises(NotReadyError, match="make_direct_map"):
            FaissIndex.wrap(index).reconstruct(ids)
        index.make_direct_map()
    wrapped = FaissIndex.wrap(index)
    assert wrapped.reconstructs == (kind == "IVF16,Flat")
    rows = wrapped.reconstruct(ids)
    assert float(rows[0, 1].abs().max()) == 0
    want = np.stack([index.reconstruct(int(i)) for i in (0, 7, N - 1)])
    assert np.array_equal(rows.view(4, D)[[0, 2, 3]], want)
    assert np.array_equal(want, VECTORS[[0, 7, N - 1]]) == wrapped.reconstructs
    with pytest.raises(InputError, match="id 2000 was asked of an index that holds 2000"):
        wrapped.reconstruct(torch.tensor([N]))


def test_an_index_that_changes_under_us_is_refused() -> None:
    index = filled("Flat")
    wrapped = FaissIndex.wrap(index, labels=LABELS, payload=PAYLOAD)
    index.add(VECTORS.numpy())
    for call in (
        lambda: wrapped.search(QUERIES, 3),
        lambda: wrapped.search_both(QUERIES, 3, 1),
        lambda: wrapped.reconstruct(torch.zeros(1, dtype=torch.int64)),
        lambda: wrapped.save(Path("never")),
        lambda: copy.deepcopy(wrapped),
    ):
        with pytest.raises(InputError, match=r"held 2000 vectors when it was wrapped .* wrap it again"):
            call()
    moved = filled("Flat")
    wrapped = FaissIndex.wrap(moved)
    moved.reset()
    moved.add(draw(9, 4 * N, D).numpy())
    moved.remove_ids(np.arange(3 * N))
    assert moved.ntotal == N
    with pytest.raises(InputError, match="wrap it again"):
        wrapped.search(QUERIES, 3)


def test_ids_that_are_no_rows_are_refused() -> None:
    index = faiss.index_factory(D, "IDMap,Flat")
    index.add_with_ids(VECTORS.numpy(), np.arange(N) + 500)
    with pytest.raises(InputError, match=r"gave the id \d+ where it holds 2000 vectors"):
        FaissIndex.wrap(index).search(QUERIES, 50)


def odd_metric() -> Any:
    index = faiss.IndexFlat(D, faiss.METRIC_L1)
    index.add(VECTORS.numpy())
    return index


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "no faiss index": (lambda: FaissIndex.wrap(VECTORS), "takes a faiss.Index, not Tensor"),
    "binary": (lambda: FaissIndex.wrap(faiss.IndexBinaryFlat(16)), "takes a faiss.Index, not IndexBinaryFlat"),
    "empty": (lambda: FaissIndex.wrap(faiss.IndexFlatL2(4)), "empty or untrained"),
    "untrained": (lambda: FaissIndex.wrap(faiss.index_factory(D, "IVF8,Flat")), "empty or untrained"),
    "L1": (lambda: FaissIndex.wrap(odd_metric()), "neither by L2 nor by inner product"),
    "another metric": (lambda: FaissIndex.wrap(filled("Flat"), "ip"), "by metric 'ip'; pass metric='l2'"),
    "cosine by L2": (lambda: FaissIndex.wrap(filled("Flat"), "cosine"), "pass metric='l2'"),
    "unknown metric": (lambda: FaissIndex.wrap(filled("Flat"), "l7"), "by metric 'l7'"),
    "cosine of raw vectors": (
        lambda: FaissIndex.wrap(filled("Flat", metric=faiss.METRIC_INNER_PRODUCT), "cosine"),
        "references of unit length and these are not",
    ),
    "vectors twice": (lambda: FaissIndex.wrap(filled("Flat"), vectors=VECTORS), "leave vectors= out"),
    "other vectors": (lambda: FaissIndex.wrap(filled("SQ8"), vectors=VECTORS[:9]), r"shape \(9, 16\) where"),
    "few labels": (lambda: FaissIndex.wrap(filled("SQ8"), labels=LABELS[:9]), "9 labels for 2000 references"),
    "few rows": (lambda: FaissIndex.wrap(filled("Flat"), payload=PAYLOAD[:9]), "9 payload rows for 2000"),
    "odd labels": (lambda: FaissIndex.wrap(filled("SQ8"), labels=LABELS - 1), "holds the label -1"),
    "added to": (lambda: FaissIndex.wrap(filled("SQ8")).add(VECTORS), "wrapped faiss index is not changed"),
    "float64": (lambda: FaissIndex().build(VECTORS.double()), "faiss holds float32 .* pass vectors.float()"),
    "NaN": (lambda: FaissIndex.wrap(filled("Flat", torch.full((3, D), torch.nan))), "NaN or infinite"),
    "a GPU": (lambda: FaissIndex().to("cuda"), "searches on the CPU; use index='exact'"),
    "pickle": (lambda: copy.copy(FaissIndex()), "write it with save"),
    "no file": (lambda: FaissIndex().save(Path("never")), "the index is empty; call build"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_told_in_one_sentence(what: str) -> None:
    mistake, message = MISTAKES[what]
    with pytest.raises((InputError, NotReadyError), match=message) as error:
        mistake()
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_what_faiss_refuses_is_told_in_one_sentence() -> None:
    index = filled("IVF16,Flat")
    wrapped = FaissIndex.wrap(index)
    index.nprobe = 0
    with pytest.raises(InputError, match=r"^faiss refused to search: .*\.$") as error:
        wrapped.search(QUERIES, 3)
    assert "/project" not in str(error.value)


# ------------------------------------------------------------------------------ process-wide settings


class Watched:
    """A flat index that notes faiss's settings while it searches, and may fail."""

    def __init__(self, index: Any) -> None:
        self._index, self.seen, self.fails = index, [], None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def search(self, *args: Any) -> Any:
        self.seen.append((faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold))
        if self.fails is not None:
            raise self.fails
        return self._index.search(*args)


@pytest.mark.parametrize(
    ("threshold", "queries", "inside"), [(128_000, 30, 1), (128_000, 5, 128_000), (20, 30, 20), (1000, 30, 1000)]
)
@pytest.mark.parametrize("fails", [None, RuntimeError("at a.cpp:1: no"), KeyboardInterrupt()])
def test_settings_are_put_back(
    threshold: int, queries: int, inside: int, fails: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = faiss.omp_get_max_threads()
    monkeypatch.setattr(faiss.cvar, "distance_compute_blas_threshold", threshold)
    faiss.omp_set_num_threads(3)
    try:
        index = FaissIndex().build(VECTORS)
        index._index = Watched(index._index)
        index._index.fails = fails
        if fails is None:
            index.search(QUERIES[:queries], 3)
        else:
            with pytest.raises(InputError if isinstance(fails, RuntimeError) else type(fails)):
                index.search(QUERIES[:queries], 3)
        assert index._index.seen == [(torch.get_num_threads(), inside)]
        assert (faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold) == (3, threshold)
    finally:
        faiss.omp_set_num_threads(threads)


@pytest.mark.parametrize("broken", [ImportError("no"), RuntimeError("no library"), OSError("no library")])
def test_without_faiss(broken: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        def find_spec(self, name: str, *rest: Any) -> None:
            if name == "faiss":
                raise broken

    monkeypatch.delitem(sys.modules, "faiss")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    for make in (FaissIndex, lambda: FaissIndex.wrap(None), lambda: registry.indexes.create("faiss", metric="l2")):
        with pytest.raises(MissingExtraError, match=r"faiss-cpu is not installed; .*pip install 'robustknn\[faiss\]'"):
            make()
    assert "faiss" in registry.indexes


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("kind", "vectors"), [("IVF16,Flat", None), ("IVF16,PQ4x4", VECTORS), ("HNSW16", VECTORS)])
def test_other_kinds_saved_and_loaded(kind: str, vectors: Tensor | None, tmp_path: Path) -> None:
    index = FaissIndex.wrap(filled(kind), labels=LABELS, payload=PAYLOAD, vectors=vectors, memory_mb=33)
    index.save(tmp_path / "index")
    assert (tmp_path / "index" / "index.faiss").is_file()
    loaded = FaissIndex.load(tmp_path / "index")
    assert same(loaded.search(QUERIES, 20), index.search(QUERIES, 20))
    for name in ("exact", "updatable", "reconstructs", "dim", "metric"):
        assert getattr(loaded, name) == getattr(index, name)
    assert torch.equal(loaded.payload(torch.arange(N)), PAYLOAD)
    twin = copy.deepcopy(index)
    assert same(twin.search(QUERIES, 20), index.search(QUERIES, 20))
    if vectors is not None:
        ids = torch.arange(N)
        assert torch.equal(loaded.reconstruct(ids), vectors)
        assert torch.equal(twin.reconstruct(ids), vectors)
        assert same(loaded.search_classes(QUERIES, 3), index.search_classes(QUERIES, 3))


def test_faiss_never_sees_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FaissIndex.wrap(filled("IVF4,PQ2x4", VECTORS[:60]), vectors=VECTORS[:60]).save(tmp_path / "index")
    read: list[str] = []
    plain = faiss.read_index
    monkeypatch.setattr(faiss, "read_index", lambda path, flags: (read.append((path, flags)), plain(path, flags))[1])
    for _ in mutate.damaged(tmp_path / "index", 10_000, seed=3):
        with pytest.raises(IntegrityError):
            FaissIndex.load(tmp_path / "index")
    assert not read
    FaissIndex.load(tmp_path / "index")
    assert read == [(str(tmp_path / "index" / "index.faiss"), 0)]  # never mapped: that flag crashes some kinds


@pytest.mark.parametrize("content", [b"", b"IxF2", b"IxFI" + b"\xff" * 60, b"nothing of faiss"])
def test_a_sealed_file_that_faiss_cannot_read(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = FaissIndex.wrap(filled("SQ8"))
    monkeypatch.setattr(faiss, "write_index", lambda _, path: Path(path).write_bytes(content))
    index.save(tmp_path / "index")
    with pytest.raises(IntegrityError, match="holds no faiss-index"):
        FaissIndex.load(tmp_path / "index")


def test_another_index_than_the_vectors_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, other = faiss.write_index, filled("SQ8", VECTORS[:99])
    monkeypatch.setattr(faiss, "write_index", lambda _, path: plain(other, path))
    FaissIndex.wrap(filled("SQ8"), vectors=VECTORS).save(tmp_path / "index")
    with pytest.raises(IntegrityError, match="hold"):
        FaissIndex.load(tmp_path / "index")


def test_what_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = filled("IVF4,Flat")
    lists = faiss.OnDiskInvertedLists(4, index.code_size, str(tmp_path / "lists"))
    lists.merge_from(faiss.downcast_InvertedLists(index.invlists), 0)
    index.replace_invlists(lists)
    with pytest.raises(InputError, match="lie in a file of their own"):
        FaissIndex.wrap(index).save(tmp_path / "index")

    def refuses(*args: Any) -> None:
        raise RuntimeError("Error in f at /project/io.cpp:7: don't know how to serialize this type of index")

    monkeypatch.setattr(faiss, "write_index", refuses)
    with pytest.raises(InputError, match=r"^faiss cannot write this index: don't know how .*index\.$"):
        FaissIndex.wrap(filled("SQ8")).save(tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["lists"]
