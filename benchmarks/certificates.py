"""What a feature certificate costs, in units of the two float64 products with all references that it cannot do without."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.record import Figure, Result
from benchmarks.timing import Ratio, seconds
from robustknn import KNN, FeatureExtractor, ReferenceSet
from robustknn.certification import FeatureBisector

MINUTE = 60.0
NEIGHBORS = (1, 5, 75)
WHAT = (
    "`feature-bisector` of a batch of features over references in 10 clusters of low rank, one for each class, as a "
    "trained network makes them: seconds of processor time on one thread, scaled to 1,000 queries; and the same in "
    "units of the two float64 products of queries and references alone."
)


def clustered(n: int, dim: int, seed: int, rank: int = 32, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Features (n, D) around a center for each class, spread along few directions, and their classes."""
    shape = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, dim, generator=shape)
    directions = torch.randn(classes, rank, dim, generator=shape) / rank**0.5
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    spread = torch.randn(n, rank, generator=generator)
    noise = 0.1 * torch.randn(n, dim, generator=generator)
    rows = centers[labels] + noise
    for c in range(classes):
        rows[labels == c] += spread[labels == c] @ directions[c]
    return rows, labels


def run(quick: bool) -> Result:
    """Measure at several k."""
    repeats, n, dim, batch = (1, 2000, 32, 20) if quick else (3, 50_000, 512, 200)
    vectors, labels = clustered(n, dim, 1)
    x, _ = clustered(batch, dim, 2)
    references = ReferenceSet.from_vectors(vectors, labels, features=FeatureExtractor(nn.Identity()))
    wide, queries = vectors.double(), x.double()

    def products() -> list[Tensor]:
        return [queries @ wide.T for _ in range(2)]

    figures = []
    for k in NEIGHBORS:
        knn = KNN(references, k)
        times = [
            (seconds(products, _clock), seconds(lambda: FeatureBisector(upper="none")(knn, x), _clock))
            for _ in range(repeats)
        ]
        base, ours = (min(column) for column in zip(*times, strict=True))
        pairs = [case / bare for bare, case in times]
        figures.append(
            Figure(f"k = {k}: seconds for 1,000 queries", 1000 * ours / batch, bound=None if quick else MINUTE)
        )
        figures.append(
            Figure.of(f"k = {k}: in units of two products", Ratio(ours / base, sorted(pairs)[repeats // 2], pairs))
        )
    return Result(WHAT, repeats, figures, {"n": n, "dim": dim, "batch": batch})


def _clock() -> float:
    import time

    return time.process_time()
