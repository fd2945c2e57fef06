"""Exact search by both engines, against a float64 brute-force search written here."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mutate
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustknn import registry, store
from robustknn.errors import InputError, IntegrityError, NotReadyError
from robustknn.neighbors import MISSING, ClassNeighbors, ExactIndex, FaissIndex, NeighborIndex, Neighbors
from robustknn.neighbors import exact as exact_module
from robustknn.neighbors import product as product_module
from robustknn.neighbors import refine as refine_module
from robustknn.neighbors import selection as selection_module
from robustknn.neighbors import sketch as sketch_module

Array = np.ndarray[Any, Any]
Engine = Callable[..., ExactIndex | FaissIndex]
METRICS = ("l2", "cosine", "ip")


@pytest.fixture(params=["exact", "sketched", "faiss"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    if request.param == "faiss":
        pytest.importorskip("faiss")
        return FaissIndex
    if request.param == "sketched":
        sketch_everything(monkeypatch)
    return ExactIndex


def sketch_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches by four coordinates from the first query on, also where that gains nothing."""
    for module, name, value in [
        (sketch_module, "RANK", 4),
        (sketch_module, "_SHORTER", 1),
        (sketch_module, "LEAST_GAIN", 0),
        (exact_module, "LEAST_GAIN", 0),
        (exact_module, "LEAST_DIM", 1),
        (exact_module, "LEAST_ROWS", 1),
        (exact_module, "RANK", -1),
    ]:
        monkeypatch.setattr(module, name, value)


@pytest.fixture(params=["exact", "faiss", "ivf-flat", "ivf-sq8", "ivf-pq", "hnsw"])
def any_engine(request: pytest.FixtureRequest) -> Engine:
    """Engines for what does not depend on how exactly they find."""
    if request.param != "exact":
        pytest.importorskip("faiss")
    return registry.indexes.entry(request.param).build


# -------------------------------------------------------------------------------------------- the truth


def at_unit_length(x: Array) -> Array:
    """Rows at unit length, rounded to their type as an index stores them; zero stays zero."""
    length = np.sqrt((x.astype(np.float64) ** 2).sum(1, keepdims=True))
    return (x / np.where(length > 0, length, 1)).astype(x.dtype)


def keys_of(metric: str, vectors: Tensor, queries: Tensor) -> tuple[Array, Array]:
    """What orders references, in float64, (B, n): ‖q − r‖², 1 − cos, −⟨q, r⟩; and the size of the terms summed."""
    r, q = vectors.numpy(), queries.numpy().astype(vectors.numpy().dtype)
    if metric == "cosine":
        r, q = at_unit_length(r), at_unit_length(q)
    r, q = r.astype(np.float64), q.astype(np.float64)
    keys, sizes = np.empty((2, len(q), len(r)))
    for i, row in enumerate(q):
        if metric == "l2":
            keys[i] = sizes[i] = ((row - r) ** 2).sum(1)
            continue
        keys[i], sizes[i] = -(row * r).sum(1), np.abs(row * r).sum(1)
        if metric == "cosine":
            length = np.sqrt((r * r).sum(1)) * np.sqrt((row * row).sum())
            keys[i] = 1 + np.where(length > 0, keys[i] / np.where(length > 0, length, 1), 0)
            sizes[i] = 1
    return keys, sizes


def distances_of(metric: str, keys: Array) -> Array:
    return np.sqrt(keys) if metric == "l2" else keys


def assert_nearest(
    found: Neighbors, metric: str, vectors: Tensor, queries: Tensor, k: int, strict: bool = True
) -> None:
    """The ids of a float64 brute-force search under (distance, id), and their distances.

    Not `strict`: ids may differ where the float64 keys are equal but for the order in which they are summed.
    """
    keys, sizes = keys_of(metric, vectors, queries)
    want = np.argsort(keys, axis=1, kind="stable")[:, :k]
    ids, least = found.ids.numpy(), np.take_along_axis(keys, want, 1)
    assert found.ids.dtype == torch.int64
    assert ids.shape == found.distances.shape == want.shape
    if strict:
        assert np.array_equal(ids, want)
    else:
        assert all(len(set(row)) == k for row in ids.tolist())
        slack = 1e-13 * sizes.max(1, keepdims=True)
        assert (np.abs(np.take_along_axis(keys, ids, 1) - least) <= slack).all()
        neighbors = np.sort(keys, 1)
        gaps = np.diff(neighbors, axis=1, prepend=-np.inf, append=np.inf)
        alone = (gaps[:, :k] > slack) & (gaps[:, 1 : k + 1] > slack)
        assert np.array_equal(ids[alone], want[alone])
    with np.errstate(over="ignore"):
        distances = distances_of(metric, least).astype(found.distances.numpy().dtype)
    precision = np.finfo(distances.dtype).eps
    low = 1e-7 if metric == "cosine" else 1e-13 * np.sqrt(sizes.max())
    np.testing.assert_allclose(found.distances.numpy(), distances, rtol=4 * precision, atol=low)
    assert bool((found.distances[:, :-1] <= found.distances[:, 1:]).all())


