"""An index larger than the memory it takes: `python -m benchmarks.on_disk --folder DIR [--n 20000000] [--dim 64]`.

Vectors are generated block by block into a mapped file, an index of inverted lists is built beside them in blocks, and
both are searched, by the lists and exactly. The anonymous memory of the process (RssAnon in /proc) is watched all the
while; the mapped files do not count as that. The folder holds three times the vectors while the lists are merged, and
is emptied of them afterwards unless --keep; a run that was stopped goes on with its blocks.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import mixture
from benchmarks.engines import recall, votes
from benchmarks.memory import anonymous_memory
from benchmarks.record import HEADER, Figure, Result, row, write
from robustknn import store
from robustknn.neighbors import ExactIndex, make_index
from robustknn.progress import Console

VECTORS, LABELS = "vectors.npy", "labels.npy"
TIMES = 8.0
_BLOCK = 262_144
_BATCH = 50
WHAT = (
    "Inverted lists on a disk, built in blocks from a mapped file and searched by L2, beside exact search of the same "
    "file: the largest anonymous memory (RssAnon) beyond that of the interpreter and libraries, the size of the "
    "vectors in units of it, seconds, milliseconds a query, recall of the exact neighbors and how often the majority "
    "label of the k is that of exact search."
)


class Watch:
    """The largest anonymous memory beyond what there was at the start, looked at every 20 ms, in bytes."""

    def __init__(self) -> None:
        self.start, self.peak, self._done = anonymous_memory(), 0, threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.peak, self._done = 0, threading.Event()
        thread = threading.Thread(target=self._look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _look(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_memory() - self.start)
            if self._done.wait(0.02):
                return


def write_rows(folder: Path, generator: mixture.Mixture, n: int) -> None:
    """The generator's first n rows and their labels as `.npy` files, whole or not at all."""
    if (folder / VECTORS).exists():
        return
    with store.atomic_path(folder / VECTORS) as partial, store.atomic_path(folder / LABELS) as beside:
        vectors: Any = np.lib.format.open_memmap(partial, "w+", np.float32, (n, generator.dim))
        labels: Any = np.lib.format.open_memmap(beside, "w+", np.int64, (n,))
        for start in range(0, n, _BLOCK):
            rows, classes = generator.rows(start, min(_BLOCK, n - start))
            vectors[start : start + len(rows)], labels[start : start + len(rows)] = rows.numpy(), classes.numpy()
        del vectors, labels  # which writes what is left to the disk


def timed(task: Callable[[], Any]) -> tuple[Any, float]:
    """What a task gives, and its seconds."""
    start = time.perf_counter()
    return task(), time.perf_counter() - start


def in_batches(index: Any, queries: Tensor, k: int) -> Tensor:
    """Ids (B, k), a few queries at a time."""
    return torch.cat([index.search(part, k).ids for part in queries.split(_BATCH)])


def run(folder: Path, args: argparse.Namespace) -> list[Figure]:
    """Write, build, search."""
    generator = mixture.Mixture(args.dim, args.seed)
    write_rows(folder, generator, args.n)
    queries = generator.queries(args.queries)
    _warm_up(folder, args)
    watch, size = Watch(), args.n * args.dim * 4
    vectors, labels = (store.load_array(folder / name, mapped=True) for name in (VECTORS, LABELS))
    spec = f"{args.kind}:path={folder / 'index'},memory_mb={args.memory_mb}"
    with watch.watching():
        index, built = timed(lambda: make_index(spec, "l2").build(vectors, progress=Console()))  # type: ignore[call-arg]
    building = watch.peak
    lists = (folder / "index" / "lists.ivfdata").stat().st_size
    del index
    index, opened = timed(lambda: make_index(str(folder / "index"), "l2"))
    index.attach(lambda: (vectors, None), labels, None)
    with watch.watching():
        first, cold = timed(lambda: in_batches(index, queries, args.k))
        found, warm = timed(lambda: in_batches(index, queries, args.k))
    searching = watch.peak
    assert torch.equal(first, found)
    with watch.watching():
        exact_index, read = timed(lambda: ExactIndex("l2", memory_mb=args.memory_mb).adopt(vectors, None, None))
        exact, scanned = timed(lambda: exact_index.search(queries, args.k).ids)
    most = max(building, searching)
    agree = float((votes(found, labels) == votes(exact, labels)).double().mean())
    return [
        Figure("vectors, GB", size / 1e9),
        Figure("lists, GB", lists / 1e9),
        Figure("building: anonymous memory at its peak, GB", building / 1e9),
        Figure("searching: anonymous memory at its peak, GB", searching / 1e9),
        Figure("vectors in units of the larger", size / max(most, 1), bound=TIMES, at_least=True),
        Figure("vectors and lists in units of the larger", (size + lists) / max(most, 1)),
        Figure("exact search: anonymous memory at its peak, GB", watch.peak / 1e9),
        Figure("building, seconds", built),
        Figure("opening, seconds", opened),
        Figure("searching the first time, ms a query", 1e3 * cold / len(queries)),
        Figure("searching again, ms a query", 1e3 * warm / len(queries)),
        Figure("exact search: reading once to prepare, seconds", read),
        Figure("exact search, ms a query", 1e3 * scanned / len(queries)),
        Figure("recall", recall(found, exact)),
        Figure("votes as exact", agree),
    ]


def _warm_up(folder: Path, args: argparse.Namespace) -> None:
    """Let the libraries take what they keep, on an index of nothing."""
    small = torch.randn(5000, args.dim)
    place = folder / "small"
    shutil.rmtree(place, ignore_errors=True)
    make_index(f"{args.kind}:path={place}", "l2").build(small).search(small[:_BATCH], args.k)
    ExactIndex("l2", memory_mb=8).build(small).search(small[:_BATCH], args.k)
    shutil.rmtree(place)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write a JSON file; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_disk", description=WHAT)
    parser.add_argument("--folder", type=Path, required=True, help="where vectors and lists are written")
    parser.add_argument("--n", type=int, default=20_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--kind", choices=("ivf-flat-disk", "ivf-sq8-disk"), default="ivf-flat-disk")
    parser.add_argument("--memory-mb", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", action="store_true", help="leave vectors and index in the folder")
    parser.add_argument("--out", type=Path, help="where to write the JSON file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    figures = run(args.folder, args)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "folder", "keep")}
    settings["vectors"] = mixture.NAME
    print("\n".join((*HEADER, *(row("on_disk", figure) for figure in figures))))
    if args.out is not None:
        command = "python -m benchmarks.on_disk " + shlex.join(argv if argv is not None else sys.argv[1:])
        write(args.out, "on_disk", Result(WHAT, 1, figures, settings), False, command)
    if not args.keep:
        for name in (VECTORS, LABELS):
            (args.folder / name).unlink()
        shutil.rmtree(args.folder / "index")
    return 0


if __name__ == "__main__":
    sys.exit(main())
