"""Searches by bounds from a few coordinates: the same neighbors, and most references never looked at."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robustknn.neighbors import ExactIndex
from robustknn.neighbors import sketch as sketch_module
from robustknn.neighbors.scoring import Scoring
from robustknn.neighbors.sketch import LEAST_DIM, LEAST_ROWS, Sketch

N, DIM = LEAST_ROWS, LEAST_DIM
METRICS = ("l2", "cosine", "ip")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(seed: int, n: int, dim: int = DIM, rank: int = 200, noise: float = 0.05) -> Tensor:
    """Near a subspace, and far from the origin, as features behind a ReLU are; ten clusters."""
    basis, centers = draw(1000, rank, dim), 2 * draw(1001, 10, rank)
    places = torch.arange(n) % 10
    flat = (centers[places] + draw(seed, n, rank)) @ basis / rank**0.5
    return flat + noise * draw(seed + 1, n, dim) + 3


@pytest.fixture(scope="module")
def references() -> Tensor:
    return features(0, N)


def keys_of(metric: str, references: Tensor, queries: Tensor) -> Tensor:
    """What orders references, in float64."""
    r, q = references.double(), queries.double()
    if metric == "l2":
        return (q * q).sum(1)[:, None] + (r * r).sum(1) - 2 * q @ r.T
    if metric == "cosine":
        r, q = torch.nn.functional.normalize(r, dim=1), torch.nn.functional.normalize(q, dim=1)
    return -q @ r.T


def count_measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    plain = sketch_module.scores_of

    def counting(vectors: Tensor, bias: Tensor | None, placed: Tensor, ids: list[Tensor]) -> list[Tensor]:
        counts.extend(len(row) for row in ids)
        return plain(vectors, bias, placed, ids)

    monkeypatch.setattr(sketch_module, "scores_of", counting)
    return counts


@pytest.mark.parametrize("metric", METRICS)
def test_the_same_neighbors_from_a_part_of_the_references(
    references: Tensor, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, queries, k = torch.arange(N) % 10, features(7, 24), 11
    index = ExactIndex(metric).build(references, labels=labels)
    _, by_class = index.search_both(queries, k, 8)
    counts = count_measured(monkeypatch)
    near = index.search(queries, k)
    assert 0 < sum(counts) < len(queries) * N / 8
    truth = keys_of(metric, references, queries)
    assert torch.equal(near.ids, truth.argsort(1)[:, :k])
    for c in range(10):
        mine = truth[:, c::10].argsort(1)[:, :8] * 10 + c
        found = (mine[:, :, None] == by_class.ids[:, c, None, :]).any(2)
        assert float(found.double().mean()) > 0.98
    assert bool((by_class.distances.diff(dim=2) >= 0).all())


def test_it_is_made_when_enough_is_asked(references: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    index, queries = ExactIndex().build(references), features(9, 5)
    counts = count_measured(monkeypatch)
    before = index.search(queries, 3)
    assert not counts
    index.search(references[:1100], 1)
    after = index.search(queries, 3)
    assert counts
    assert torch.equal(before.ids, after.ids)
    assert torch.equal(before.distances, after.distances)


def test_queries_that_bounds_say_nothing_of(references: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is about as far from all; the references are gone through as ever. Its neighbors in a batch do not mind."""
    labels = torch.arange(N) % 10
    index = ExactIndex("cosine").build(references, labels=labels)
    queries = torch.cat([features(5, 6), 100 * draw(11, 6, DIM), references[:4]])
    counts = count_measured(monkeypatch)
    near, _ = index.search_both(queries, 7, 3)
    assert max(counts) <= N // 16
    assert torch.equal(near.ids, keys_of("cosine", references, queries).argsort(1)[:, :7])
    alone = torch.cat([index.search_both(query[None], 7, 3)[1].ids for query in queries])
    assert torch.equal(index.search_both(queries, 7, 3)[1].ids, alone)


@pytest.mark.parametrize(
    "vectors",
    [
        pytest.param(lambda: draw(0, N, DIM), id="without a subspace"),
        pytest.param(lambda: features(0, N - 1), id="few"),
        pytest.param(lambda: features(0, N, DIM - 1), id="short"),
        pytest.param(lambda: features(0, N).double(), id="in float64"),
    ],
)
def test_searched_without(vectors: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    given = vectors()
    index = ExactIndex().build(given, labels=torch.arange(len(given)) % 10)
    index.search_both(given[:2], 3, 3)
    counts = count_measured(monkeypatch)
    near, _ = index.search_both(given[:8], 3, 3)
    assert not counts
    assert near.ids[:, 0].tolist() == list(range(8))


def test_a_search_for_very_many_goes_through_all(references: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ExactIndex().build(references, labels=torch.arange(N) % 10)
    index.search_both(references[:1], 1, 1)
    counts = count_measured(monkeypatch)
    index.search_both(references[:2], 3, N // 160)
    index.search(references[:2], N // 16)
    assert not counts


SCALES = (1e-18, 1.0, 1e15)


@pytest.mark.parametrize(("metric", "scale"), list(itertools.product(METRICS, SCALES)))
def test_bounds_hold(metric: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the vectors are: near the subspace, in it, away from it, zero."""
    monkeypatch.setattr(sketch_module, "RANK", 12)
    monkeypatch.setattr(sketch_module, "_SHORTER", 1)
    kinds = [features(0, 200, 64, 10), draw(1, 100, 64), features(2, 50, 64, 3, 0.0), torch.zeros(3, 64)]
    vectors = torch.cat(kinds) * scale
    queries = torch.cat([features(3, 20, 64, 10), draw(4, 20, 64), torch.zeros(1, 64), vectors[:20] / scale]) * scale
    index = ExactIndex(metric).build(vectors)
    placed, scoring = index.place(queries), index.scoring
    assert isinstance(scoring, Scoring)
    sketch = Sketch.of(index.vectors, scoring)
    lower = torch.cat([part.clone() for _, part in sketch._bounds(scoring.place(placed), scoring.bias, 64)]).T.double()
    truth = index.metric.keys(placed, index.vectors[None].expand(len(placed), -1, -1))
    told = lower / scoring.scale + scoring.offset(placed)[:, None]
    assert bool((told <= truth + 4 * scoring.error(placed)[:, None]).all())
    near = (truth - told)[:20, :200]  # of queries and references near the subspace
    assert float(near.median()) < 0.1 * float(truth[:20, :200].abs().amax())