# -------------------------------------------------------------------------------------------- the data


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(seed: int, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def clusters(seed: int, n: int, d: int) -> Tensor:
    return draw(seed, 7, d)[whole(seed, 0, 7, n).long()] + 0.01 * draw(seed + 1, n, d)


DATA: dict[str, Callable[[int, int, int], Tensor]] = {
    "normal": draw,
    "clusters": clusters,
    "relu": lambda s, n, d: draw(s, n, d).clamp_min(0),
    "integers": lambda s, n, d: whole(s, -2, 3, n, d),
    "bits": lambda s, n, d: whole(s, 0, 2, n, d),
    "duplicates": lambda s, n, d: draw(s, 5, d)[whole(s, 0, 5, n).long()],
    "constant": lambda s, n, d: torch.full((n, d), 0.1),
    "zero": lambda s, n, d: torch.zeros(n, d),
    "some zero": lambda s, n, d: draw(s, n, d) * whole(s, 0, 2, n, 1),
    "tiny": lambda s, n, d: 1e-20 * draw(s, n, d),
    "tinier": lambda s, n, d: 1e-37 * draw(s, n, d),
    "huge": lambda s, n, d: 1e18 * draw(s, n, d),
    "hugest": lambda s, n, d: 1e36 * draw(s, n, d),
    "all magnitudes": lambda s, n, d: draw(s, n, d) * 10 ** whole(s, -18, 19, n, 1),
    "far away": lambda s, n, d: draw(s, n, d) + 1e4,
    "very far": lambda s, n, d: (draw(s, n, d) + 1e6).round(),
    "one outlier": lambda s, n, d: torch.cat([draw(s, n - 1, d), torch.full((1, d), 1e15)]),
}
# Where many keys are equal by arithmetic that rounds, which of them is less depends on the order of summation.
ROUNDED_TIES = {("cosine", kind) for kind in ("integers", "bits", "constant", "very far", "far away", "one outlier")}
ROUNDED_TIES |= {("ip", "constant"), ("ip", "one outlier"), ("l2", "one outlier"), ("l2", "all magnitudes")}
SHAPES = [(1, 1, 1), (2, 3, 2), (16, 2, 5), (17, 5, 17), (257, 16, 7), (700, 33, 20)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", DATA)
def test_same_as_brute_force(engine: Engine, kind: str, metric: str) -> None:
    for place, (n, d, k) in enumerate(SHAPES):
        vectors, queries = DATA[kind](place, n, d), DATA[kind](place + 100, 9, d)
        queries[0] = vectors[n // 2]  # a query that is a reference
        index = engine(metric).build(vectors)
        for wanted in {1, k, n}:
            strict = (metric, kind) not in ROUNDED_TIES and not (metric == "cosine" and d == 1)
            assert_nearest(index.search(queries, wanted), metric, vectors, queries, wanted, strict)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "d", "k"), [(6000, 3, 1), (4000, 64, 50), (1500, 600, 10), (3000, 129, 3000)])
def test_same_as_brute_force_when_large(engine: Engine, metric: str, n: int, d: int, k: int) -> None:
    vectors, queries = clusters(1, n, d), clusters(1, 40, d) + 0.01 * draw(2, 40, d)
    assert_nearest(engine(metric).build(vectors).search(queries, k), metric, vectors, queries, k)


@pytest.mark.parametrize("metric", METRICS)
def test_thousands_of_equal_references_come_by_id(engine: Engine, metric: str) -> None:
    vectors = draw(0, 1, 20).repeat(5000, 1)
    vectors[::7] = draw(1, 1, 20)
    found = engine(metric).build(vectors).search(vectors[[0, 1, 4999]], 900)
    seventh, others = torch.arange(0, 5000, 7), torch.arange(5000)[torch.arange(5000) % 7 != 0]
    assert torch.equal(found.ids[0], torch.cat([seventh, others])[:900])
    assert torch.equal(found.ids[1], others[:900])
    if metric == "l2":
        assert float(found.distances[1].max()) == 0


def test_a_query_that_is_a_reference_has_distance_zero(engine: Engine) -> None:
    vectors = draw(0, 3000, 50) * 1e3 + 1e5
    found = engine().build(vectors).search(vectors, 2)
    assert torch.equal(found.ids[:, 0], torch.arange(3000))
    assert float(found.distances[:, 0].abs().max()) == 0
    assert float(found.distances[:, 1].min()) > 0


@pytest.mark.parametrize("metric", METRICS)
def test_references_in_float64(metric: str) -> None:
    vectors = 1 + 1e-9 * draw(0, 2000, 12).double()  # all equal in float32
    queries = 1 + 1e-9 * draw(1, 20, 12).double()
    found = ExactIndex(metric).build(vectors).search(queries, 30)
    assert found.distances.dtype == torch.float64
    # Cosines of such vectors differ by 1e-18, below the rounding of float64.
    assert_nearest(found, metric, vectors, queries, 30, strict=metric == "l2")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_references_of_half_precision_are_searched_as_they_are(engine: Engine, metric: str, dtype: torch.dtype) -> None:
    vectors, queries = draw(0, 1500, 24).to(dtype), draw(1, 15, 24)
    found = engine(metric).build(vectors).search(queries, 20)
    if metric == "cosine":  # the exact engine keeps unit vectors in the type of the references
        keys, _ = keys_of(metric, vectors.float(), queries)
        np.testing.assert_allclose(found.distances.numpy(), np.sort(keys, 1)[:, :20], atol=8e-3)
    else:
        assert_nearest(found, metric, vectors.float(), queries, 20)


@pytest.mark.parametrize("metric", METRICS)
def test_input_that_is_not_contiguous(engine: Engine, metric: str) -> None:
    wide, tall = draw(0, 900, 46), draw(1, 23, 40)
    vectors, queries = wide[::3, ::2], tall.T[::2]
    found = engine(metric).build(vectors).search(queries, 9)
    assert_nearest(found, metric, vectors.clone(), queries.clone(), 9)
    adopted = ExactIndex("l2").adopt(vectors, None, None).search(queries, 9)
    assert_nearest(adopted, "l2", vectors.clone(), queries.clone(), 9)


def test_queries_of_other_types_and_none_at_all(engine: Engine) -> None:
    vectors = whole(0, -9, 9, 300, 6)
    index = engine().build(vectors, labels=torch.arange(300) % 3)
    queries = whole(1, -9, 9, 8, 6)
    want = index.search(queries, 5)
    for other in (queries.double(), queries.long(), queries.numpy(), queries.half(), queries.clone().requires_grad_()):
        found = index.search(other, 5)  # type: ignore[arg-type]
        assert torch.equal(found.ids, want.ids)
        assert not found.distances.requires_grad
    near, classes = index.search_both(queries[:0], 5, 2)
    assert (near.ids.shape, classes.ids.shape) == ((0, 5), (0, 3, 2))
    assert index.search(queries[:0], 5).distances.shape == (0, 5)


# ------------------------------------------------------------------------------------ for any small input


@st.composite
def problems(pick: st.DrawFn) -> tuple[Tensor, Tensor, int, str, bool]:
    """References, queries, k, a metric, and whether float64 arithmetic is exact on them."""
    n, d, b = pick(st.integers(1, 70)), pick(st.integers(1, 6)), pick(st.integers(1, 4))
    metric = pick(st.sampled_from(METRICS))
    k = pick(st.integers(1, n))
    seed = pick(st.integers(0, 2**20))
    if pick(st.booleans()):
        top = pick(st.sampled_from([1, 2, 4, 1000]))
        scale = 2.0 ** pick(st.sampled_from([-66, -40, 0, 0, 40, 60]))
        shift = pick(st.sampled_from([0, 0, 5, 2**14]))
        both = (whole(seed, -top, top + 1, n + b, d) + shift) * scale
        exact = metric != "cosine"
    else:
        numbers = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=True)
        few = torch.tensor(pick(st.lists(numbers, min_size=1, max_size=8)), dtype=torch.float32)
        both = few[whole(seed, 0, len(few), n + b, d).long()]
        exact = False
    return both[:n], both[n:], k, metric, exact


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_any_small_problem(problem: tuple[Tensor, Tensor, int, str, bool], engine: Engine) -> None:
    vectors, queries, k, metric, exact = problem
    assert_nearest(engine(metric).build(vectors).search(queries, k), metric, vectors, queries, k, exact)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(lengths=st.tuples(st.integers(0, 9), st.integers(0, 9)), k=st.integers(1, 12), seed=st.integers(0, 999))
