"""The approximate engines over faiss that live in memory: inverted lists of vectors or of codes, and a graph."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from robustknn import registry
from robustknn.checks import check_choice, check_positive_int
from robustknn.errors import InputError
from robustknn.neighbors.faiss_module import load_faiss
from robustknn.neighbors.trained import TrainedIndex

LEAST_A_LIST = 39
"""Vectors to learn a list's center from, at least: fewer make poor centers (and faiss warns)."""
_USUAL_A_LIST = 64
_LEAST_PROBES = 32
_LISTS_A_PROBE = 125
_CODE_VALUES = 16
# From so many queries on it pays to order them.
_ORDERED = 64


def lists_for(n: int) -> int:
    """How many lists to sort n vectors into: 4√n, and as few as leave each enough to learn from."""
    return max(1, min(4 * math.isqrt(n), n // LEAST_A_LIST))


def probes_for(lists: int) -> int:
    """How many of its lists an engine looks through by default."""
    return min(lists, max(_LEAST_PROBES, lists // _LISTS_A_PROBE))


class IVFIndex(TrainedIndex):
    """Vectors in lists by their nearest of `nlist` centers; a search looks through the `nprobe` nearest lists.

    Args:
        metric, rerank, seed, memory_mb: as for `TrainedIndex`.
        nlist: the number of lists; None makes 4√n, fewer where that left fewer than 39 vectors a list.
        nprobe: lists looked through; None takes 32, or 1/125 of the lists when that is more. May be changed later.
        train_size: vectors to learn the centers from at most; None takes 64 a list.
    """

    code = ""
    scans_by_query = True  # faiss goes through the lists of one query after another

    def __init__(
        self,
        metric: str = "l2",
        nlist: int | None = None,
        nprobe: int | None = None,
        rerank: int | None = None,
        seed: int = 0,
        train_size: int | None = None,
        memory_mb: int = 256,
    ) -> None:
        super().__init__(metric, rerank, seed, train_size, memory_mb)
        self.nlist = None if nlist is None else check_positive_int(nlist, "nlist")
        self.nprobe = None if nprobe is None else check_positive_int(nprobe, "nprobe")

    @property
    def probes(self) -> int:
        """How many lists a search looks through."""
        lists = int(self._index.nlist)
        return min(lists, self.nprobe) if self.nprobe else probes_for(lists)

    def _empty(self, n: int, width: int, metric: int) -> Any:
        lists = self.nlist or lists_for(n)
        if lists > n:
            raise InputError(f"nlist = {lists} lists were asked for {n} vectors; lower nlist or leave it out.")
        index = load_faiss().index_factory(width, f"IVF{lists},{self._coding(width)}", metric)
        self._seeded(index.cp)
        return index

    def _coding(self, width: int) -> str:
        return self.code

    def _seeded(self, clustering: Any) -> None:
        clustering.seed = self.seed % 2**31
        clustering.min_points_per_centroid = 1  # or it warns on the standard error stream
        clustering.max_points_per_centroid = 2**30  # what it is given is a sample already

    def _learns_from(self, index: Any, n: int) -> int:
        return min(n, _USUAL_A_LIST * int(index.nlist)) if self.train_size is None else min(n, self.train_size)

    def _set(self, index: Any) -> None:
        index.nprobe = self.probes

    def _find(self, placed: Any, m: int) -> tuple[Any, Any]:
        """faiss's search, with queries that share lists one after another: the lists are then still in the cache."""
        if not self.scans_by_query or len(placed) < _ORDERED:
            return super()._find(placed, m)
        told, lists = self._index.quantizer.search(placed, self._index.nprobe)
        # The least of their lists is the same for most queries that share many (a hash of one function).
        order = np.argsort(lists.min(1), kind="stable")
        told, found = self._index.search_preassigned(placed[order], m, lists[order], told[order])
        back = np.argsort(order)
        return told[back], found[back]


@registry.indexes.register("ivf-flat")
class IVFFlatIndex(IVFIndex):
    """Inverted lists of whole vectors (faiss IVF, Flat): much faster than exact, misses what lies in other lists.

    Args:
        metric, nlist, nprobe, rerank, seed, train_size, memory_mb: as for `IVFIndex`.
        dtype: what the lists hold, "float32" or "float16": half the memory, and half as fast again where memory is
            what limits a search. Candidates are measured with the vectors themselves either way; the numbers must be
            between about 1e-4 and 65,504.
    """

    def __init__(
        self,
        metric: str = "l2",
        nlist: int | None = None,
        nprobe: int | None = None,
        rerank: int | None = None,
        seed: int = 0,
        train_size: int | None = None,
        dtype: str = "float32",
        memory_mb: int = 256,
    ) -> None:
        super().__init__(metric, nlist, nprobe, rerank, seed, train_size, memory_mb)
        self.dtype = check_choice(dtype, ("float32", "float16"), "dtype")
        self.code = "Flat" if self.dtype == "float32" else "SQfp16"


@registry.indexes.register("ivf-sq8")
class IVFSQ8Index(IVFIndex):
    """Inverted lists of vectors in 8 bits a number (faiss IVF, SQ8): a quarter of the memory of ivf-flat."""

    code = "SQ8"
    rerank_default = 2


@registry.indexes.register("ivf-pq")
class IVFPQIndex(IVFIndex):
    """Inverted lists of 4-bit product codes (faiss IVF, PQ fast-scan): an eighth of a byte a number, re-ranked.

    Every four numbers of a vector become one code; a length that four does not divide is filled with zeros.
    """

    scans_by_query = False
    rerank_default = 16
    least_learned = _CODE_VALUES

    def _width(self, dim: int) -> int:
        return -(-dim // 4) * 4

    def _coding(self, width: int) -> str:
        return f"PQ{width // 4}x4fs"

    def _empty(self, n: int, width: int, metric: int) -> Any:
        index = super()._empty(n, width, metric)
        self._seeded(index.pq.cp)
        return index

    def _learns_from(self, index: Any, n: int) -> int:
        usual = min(n, max(_USUAL_A_LIST * int(index.nlist), 256 * _CODE_VALUES))
        return usual if self.train_size is None else min(n, self.train_size)


@registry.indexes.register("hnsw")
class HNSWIndex(TrainedIndex):
    """A graph from neighbor to neighbor (faiss HNSW, Flat): quick for single queries, slow to build, most memory.

    Args:
        metric, rerank, seed, memory_mb: as for `TrainedIndex`.
        neighbors: edges of a vector (M).
        ef_construction: candidates kept while the graph is built.
        ef_search: candidates kept while it is searched, at least those that are measured. May be changed later.
        deterministic: build on one thread; on several the graph depends on which of them is quicker.
    """

    def __init__(
        self,
        metric: str = "l2",
        neighbors: int = 32,
        ef_construction: int = 80,
        ef_search: int = 128,
        rerank: int | None = None,
        seed: int = 0,
        deterministic: bool = True,
        memory_mb: int = 256,
    ) -> None:
        super().__init__(metric, rerank, seed, None, memory_mb)
        self.neighbors = check_positive_int(neighbors, "neighbors")
        self.ef_construction = check_positive_int(ef_construction, "ef_construction")
        self.ef_search = check_positive_int(ef_search, "ef_search")
        self.deterministic = bool(deterministic)
        self.build_threads = 1 if self.deterministic else None
        if self.neighbors < 2:
            raise InputError("neighbors = 1 makes no graph; pass at least 2.")

    def _empty(self, n: int, width: int, metric: int) -> Any:
        faiss = load_faiss()
        index = faiss.IndexHNSWFlat(width, self.neighbors, metric)
        index.hnsw.efConstruction = self.ef_construction
        index.hnsw.rng = faiss.RandomGenerator(self.seed % 2**31)
        return index

    def _set(self, index: Any) -> None:
        index.hnsw.efSearch = self.ef_search
