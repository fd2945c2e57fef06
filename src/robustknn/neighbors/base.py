"""What every neighbor index promises, and the vocabulary of searches.

One convention for all engines: distances are true (L2, not squared), ascending; equal distances are ordered
by the smaller id; a neighbor that is missing has id −1 and infinite distance and never votes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from robustknn.checks import as_tensor, check_choice, check_finite, check_labels, check_positive_int
from robustknn.errors import InputError, NotReadyError

Vectors = tuple[Tensor, Tensor | None]
METRICS = ("l2", "cosine", "ip")
MISSING = -1
# Rows of ids whose references are held at a time where they have to be gathered first.
_COMBINED = 64


@dataclass(frozen=True)
class Neighbors:
    """The k nearest references of each query, nearest first.

    Attributes:
        distances: (B, k), ascending. L2: ‖q − r‖. cosine: 1 − cos(q, r). ip: −⟨q, r⟩.
        ids: (B, k) int64; −1 where an approximate index found fewer than k.
    """

    distances: Tensor
    ids: Tensor

    def first(self, k: int) -> Neighbors:
        """The k nearest of these."""
        return Neighbors(self.distances[:, :k], self.ids[:, :k])


@dataclass(frozen=True)
class ClassNeighbors:
    """The K nearest references of every class, (B, C, K), nearest first; −1 where a class has fewer."""

    distances: Tensor
    ids: Tensor

    def first(self, k: int) -> ClassNeighbors:
        """The k nearest of these, class by class."""
        return ClassNeighbors(self.distances[:, :, :k], self.ids[:, :, :k])

    def widened(self, classes: int) -> ClassNeighbors:
        """The same with further classes, which have no reference."""
        more = classes - self.ids.shape[1]
        if more <= 0:
            return self
        pad = nn.functional.pad
        return ClassNeighbors(
            pad(self.distances, (0, 0, 0, more), value=float("inf")), pad(self.ids, (0, 0, 0, more), value=MISSING)
        )


@dataclass(frozen=True)
class Metric:
    """A metric by the key that orders references exactly: the squared distance for L2, else the distance itself.

    Cosine's key is 1 − ⟨q, r⟩/(‖q‖‖r‖), ip's −⟨q, r⟩.
    """

    name: str

    @property
    def unit(self) -> bool:
        """Whether vectors are searched at unit length."""
        return self.name == "cosine"

    def keys(self, queries: Tensor, rows: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """The key of each query with its own rows, exact but for rounding: (B, D) and (B, m, D) → (B, m)."""
        return self.keys_(queries.to(dtype), rows.to(dtype, copy=True))

    def keys_(self, queries: Tensor, rows: Tensor) -> Tensor:
        """The same in the type both have; the rows are used up."""
        q = queries[:, None, :]
        if self.name == "l2":
            return rows.sub_(q).square_().sum(2)
        if not self.unit:
            return -rows.mul_(q).sum(2)
        length = torch.linalg.vector_norm(rows, dim=2) * torch.linalg.vector_norm(q, dim=2)
        # A vector of length zero has no direction: its cosine with anything is taken as 0.
        cosine = rows.mul_(q).sum(2) / length.clamp_min(torch.finfo(rows.dtype).tiny)
        return 1 - torch.where(length > 0, cosine, torch.zeros_like(cosine))

    def distances(self, keys: Tensor) -> Tensor:
        """Distances from keys."""
        return keys.clamp_min(0).sqrt() if self.name == "l2" else keys


@dataclass(frozen=True)
class Choice:
    """An engine chosen by what is to be indexed: its spec, as `make_index` takes it, and why, in one sentence."""

    spec: str
    reason: str


class NeighborIndex(ABC):
    """References to search in. Build it over vectors, then search.

    Attributes (of an engine, or of one instance where it depends on what is indexed):
        exact: every search returns the true nearest neighbors under the tie rule.
        updatable: `add` works after `build`.
        reconstructs: `reconstruct` gives the indexed vectors back, not an approximation (needed for gradients).
        distributed: the vectors live in other processes.
        chosen: why the engine "auto" took this one, or None.
    """

    exact: bool = False
    updatable: bool = False
    reconstructs: bool = False
    distributed: bool = False
    chosen: Choice | None = None

    def __init__(self, metric: str = "l2") -> None:
        self.metric = Metric(check_choice(metric, METRICS, "metric"))
        self._labels: Tensor | None = None
        self._payload: Tensor | None = None

    @property
    def differentiable(self) -> bool:
        """Whether an attack may take gradients through the neighbors found: they are exact and at hand."""
        return self.exact and self.reconstructs

    # ------------------------------------------------------------------------------------- content

    def resolved(self, n: int, dim: int) -> NeighborIndex:
        """The engine to build over n vectors of length `dim`: itself, unless it is one that chooses another."""
        return self

    @abstractmethod
    def build(self, vectors: Tensor, labels: Tensor | None = None, payload: Tensor | None = None) -> NeighborIndex:
        """Index vectors (n, D), whose ids are their rows; labels (n,) enable the search by class."""

    @abstractmethod
    def add(self, vectors: Tensor, labels: Tensor | None = None, payload: Tensor | None = None) -> NeighborIndex:
        """Append vectors; their ids continue after the last."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of vectors."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """The length of a vector."""

    # -------------------------------------------------------------------------------------- search

    @abstractmethod
    def search(self, queries: Tensor, k: int) -> Neighbors:
        """The k nearest references of each query (B, D)."""

    @abstractmethod
    def search_both(self, queries: Tensor, k: int, per_class: int) -> tuple[Neighbors, ClassNeighbors]:
        """The k nearest overall and the `per_class` nearest of every class, from one pass over the references.

        Neighbors by class serve to guide attacks: their order is that of float32 scores, their distances are
        approximate.
        """

    def search_classes(self, queries: Tensor, per_class: int) -> ClassNeighbors:
        """The `per_class` nearest references of every class."""
        return self.search_both(queries, 1, per_class)[1]

    @abstractmethod
    def reconstruct(self, ids: Tensor) -> Tensor:
        """The vectors of ids of any shape, (*ids.shape, D); zeros for −1."""

    def reconstruct_unit(self, ids: Tensor) -> Tensor:
        """The same at unit length, in float32 or wider."""
        rows = self.reconstruct(ids)
        return nn.functional.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)

    def stored(self) -> Tensor | None:
        """The references (n, D) where they lie in memory, of unit length for cosine; None where they do not."""
        return None

    def combine(self, ids: Tensor, weights: Tensor, unit: bool = False) -> Tensor:
        """Weighted sums of references: ids and weights (N, G) → Σ_g w_g r_g, (N, D); −1 counts nothing.

        Args:
            unit: of the references at unit length.
        """
        sums = []
        for part, weight in zip(ids.split(_COMBINED), weights.split(_COMBINED), strict=True):
            rows = self.reconstruct_unit(part) if unit else self.reconstruct(part)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            sums.append(torch.einsum("ngd,ng->nd", rows, weight.to(rows)))
        return torch.cat(sums)

    def attach(self, vectors: Callable[[], Vectors], labels: Tensor, payload: Tensor | None) -> None:
        """Learn what the references are beside what was indexed: labels for the search by class, and payload.

        Args:
            vectors: gives the references (n, D), at unit length for cosine with the lengths they had, for an engine
                that has none of its own to measure and combine.
        """
        self._labels = labels if self._labels is None else self._labels
        self._payload = payload if self._payload is None else self._payload

    def payload(self, ids: Tensor) -> Tensor:
        """The payload of ids of any shape (that of id 0 for −1); NotReadyError when the index carries none."""
        if self._payload is None:
            raise NotReadyError("this index carries no payload; build it with payload=.")
        known = self._payload.index_select(0, ids.clamp_min(0).reshape(-1).to(self._payload.device))
        return known.view(*ids.shape, *self._payload.shape[1:])

    # ----------------------------------------------------------------------------------- transport

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the index as an artifact directory."""

    @classmethod
    @abstractmethod
    def load(cls, path: Path) -> NeighborIndex:
        """Read what `save` wrote; IntegrityError when it is not whole."""

    @abstractmethod
    def to(self, device: torch.device | str) -> NeighborIndex:
        """Move to a device (in place); returns itself."""

    # -------------------------------------------------------------------------------------- checks

    def check_queries(self, queries: Tensor, k: int) -> Tensor:
        """Refuse queries and k that cannot be searched; returns the queries detached."""
        check_positive_int(k, "k")
        if not len(self):
            raise empty()
        if k > len(self):
            raise InputError(f"k = {k} neighbors were asked of {len(self)} references; lower k or add references.")
        queries = as_tensor(queries, "queries")
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise InputError(
                f"queries have shape {tuple(queries.shape)}; this index holds vectors of length {self.dim}, "
                f"pass (B, {self.dim})."
            )
        if queries.is_complex():
            raise InputError(f"queries must be real numbers, not {queries.dtype}.")
        check_finite(queries, "the features searched for")
        return queries.detach()


def empty() -> NotReadyError:
    """The error of an index without content."""
    return NotReadyError("the index is empty; call build(vectors) first.")


def check_vectors(vectors: Tensor, labels: Tensor | None, payload: Tensor | None) -> Tensor | None:
    """Refuse vectors that cannot be indexed; returns the labels as class numbers (n,) int64."""
    if not isinstance(vectors, Tensor) or vectors.ndim != 2 or not vectors.is_floating_point():
        found = f"{tuple(vectors.shape)} {vectors.dtype}" if isinstance(vectors, Tensor) else type(vectors).__name__
        raise InputError(f"references must be a floating point tensor (n, D), not {found}; flatten features first.")
    if not vectors.numel():
        raise InputError(f"there is no reference to index (shape {tuple(vectors.shape)}); pass at least one.")
    return check_beside(len(vectors), labels, payload)


def check_beside(n: int, labels: Tensor | None, payload: Tensor | None) -> Tensor | None:
    """Refuse labels and payload that do not go with n references; returns the labels as class numbers (n,) int64."""
    for what, value in (("labels", labels), ("payload rows", payload)):
        if value is not None and len(value) != n:
            raise InputError(f"there are {len(value)} {what} for {n} references; pass one each.")
    return None if labels is None else check_labels(labels, n, None, "reference labels")


def joined(old: Tensor | None, new: Tensor | None, what: str) -> Tensor | None:
    """What is kept beside the references, with that of more references appended; all carry it or none."""
    if (old is None) != (new is None):
        raise InputError(f"either all references carry {what} or none; pass {what}= in every call.")
    return None if old is None or new is None else torch.cat([old, new.to(old)])
