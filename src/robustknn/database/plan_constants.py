"""The figures from which `plan` computes: each with its unit, its source, and what kind of figure it is.

A benchmark run elsewhere replaces a value and its source here; nothing else holds a figure.
"""

from __future__ import annotations

from dataclasses import dataclass

MEASURED, PUBLISHED, ASSUMED = "measured", "published", "assumed"
LARGEST_RUN = 1_000_000
"""Vectors of the largest run behind the figures measured here."""

_BOX = "2 cores (AMD Zen 5), 23 GB"
_RUN = f"1M x 256, k 50, on {_BOX}"
_DISKANN = "Subramanya et al., DiskANN, NeurIPS 2019: 1B x 128 bytes (SIFT), 16 cores, 64 GB and an SSD"


@dataclass(frozen=True)
class Constant:
    """One figure.

    Attributes:
        kind: "measured" here, "published" elsewhere, or "assumed".
        source: of what it was measured (number x length of the vectors, machine), who published it, or why assumed.
    """

    value: float
    unit: str
    kind: str
    source: str


CONSTANTS: dict[str, Constant] = {
    "exact product": Constant(71e9, "FLOP/s a core", MEASURED, f"exact engine, {_RUN}, batch 1,000: 278 queries/s"),
    "exact read": Constant(22.6e9, "bytes/s", MEASURED, f"exact engine, {_RUN}, batch 1: 22 queries/s"),
    "list scan": Constant(
        5.5e9,
        "numbers/s a core",
        MEASURED,
        f"ivf-flat, 32 of 4,000 lists, {_RUN}, batch 1,000: 3,591 queries/s; centers and list entries compared, times "
        "their length",
    ),
    "list scan, one query": Constant(2.6e9, "numbers/s", MEASURED, f"the same, {_RUN}, batch 1: 850 queries/s"),
    "speed of sq8": Constant(
        0.89, "times ivf-flat", MEASURED, f"ivf-sq8, the same lists, 2 k re-ranked, {_RUN}, batch 1,000: 3,180 to 3,591"
    ),
    "speed of pq": Constant(
        0.62, "times ivf-flat", MEASURED, f"ivf-pq, the same lists, 16 k re-ranked, {_RUN}, batch 1,000: 2,211 to 3,591"
    ),
    "clustering": Constant(
        89e9,
        "FLOP/s a core",
        MEASURED,
        f"ivf-flat, 4,000 lists, {_RUN}: learned in 10 rounds and filled, 82 core-seconds",
    ),
    "graph search": Constant(
        2.97e-5,
        "core-seconds a query and doubling of n",
        MEASURED,
        f"hnsw, 64 edges, ef 128, {_RUN}, batch 1,000: 3,382 queries/s",
    ),
    "graph building": Constant(
        1.53e-5, "core-seconds a vector and doubling of n", MEASURED, f"hnsw, 64 edges, {_RUN}: 306 s, one thread"
    ),
    "Milvus, one query": Constant(
        0.031, "s", MEASURED, f"Milvus 2.3.5 standalone, HNSW, 20k x 64, batch 1, by its protocol, on {_BOX}"
    ),
    "Milvus, in batches": Constant(
        0.0022, "s a query", MEASURED, f"Milvus 2.3.5 standalone, HNSW, 20k x 64, batch 100, by its protocol, on {_BOX}"
    ),
    "DiskANN": Constant(5000 / 16, "queries/s a core", PUBLISHED, f"{_DISKANN}: more than 5,000 queries/s"),
    "DiskANN, one query": Constant(0.003, "s", PUBLISHED, f"{_DISKANN}: less than 3 ms in the mean"),
    "disk read": Constant(3e9, "bytes/s", ASSUMED, "one NVMe drive, long reads"),
    "disk write": Constant(1e9, "bytes/s", ASSUMED, "one NVMe drive, long writes"),
    "disk rows": Constant(500e3, "reads/s", ASSUMED, "one NVMe drive, 4 KiB reads, many at once"),
    "extraction": Constant(2500, "images/s a GPU", ASSUMED, "a ResNet-50 at 224 x 224, if the images arrive as fast"),
    "memory price": Constant(5, "$ a GB and month", ASSUMED, "rented"),
    "disk price": Constant(0.10, "$ a GB and month", ASSUMED, "rented NVMe"),
    "core price": Constant(0.03, "$ a core and hour", ASSUMED, "rented, 730 hours a month"),
    "GPU price": Constant(2, "$ a GPU and hour", ASSUMED, "rented"),
}

RECALL: dict[str, tuple[str, str]] = {
    "exact": ("1", "by construction"),
    "exact-fp16": ("1", "of the vectors rounded to float16"),
    "ivf-flat": (".99", f"measured: recall@50, {_RUN}, 32 lists"),
    "ivf-sq8": (".99", f"measured: recall@50, {_RUN}, 32 lists, 2 k re-ranked"),
    "ivf-pq": (".87", f"measured: recall@50, {_RUN}, 32 lists, 16 k re-ranked"),
    "hnsw": (".95", f"measured: recall@50, {_RUN}, ef 128"),
    "ivf-flat-disk": (".99", f"as ivf-flat; 20M x 64 from disk: 1.00 measured, {_BOX}"),
    "ivf-sq8-disk": (".99", "as ivf-sq8"),
    "diskann (Milvus)": (".95", f"published: 1-recall@1, {_DISKANN}"),
    "ivf-sq8 (Milvus)": (".99", "as ivf-sq8 in every shard"),
}
"""Recall that was seen, and where: it falls with the number of vectors unless more lists are looked through."""
