"""The search engines side by side: `python -m benchmarks.engines [--n 1000000] [--dim 256] [--data D --weights F]`.

Everything is built first; then each batch size is timed in rounds over all engines, so that ratios are of times taken
in turn. Wall time, since several threads work; run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import mixture, real_features
from benchmarks.memory import anonymous_memory
from benchmarks.record import HEADER, Figure, Result, row, write
from robustknn.neighbors import make_index
from robustknn.neighbors.faiss_module import load_faiss

KINDS = ("ivf-flat", "ivf-sq8", "ivf-pq", "hnsw")
BATCHES = (1, 100, 256, 1000)
SHARE, TIMES, RECALL = 0.70, 25.0, 0.98
_CHUNK = 65_536
_SINGLES = 20
WHAT = (
    "Search by L2 for the k nearest: seconds of all cores together to build, bytes of the index as it is saved "
    "without vectors, gain in anonymous memory, queries a second (the best of the rounds, wall time), recall of the "
    "exact neighbors and how often the majority label of the k is that of exact search. 'share of the product' is "
    "the time of a float32 matrix product of the same shape (all references × the batch) over that of exact search. "
    "'plain faiss' is the same faiss index used directly, with its own defaults except the number of lists and the "
    "effort of a search (nprobe, efSearch); product codes are not re-ranked there, and the centroids are learned "
    "once, for ivf-flat."
)


@dataclass(frozen=True)
class Engine:
    """Something that searches: ids (B, k) of queries (B, D), and what it cost to have it."""

    search: Callable[[Tensor], Tensor]
    seconds: float
    gained: int
    size: int


def built(make: Callable[[], Any]) -> tuple[Any, float, int]:
    """What `make` makes, the seconds of all threads together it took, and the anonymous memory it left in use."""
    before, start = anonymous_memory(), time.process_time()
    made = make()
    return made, time.process_time() - start, anonymous_memory() - before


def saved_size(index: Any) -> int:
    """How many bytes faiss writes of an index, counted, not kept."""
    faiss, counted = load_faiss(), [0]

    def count(data: bytes) -> int:
        counted[0] += len(data)
        return len(data)

    writer = faiss.PyCallbackIOWriter(count)
    faiss.write_index(index, writer)
    return counted[0]


def ours(kind: str, vectors: Tensor, labels: Tensor, k: int) -> tuple[Engine, Any]:
    """One of our engines, and the index itself."""
    index, seconds, gained = built(lambda: make_index(kind, "l2").build(vectors, labels))
    size = 0 if kind == "exact" else saved_size(index._index)

    def search(queries: Tensor) -> Tensor:
        return index.search(queries, k).ids

    return Engine(search, seconds, gained, size), index


def plain_faiss(kind: str, mine: Any, vectors: Tensor, k: int, quantizer: Any) -> tuple[Engine, Any]:
    """The same faiss index used as its own examples use it, and the index itself.

    Args:
        quantizer: the trained centroids of its lists, of another plain index; None trains them.
    """
    faiss, dim = load_faiss(), vectors.shape[1]
    faiss.omp_set_num_threads(torch.get_num_threads())

    def make() -> Any:
        if kind == "exact":
            index = faiss.IndexFlatL2(dim)
        elif kind == "hnsw":
            index = faiss.IndexHNSWFlat(dim, mine.neighbors)
            index.hnsw.efConstruction, index.hnsw.efSearch = mine.ef_construction, mine.ef_search
        else:
            code = {"ivf-flat": "Flat", "ivf-sq8": "SQ8", "ivf-pq": f"PQ{dim // 4}x4fs"}[kind]
            index = faiss.index_factory(dim, f"IVF{mine._index.nlist},{code}")
            index.nprobe = mine.probes
            if quantizer is not None:
                index.own_fields, index.quantizer = False, quantizer
        index.train(vectors.numpy())
        index.add(vectors.numpy())
        return index

    index, seconds, gained = built(make)
    return Engine(lambda q: torch.from_numpy(index.search(q.numpy(), k)[1]), seconds, gained, saved_size(index)), index


def peers(vectors: Tensor, k: int, threads: int) -> Iterator[tuple[str, Engine | None]]:
    """Others, with their defaults; None for one that is not installed."""
    from sklearn.neighbors import NearestNeighbors
    from threadpoolctl import threadpool_limits

    brute, seconds, gained = built(lambda: NearestNeighbors(algorithm="brute").fit(vectors.numpy()))

    def by_sklearn(queries: Tensor) -> Tensor:
        with threadpool_limits(threads):
            return torch.from_numpy(brute.kneighbors(queries.numpy(), k, return_distance=False))

    yield "scikit-learn brute force", Engine(by_sklearn, seconds, gained, 0)
    try:
        from usearch.index import Index
    except Exception:  # not installed, or its libraries do not load
        yield "usearch", None
        return

    def make() -> Any:
        index = Index(ndim=vectors.shape[1], metric="l2sq", dtype="f32")
        index.add(np.arange(len(vectors)), vectors.numpy(), threads=threads)
        return index

    index, seconds, gained = built(make)

    def by_usearch(queries: Tensor) -> Tensor:
        found = index.search(queries.numpy(), k, threads=threads).keys
        return torch.from_numpy(np.asarray(found).reshape(len(queries), -1).astype(np.int64))

    yield "usearch", Engine(by_usearch, seconds, gained, index.memory_usage)


def rates(tasks: dict[str, Callable[[Tensor], object]], queries: Tensor, batch: int, repeats: int) -> dict[str, float]:
    """Queries a second of each task, the best of rounds over all of them."""
    parts = queries[:batch].split(batch) if batch > 1 else queries[:_SINGLES].split(1)
    count, best = sum(map(len, parts)), dict.fromkeys(tasks, float("inf"))
    for turn in range(repeats + 1):  # the first does not count
        for name, task in tasks.items():
            start = time.perf_counter()
            for part in parts:
                task(part)
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return {name: count / seconds for name, seconds in best.items()}


def product_of(vectors: Tensor, batch: int) -> Callable[[Tensor], object]:
    """The bare product of all references with the queries, in chunks as the search makes it."""
    out = torch.empty(min(_CHUNK, len(vectors)), batch)

    def multiply(queries: Tensor) -> None:
        for part in vectors.split(_CHUNK):
            torch.mm(part, queries.T, out=out[: len(part), : len(queries)])

    return multiply


def votes(ids: Tensor, labels: Tensor) -> Tensor:
    """The majority label of each query's neighbors, the smallest of equals; a missing one does not vote."""
    one_hot = torch.nn.functional.one_hot(labels[ids.clamp_min(0)], int(labels.max()) + 1)
    return (one_hot * (ids >= 0)[..., None]).sum(1).argmax(1)


