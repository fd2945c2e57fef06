"""Exact search as a share of what the machine's matrix product can do, beside scikit-learn and FAISS."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.record import Figure, Result
from benchmarks.timing import Ratio, Task, against
from robustknn import ExactIndex

BOUND = 0.55
SIDES = (1024, 2048, 4096)
WHAT = (
    "Exact L2 search (2·n·D·B floating point operations in the time of a search) as a share of the rate of the fastest "
    f"of three square float32 matrix products ({', '.join(map(str, SIDES))}) in the same run, searches and products in "
    "turn; and the time of scikit-learn's brute force and of FAISS's IndexFlatL2 with its defaults in units of ours."
)


def run(quick: bool) -> Result:
    """Measure at batches of 100 and 256."""
    repeats, n, dim, k = (2, 2000, 32, 50) if quick else (15, 100_000, 256, 50)
    generator = torch.Generator().manual_seed(0)
    vectors, queries = (torch.randn(rows, dim, generator=generator) for rows in (n, 256))
    index = ExactIndex("l2").build(vectors)
    side = fastest(SIDES[:1] if quick else SIDES)
    product, figures = square(side), []
    for batch in (100, 256):
        part = queries[:batch]
        share = 2 * n * dim * batch / (2 * side**3)
        ours = against(product, {"ours": lambda part=part: index.search(part, k)}, repeats)["ours"]
        figures.append(_share(f"batch {batch}: share of the product's rate", ours, share))
        found = against(lambda part=part: index.search(part, k), rivals(vectors, part, k), max(2, repeats // 3))
        figures += [Figure.of(f"batch {batch}: {name}, in units of ours", ratio) for name, ratio in found.items()]
    return Result(WHAT, repeats, figures, {"n": n, "dim": dim, "k": k, "side": side})


def _share(what: str, ratio: Ratio, work: float) -> Figure:
    """The rate of a search over that of the product, from the ratio of their times and of their operations."""
    return Figure(what, work / ratio.least, work / ratio.median, BOUND, True, [work / pair for pair in ratio.pairs])


def square(side: int) -> Callable[[], Tensor]:
    """A square matrix product."""
    a, b, out = (torch.rand(side, side, generator=torch.Generator().manual_seed(s)) for s in range(3))
    return lambda: torch.mm(a, b, out=out)


def fastest(sides: tuple[int, ...]) -> int:
    """The size at which the product does most operations a second."""
    first, *others = sides
    found = against(square(first), {str(side): square(side) for side in others}, 3)
    rates = {int(side): (int(side) / first) ** 3 / ratio.least for side, ratio in found.items()}
    return max({first: 1.0, **rates}.items(), key=lambda item: item[1])[0]


def rivals(vectors: Tensor, queries: Tensor, k: int) -> dict[str, Task]:
    """The same search by others, on one thread; FAISS where it is installed."""
    from sklearn.neighbors import NearestNeighbors
    from threadpoolctl import threadpool_limits

    brute = NearestNeighbors(algorithm="brute").fit(vectors.numpy())

    def by_sklearn() -> object:
        with threadpool_limits(1):
            return brute.kneighbors(queries.numpy(), k)

    found: dict[str, Task] = {"scikit-learn brute force": by_sklearn}
    try:
        import faiss
    except Exception:  # not installed, or its libraries do not load
        return found
    faiss.omp_set_num_threads(1)
    flat = faiss.IndexFlatL2(vectors.shape[1])
    flat.add(vectors.numpy())
    return {**found, "FAISS IndexFlatL2": lambda: flat.search(queries.numpy(), k)}
