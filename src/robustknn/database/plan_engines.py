"""What one machine's share of a database costs with each engine: bytes, and times from smaller runs.

Bytes follow from what an engine stores. Times are figures of `plan_constants`, scaled by the numbers that are compared
or read; a single query is never counted faster than two cores were.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from robustknn.database.plan_constants import CONSTANTS
from robustknn.neighbors.faiss_kinds import IVFFlatIndex, IVFPQIndex, IVFSQ8Index, lists_for, probes_for

BUFFER = 256e6
"""Bytes of working memory of an engine whose vectors stay on the disk."""
HALF = 0.5
"""The share of the memory that an index may take: the rest is for network, queries and the disk's cache."""
_BATCH = 1000
_ROUNDS, _A_LIST = 10, 64
_RERANK = {
    "ivf-flat": IVFFlatIndex.rerank_default,
    "ivf-sq8": IVFSQ8Index.rerank_default,
    "ivf-pq": IVFPQIndex.rerank_default,
}
_SPEED = {"ivf-flat": (), "ivf-sq8": ("speed of sq8",), "ivf-pq": ("speed of pq",)}
_PAGE = 4096
_WRITE = ("disk write",)


@dataclass(frozen=True)
class Figure:
    """One result.

    Attributes:
        value: None where there is nothing to compute it from.
        unit: "bytes", "s", "1/s", "$" or "".
        formula: how it was computed, in words.
        constants: the names of the constants it was computed with; none for plain arithmetic.
    """

    value: float | None
    unit: str
    formula: str
    constants: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of which kinds these constants are; none for plain arithmetic."""
        return tuple(sorted({CONSTANTS[name].kind for name in self.constants}))


@dataclass(frozen=True)
class Share:
    """What one machine holds.

    Attributes:
        n, dim: vectors and their length.
        k: neighbors of a query.
        payload: bytes kept beside a vector.
        memory, cores: of the machine.
    """

    n: int
    dim: int
    k: int
    payload: int
    memory: float
    cores: int

    @property
    def lists(self) -> int:
        """How many lists the engines make."""
        return lists_for(self.n)

    @property
    def probes(self) -> int:
        """How many of them a search looks through."""
        return probes_for(self.lists)

    @property
    def compared(self) -> float:
        """Numbers compared for a query: the centers, and the vectors of the lists looked through."""
        return (self.lists + self.probes * self.n / self.lists) * self.dim

    def entry(self, kind: str) -> float:
        """Bytes of a vector in a list, with its id."""
        return 8 + {"ivf-flat": 4 * self.dim, "ivf-sq8": self.dim, "ivf-pq": math.ceil(self.dim / 4) / 2}[kind]

    def stored(self, width: int = 2) -> float:
        """Bytes on the disk of the vectors, at `width` bytes a number, and the payload."""
        return self.n * (width * self.dim + self.payload)

    def reads(self, rerank: int, held: float) -> Figure:
        """Seconds of reading for a query: the candidates that are measured again, and the payload of the winners.

        Args:
            held: bytes on the disk; half of the memory keeps them at hand where they fit.
        """
        if held <= HALF * self.memory:
            return Figure(0.0, "s", "rows to measure again lie in the disk's cache")
        pages = self.k * (rerank * math.ceil(2 * self.dim / _PAGE) + 1)
        return Figure(pages / value("disk rows"), "s", f"{pages:,} rows read from the disk", ("disk rows",))


@dataclass(frozen=True)
class Cost:
    """The figures of one share."""

    memory: Figure
    disk: Figure
    build: Figure
    latency: Figure
    throughput: Figure


def value(name: str) -> float:
    """A constant's value."""
    return CONSTANTS[name].value


def _bytes(amount: float, formula: str) -> Figure:
    return Figure(amount, "bytes", formula)


_NOTHING_BUILT = Figure(0.0, "s", "nothing is built")


def _exact(s: Share) -> Cost:
    held, operations = 4.0 * s.n * s.dim, 2.0 * s.n * s.dim
    return Cost(
        _bytes(held, "4 d a vector"),
        _bytes(s.stored(4), "4 d a vector, and the payload"),
        _NOTHING_BUILT,
        Figure(held / value("exact read"), "s", "4 n d bytes read from memory, as by two cores", ("exact read",)),
        Figure(value("exact product") * s.cores / operations, "1/s", "2 n d operations a query", ("exact product",)),
    )


def _exact_fp16(s: Share) -> Cost:
    read, product = 2.0 * s.n * s.dim, 2.0 * s.n * s.dim / (value("exact product") * s.cores)
    source = "exact read" if read <= HALF * s.memory else "disk read"
    scan, used = read / value(source), ("exact product", source)
    return Cost(
        _bytes(BUFFER, "256 MB of working memory; what is free caches the file"),
        _bytes(s.stored(), "2 d a vector, and the payload"),
        _NOTHING_BUILT,
        Figure(max(scan, product), "s", "2 n d bytes read", used),
        Figure(
            1 / max(scan / _BATCH, product),
            "1/s",
            f"2 n d bytes read for {_BATCH:,} queries, 2 n d operations each",
            used,
        ),
    )


