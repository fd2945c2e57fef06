"""The engine that fits: exact while that is quick, inverted lists in memory while they fit, on a disk beyond."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from robustknn import registry
from robustknn.checks import check_positive_int
from robustknn.errors import InputError
from robustknn.neighbors.base import Choice, ClassNeighbors, NeighborIndex, Neighbors, Vectors, empty

EXACT_NUMBERS = 250_000_000
"""Up to so many numbers (vectors × length) every query is compared with all: about 10 ms a query on two cores."""
_UNKNOWN_MEMORY = 8 * 2**30


def choose(n: int, dim: int, memory_bytes: int) -> Choice:
    """The engine for n vectors of length `dim` on a machine with so much memory."""
    size, lists = f"{n:,} × {dim} numbers", n * (4 * dim + 8)
    if n * dim <= EXACT_NUMBERS:
        return Choice("exact", f"{size} are few enough (at most {EXACT_NUMBERS:,}) to compare with all of them.")
    room = memory_bytes // 2
    if lists <= room:
        return Choice(
            "ivf-flat",
            f"{size} are too many to compare with all of them, and lists of {_gb(lists)} fit in half of the memory "
            f"({_gb(room)}); it is approximate.",
        )
    return Choice(
        "ivf-sq8-disk",
        f"{size} make lists of {_gb(lists)}, more than half of the memory ({_gb(room)}), so they lie on the disk in "
        f"8 bits a number ({_gb(n * (dim + 8))}); it is approximate.",
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def memory_of_machine() -> int:
    """The memory this process may use, in bytes: the machine's, or its container's limit; 8 GiB where neither tells."""
    known = []
    with suppress(AttributeError, ValueError, OSError):  # Windows has none
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such limit, or "max"
            known.append(int(Path(limit).read_text(encoding="ascii")))
    return min(known, default=_UNKNOWN_MEMORY)


@registry.indexes.register("auto")
class AutoIndex(NeighborIndex):
    """Chooses exact, ivf-flat or ivf-sq8-disk by the number of vectors, their length and the memory, and says so.

    Args:
        metric: "l2", "cosine" or "ip".
        path: the folder for lists that do not fit in memory.
        ram_mb: the memory to choose by; None takes that of the machine.
    """

    def __init__(self, metric: str = "l2", path: str | Path = "", ram_mb: int | None = None) -> None:
        super().__init__(metric)
        self.path = str(path)
        self.ram_mb = None if ram_mb is None else check_positive_int(ram_mb, "ram_mb")
        self._engine: NeighborIndex | None = None

    def resolved(self, n: int, dim: int) -> NeighborIndex:
        """The engine for n vectors of length `dim`; its `chosen` says why, and so does a warning."""
        choice = choose(n, dim, memory_of_machine() if self.ram_mb is None else self.ram_mb * 2**20)
        options = {"path": self.path} if choice.spec.endswith("-disk") else {}
        if options == {"path": ""}:
            raise InputError(f"auto chose {choice.spec}: {choice.reason[:-1]}; say where, as in auto:path=FOLDER.")
        engine: NeighborIndex = registry.indexes.create(choice.spec, metric=self.metric.name, **options)
        engine.chosen = choice
        warnings.warn(f"index auto chose {choice.spec}: {choice.reason}", stacklevel=3)
        return engine

    @property
    def engine(self) -> NeighborIndex:
        """What was chosen."""
        if self._engine is None:
            raise empty()
        return self._engine

    def _take(self, engine: NeighborIndex) -> AutoIndex:
        self._engine, self.chosen = engine, engine.chosen
        self.exact, self.updatable = engine.exact, engine.updatable
        self.reconstructs, self.distributed = engine.reconstructs, engine.distributed
        return self

    def build(self, vectors: Tensor, labels: Tensor | None = None, payload: Tensor | None = None) -> AutoIndex:
        return self._take(self.resolved(*vectors.shape).build(vectors, labels, payload))

    def add(self, vectors: Tensor, labels: Tensor | None = None, payload: Tensor | None = None) -> AutoIndex:
        return self._take(self.engine.add(vectors, labels, payload))

    def __len__(self) -> int:
        return 0 if self._engine is None else len(self._engine)

    @property
    def dim(self) -> int:
        return self.engine.dim

    def search(self, queries: Tensor, k: int) -> Neighbors:
        return self.engine.search(queries, k)

    def search_both(self, queries: Tensor, k: int, per_class: int) -> tuple[Neighbors, ClassNeighbors]:
        return self.engine.search_both(queries, k, per_class)

    def reconstruct(self, ids: Tensor) -> Tensor:
        return self.engine.reconstruct(ids)

    def reconstruct_unit(self, ids: Tensor) -> Tensor:
        return self.engine.reconstruct_unit(ids)

    def stored(self) -> Tensor | None:
        return self.engine.stored()

    def combine(self, ids: Tensor, weights: Tensor, unit: bool = False) -> Tensor:
        return self.engine.combine(ids, weights, unit)

    def attach(self, vectors: Callable[[], Vectors], labels: Tensor, payload: Tensor | None) -> None:
        self.engine.attach(vectors, labels, payload)

    def payload(self, ids: Tensor) -> Tensor:
        return self.engine.payload(ids)

    def save(self, path: Path) -> None:
        """Write the chosen engine; `make_index` and its own class read it."""
        self.engine.save(path)

    @classmethod
    def load(cls, path: Path) -> NeighborIndex:
        """The engine that was saved, of whatever kind."""
        from robustknn.neighbors.loading import load_index

        return load_index(path)

    def to(self, device: torch.device | str) -> AutoIndex:
        self.engine.to(device)
        return self
