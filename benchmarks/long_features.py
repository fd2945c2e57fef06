"""Exact search over long vectors, such as the maps of early layers: by bounds, and by the whole product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.record import Figure, Result
from benchmarks.timing import against
from robustknn import ExactIndex
from robustknn.neighbors import exact

WHAT = (
    "A search for k neighbors by the bounds of a sketch, in units of the same search by the whole product, both with "
    "the same result; with k neighbors of every class besides; and what making the sketch costs, in units of searching "
    "1,000 queries by the whole product. Ten clusters near a subspace of 200 dimensions."
)
CLASSES = 10


def run(quick: bool) -> Result:
    """Measure at batches of 10 and 100."""
    repeats, n, dim, k = (1, exact.LEAST_ROWS, exact.LEAST_DIM, 5) if quick else (5, 10_000, 12_544, 15)
    vectors, queries = features(0, n, dim), features(1, 100, dim)
    labels = torch.arange(n) % CLASSES
    bounded, whole = (ExactIndex().build(vectors, labels=labels) for _ in range(2))
    figures = []
    with without():
        whole.search_both(queries[:1], 1, 1)  # settled: this one has no sketch
    bounded.search_both(queries[:1], 1, 1)
    for batch in (10, 100):
        part = queries[:batch]
        assert torch.equal(bounded.search(part, k).ids, whole.search(part, k).ids)
        ratio = against(lambda p=part: whole.search(p, k), {"": lambda p=part: bounded.search(p, k)}, repeats)[""]
        figures.append(Figure.of(f"batch {batch}: {k} nearest", ratio))
        ratio = against(
            lambda p=part: whole.search_both(p, k, k), {"": lambda p=part: bounded.search_both(p, k, k)}, repeats
        )[""]
        figures.append(Figure.of(f"batch {batch}: and {k} nearest of {CLASSES} classes", ratio))

    def made() -> object:
        return ExactIndex().build(vectors, labels=labels).search_both(queries[:1], 1, 1)

    ratio = against(lambda: whole.search(queries, k), {"": made}, 1)[""]
    figures.append(Figure.of("making the sketch", ratio.times(len(queries) / 1000)))
    return Result(WHAT, repeats, figures, {"n": n, "dim": dim, "k": k, "classes": CLASSES})


@contextmanager
def without() -> Iterator[None]:
    """No sketches are made in this block."""
    before, exact.LEAST_DIM = exact.LEAST_DIM, 2**60
    try:
        yield
    finally:
        exact.LEAST_DIM = before


def features(seed: int, n: int, dim: int) -> Tensor:
    """Clusters near a subspace, and noise around."""
    shape, drawn = (torch.Generator().manual_seed(s) for s in (100, seed))
    centers = 2 * torch.randn(CLASSES, 200, generator=shape)
    basis = torch.randn(200, dim, generator=shape) / 200**0.5
    inner = centers[torch.arange(n) % CLASSES] + torch.randn(n, 200, generator=drawn)
    return inner @ basis + 0.05 * torch.randn(n, dim, generator=drawn)
