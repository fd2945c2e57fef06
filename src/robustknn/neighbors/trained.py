"""What the approximate engines over faiss share: how they are built, kept honest, saved and given their vectors.

faiss finds candidates; each is measured again, in float64, with the vectors themselves, so that every distance
returned is that of the id beside it and the order is that of (distance, id). The vectors stay where they are, in
memory or mapped from a disk.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from robustknn import registry, store
from robustknn.checks import check_positive_int, check_whole
from robustknn.errors import InputError, MissingExtraError, NotReadyError
from robustknn.neighbors.base import ClassNeighbors, Neighbors, Vectors, check_vectors, empty, joined
from robustknn.neighbors.exact import load_parts, no_index
from robustknn.neighbors.faiss_index import FaissIndex
from robustknn.neighbors.faiss_module import load_faiss, reason_of, settings
from robustknn.neighbors.faiss_rows import Marks, chunks, sample
from robustknn.neighbors.refine import exact_keys
from robustknn.progress import Progress, Silent

SCHEMA = 1
INDEX, MARKS = "index.faiss", "marks.npy"
# Codes that order badly are no better for few neighbors: as many candidates are measured as for so many.
_FEW = 10


class TrainedIndex(FaissIndex):
    """An engine over faiss that is not exact. A kind says how its faiss index is made (`_empty`) and set (`_set`).

    Args:
        metric: "l2", "cosine" or "ip". Cosine is searched as L2 between vectors of unit length, which orders alike.
        rerank: how many times k candidates are measured exactly (a k below 10 counts as 10); None takes the kind's
            default. May be changed later.
        seed: of the sample and of the clustering: the same vectors and settings give the same index.
        train_size: vectors to learn from at most; None takes the kind's default.
        memory_mb: bound on the working memory of building, and of the search by class.
    """

    exact = False
    rerank_default = 1
    build_threads: int | None = None  # None takes torch's
    least_learned = 1  # fewer vectors are learned from several times

    def __init__(
        self,
        metric: str = "l2",
        rerank: int | None = None,
        seed: int = 0,
        train_size: int | None = None,
        memory_mb: int = 256,
    ) -> None:
        super().__init__(metric, memory_mb)
        self.exact = False
        self.rerank = self.rerank_default if rerank is None else check_positive_int(rerank, "rerank")
        self.seed = check_whole(seed, "seed", 0)
        self.train_size = None if train_size is None else check_positive_int(train_size, "train_size")
        self.memory_mb = self._plain.memory_mb
        self._marks: Marks | None = None

    @property
    def name(self) -> str:
        """The name this engine is registered under."""
        return registry.indexes.name_of(type(self)) or type(self).__name__

    # -------------------------------------------------------------------------------- what a kind says

    @abstractmethod
    def _empty(self, n: int, width: int, metric: int) -> Any:
        """An empty faiss index for n vectors of `width` numbers, its clustering seeded."""

    @abstractmethod
    def _set(self, index: Any) -> None:
        """Set what may change between searches."""

    def _width(self, dim: int) -> int:
        """How many numbers a vector of length `dim` is given to faiss as."""
        return dim

    def _learns_from(self, index: Any, n: int) -> int:
        """How many vectors to train with; 0 for a kind that learns nothing."""
        return 0

    # ------------------------------------------------------------------------------------- content

    def build(
        self,
        vectors: Tensor,
        labels: Tensor | None = None,
        payload: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Index vectors (n, D), which are kept as they are, not copied: they may be mapped from a disk.

        They are read twice in a stream: once for a sample to learn from, once to be added.

        Raises:
            InputError: what `ExactIndex.build` refuses, float64, and settings that these vectors do not allow.
        """
        labels = check_vectors(vectors, labels, payload)
        vectors = vectors.detach().cpu()
        index = self._trained(vectors)
        self._add_rows(index, vectors, progress)
        self._marks = Marks.of(vectors)
        self._plain.hold(vectors, None, labels, payload)
        self._hold(index, labels, payload)
        return self

    def _trained(self, vectors: Tensor) -> Any:
        """An empty faiss index that has learned from a sample of the vectors."""
        n, dim = vectors.shape
        faiss, width = load_faiss(), self._width(dim)
        inner = self.metric.name == "ip"
        index = self._empty(n, width, faiss.METRIC_INNER_PRODUCT if inner else faiss.METRIC_L2)
        count = self._learns_from(index, n)
        if count:
            rows = sample(self.metric, vectors, width, min(count, self.train_size or count), self.seed)
            if len(rows) < self.least_learned:  # else this would be a copy of the largest thing in memory
                rows = rows.repeat(-(-self.least_learned // len(rows)), 1)
            try:
                with settings(faiss, len(rows)):
                    index.train(rows.numpy())
            except RuntimeError as error:
                raise InputError(f"faiss could not learn from {len(rows)} vectors: {reason_of(error)}.") from error
        return index

    def _add_rows(self, index: Any, vectors: Tensor, progress: Progress | None = None, first: int = 0) -> None:
        """Add vectors to a faiss index; those of an empty one get the ids from `first` on."""
        faiss, report = load_faiss(), progress or Silent()
        report.start("indexing", len(vectors))
        try:
            for part in chunks(self.metric, vectors, index.d, self.memory_mb):
                with settings(faiss, len(part), self.build_threads):
                    if first:
                        index.add_with_ids(part.numpy(), np.arange(first, first + len(part)))
                        first += len(part)
                    else:
                        index.add(part.numpy())
                report.advance(len(part))
        finally:
            report.stop()

    def add(self, vectors: Tensor, labels: Tensor | None = None, payload: Tensor | None = None) -> Self:
        """Append vectors to what was learned before; build anew when they are many or of another kind.

        An index that was given vectors makes a copy of them and these in memory. One that was loaded without any takes
        these alone, and wants all of them in `attach`.
        """
        if not self.updatable:
            raise InputError(f"the engine {self.name!r} does not grow; build it again over all vectors.")
        labels = check_vectors(vectors, labels, payload)
        vectors = vectors.detach().cpu()
        if vectors.shape[1] != self.dim:
            raise InputError(f"vectors of length {vectors.shape[1]} cannot join an index of length {self.dim}.")
        own = self._plain.vectors if len(self._plain) else None
        if own is not None:
            labels, payload = joined(self._labels, labels, "labels"), joined(self._payload, payload, "payload")
        # Checked before anything is added, so that a failed call changes nothing.
        for _ in chunks(self.metric, vectors, self._index.d, self.memory_mb):
            pass
        self._add_rows(self._index, vectors)
        if own is not None:
            self._plain.hold(torch.cat([own, vectors.to(own)]), None, labels, payload)
        self._hold(self._index, labels, payload)
        return self

    def attach(self, vectors: Callable[[], Vectors], labels: Tensor, payload: Tensor | None) -> None:
        """Take the vectors that were indexed, for an index loaded without them, and what is kept beside them.

        Raises:
            InputError: other vectors than were indexed, as far as a few rows tell, or another number of labels.
        """
        held, lengths = (self._plain.vectors, self._plain.lengths) if len(self._plain) else vectors()
        if self._marks is not None:
            self._marks.check(self.metric, held, len(self))
        kept = self._labels if self._labels is not None else labels
        beside = self._payload if self._payload is not None else payload
        self._plain.hold(held, lengths, kept, beside)
        self._hold(self._index, kept, beside)

    def _hold(self, index: Any, labels: Tensor | None, payload: Tensor | None) -> Self:
        super()._hold(index, labels, payload)
        self.reconstructs = len(self._plain) > 0
        return self

    @property
    def dim(self) -> int:
        if self._index is None or self._marks is None:
            raise empty()
        return self._marks.rows.shape[1]

    # -------------------------------------------------------------------------------------- search

    def search(self, queries: Tensor, k: int) -> Neighbors:
        self._need_vectors()
        return super().search(queries, k)

    def search_both(self, queries: Tensor, k: int, per_class: int) -> tuple[Neighbors, ClassNeighbors]:
        self._need_vectors()
        return super().search_both(queries, k, per_class)

    def reconstruct(self, ids: Tensor) -> Tensor:
        self._need_vectors()
        return super().reconstruct(ids)

    def _need_vectors(self) -> None:
        if self._index is not None and not len(self._plain):
            raise NotReadyError(
                "this index was saved without its vectors; give them by attach(lambda: (vectors, None), labels, None)."
            )

    def _candidates(self, placed: Tensor, k: int) -> Tensor:
        spare = self._plain.spare(k)
        many = max(spare, self.rerank * max(k, _FEW))
        if many >= len(self):  # faiss has nothing to choose
            return torch.arange(len(self)).repeat(len(placed), 1)
        self._set(self._index)
        wide = torch.nn.functional.pad(placed, (0, self._index.d - placed.shape[1]))
        ids = self._ask(wide.contiguous(), many)[1]
        if many == spare:
            return ids
        # Measured in float32 first: the few that are left cost little in float64.
        keys = exact_keys(self.metric, placed, self._plain.vectors, ids, torch.float32)
        return ids.gather(1, keys.topk(spare, dim=1, largest=False, sorted=False).indices)

    # ----------------------------------------------------------------------------------- transport

    def options(self) -> dict[str, Any]:
        """The settings, as the constructor takes them."""
        names = [name for name in inspect.signature(type(self)).parameters if name != "metric"]
        return {name: getattr(self, name) for name in names}

    def save(self, path: Path, with_vectors: bool = True) -> None:
        """Write the index as an artifact directory.

        Args:
            with_vectors: write the vectors, labels and payload too. Without, it is for a folder that has them already
                and is given them by `attach` after loading.
        """
        if self._index is None or self._marks is None:
            raise empty()
        if with_vectors:
            self._need_vectors()
        meta = {"metric": self.metric.name, "options": self.options(), "marked": self._marks.ids}
        with store.artifact(Path(path), f"{self.name}-index", SCHEMA, meta) as folder:
            self._write(folder)
            store.save_array(folder / MARKS, self._marks.rows)
            kept = {"vectors": self._plain.vectors, "lengths": self._plain.lengths} if with_vectors else {}
            kept |= {"labels": self._labels, "payload": self._payload} if with_vectors else {}
            for name, tensor in kept.items():
                if tensor is not None:
                    store.save_array(folder / f"{name}.npy", tensor)

    def _write(self, folder: Path) -> None:
        try:
            load_faiss().write_index(self._index, str(folder / INDEX))
        except RuntimeError as error:
            raise store.StorageError(f"faiss cannot write this index: {reason_of(error)}.") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; its vectors stay on the disk. faiss sees its file once the checksum was found right.

        Raises:
            IntegrityError: a file is missing, truncated or altered, or they do not make such an index.
        """
        kind = f"{registry.indexes.name_of(cls)}-index"
        return cls._of(store.read_manifest(Path(path), kind, SCHEMA))

    @classmethod
    def _of(cls, manifest: store.Manifest) -> Self:
        """The index that a checked artifact holds."""
        parts = load_parts(manifest, mapped=True)
        try:
            made = cls(manifest.meta["metric"], **manifest.meta["options"])
            made._marks = Marks(manifest.meta["marked"], store.load_array(manifest.file(MARKS)))
            index = made._read(manifest)
            faiss, dim = load_faiss(), made._marks.rows.shape[1]
            metric = faiss.METRIC_INNER_PRODUCT if made.metric.name == "ip" else faiss.METRIC_L2
            if (index.d, index.metric_type) != (made._width(dim), metric) or not index.ntotal:
                raise InputError("faiss's file holds another index")
            if parts["vectors"] is not None:
                made._marks.check(made.metric, parts["vectors"], index.ntotal)
                made._plain.hold(parts["vectors"], parts["lengths"], parts["labels"], parts["payload"])
            made._hold(index, parts["labels"], parts["payload"])
            return made
        except MissingExtraError:
            raise
        except (InputError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
            raise no_index(manifest, error) from error

    @staticmethod
    def _read(manifest: store.Manifest) -> Any:
        """faiss's index from its file."""
        return load_faiss().read_index(str(manifest.file(INDEX)), 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Another index whose faiss part is its own; the vectors are shared."""
        made = type(self)(self.metric.name, **self.options())
        if self._index is None:
            return made
        made._marks = self._marks
        if len(self._plain):
            made._plain.hold(self._plain.vectors, self._plain.lengths, self._labels, self._payload)
        made._hold(self._twin(), self._labels, self._payload)
        return made

    def _twin(self) -> Any:
        return load_faiss().clone_index(self._index)