def _lists(kind: str, on_disk: bool = False) -> Callable[[Share], Cost]:
    """An engine of inverted lists, in memory or on the disk."""
    speed = _SPEED[kind]
    times = math.prod(value(name) for name in speed)

    def cost(s: Share) -> Cost:
        centers, entries = 4.0 * s.lists * s.dim, s.n * s.entry(kind)
        held = s.stored() + entries + centers
        memory = Figure(entries + centers, "bytes", f"{s.entry(kind):g} a vector, and the centers of the lists")
        build, reads = _clustered(s), s.reads(_RERANK[kind], held)
        if on_disk:
            memory = Figure(BUFFER + centers, "bytes", "256 MB of working memory, and the centers of the lists")
            build = _plus(build, Figure(2 * (entries + centers) / value("disk write"), "s", "written twice", _WRITE))
            read = s.probes * s.n / s.lists * s.entry(kind)
            source = "disk read" if reads.value else "exact read"
            reads = _plus(reads, Figure(read / value(source), "s", "the lists read", (source,)))
        scan, lists = s.compared / times, f"{s.probes:,} of {s.lists:,} lists"
        one = Figure(scan / value("list scan, one query"), "s", lists, ("list scan, one query", *speed))
        many = Figure(scan / (value("list scan") * s.cores), "s", lists, ("list scan", *speed))
        return Cost(
            memory,
            Figure(held, "bytes", f"2 d + {s.entry(kind):g} a vector, the centers, and the payload"),
            build,
            _plus(one, reads),
            _rate(many, reads),
        )

    return cost


def _clustered(s: Share) -> Figure:
    operations = 2.0 * (_ROUNDS * min(s.n, _A_LIST * s.lists) + s.n) * s.lists * s.dim
    how = f"{_ROUNDS} rounds of clustering on {_A_LIST} vectors a list, then each vector to its list"
    return Figure(operations / (value("clustering") * s.cores), "s", how, ("clustering",))


def _plus(one: Figure, other: Figure) -> Figure:
    """Two times, one after the other."""
    assert one.value is not None
    assert other.value is not None
    used = tuple(dict.fromkeys((*one.constants, *other.constants)))
    return Figure(one.value + other.value, "s", f"{one.formula}; {other.formula}", used)


def _rate(one: Figure, other: Figure) -> Figure:
    """Queries a second where two times of each query pass at once."""
    assert one.value is not None
    assert other.value is not None
    both = _plus(one, other)
    return replace(both, value=1 / max(one.value, other.value), unit="1/s")


def _hnsw(s: Share) -> Cost:
    depth, index = math.log2(max(2, s.n)) * s.dim / 256, s.n * (4.0 * s.dim + 264)
    held, how, used = s.stored() + index, "log2 n steps of length d", ("graph search",)
    search, reads = value("graph search") * depth, s.reads(1, held)
    built = value("graph building") * s.n * depth
    return Cost(
        _bytes(index, "4 d + 264 a vector: itself and 64 edges"),
        _bytes(held, "6 d + 264 a vector, and the payload"),
        Figure(built, "s", "n log2 n steps of length d, on one thread, so that it repeats", ("graph building",)),
        _plus(Figure(search, "s", how, used), reads),
        _rate(Figure(search / s.cores, "s", how, used), reads),
    )


def _diskann(s: Share) -> Cost:
    made = Cost(
        _bytes(s.n * math.ceil(s.dim / 8), "d / 8 a vector: product codes"),
        _bytes(s.n * (4.0 * s.dim + 256 + s.payload), "4 d + 256 a vector: itself and 64 edges; and the payload"),
        Figure(None, "s", "no figure at hand"),
        Figure(value("DiskANN, one query"), "s", "as published, whatever n and d", ("DiskANN, one query",)),
        Figure(value("DiskANN") * s.cores, "1/s", "as published, whatever n and d", ("DiskANN",)),
    )
    return _by_protocol(made)


def _milvus(s: Share) -> Cost:
    held = s.n * (4.0 * s.dim + s.entry("ivf-sq8") + s.payload) + 4.0 * s.lists * s.dim
    disk = _bytes(held, f"4 d + {s.entry('ivf-sq8'):g} a vector, the centers, and the payload")
    return _by_protocol(replace(_lists("ivf-sq8")(s), disk=disk))


def _by_protocol(inside: Cost) -> Cost:
    """What a client of Milvus sees of an index inside it."""
    way = Figure(value("Milvus, one query"), "s", "the way through the protocol", ("Milvus, one query",))
    many = inside.throughput
    assert many.value is not None
    return replace(
        inside,
        latency=_plus(inside.latency, way),
        throughput=replace(
            many,
            value=min(many.value, 1 / value("Milvus, in batches")),
            formula=f"{many.formula}; no more than one client's way through the protocol lets pass",
            constants=(*many.constants, "Milvus, in batches"),
        ),
    )


ENGINES: dict[str, Callable[[Share], Cost]] = {
    "exact": _exact,
    "exact-fp16": _exact_fp16,
    "ivf-flat": _lists("ivf-flat"),
    "ivf-sq8": _lists("ivf-sq8"),
    "ivf-pq": _lists("ivf-pq"),
    "hnsw": _hnsw,
    "ivf-flat-disk": _lists("ivf-flat", on_disk=True),
    "ivf-sq8-disk": _lists("ivf-sq8", on_disk=True),
    "diskann (Milvus)": _diskann,
    "ivf-sq8 (Milvus)": _milvus,
}
"""By name, what a share costs. "exact-fp16" streams vectors mapped from the disk; Milvus is a cluster of its own."""
