"""Search through faiss (the extra `faiss`): flat and exact, or with any faiss index the user has.

faiss finds candidates in float32; what is returned is settled in float64 as in the exact engine, so that a
flat faiss index and `ExactIndex` give the same ids. Where faiss's vectors lie uncompressed in memory they are
searched in place, not copied.

Settings of faiss that belong to the whole process are changed for the length of one call and put back: its
OpenMP threads (its own, beside torch's; they are set to torch's number) and the size from which it multiplies
matrices, which recent versions put far above an attack's batches (a search is then several times slower).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustknn import registry, store
from robustknn.checks import check_finite
from robustknn.errors import InputError, MissingExtraError, NotReadyError
from robustknn.neighbors.base import (
    ClassNeighbors,
    NeighborIndex,
    Neighbors,
    Vectors,
    check_beside,
    check_vectors,
    empty,
    joined,
)
from robustknn.neighbors.exact import ExactIndex, load_parts, no_index
from robustknn.neighbors.faiss_module import (
    as_float32,
    gives_back,
    is_flat,
    load_faiss,
    metric_of,
    new_flat,
    reason_of,
    refuse_lists_elsewhere,
    settings,
)
from robustknn.neighbors.refine import exact_keys, in_order, normalize_

KIND, SCHEMA = "faiss-index", 1
_FILE = "index.faiss"


@registry.indexes.register("faiss")
class FaissIndex(NeighborIndex):
    """Nearest neighbors by faiss on the CPU: exact over vectors of its own, or with an index you have (`wrap`).

    Args:
        metric: "l2", "cosine" or "ip".
        memory_mb: bound on the working memory of what faiss does not do itself: the search by class, and rows
            that need a second look.

    Raises:
        MissingExtraError: faiss is not installed.
    """

    exact = True
    updatable = True
    reconstructs = True

    def __init__(self, metric: str = "l2", memory_mb: int = 256) -> None:
        super().__init__(metric)
        load_faiss()
        self._index: Any = None
        self._storage = 0  # where a flat index keeps its vectors; 0 for other kinds
        # The vectors in torch's eyes: faiss's own storage when flat, the user's `vectors` otherwise.
        self._plain = ExactIndex(metric, memory_mb=memory_mb)

    # ------------------------------------------------------------------------------------- content

    def build(self, vectors: Tensor, labels: Tensor | None = None, payload: Tensor | None = None) -> FaissIndex:
        """Copy vectors (n, D) into a flat faiss index; for cosine they are brought to unit length there.

        Raises:
            InputError: what `ExactIndex.build` refuses, and float64, which faiss cannot hold.
        """
        labels = check_vectors(vectors, labels, payload)
        rows = as_float32(vectors)
        index = new_flat(self.metric, rows.shape[1])
        index.add(rows.numpy())
        self.updatable = True
        return self._hold_flat(index, None, labels, payload)

    def add(self, vectors: Tensor, labels: Tensor | None = None, payload: Tensor | None = None) -> FaissIndex:
        """Append vectors. A wrapped index is the user's: add to it there, and wrap it again."""
        if not self.updatable:
            raise InputError("a wrapped faiss index is not changed from here; add to it yourself and wrap it again.")
        labels = check_vectors(vectors, labels, payload)
        rows = as_float32(vectors)
        if rows.shape[1] != self.dim:
            raise InputError(f"vectors of length {rows.shape[1]} cannot join an index of length {self.dim}.")
        check_finite(rows, "the references")
        labels, payload = joined(self._labels, labels, "labels"), joined(self._payload, payload, "payload")
        self._index.add(rows.numpy())
        return self._hold_flat(self._index, self._plain.lengths, labels, payload)

    @classmethod
    def wrap(
        cls,
        index: Any,
        metric: str | None = None,
        labels: Tensor | None = None,
        payload: Tensor | None = None,
        vectors: Tensor | None = None,
        memory_mb: int = 256,
    ) -> FaissIndex:
        """Search with a faiss index that exists. It is used as it is and must not change while it is wrapped.

        Its ids must be the rows 0..n − 1 of labels, payload and vectors. A flat index is exact. Any other is
        not: it finds what it finds (`exact` is False), with the distances it tells, missing neighbors as −1.

        Args:
            index: any faiss.Index, filled; search parameters such as nprobe are set on it.
            metric: "l2" or "ip", by default the index's own; "cosine" for an inner-product index over vectors
                of unit length.
            labels: (n,) class numbers, for the search by class.
            payload: what is kept beside each reference.
            vectors: (n, D) what was indexed, where the index compresses it or cannot give it back: for
                gradients, for the search by class, and for exact distances of what is found. A flat index
                holds its vectors already.
            memory_mb: as for the class.

        Raises:
            InputError: not a faiss.Index, empty or untrained, another metric than it searches by, another number
                of labels, payload rows or vectors than it holds.
        """
        faiss = load_faiss()
        made = cls(metric_of(faiss, index, metric), memory_mb)
        made.updatable = False
        if is_flat(faiss, index):
            if vectors is not None:
                raise InputError("a flat faiss index holds its vectors; leave vectors= out.")
            lengths = torch.ones(index.ntotal) if made.metric.unit else None
            return made._hold_flat(index, lengths, labels, payload)
        if vectors is not None:
            check_vectors(vectors, labels, payload)
            made._check_shape(index, vectors)
            made._plain.build(as_float32(vectors), labels, payload)
        return made._hold(index, labels, payload)

    def _hold_flat(
        self, index: Any, lengths: Tensor | None, labels: Tensor | None, payload: Tensor | None
    ) -> FaissIndex:
        """Search in a flat index; rows from the number of `lengths` on are brought to unit length for cosine."""
        faiss = load_faiss()
        view = torch.from_numpy(faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d)).view(-1, index.d)
        if self.metric.unit:
            known = torch.empty(0) if lengths is None else lengths
            lengths = torch.cat([known, normalize_(view[len(known) :])])
        self._plain.adopt(view, lengths, labels, payload)
        self._storage = int(index.get_xb())
        return self._hold(index, labels, payload)

    def _hold(self, index: Any, labels: Tensor | None, payload: Tensor | None) -> FaissIndex:
        """Search with an index; `_plain` has its vectors or is empty."""
        n = index.ntotal
        self._labels = check_beside(n, labels, payload)
        self._payload = payload
        self._index, self._n = index, n
        self.exact = bool(self._storage)
        self.reconstructs = len(self._plain) > 0 or gives_back(load_faiss(), index)
        return self

    def __len__(self) -> int:
        return 0 if self._index is None else self._n

    @property
    def dim(self) -> int:
        if self._index is None:
            raise empty()
        return int(self._index.d)

    def reconstruct(self, ids: Tensor) -> Tensor:
        self._check_unchanged()
        if bool((ids >= len(self)).any()):
            raise InputError(f"id {int(ids.max())} was asked of an index that holds {len(self)} references.")
        if len(self._plain):
            return self._plain.reconstruct(ids.cpu()).to(ids.device)
        known = ids.reshape(-1).clamp_min(0).cpu().numpy()
        try:
            rows = torch.from_numpy(self._index.reconstruct_batch(known)).view(*ids.shape, self.dim).to(ids.device)
        except (RuntimeError, AttributeError) as error:
            raise NotReadyError(
                f"this {type(self._index).__name__} does not give its vectors back; wrap it with vectors=, or call "
                "its make_direct_map() first if it has one."
            ) from error
        return rows.masked_fill_(ids[..., None] < 0, 0)

    def attach(self, vectors: Callable[[], Vectors], labels: Tensor, payload: Tensor | None) -> None:
        super().attach(vectors, labels, payload)
        own = (self._plain.vectors, self._plain.lengths) if len(self._plain) else vectors()
        self._plain.adopt(*own, self._labels, self._payload)
        self.reconstructs = True

    def combine(self, ids: Tensor, weights: Tensor, unit: bool = False) -> Tensor:
        if not len(self._plain):
            return super().combine(ids, weights, unit)
        self._check_unchanged()
        return self._plain.combine(ids.cpu(), weights.cpu(), unit).to(ids.device)

    # -------------------------------------------------------------------------------------- search

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> Neighbors:
        self._check_unchanged()
        queries = self.check_queries(queries, k)
        device, placed = queries.device, self._place(queries)
        if self.exact:
            approximate, ids = self._ask(placed, self._plain.spare(k))
            found = self._plain.settle(placed, k, approximate, ids, self._plain.scoring.plain_error(placed))
        elif len(self._plain):
            ids = self._candidates(placed, k)
            found = self._first(exact_keys(self.metric, placed, self._plain.vectors, ids), ids, k)
        else:
            found = self._first(*self._ask(placed, k), k)
        return Neighbors(found.distances.to(device), found.ids.to(device))

    @torch.no_grad()
    def search_both(self, queries: Tensor, k: int, per_class: int) -> tuple[Neighbors, ClassNeighbors]:
        self._check_unchanged()
        if not len(self._plain):
            raise NotReadyError("searching by class needs the vectors themselves; wrap the faiss index with vectors=.")
        near, classes = self._plain.search_both(self.check_queries(queries, k).cpu(), k, per_class)
        classes = ClassNeighbors(classes.distances.to(queries.device), classes.ids.to(queries.device))
        # What a flat index finds is what the exact engine found; another kind keeps to its own answers.
        if not self.exact:
            return self.search(queries, k), classes
        return Neighbors(near.distances.to(queries.device), near.ids.to(queries.device)), classes

    def _candidates(self, placed: Tensor, k: int) -> Tensor:
        """Ids (B, m) to measure for the k nearest, −1 for none."""
        return self._ask(placed, self._plain.spare(k))[1]

    def _place(self, queries: Tensor) -> Tensor:
        """Queries as faiss takes them: float32 in the CPU's memory, row by row, at unit length for cosine."""
        placed = queries.to("cpu", torch.float32).contiguous()
        if self.metric.unit:
            placed = placed.clone()
            normalize_(placed)
        return placed

    def _ask(self, placed: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """Keys as faiss tells them, float64, and ids, (B, m) each; ∞ and −1 for a missing one."""
        try:
            with settings(load_faiss(), len(placed)):
                told, found = self._find(placed.numpy(), m)
        except RuntimeError as error:
            raise InputError(f"faiss refused to search: {reason_of(error)}.") from error
        ids, keys = torch.from_numpy(found), torch.from_numpy(told).double()
        if bool((ids >= len(self)).any()):
            raise InputError(
                f"the faiss index gave the id {int(ids.max())} where it holds {len(self)} vectors; its ids must be "
                "the rows 0..n-1 (fill it with add, not add_with_ids)."
            )
        if self.metric.name != "l2":
            keys = float(self.metric.unit) - keys
        return keys.masked_fill_(ids < 0, float("inf")), ids

    def _find(self, placed: Any, m: int) -> tuple[Any, Any]:
        """What faiss tells and whom it finds for checked queries, (B, m) arrays each."""
        told, found = self._index.search(placed, m)
        return told, found

    def _first(self, keys: Tensor, ids: Tensor, k: int) -> Neighbors:
        keys, ids = in_order(keys, ids)
        return Neighbors(self.metric.distances(keys[:, :k]).float(), ids[:, :k].contiguous())

    @staticmethod
    def _check_shape(index: Any, vectors: Tensor) -> None:
        if tuple(vectors.shape) != (index.ntotal, index.d):
            raise InputError(
                f"vectors have shape {tuple(vectors.shape)} where the faiss index holds {index.ntotal} of length "
                f"{index.d}; pass those that were indexed, in their order."
            )

    def _check_unchanged(self) -> None:
        """Refuse a wrapped index that was changed: what is known of its vectors would be wrong, or freed memory."""
        if self._index is None:
            return
        if self._index.ntotal != self._n or (self._storage and int(self._index.get_xb()) != self._storage):
            raise InputError(
                f"the faiss index held {self._n} vectors when it was wrapped and was changed since (now "
                f"{self._index.ntotal}); wrap it again."
            )

    # ----------------------------------------------------------------------------------- transport

    def save(self, path: Path) -> None:
        """Write the index as an artifact directory: plain arrays when flat, else faiss's own file beside them.

        Raises:
            InputError: faiss cannot write this kind, or its lists lie in another file.
        """
        if self._index is None:
            raise empty()
        self._check_unchanged()
        meta = {"metric": self.metric.name, "memory_mb": self._plain.memory_mb}
        faiss = load_faiss()
        if not self._storage:
            refuse_lists_elsewhere(faiss, self._index)
        with store.artifact(Path(path), KIND, SCHEMA, meta) as folder:
            kept = {"labels": self._labels, "payload": self._payload}
            if len(self._plain):
                kept |= {"vectors": self._plain.vectors, "lengths": self._plain.lengths}
            for name, tensor in kept.items():
                if tensor is not None:
                    store.save_array(folder / f"{name}.npy", tensor)
            if not self._storage:
                try:
                    faiss.write_index(self._index, str(folder / _FILE))
                except RuntimeError as error:
                    raise InputError(f"faiss cannot write this index: {reason_of(error)}.") from error

    @classmethod
    def load(cls, path: Path) -> FaissIndex:
        """Read what `save` wrote. faiss sees its file only after its checksum was found right.

        The checksum tells damage, not intent: faiss's file format is parsed by faiss, so load only what you
        trust.

        Raises:
            IntegrityError: a file is missing, truncated or altered.
        """
        manifest = store.read_manifest(Path(path), KIND, SCHEMA)
        flat = _FILE not in manifest.files
        parts = load_parts(manifest, mapped=flat)
        try:
            made = cls(**manifest.meta)
            if flat:
                return made._load_flat(**parts)
            # Never with IO_FLAG_MMAP: on an index whose lists are on disk already, a search would then crash.
            index = load_faiss().read_index(str(manifest.file(_FILE)), 0)
            metric_of(load_faiss(), index, made.metric.name)
            if parts["vectors"] is not None:
                made._check_shape(index, parts["vectors"])
                made._plain.adopt(parts["vectors"], parts["lengths"], parts["labels"])
            made.updatable = False
            return made._hold(index, parts["labels"], parts["payload"])
        except MissingExtraError:
            raise
        except (InputError, TypeError, RuntimeError) as error:
            raise no_index(manifest, error) from error

    def _load_flat(
        self, vectors: Tensor | None, lengths: Tensor | None, labels: Tensor | None, payload: Tensor | None
    ) -> FaissIndex:
        if vectors is None or (self.metric.unit and lengths is None):
            raise InputError("vectors or their lengths are missing")
        check_vectors(vectors, labels, payload)
        index = new_flat(self.metric, vectors.shape[1])
        index.add(as_float32(vectors).numpy())
        return self._hold_flat(index, lengths, labels, payload)

    def to(self, device: torch.device | str) -> FaissIndex:
        if torch.device(device).type != "cpu":
            raise InputError(f"the faiss engine searches on the CPU; use index='exact' to search on {device}.")
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FaissIndex:
        """Another index with its own copy of everything."""
        made = type(self)(self.metric.name, self._plain.memory_mb)
        if self._index is None:
            return made
        self._check_unchanged()
        index = load_faiss().clone_index(self._index)
        made.updatable = self.updatable
        labels, payload = (None if t is None else t.clone() for t in (self._labels, self._payload))
        if self._storage:
            lengths = self._plain.lengths
            return made._hold_flat(index, None if lengths is None else lengths.clone(), labels, payload)
        if len(self._plain):
            made._plain.adopt(self._plain.vectors.clone(), self._plain.lengths, labels, payload)
        return made._hold(index, labels, payload)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError("a faiss index is not pickled; write it with save(path) and read it with load(path).")