def recall(found: Tensor, exact: Tensor) -> float:
    """The share of the exact neighbors that were found."""
    return float(np.mean([np.isin(e, f).mean() for f, e in zip(found.numpy(), exact.numpy(), strict=True)]))


def run(vectors: Tensor, labels: Tensor, queries: Tensor, k: int, repeats: int, with_peers: bool) -> list[Figure]:
    """Build, compare and time everything."""
    engines: dict[str, Engine | None] = {}
    quantizer = None
    for kind in ("exact", *KINDS):
        engines[kind], index = ours(kind, vectors, labels, k)
        _say(f"built {kind}: {engines[kind].seconds:.1f} s")
        if with_peers:
            plain, index = plain_faiss(kind, index, vectors, k, quantizer)
            engines[f"plain faiss, {kind}"] = plain
            quantizer = quantizer or getattr(index, "quantizer", None)
            _say(f"built plain faiss, {kind}: {plain.seconds:.1f} s")
    if with_peers:
        engines |= dict(peers(vectors, k, torch.get_num_threads()))
    known = {name: engine for name, engine in engines.items() if engine is not None}
    figures = [Figure(f"{name}: not installed", 0) for name in engines if name not in known]
    exact = known["exact"].search(queries)
    large = len(vectors) >= 1_000_000
    for name, engine in known.items():
        found = engine.search(queries)
        kept = recall(found, exact)
        figures += [
            Figure(f"{name}: core seconds to build", engine.seconds),
            Figure(f"{name}: index, GB", engine.size / 1e9),
            Figure(f"{name}: anonymous memory gained, GB", engine.gained / 1e9),
            Figure(f"{name}: recall", kept, bound=RECALL if large and name == "ivf-flat" else None, at_least=True),
            Figure(f"{name}: votes as exact", float((votes(found, labels) == votes(exact, labels)).double().mean())),
        ]
    for batch in (b for b in BATCHES if b <= len(queries)):
        tasks: dict[str, Callable[[Tensor], object]] = {name: engine.search for name, engine in known.items()}
        found_rates = rates({"the product": product_of(vectors, batch), **tasks}, queries, batch, repeats)
        multiplied = found_rates.pop("the product")
        flops = 2 * vectors.numel() * multiplied / 1e9
        figures.append(Figure(f"batch {batch}: the product, GFLOP/s", flops))
        share = found_rates["exact"] / multiplied
        bound = SHARE if batch >= 256 else None
        figures.append(Figure(f"batch {batch}: exact, share of the product", share, bound=bound, at_least=True))
        for name, rate in found_rates.items():
            figures.append(Figure(f"batch {batch}: {name}, queries/s", rate))
            goal = TIMES if large and name == "ivf-flat" and batch >= 100 else None
            if name != "exact":
                times = rate / found_rates["exact"]
                figures.append(Figure(f"batch {batch}: {name}, times exact", times, bound=goal, at_least=True))
        _say(f"timed batches of {batch}")
    return figures


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write a JSON file; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=WHAT)
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10: real features in place of the generator")
    parser.add_argument("--weights", type=Path, help="weights of a ResNet-20, with --data")
    parser.add_argument("--no-peers", action="store_true", help="our engines alone")
    parser.add_argument("--out", type=Path, help="where to write the JSON file")
    args = parser.parse_args(argv)
    if (args.data is None) != (args.weights is None):
        parser.error("--data and --weights go together.")
    torch.set_num_threads(args.threads)
    if args.data is None:
        generator = mixture.Mixture(args.dim, args.seed)
        vectors, labels = generator.rows(0, args.n)
        queries = generator.queries(args.queries)
    else:
        vectors, labels, queries = real_features.features(args.data, args.weights, args.dim, args.n, args.queries)
    figures = run(vectors, labels, queries, args.k, args.repeats, not args.no_peers)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "data", "weights")}
    settings["vectors"] = mixture.NAME if args.data is None else real_features.NAME
    result = Result(WHAT, args.repeats, figures, settings)
    print("\n".join((*HEADER, *(row("engines", figure) for figure in figures))))
    if args.out is not None:
        command = "python -m benchmarks.engines " + shlex.join(argv if argv is not None else sys.argv[1:])
        write(args.out, "engines", result, False, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
