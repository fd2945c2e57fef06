"""The approximate engines over faiss, against a float64 brute-force search written here."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import mutate
import numpy as np
import pytest
import torch
from torch import Tensor

from robustknn import KNN, PGD, FeatureExtractor, ReferenceSet, ThreatModel, registry, store
from robustknn.errors import InputError, IntegrityError, MissingExtraError, NotReadyError
from robustknn.neighbors import MISSING, ExactIndex, NeighborIndex, Neighbors, load_index, make_index
from robustknn.neighbors import faiss_kinds as kinds_module
from robustknn.neighbors.faiss_kinds import LEAST_A_LIST, lists_for

faiss = pytest.importorskip("faiss")

Array = np.ndarray[Any, Any]
METRICS = ("l2", "cosine", "ip")
KINDS = ("ivf-flat", "ivf-sq8", "ivf-pq", "hnsw")
N, D, K = 3000, 30, 20  # four does not divide 30


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CENTERS = 2 * draw(0, 12, D)
LABELS = torch.arange(N) % 12
VECTORS = CENTERS[LABELS] + 0.5 * draw(1, N, D)
QUERIES = CENTERS[torch.arange(40) % 12] + 0.5 * draw(2, 40, D)
PAYLOAD = draw(3, N, 3)


def distances_to_all(metric: str, vectors: Tensor, queries: Tensor) -> Array:
    """True distances in float64, (B, n)."""
    r, q = vectors.numpy().astype(np.float64), queries.numpy().astype(np.float64)
    if metric == "l2":
        return np.sqrt(np.stack([((row - r) ** 2).sum(1) for row in q]))
    products = q @ r.T
    if metric == "ip":
        return -products
    return 1 - products / (np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(r, axis=1))


def assert_honest(found: Neighbors, metric: str, vectors: Tensor, queries: Tensor) -> float:
    """Every distance is that of the id beside it, in order, no id twice, missing ones last; returns the recall."""
    ids, distances, all_ = found.ids.numpy(), found.distances.numpy(), distances_to_all(metric, vectors, queries)
    missing = ids == MISSING
    assert np.array_equal(missing, np.isposinf(distances))
    assert (np.diff(missing.astype(int), axis=1) >= 0).all()
    true = np.take_along_axis(all_, ids.clip(0), 1)
    np.testing.assert_allclose(distances[~missing], true[~missing], rtol=1e-6, atol=1e-6)
    here, there = distances[:, :-1], distances[:, 1:]
    with np.errstate(invalid="ignore"):
        assert ((here < there) | ((here == there) & ((ids[:, :-1] < ids[:, 1:]) | missing[:, 1:]))).all()
    for row in ids:
        assert len(set(row[row >= 0].tolist())) == (row >= 0).sum()
    want = np.argsort(all_, axis=1, kind="stable")[:, : ids.shape[1]]
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(ids.tolist(), want.tolist(), strict=True)]))


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.ids, other.ids) and torch.equal(one.distances, other.distances)


def make(kind: str, metric: str = "l2", **options: Any) -> Any:
    return registry.indexes.create(kind, metric=metric, **options)


# -------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_most_and_tells_the_truth_about_it(kind: str, metric: str) -> None:
    before = VECTORS.clone()
    index = make(kind, metric).build(VECTORS, LABELS, PAYLOAD)
    assert (index.exact, index.updatable, index.reconstructs, index.differentiable) == (False, True, True, False)
    assert isinstance(index, NeighborIndex)
    assert (len(index), index.dim) == (N, D)
    assert assert_honest(index.search(QUERIES, K), metric, VECTORS, QUERIES) > 0.97
    near, by_class = index.search_both(QUERIES, K, 4)
    assert same(near, index.search(QUERIES, K))
    want = ExactIndex(metric).build(VECTORS, LABELS).search_classes(QUERIES, 4)
    np.testing.assert_allclose(by_class.distances, want.distances, atol=1e-5)
    ids = torch.tensor([[0, MISSING], [7, N - 1]])
    assert torch.equal(index.reconstruct(ids)[[0, 1, 1], [0, 0, 1]], VECTORS[[0, 7, N - 1]])
    assert float(index.reconstruct(ids)[0, 1].abs().max()) == 0
    weights = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    some = torch.arange(20).view(5, 4)
    np.testing.assert_allclose(
        index.combine(some, weights), torch.einsum("ngd,ng->nd", VECTORS[some], weights), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(index.payload(ids), PAYLOAD[ids.clamp_min(0)])
    assert torch.equal(VECTORS, before)
    assert index._plain.vectors.data_ptr() == VECTORS.data_ptr()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("kind", "low", "high"), [("ivf-flat", 1, 9999), ("ivf-sq8", 1, 9999), ("hnsw", 1, 500)])
def test_more_is_found_where_more_is_looked_at(kind: str, low: int, high: int, metric: str) -> None:
    """With every list looked through, or a beam as wide as the graph, it is a brute-force search."""
    index = make(kind, metric, rerank=9).build(VECTORS)
    setting = "ef_search" if kind == "hnsw" else "nprobe"
    recalls = []
    for value in (low, high):
        setattr(index, setting, value)
        index.rerank = 1 if value == low else 9
        recalls.append(assert_honest(index.search(QUERIES, K), metric, VECTORS, QUERIES))
    assert recalls[1] == 1 if kind != "hnsw" else recalls[1] > 0.99
    assert recalls[0] < 1 if kind != "hnsw" else recalls[0] <= recalls[1]


def test_re_ranking_is_what_product_codes_live_by() -> None:
    index = make("ivf-pq", nprobe=9999).build(VECTORS)
    recalls = []
    for index.rerank in (1, 4, 16, N // K):
        recalls.append(assert_honest(index.search(QUERIES, K), "l2", VECTORS, QUERIES))
    assert recalls == sorted(recalls)
    assert recalls[0] < 0.9
    assert recalls[-1] == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 15, 50])
def test_few_references(kind: str, n: int) -> None:
    for metric in METRICS:
        index = make(kind, metric).build(VECTORS[:n])
        k = min(n, 5)
        assert assert_honest(index.search(QUERIES, k), metric, VECTORS[:n], QUERIES) > 0.9
        assert bool((index.search(QUERIES, n).ids >= 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 33])
def test_any_length(kind: str, dim: int) -> None:
    vectors, queries = draw(0, 400, dim), draw(1, 20, dim)
    for metric in ("l2", "ip"):
        index = make(kind, metric).build(vectors)
        assert index.dim == dim
        assert assert_honest(index.search(queries, 5), metric, vectors, queries) > 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_equal_references_come_by_id(kind: str) -> None:
    vectors = torch.cat([VECTORS[:300], VECTORS[:5].repeat(4, 1), torch.zeros(3, D)])
    found = make(kind).build(vectors).search(vectors[:5], 5)
    want = torch.stack([torch.tensor([i, *range(300 + i, 320, 5)]) for i in range(5)])
    assert torch.equal(found.ids, want)
    assert float(found.distances.max()) == 0


@pytest.mark.parametrize("kind", ["ivf-flat", "ivf-sq8", "ivf-pq"])
def test_what_the_lists_do_not_hold_is_missing(kind: str) -> None:
    index = make(kind, nlist=30, nprobe=1, rerank=1).build(VECTORS)
    found = index.search(QUERIES, 800)
    assert bool((found.ids == MISSING).any(1).all())
    assert bool((found.ids[:, 0] >= 0).all())
    assert_honest(found, "l2", VECTORS, QUERIES)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_from_a_file(kind: str, metric: str, tmp_path: Path) -> None:
    store.save_array(tmp_path / "v.npy", VECTORS.half())
    mapped = store.load_array(tmp_path / "v.npy", mapped=True)
    index = make(kind, metric).build(mapped, LABELS)
    assert index._plain.vectors.data_ptr() == mapped.data_ptr()
    assert assert_honest(index.search(QUERIES, K), metric, VECTORS.half().float(), QUERIES) > 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_again(kind: str) -> None:
    one, other, another = (make(kind, seed=seed).build(VECTORS) for seed in (5, 5, 6))
    for index in (one, other, another):
        if kind == "hnsw":
            index.ef_search = 1
        else:
            index.nprobe, index.rerank = 2, 1
    assert same(one.search(QUERIES, 40), other.search(QUERIES, 40))
    assert not same(one.search(QUERIES, 40), another.search(QUERIES, 40))


def test_the_work_may_be_cut_as_memory_allows() -> None:
    """Blocks of rows and single queries give what one call gives."""
    for kind in KINDS:
        whole = make(kind).build(VECTORS)
        cut = make(kind, memory_mb=1).build(VECTORS)
        found = whole.search(QUERIES, K)
        assert same(cut.search(QUERIES, K), found)
        parts = [whole.search(part, K) for part in QUERIES.split(7)]
        assert torch.equal(torch.cat([p.ids for p in parts]), found.ids)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["ivf-flat", "ivf-sq8"])
def test_queries_are_ordered_by_their_lists_and_put_back(
    kind: str, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = make(kind, metric, nprobe=3).build(VECTORS)
    monkeypatch.setattr(kinds_module, "_ORDERED", 2)
    ordered = index.search(VECTORS[:500], 30)
    monkeypatch.setattr(kinds_module, "_ORDERED", 10**9)
    assert same(ordered, index.search(VECTORS[:500], 30))


@pytest.mark.parametrize("metric", METRICS)
def test_lists_in_half_precision(metric: str) -> None:
    whole, half = (make("ivf-flat", metric, dtype=dtype).build(VECTORS) for dtype in ("float32", "float16"))
    assert half._index.code_size == whole._index.code_size / 2 == 2 * D
    assert assert_honest(half.search(QUERIES, K), metric, VECTORS, QUERIES) > 0.97
    assert half.options()["dtype"] == "float16"


def test_the_number_of_lists_grows_with_the_root_and_leaves_each_enough() -> None:
    assert lists_for(1) == 1
    assert lists_for(50) == 1
    assert lists_for(2 * LEAST_A_LIST) == 2
    assert lists_for(1_000_000) == 4000
    assert lists_for(100_000_000) == 40_000
    assert all(n // lists_for(n) >= LEAST_A_LIST for n in range(LEAST_A_LIST, 30_000, 97))
    assert make("ivf-flat").build(VECTORS)._index.nlist == lists_for(N)
    assert make("ivf-flat", nlist=7).build(VECTORS)._index.nlist == 7


@pytest.mark.parametrize(("lists", "asked", "looked"), [(76, None, 32), (20, None, 20), (20, 64, 20), (76, 5, 5)])
def test_lists_looked_through(lists: int, asked: int | None, looked: int) -> None:
    index = make("ivf-flat", nlist=lists, nprobe=asked).build(VECTORS)
    index.search(QUERIES, 3)
    assert index._index.nprobe == index.probes == looked


def test_a_build_says_nothing_on_the_terminal() -> None:
    code = (
        "import torch, robustknn.neighbors as n\n"
        "for kind in ('ivf-flat:nlist=20', 'ivf-sq8', 'ivf-pq', 'hnsw'):\n"
        "    n.make_index(kind, 'l2').build(torch.randn(60, 6)).search(torch.randn(2, 6), 3)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert said.stdout + said.stderr == ""


# -------------------------------------------------------------------------------------------- more, again


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_added_vectors_are_found(kind: str, metric: str) -> None:
    index = make(kind, metric).build(VECTORS[:2000], LABELS[:2000], PAYLOAD[:2000])
    for rows in (slice(2000, 2001), slice(2001, N)):
        assert index.add(VECTORS[rows], LABELS[rows], PAYLOAD[rows]) is index
    assert len(index) == N
    assert assert_honest(index.search(QUERIES, K), metric, VECTORS, QUERIES) > 0.95
    found = index.search(VECTORS[2500:2520], 1).ids[:, 0]
    if metric != "ip":
        assert torch.equal(found, torch.arange(2500, 2520))
    assert torch.equal(index.payload(torch.arange(N)), PAYLOAD)
    assert len(index.search_classes(QUERIES, 2).ids[0]) == 12


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_vectors", [True, False])
def test_saved_and_loaded(kind: str, metric: str, with_vectors: bool, tmp_path: Path) -> None:
    index = make(kind, metric, seed=3, memory_mb=33).build(VECTORS, LABELS, PAYLOAD)
    want = index.search_both(QUERIES, K, 3)
    index.save(tmp_path / "index", with_vectors=with_vectors)
    files = {path.name for path in (tmp_path / "index").iterdir()}
    assert ("vectors.npy" in files) == ("labels.npy" in files) == ("payload.npy" in files) == with_vectors
    loaded: Any = make_index(str(tmp_path / "index"), metric)
    assert type(loaded) is type(index)
    assert loaded.options() == index.options()
    if not with_vectors:
        assert (len(loaded), loaded.dim, loaded.reconstructs) == (N, D, False)
        for call in (
            lambda: loaded.search(QUERIES, 3),
            lambda: loaded.search_both(QUERIES, 3, 1),
            lambda: loaded.reconstruct(torch.zeros(1, dtype=torch.int64)),
            lambda: loaded.save(tmp_path / "again"),
        ):
            with pytest.raises(NotReadyError, match="saved without its vectors; give them by attach"):
                call()
        loaded.attach(lambda: (VECTORS, None), LABELS, PAYLOAD)
    assert loaded.reconstructs
    for one, other in zip(loaded.search_both(QUERIES, K, 3), want, strict=True):
        assert same(one, other)
    assert torch.equal(loaded.payload(torch.arange(N)), PAYLOAD)
    twin = copy.deepcopy(loaded)
    loaded.add(VECTORS[:50], LABELS[:50], PAYLOAD[:50])
    assert (len(loaded), len(twin)) == (N + 50, N)
    assert same(twin.search(QUERIES, K), want[0])


def test_an_index_beside_a_database_grows_without_its_vectors(tmp_path: Path) -> None:
    make("ivf-sq8").build(VECTORS[:2000]).save(tmp_path / "a", with_vectors=False)
    index: Any = load_index(tmp_path / "a")
    index.add(VECTORS[2000:])
    index.save(tmp_path / "b", with_vectors=False)
    grown: Any = load_index(tmp_path / "b")
    with pytest.raises(InputError, match=r"holds 3000 vectors of length 30, these are \(2000, 30\)"):
        grown.attach(lambda: (VECTORS[:2000], None), LABELS[:2000], None)
    grown.attach(lambda: (VECTORS, None), LABELS, None)
    assert assert_honest(grown.search(QUERIES, K), "l2", VECTORS, QUERIES) > 0.95


@pytest.mark.parametrize("metric", METRICS)
def test_other_vectors_are_not_attached(metric: str, tmp_path: Path) -> None:
    make("ivf-flat", metric).build(VECTORS).save(tmp_path / "a", with_vectors=False)
    index: Any = load_index(tmp_path / "a")
    for wrong in (VECTORS.flip(0), VECTORS + 1, -VECTORS):
        with pytest.raises(InputError, match="holds other vectors than these"):
            index.attach(lambda wrong=wrong: (wrong, None), LABELS, None)
    if metric == "cosine":  # of whatever length: their directions are the same
        unit = torch.nn.functional.normalize(VECTORS, dim=1)
        index.attach(lambda: (unit, VECTORS.norm(dim=1)), LABELS, None)
        assert assert_honest(index.search(QUERIES, K), metric, VECTORS, QUERIES) > 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_faiss_never_sees_a_damaged_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(kind).build(VECTORS[:60, :8], LABELS[:60], PAYLOAD[:60]).save(tmp_path / "index")
    read: list[str] = []
    plain = faiss.read_index
    monkeypatch.setattr(faiss, "read_index", lambda path, flags: (read.append(path), plain(path, flags))[1])
    for _ in mutate.damaged(tmp_path / "index", 2000, seed=3):
        with pytest.raises(IntegrityError):
            load_index(tmp_path / "index")
    assert not read
    load_index(tmp_path / "index")
    assert len(read) == 1


@pytest.mark.parametrize("content", [b"", b"IxF2", b"IwFl" + b"\xff" * 60])
def test_a_sealed_file_that_faiss_cannot_read(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "write_index", lambda _, path: Path(path).write_bytes(content))
    make("ivf-flat").build(VECTORS).save(tmp_path / "index")
    with pytest.raises(IntegrityError, match="holds no ivf-flat-index"):
        load_index(tmp_path / "index")


def test_another_index_than_the_manifest_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = faiss.write_index
    others = [make("ivf-flat").build(VECTORS[:, :8]), make("ivf-flat", "ip").build(VECTORS)]
    for place, other in enumerate(others):
        monkeypatch.setattr(faiss, "write_index", lambda _, path, other=other: plain(other._index, path))
        make("ivf-flat").build(VECTORS).save(tmp_path / str(place))
        with pytest.raises(IntegrityError, match="faiss's file holds another index"):
            load_index(tmp_path / str(place))


MISTAKES: dict[str, tuple[Any, str]] = {
    "more lists than vectors": (
        lambda: make("ivf-flat", nlist=51).build(VECTORS[:50]),
        "nlist = 51 lists were asked for 50 vectors; lower nlist",
    ),
    "no list": (lambda: make("ivf-flat", nlist=0), "nlist must be a whole number of at least 1"),
    "no probe": (lambda: make("ivf-sq8", nprobe=0), "nprobe must be a whole number of at least 1"),
    "no rerank": (lambda: make("ivf-pq", rerank=0), "rerank must be a whole number of at least 1"),
    "half a rerank": (lambda: make("ivf-pq", rerank=1.5), "rerank must be a whole number"),
    "a seed below zero": (lambda: make("hnsw", seed=-1), "seed must be a whole number of at least 0"),
    "no edge": (lambda: make("hnsw", neighbors=1), "neighbors = 1 makes no graph"),
    "no beam": (lambda: make("hnsw", ef_search=0), "ef_search must be a whole number of at least 1"),
    "no sample": (lambda: make("ivf-flat", train_size=0), "train_size must be a whole number of at least 1"),
    "fewer to learn from than lists": (
        lambda: make("ivf-flat", nlist=50, train_size=10).build(VECTORS),
        "faiss could not learn from 10 vectors",
    ),
    "float64": (lambda: make("hnsw").build(VECTORS.double()), r"faiss holds float32 .* pass vectors.float\(\)"),
    "NaN far behind": (
        lambda: make("ivf-flat", memory_mb=1, train_size=300, nlist=3).build(bad(2777)),
        "NaN or infinite values, first in sample 2777",
    ),
    "an unknown setting": (lambda: make("ivf-flat", nprob=3), "'nprob'; did you mean 'nprobe'"),
    "a GPU": (lambda: make("ivf-flat").to("cuda"), "searches on the CPU; use index='exact'"),
    "pickled": (lambda: copy.copy(make("ivf-flat")), "write it with save"),
    "labels of others": (
        lambda: make("ivf-flat").build(VECTORS).attach(lambda: (VECTORS, None), LABELS[:9], None),
        "9 labels for 3000 references",
    ),
}


def bad(row: int) -> Tensor:
    made = VECTORS.repeat(1, 12)
    made[row, 7] = torch.nan
    return made


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_told_in_one_sentence(what: str) -> None:
    mistake, message = MISTAKES[what]
    with pytest.raises(InputError, match=message) as error:
        mistake()
    assert str(error.value).endswith((".", "?"))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("kind", KINDS)
def test_without_faiss(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'robustknn\[faiss\]'"):
        make(kind)


# ------------------------------------------------------------------------------------ inside a classifier


@pytest.fixture(scope="module")
def references() -> ReferenceSet:
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh())
    y = torch.arange(900) % 3
    x = torch.rand(3, 8, generator=torch.Generator().manual_seed(1))[y] + 0.2 * draw(5, 900, 8)
    return ReferenceSet.build(FeatureExtractor(encoder), (x.clamp(0, 1), y))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_decides_by_it(kind: str, metric: str, references: ReferenceSet, tmp_path: Path) -> None:
    x = torch.rand(60, 8, generator=torch.Generator().manual_seed(2))
    exact = KNN(references, 7, metric=metric)
    classifier = KNN(references, 7, metric=metric, index=kind)
    agreement = (classifier.predict(x) == exact.predict(x)).double().mean()
    assert agreement > 0.95
    y = exact.predict(x)
    with pytest.raises(InputError, match="approximate"):
        PGD(steps=2)(classifier, x, y, ThreatModel("linf", 0.1))
    index = classifier.voters[0].index
    assert not index.exact
    index.save(tmp_path / "index", with_vectors=False)
    again = KNN(references, 7, metric=metric, index=str(tmp_path / "index"))
    assert torch.equal(again.predict(x), classifier.predict(x))
    other = ReferenceSet.from_vectors(draw(0, 900, 12), torch.arange(900) % 3, features=references.features)
    with pytest.raises(InputError, match="holds other vectors than these"):
        KNN(other, 7, metric=metric, index=str(tmp_path / "index")).predict(x)


def test_settings_reach_the_engine(references: ReferenceSet) -> None:
    voter = KNN(references, 7, index="ivf-flat:nlist=9,nprobe=2").voters[0]
    assert (voter.index._index.nlist, voter.index.probes) == (9, 2)  # type: ignore[attr-defined]
