"""The figures from which `plan` computes: each with its unit, its source, and what kind of figure it is.

A benchmark run elsewhere replaces a value and its source here; nothing else holds a figure.
"""

from __future__ import annotations

from dataclasses import dataclass

MEASURED, PUBLISHED, ASSUMED = "measured", "published", "assumed"
LARGEST_RUN = 1_000_000
"""Vectors of the largest run behind the figures measured here."""

_BOX = "2 cores (AMD Zen 5), 23 GB"
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
    "exact product": Constant(
        61e9, "FLOP/s a core", MEASURED, f"exact engine, 100k x 256, k 50, batch 100: 2,388 queries/s on {_BOX}"
    ),
    "exact read": Constant(
        12.3e9, "bytes/s", MEASURED, f"exact engine, 1M x 256, batch 1: 12 queries/s on {_BOX}, shared with other work"
    ),
    "list scan": Constant(
        7.8e9,
        "numbers/s a core",
        MEASURED,
        f"IVF4096,Flat, nprobe 32, 1M x 256, batch 1,000: 5,119 queries/s on {_BOX}, shared with other work; centers "
        "and list entries compared, times their length",
    ),
    "list scan, one query": Constant(
        9.0e9, "numbers/s", MEASURED, f"the same, batch 1: 2,955 queries/s on {_BOX}, shared with other work"
    ),
    "speed of sq8": Constant(
        1.17, "times ivf-flat", MEASURED, f"IVF1024, nprobe 32, 100k x 256, batch 1,000: 4,999 to 4,283 on {_BOX}"
    ),
    "speed of pq": Constant(
        1.7,
        "times ivf-flat",
        MEASURED,
        f"IVF4096, nprobe 32, 1M x 256, 8 k re-ranked, batch 1,000: 8,677 to 5,119 on {_BOX}",
    ),
    "clustering": Constant(
        32e9,
        "FLOP/s a core",
        MEASURED,
        f"IVF1024, 100k x 256: trained (10 rounds) and filled in 9 s on {_BOX}, shared with other work",
    ),
    "graph search": Constant(
        21e-6,
        "core-seconds a query and doubling of n",
        MEASURED,
        f"HNSW32, ef 200, 100k x 256, batch 1,000: 5,607 queries/s on {_BOX}, shared with other work",
    ),
    "graph building": Constant(
        1.16e-5,
        "core-seconds a vector and doubling of n",
        MEASURED,
        f"HNSW32, 100k x 256: 9.6 s on {_BOX}, shared with other work",
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
    "ivf-flat": (".98", f"measured: recall@50, 1M x 256, nprobe 32, {_BOX}"),
    "ivf-sq8": (".995", f"measured: recall@50, 100k x 256, nprobe 32, not re-ranked, {_BOX}"),
    "ivf-pq": (".82", f"measured: recall@50, 1M x 256, nprobe 32, 8 k re-ranked, {_BOX}"),
    "hnsw": ("1.00", f"measured: recall@50, 100k x 256, ef 200, {_BOX}"),
    "ivf-flat-disk": (".98", f"as ivf-flat; on 400k x 256 from disk 1.00 was measured, {_BOX}"),
    "ivf-sq8-disk": (".995", "as ivf-sq8"),
    "diskann (Milvus)": (".95", f"published: 1-recall@1, {_DISKANN}"),
    "ivf-sq8 (Milvus)": (".995", "as ivf-sq8 in every shard"),
}
"""Recall that was seen, and where: it falls with the number of vectors unless more lists are looked through."""