def test_merging_gives_the_first_of_two_sorted_sequences(lengths: tuple[int, int], k: int, seed: int) -> None:
    one, other = (whole(seed + n, 0, 9, n, 40).double().sort(0).values for n in lengths)
    merged = selection_module._merge(list(one), list(other), k)
    want = torch.cat([one, other]).sort(0).values[:k]
    assert len(merged) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(merged, want, strict=True))


# ---------------------------------------------------------------------------------- same in every setting


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.ids, other.ids) and torch.equal(one.distances, other.distances)


MIXED = torch.cat([clusters(0, 1000, 19), draw(3, 20, 19).repeat(30, 1), whole(0, -2, 3, 400, 19)])
ASKED = torch.cat([clusters(0, 30, 19) + 0.01 * draw(4, 30, 19), MIXED[::200], draw(5, 260, 19)])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (exact_module, "_CHUNK_ROWS", 64),
        (exact_module, "_CHUNK_ROWS", 1),
        (exact_module, "_QUERY_BLOCK", 1),
        (product_module, "QUERY_MULTIPLE", 3),
        (refine_module, "_CPU_BLOCK", 1),
        (refine_module, "_CPU_BLOCK", 2**30),
        (refine_module, "_REUSED", 1),
        (refine_module, "_REUSED", 2**30),
        (selection_module, "_GROUP", 2),
        (selection_module, "_GROUP", 2**20),
    ],
)
def test_found_does_not_depend_on_how_the_work_is_cut(
    engine: Engine, metric: str, where: Any, name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, queries = (MIXED[::9], ASKED[::9]) if value == 1 else (MIXED, ASKED)
    want = engine(metric).build(vectors).search(queries, 23)
    monkeypatch.setattr(exact_module, "_LEAST_ROWS", 1)
    monkeypatch.setattr(where, name, value)
    assert same(engine(metric, memory_mb=1).build(vectors).search(queries, 23), want)


@pytest.mark.parametrize("metric", METRICS)
def test_found_does_not_depend_on_the_other_queries(engine: Engine, metric: str) -> None:
    index = engine(metric).build(MIXED)
    want = index.search(ASKED, 11)
    order = torch.randperm(len(ASKED), generator=torch.Generator().manual_seed(0))
    mixed = index.search(ASKED[order], 11)
    assert torch.equal(mixed.ids, want.ids[order])
    assert torch.equal(mixed.distances, want.distances[order])
    for size in (1, 2, 7, 19):
        parts = [index.search(part, 11) for part in ASKED[:38].split(size)]
        assert torch.equal(torch.cat([p.ids for p in parts]), want.ids[:38])
        assert torch.equal(torch.cat([p.distances for p in parts]), want.distances[:38])
    assert same(index.search(ASKED, 30).first(11), want)


def test_searches_in_several_threads_and_modes(engine: Engine) -> None:
    index = engine("l2", memory_mb=1).build(MIXED, labels=torch.arange(len(MIXED)) % 10)
    want = index.search(ASKED, 11)
    found: list[Neighbors] = []
    workers = [threading.Thread(target=lambda: found.append(index.search(ASKED, 11))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    assert all(same(one, want) for one in found)
    product_module.SCRATCH.kept = None
    with torch.inference_mode():
        inside = index.search_both(ASKED, 11, 2)
    outside = index.search_both(ASKED, 11, 2)
    assert same(inside[0], want)
    assert same(outside[0], want)
    assert same(inside[1], outside[1])


# --------------------------------------------------------------------------------------------- by class


def assert_nearest_by_class(
    found: ClassNeighbors, metric: str, vectors: Tensor, labels: Tensor, queries: Tensor, per_class: int, rtol: float
) -> None:
    """Distances near the true ones, ids the true ones where distances are further apart than that."""
    keys, _ = keys_of(metric, vectors, queries)
    keys = distances_of(metric, keys)
    slack = rtol * np.abs(keys).max()
    n_classes = int(labels.max()) + 1
    assert found.ids.shape == found.distances.shape == (len(queries), n_classes, per_class)
    ids, distances = found.ids.numpy(), found.distances.numpy()
    for c in range(n_classes):
        members = np.flatnonzero(labels.numpy() == c)
        kept = min(len(members), per_class)
        assert (ids[:, c, kept:] == MISSING).all()
        assert np.isposinf(distances[:, c, kept:]).all()
        if not kept:
            continue
        mine = keys[:, members]
        order = np.argsort(mine, axis=1, kind="stable")
        sorted_keys = np.take_along_axis(mine, order, 1)
        np.testing.assert_allclose(distances[:, c, :kept], sorted_keys[:, :kept], rtol=0, atol=slack)
        assert all(len(set(row)) == kept and set(row) <= set(members.tolist()) for row in ids[:, c, :kept].tolist())
        gaps = np.diff(sorted_keys, axis=1, prepend=-np.inf, append=np.inf)
        alone = (gaps[:, :kept] > 2 * slack) & (gaps[:, 1 : kept + 1] > 2 * slack)
        assert np.array_equal(ids[:, c, :kept][alone], members[order[:, :kept]][alone])


def classes(kind: str, n: int) -> Tensor:
    if kind == "unequal":
        sizes = torch.tensor([1, 2, 3, 7, 40, 400, n - 453])
        return torch.arange(7).repeat_interleave(sizes)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    if kind == "with gaps":
        return torch.tensor([0, 5, 9])[torch.arange(n) % 3]
    if kind == "sorted":
        return torch.arange(n) * 10 // n
    return torch.arange(n) % int(kind)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["unequal", "with gaps", "sorted", "1", "10", "1000"])
@pytest.mark.parametrize("per_class", [1, 5, 17])
def test_by_class_as_brute_force(
    engine: Engine, metric: str, kind: str, per_class: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection_module, "_GROUP", 4)
    monkeypatch.setattr(sketch_module, "RANK", 8)  # with fewer a search by class is approximate
    vectors, queries = draw(0, 2200, 8), draw(1, 5, 8)
    labels = classes(kind, 2200)
    index = engine(metric).build(vectors, labels=labels)
    near, found = index.search_both(queries, 9, per_class)
    assert_nearest(near, metric, vectors, queries, 9)
    assert_nearest_by_class(found, metric, vectors, labels, queries, per_class, 1e-5)
    assert same(index.search_classes(queries, per_class), found)
    # In small chunks a class lies in many of them.
    monkeypatch.setattr(exact_module, "_LEAST_ROWS", 1)
    monkeypatch.setattr(exact_module, "_CHUNK_ROWS", 300)
    again = engine(metric).build(vectors, labels=labels).search_both(queries, 9, per_class)
    assert same(again[0], near)
    assert_nearest_by_class(again[1], metric, vectors, labels, queries, per_class, 1e-5)


@pytest.mark.parametrize("scale", [1e-19, 1e18])
def test_by_class_at_all_magnitudes(engine: Engine, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch_module, "RANK", 6)
    vectors, queries, labels = draw(0, 500, 6) * scale, draw(1, 4, 6) * scale, torch.arange(500) % 4
    found = engine().build(vectors, labels=labels).search_classes(queries, 5)
    assert_nearest_by_class(found, "l2", vectors, labels, queries, 5, 1e-5)


def test_by_class_in_float64_and_with_ties() -> None:
    vectors, queries, labels = draw(0, 500, 6).double(), draw(1, 4, 6).double(), torch.arange(500) % 4
    found = ExactIndex().build(vectors, labels=labels).search_classes(queries, 5)
    assert_nearest_by_class(found, "l2", vectors, labels, queries, 5, 1e-5)
    equal = ExactIndex().build(torch.ones(60, 2), labels=torch.arange(60) % 3).search_classes(torch.ones(1, 2), 7)
    for c in range(3):
        assert len(set(equal.ids[0, c].tolist())) == 7
        assert (equal.ids[0, c] % 3 == c).all()
    assert float(equal.distances.max()) == 0


def test_by_class_of_a_query_beyond_float32_names_no_stranger(engine: Engine) -> None:
    index = engine().build(draw(0, 300, 4), labels=torch.arange(300) % 3)
    near, found = index.search_both(torch.full((1, 4), 1e38), 5, 4)
    assert_nearest(near, "l2", draw(0, 300, 4), torch.full((1, 4), 1e38), 5)
    assert (found.ids[0] % 3 == torch.arange(3)[:, None]).all()


def test_by_class_reads_the_references_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    plain = exact_module.product

    def counting(vectors: Tensor, *rest: Any) -> None:
        rows.append(len(vectors))
        plain(vectors, *rest)

    monkeypatch.setattr(exact_module, "product", counting)
    monkeypatch.setattr(exact_module, "_CHUNK_ROWS", 1024)
    ExactIndex().build(draw(0, 3000, 8), labels=torch.arange(3000) % 7).search_both(draw(1, 40, 8), 20, 5)
    assert rows == [1024, 1024, 952]


# -------------------------------------------------------------------------------------- rounded products


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x = torch.from_numpy(load_digits().data).float() / 16
    mixing = draw(0, 64, 100) / 8
    features = (x @ mixing).clamp_min(0)
    return features[200:], features[:200]


@pytest.mark.parametrize("metric", METRICS)
def test_bfloat16_finds_the_same(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = digits()
    want = ExactIndex(metric).build(vectors).search(queries, 30)
    assert same(ExactIndex(metric, precision="bfloat16").build(vectors).search(queries, 30), want)
    # A processor without such products multiplies exactly: here they are rounded for it.
    plain = exact_module.product
    rounded: list[str] = []

    def rounding(vectors: Tensor, queries: Tensor, bias: Tensor | None, out: Tensor, precision: str) -> None:
        rounded.append(precision)
        if precision == "bfloat16":
            vectors, queries = vectors.bfloat16().float(), queries.bfloat16().float()
        plain(vectors, queries, bias, out, precision)

    monkeypatch.setattr(exact_module, "product", rounding)
    index = ExactIndex(metric, precision="bfloat16").build(vectors)
    assert same(index.search(queries, 30), want)
    assert "bfloat16" in rounded


def precisions() -> tuple[str, str]:
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]


@pytest.fixture
def untouched_precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("untouched_precision")
@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="left out: needs torch 2.9")
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
@pytest.mark.parametrize("before", ["highest", "high", "medium", "tf32"])
def test_the_processes_precision_of_products(before: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = digits()
    if before == "tf32":  # set the newer way, after which reading the older one fails
        torch.backends.mkldnn.matmul.fp32_precision = before  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = before
    else:
        torch.set_float32_matmul_precision(before)
    at_start = precisions()
    inside: list[tuple[str, str]] = []
    plain = torch.addmm

    def watched(*args: Any, **options: Any) -> Tensor:
        inside.append(precisions())
        if fails:
            raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(torch, "addmm", watched)
    fails = False
    index = ExactIndex(precision=wanted).build(vectors)
    want = ExactIndex().build(vectors).search(queries, 9)
    inside.clear()
    assert same(index.search(queries, 9), want)
    if wanted == "bfloat16":
        assert inside[0] == ("bf16", "tf32")
    else:
        assert set(inside[0]) <= {"none", "ieee"}
    assert precisions() == at_start
    fails = True
    with pytest.raises(KeyboardInterrupt):
        index.search(queries, 9)
    assert precisions() == at_start


@pytest.mark.usefixtures("untouched_precision")
@pytest.mark.parametrize(("wanted", "inside"), [("float32", "highest"), ("bfloat16", "medium")])
def test_the_processes_precision_before_torch_2_9(wanted: str, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace())
    torch.set_float32_matmul_precision("high")
    with product_module._products_in(wanted):
        assert torch.get_float32_matmul_precision() == inside
    assert torch.get_float32_matmul_precision() == "high"


# ------------------------------------------------------------------------------------- more and again


@pytest.mark.parametrize("metric", METRICS)
def test_adding_is_building_on_all(engine: Engine, metric: str) -> None:
    vectors, labels, payload = draw(0, 700, 9) + 1, torch.arange(700) % 4, draw(1, 700, 2)
    at_once = engine(metric).build(vectors, labels, payload)
    parts = engine(metric).build(vectors[:1], labels[:1], payload[:1])
    for rows in (slice(1, 100), slice(100, 101), slice(101, 700)):
        parts.add(vectors[rows], labels[rows], payload[rows])
    queries = draw(2, 12, 9)
    for one, other in zip(parts.search_both(queries, 40, 6), at_once.search_both(queries, 40, 6), strict=True):
        assert same(one, other)
    ids = torch.tensor([[0, 699], [MISSING, 350]])
    assert torch.equal(parts.reconstruct(ids), at_once.reconstruct(ids))
    assert torch.equal(parts.payload(ids), payload[ids.clamp_min(0)])
    np.testing.assert_allclose(parts.reconstruct(ids[0]), vectors[ids[0]], rtol=1e-6)
    assert float(parts.reconstruct(ids)[1, 0].abs().max()) == 0
    if metric != "cosine":
        assert torch.equal(parts.reconstruct(ids[0]), vectors[ids[0]])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("beside", [(), ("labels",), ("labels", "payload")])
def test_saved_and_loaded(
    engine: Engine, metric: str, beside: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sketch_module, "RANK", 7)
    vectors, queries = draw(0, 400, 7), draw(1, 9, 7)
    kept = {"labels": torch.arange(400) % 3, "payload": draw(2, 400, 2, 2)}
    index = engine(metric, memory_mb=77).build(vectors, **{name: kept[name] for name in beside})
    index.save(tmp_path / "index")
    ids = torch.arange(-1, 400)
    loaded: list[ExactIndex | FaissIndex] = [type(index).load(tmp_path / "index")]
    if isinstance(index, ExactIndex):
        loaded.append(ExactIndex.load(tmp_path / "index", mapped=True))
    for other in loaded:
        assert (other.metric, len(other), other.dim, other.differentiable) == (index.metric, 400, 7, True)
        assert same(other.search(queries, 20), index.search(queries, 20))
        assert torch.equal(other.reconstruct(ids), index.reconstruct(ids))
        if "labels" in beside:
            by_class, before = other.search_classes(queries, 4), index.search_classes(queries, 4)
            assert torch.equal(by_class.ids, before.ids)
            torch.testing.assert_close(by_class.distances, before.distances)  # mapped vectors have no sketch
        if "payload" in beside:
            assert torch.equal(other.payload(ids[1:]), kept["payload"])
        other.add(draw(3, 5, 7), **{name: kept[name][:5] for name in beside})
        assert len(other) == 405
    with pytest.raises(InputError, match="exists"):
        index.save(tmp_path / "index")


def damaged_index(engine: Engine, folder: Path, metric: str = "cosine") -> Path:
    index = engine(metric).build(draw(0, 12, 3), torch.arange(12) % 3, draw(1, 12, 2))
    index.save(folder)
    return folder


def test_no_damaged_file_is_loaded(engine: Engine, tmp_path: Path) -> None:
    folder = damaged_index(engine, tmp_path / "index")
    kind = type(engine())
    for _ in mutate.damaged(folder, 10_000, seed=1):
        with pytest.raises(IntegrityError):
            kind.load(folder)
    other = damaged_index(engine, tmp_path / "other", "l2")
    for file in sorted(folder.iterdir()):
        for source in (*sorted(folder.iterdir()), *sorted(other.iterdir())):
            if source.read_bytes() != file.read_bytes():
                with mutate.replaced(file, source.read_bytes()), pytest.raises(IntegrityError):
                    kind.load(folder)
    assert len(kind.load(folder)) == 12
    for file in sorted(folder.iterdir()):
        aside = tmp_path / "aside"
        file.rename(aside)
        with pytest.raises(IntegrityError):
            kind.load(folder)
        aside.rename(file)
    with pytest.raises(IntegrityError, match="not a"):
        kind.load(tmp_path / "nothing")


FORGED: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "no vectors": ({}, {"vectors": torch.empty(0)}),
    "whole numbers": ({}, {"vectors": torch.arange(8).view(4, 2)}),
    "one dimension": ({}, {"vectors": torch.ones(8)}),
    "NaN": ({}, {"vectors": torch.full((4, 2), torch.nan)}),
    "fewer labels": ({}, {"labels": torch.zeros(3, dtype=torch.int64)}),
    "labels below zero": ({}, {"labels": torch.full((4,), -1)}),
    "labels of halves": ({}, {"labels": torch.full((4,), 0.5)}),
    "fewer payload rows": ({}, {"payload": torch.zeros(3)}),
    "a metric nobody knows": ({"metric": "l7"}, {}),
    "an option nobody knows": ({"speed": 1}, {}),
    "no memory": ({"memory_mb": 0}, {}),
    "memory in words": ({"memory_mb": "much"}, {}),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_whole_artifact_that_is_no_index(engine: Engine, what: str, tmp_path: Path) -> None:
    kind = type(engine())
    meta, parts = FORGED[what]
    parts = {"vectors": torch.ones(4, 2), **parts}
    with store.artifact(tmp_path / "index", f"{'faiss' if kind is FaissIndex else 'exact'}-index", 1, meta) as folder:
        meta.setdefault("metric", "l2")
        for name, value in parts.items():
            store.save_array(folder / f"{name}.npy", value)
    with pytest.raises(IntegrityError, match=r"holds no .*-index \(.*\); make it again\."):
        kind.load(tmp_path / "index")


# --------------------------------------------------------------------------------------------- memory


def test_adopted_vectors_are_not_copied() -> None:
    vectors = draw(0, 50, 4)
    assert ExactIndex().adopt(vectors, None, None).vectors.data_ptr() == vectors.data_ptr()
    assert ExactIndex().build(vectors).vectors.data_ptr() == vectors.data_ptr()
    before = vectors.clone()
    assert ExactIndex("cosine").build(vectors).vectors.data_ptr() != vectors.data_ptr()
    assert torch.equal(vectors, before)


MEMORY = """
import sys, torch
torch.set_num_threads(1)
from robustknn.neighbors import ExactIndex

def status(name):  # of this process alone; getrusage counts the parent's peak as well
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

n, d, memory, per_class, classes = (int(a) for a in sys.argv[1:])
generator = torch.Generator().manual_seed(0)
vectors = torch.empty(n, d)
for part in vectors.split(4096):
    part.normal_(generator=generator)
queries = torch.randn(256, d, generator=generator)
# The libraries' own memory: a small search first.
labels = torch.arange(n) % classes
ExactIndex(memory_mb=1).build(vectors[:2000], labels[:2000]).search_both(queries[:32], 50, 2)
before = status("VmRSS:")
index = ExactIndex(memory_mb=memory).adopt(vectors, None, labels)
adopted = status("VmRSS:") - before
found = index.search_both(queries, 50, per_class) if per_class else index.search(queries, 50)
print(adopted, status("VmHWM:") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="left out: reads the memory in use from /proc")
@pytest.mark.parametrize(
    ("n", "d", "memory", "per_class", "classes"),
    [(200_000, 256, 64, 0, 10), (200_000, 256, 64, 5, 10), (100_000, 64, 128, 10, 300), (3_000, 12_000, 64, 0, 10)],
)
def test_a_search_keeps_to_its_memory(n: int, d: int, memory: int, per_class: int, classes: int) -> None:
    """Peak memory over that of the references: the bound, beside 8 bytes a reference and the result."""
    answer = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, (n, d, memory, per_class, classes))],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    adopted, searched = map(float, answer.stdout.split())
    per_reference = n * (8 + 4 + 16 * (per_class > 0)) / 2**20
    result = 256 * (50 + per_class * classes) * 12 * 2 / 2**20
    assert adopted < per_reference + 24
    assert searched < memory + per_reference + result + 8


# --------------------------------------------------------------------------------- copies and mistakes


def test_copies(any_engine: Engine) -> None:
    vectors, labels, payload = draw(0, 200, 5), torch.arange(200) % 3, draw(1, 200, 2)
    queries, ids = draw(2, 6, 5), torch.arange(200)
    for metric in METRICS:
        index = any_engine(metric).build(vectors.clone(), labels.clone(), payload.clone())
        copies = [copy.deepcopy(index)]
        if isinstance(index, ExactIndex):
            copies.append(pickle.loads(pickle.dumps(index)))  # noqa: S301
        else:
            with pytest.raises(InputError, match="save"):
                pickle.dumps(index)
        want = index.search_both(queries, 9, 4)
        index.add(torch.zeros(1, 5), labels[:1], payload[:1])
        for other in copies:
            for one, other_one in zip(other.search_both(queries, 9, 4), want, strict=True):
                assert same(one, other_one)
            assert torch.equal(other.payload(ids), payload)
            assert len(other) == 200
    assert len(copy.deepcopy(any_engine())) == 0


def test_devices(any_engine: Engine) -> None:
    index = any_engine().build(draw(0, 20, 3), torch.arange(20) % 2, draw(1, 20, 2))
    want = index.search(draw(2, 3, 3), 4)
    assert index.to("cpu") is index
    assert same(index.to(torch.device("cpu")).search(draw(2, 3, 3), 4), want)
    assert any_engine().to("cpu") is not None


def test_engines_by_name(engine: Engine) -> None:
    name = "faiss" if engine is FaissIndex else "exact"
    made = registry.indexes.create(name, metric="cosine", memory_mb=5)
    assert type(made) is engine
    assert isinstance(made, NeighborIndex)
    assert (made.exact, made.updatable, made.reconstructs, made.distributed) == (True, True, True, False)


def built(engine: Engine, **options: Any) -> Any:
    return engine(**options).build(draw(0, 30, 4))


def labelled(engine: Engine) -> Any:
    return engine().build(draw(0, 30, 4), torch.arange(30) % 3, torch.zeros(30, 2))


NAN = torch.full((2, 4), torch.nan)
MISTAKES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "k of zero": (lambda e: built(e).search(torch.zeros(1, 4), 0), "k must be a whole number of at least 1, not 0"),
    "k below zero": (lambda e: built(e).search(torch.zeros(1, 4), -3), "k must be a whole number"),
    "half a k": (lambda e: built(e).search(torch.zeros(1, 4), 1.5), "k must be a whole number"),
    "too many": (lambda e: built(e).search(torch.zeros(1, 4), 31), "k = 31 neighbors were asked of 30 references"),
    "NaN asked": (lambda e: built(e).search(NAN, 1), "NaN or infinite values, first in sample 0"),
    "infinity asked": (lambda e: built(e).search(torch.full((1, 4), torch.inf), 1), "NaN or infinite"),
    "other dimension": (lambda e: built(e).search(torch.zeros(1, 5), 1), r"shape \(1, 5\); this index holds vectors"),
    "one vector": (lambda e: built(e).search(torch.zeros(4), 1), r"shape \(4,\); this index"),
    "words": (lambda e: built(e).search([["a"] * 4], 1), "queries must be a tensor or an array of numbers"),
    "complex queries": (lambda e: built(e).search(torch.zeros(1, 4, dtype=torch.complex64), 1), "real numbers"),
    "NaN indexed": (lambda e: e().build(torch.cat([torch.zeros(3, 4), NAN])), "references .* first in sample 3"),
    "NaN indexed, cosine": (lambda e: e("cosine").build(NAN), "NaN or infinite"),
    "infinity indexed": (lambda e: e("ip").build(torch.full((2, 4), torch.inf)), "NaN or infinite"),
    "nothing indexed": (lambda e: e().build(torch.zeros(0, 4)), "there is no reference to index"),
    "no dimension": (lambda e: e().build(torch.zeros(4, 0)), "there is no reference to index"),
    "images indexed": (lambda e: e().build(torch.zeros(4, 1, 2, 2)), "flatten features first"),
    "integers indexed": (lambda e: e().build(torch.zeros(4, 2, dtype=torch.int64)), "floating point"),
    "an array indexed": (lambda e: e().build(np.zeros((4, 2))), "floating point tensor .* not ndarray"),
    "fewer labels": (lambda e: e().build(torch.zeros(4, 2), torch.zeros(3)), "3 labels for 4 references"),
    "odd labels": (lambda e: e().build(torch.zeros(4, 2), torch.full((4,), -1)), "reference labels holds the label -1"),
    "fewer payload rows": (
        lambda e: e().build(torch.zeros(4, 2), payload=torch.zeros(5)),
        "5 payload rows for 4 references",
    ),
    "other vectors added": (lambda e: built(e).add(torch.zeros(1, 5)), "length 5 cannot join an index of length 4"),
    "labels left out": (lambda e: labelled(e).add(torch.zeros(1, 4)), "all references carry labels or none"),
    "labels brought in": (lambda e: built(e).add(torch.zeros(1, 4), torch.zeros(1)), "all references carry labels"),
    "payload left out": (lambda e: labelled(e).add(torch.zeros(1, 4), torch.zeros(1)), "carry payload or none"),
    "NaN added": (lambda e: built(e).add(NAN), "NaN or infinite"),
    "unknown metric": (lambda e: e("l7"), "metric must be one of 'l2', 'cosine', 'ip', not 'l7'"),
    "no memory": (lambda e: e(memory_mb=0), "memory_mb must be a whole number of at least 1"),
    "no class neighbor": (lambda e: labelled(e).search_both(torch.zeros(1, 4), 1, 0), "per_class must be a whole"),
    "classes without labels": (lambda e: built(e).search_classes(torch.zeros(1, 4), 1), "needs labels"),
    "no payload": (lambda e: built(e).payload(torch.zeros(1, dtype=torch.int64)), "carries no payload"),
    "empty searched": (lambda e: e().search(torch.zeros(1, 4), 1), "the index is empty; call build"),
    "empty searched by class": (lambda e: e().search_classes(torch.zeros(1, 4), 1), "needs"),
    "empty measured": (lambda e: e().dim, "the index is empty; call build"),
    "empty added to": (lambda e: e().add(torch.zeros(1, 4)), "the index is empty; call build"),
    "unknown precision": (lambda e: ExactIndex(precision="int8"), "precision must be one of"),
    "raw vectors adopted": (
        lambda e: ExactIndex("cosine").adopt(torch.ones(3, 2), torch.ones(3), None),
        "references of unit length and these are not",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_told_in_one_sentence(any_engine: Engine, what: str) -> None:
    mistake, message = MISTAKES[what]
    with pytest.raises((InputError, NotReadyError), match=message) as error:
        mistake(any_engine)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_a_failed_change_changes_nothing(any_engine: Engine) -> None:
    index = labelled(any_engine)
    want = index.search_both(draw(5, 3, 4), 7, 2)
    for change in (
        lambda: index.add(NAN, torch.zeros(2), torch.zeros(2, 2)),
        lambda: index.add(torch.zeros(2, 4), torch.zeros(2)),
        lambda: index.add(torch.zeros(2, 4), torch.full((2,), -1), torch.zeros(2, 2)),
        lambda: index.build(NAN),
    ):
        with pytest.raises(InputError):
            change()
    for one, other in zip(index.search_both(draw(5, 3, 4), 7, 2), want, strict=True):
        assert same(one, other)
    assert len(index) == 30


# ---------------------------------------------------------------------------------- weighted sums of references


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_weighted_sums_are_those_of_the_references(engine: Engine, metric: str, unit: bool, dtype: torch.dtype) -> None:
    if engine is not ExactIndex and dtype != torch.float32:
        pytest.skip("faiss holds float32")
    vectors = draw(0, 90, 7).to(dtype)
    index = engine(metric).build(vectors)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, 90, (150, 4), generator=generator)  # more rows than are gathered at a time
    weights = torch.rand(150, 4, generator=generator, dtype=torch.float64)
    rows = vectors.double()
    if unit:
        rows = rows / rows.norm(dim=1, keepdim=True)
    want = (rows[ids.clamp_min(0)] * weights.masked_fill(ids < 0, 0)[..., None]).sum(1)
    got = index.combine(ids, weights.float(), unit)
    tolerance = {torch.float16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
    np.testing.assert_allclose(got.double(), want, rtol=tolerance, atol=tolerance)
