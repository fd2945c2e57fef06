"""Exact search by one matrix product per chunk of references, on CPU or GPU.

Scores are computed for a chunk of references against a block of queries into one preallocated buffer laid out
(references, queries): that is the faster layout for few queries, and it lets the smallest scores be found by
elementwise minima before any sorting.

The product rounds, so the m > k best by score are measured again in float64 and ordered by (distance, id).
A row is certain when the worst kept score is beyond the k-th exact key by more than the rounding can be. For
the others (duplicates, near ties) every reference whose score leaves it a chance is measured, in a second pass.
The result is that of a float64 brute-force search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from robustknn import registry, store
from robustknn.checks import check_choice, check_positive_int
from robustknn.errors import InputError, IntegrityError, NotReadyError, reason
from robustknn.neighbors.base import ClassNeighbors, NeighborIndex, Neighbors, check_vectors, empty, joined
from robustknn.neighbors.product import QUERY_MULTIPLE, SCRATCH, product, width_of
from robustknn.neighbors.refine import certain, exact_keys, in_order, normalize_
from robustknn.neighbors.scoring import Scoring
from robustknn.neighbors.selection import PAD, Best, ClassBest, ClassTable, class_tables
from robustknn.neighbors.sketch import LEAST_DIM, LEAST_GAIN, LEAST_ROWS, RANK, Candidates, Sketch, scores_of
from robustknn.neighbors.stored import weighted_sums

KIND, SCHEMA = "exact-index", 1
_CHUNK_ROWS = 65536
_LEAST_ROWS = 1024
_QUERY_BLOCK = 256
# So many references are searched for to see whether a sketch is worth having.
_TRIED = 64


@registry.indexes.register("exact")
class ExactIndex(NeighborIndex):
    """Exact nearest neighbors in memory (or over a memory-mapped tensor), with PyTorch alone.

    Mapped references are read in chunks whenever they are searched, and 8 to 16 bytes a reference are kept in memory;
    1 to 2 KB more of many long ones in memory, once they are searched by class or often (`sketch`).

    Args:
        metric: "l2", "cosine" or "ip".
        precision: "float32", or "bfloat16" to round the product's inputs (accumulating in float32) where the
            machine does that faster. Candidates are measured again in float64 either way; with bfloat16 the
            rounding is bounded by four times the largest seen among a row's candidates.
        memory_mb: bound on the working memory of a search, beside the references and the result.
    """

    exact = True
    updatable = True
    reconstructs = True

    def __init__(self, metric: str = "l2", precision: str = "float32", memory_mb: int = 256) -> None:
        super().__init__(metric)
        self.precision = check_choice(precision, ("float32", "bfloat16"), "precision")
        self.memory_mb = check_positive_int(memory_mb, "memory_mb")
        self._vectors: Tensor | None = None
        self.lengths: Tensor | None = None
        self._scoring: Scoring | None = None
        self._tables: dict[tuple[int, int], list[ClassTable]] = {}
        self._sketch: Sketch | Literal[False] | None = None  # False: these vectors have none
        self._asked = 0

    # ------------------------------------------------------------------------------------- content

    def build(self, vectors: Tensor, labels: Tensor | None = None, payload: Tensor | None = None) -> ExactIndex:
        """Index a copy of `vectors` when the metric needs unit length and they are in memory, else the tensor itself.

        Raises:
            InputError: not (n, D) floating point, no reference, NaN or infinite values, labels that are no class
                numbers, another number of labels or payload rows than of references.
        """
        check_vectors(vectors, labels, payload)
        if not self.metric.unit or store.is_mapped(vectors):
            return self.adopt(vectors.detach().contiguous(), None, labels, payload)
        unit = vectors.detach().clone(memory_format=torch.contiguous_format)
        return self.adopt(unit, normalize_(unit), labels, payload)

    def adopt(
        self, vectors: Tensor, lengths: Tensor | None, labels: Tensor | None, payload: Tensor | None = None
    ) -> ExactIndex:
        """Index vectors without copying or changing them.

        Args:
            lengths: for cosine, the lengths that vectors of unit length had; None for vectors as they came: those are
                brought to unit length whenever they are read, which suits vectors on a disk.
        """
        labels = check_vectors(vectors, labels, payload)
        scoring = Scoring.of(self.metric, vectors.detach(), lengths is None)
        self.hold(vectors, lengths, labels, payload)
        self._scoring = scoring
        return self

    def hold(
        self, vectors: Tensor, lengths: Tensor | None, labels: Tensor | None, payload: Tensor | None = None
    ) -> ExactIndex:
        """The same, but the vectors, known to be finite, are not read before they are searched."""
        self._labels = check_vectors(vectors, labels, payload)
        self._vectors, self.lengths, self._payload = vectors.detach(), lengths, payload
        self._scoring, self._tables = None, {}
        self._sketch, self._asked = None, 0
        return self

    @property
    def raw(self) -> bool:
        """Whether cosine searches vectors as they came, whatever their length."""
        return self.metric.unit and self.lengths is None

    @property
    def scoring(self) -> Scoring:
        """How the vectors are scored; measured at the first need."""
        if self._scoring is None:
            self._scoring = Scoring.of(self.metric, self.vectors, self.raw)
        return self._scoring

    def add(self, vectors: Tensor, labels: Tensor | None = None, payload: Tensor | None = None) -> ExactIndex:
        """Append vectors (this copies what is there: adding one by one is quadratic)."""
        labels = check_vectors(vectors, labels, payload)
        old = self.vectors
        if vectors.shape[1] != self.dim:
            raise InputError(f"vectors of length {vectors.shape[1]} cannot join an index of length {self.dim}.")
        labels, payload = joined(self._labels, labels, "labels"), joined(self._payload, payload, "payload")
        both = torch.cat([old, vectors.detach().to(old)])
        lengths = None
        if self.lengths is not None:
            lengths = torch.cat([self.lengths, normalize_(both[len(old) :])])
        return self.adopt(both, lengths, labels, payload)

    @property
    def vectors(self) -> Tensor:
        """The references as they are held (n, D): at unit length for cosine, or as they came (`raw`)."""
        if self._vectors is None:
            raise empty()
        return self._vectors

    def __len__(self) -> int:
        return 0 if self._vectors is None else len(self._vectors)

    @property
    def dim(self) -> int:
        return self.vectors.shape[1]

    def reconstruct(self, ids: Tensor) -> Tensor:
        rows = self._searched(ids)
        if self.lengths is not None:
            rows = rows * self.lengths[ids.clamp_min(0).to(self.lengths.device)][..., None]
        return rows

    def reconstruct_unit(self, ids: Tensor) -> Tensor:
        if self.lengths is None or self.vectors.dtype not in (torch.float32, torch.float64):
            return super().reconstruct_unit(ids)
        return self._searched(ids)

    def _searched(self, ids: Tensor) -> Tensor:
        """The vectors of ids as they are held, in a tensor of its own; zeros for −1."""
        known, missing = ids.clamp_min(0).reshape(-1).to(self.vectors.device), ids < 0
        rows = self.vectors.index_select(0, known).view(*ids.shape, self.dim)
        # Rows are long: one more pass over them only where something is missing.
        return rows.masked_fill_(missing.to(rows.device)[..., None], 0) if bool(missing.any()) else rows

    def combine(self, ids: Tensor, weights: Tensor, unit: bool = False) -> Tensor:
        if (unit and self.lengths is None) or self.vectors.dtype not in (torch.float32, torch.float64):
            return super().combine(ids, weights, unit)
        known, weights = ids.clamp_min(0).to(self.vectors.device), weights.masked_fill(ids < 0, 0).to(self.vectors)
        if self.lengths is not None and not unit:
            weights = weights * self.lengths[known]
        return weighted_sums(self.vectors, known, weights)

    def stored(self) -> Tensor | None:
        held = self.vectors
        here = held.device.type == "cpu" and held.dtype in (torch.float32, torch.float64) and not store.is_mapped(held)
        return held if here and not self.raw else None

    # -------------------------------------------------------------------------------------- search

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> Neighbors:
        return self._search(queries, k, 0)[0]

    @torch.no_grad()
    def search_both(self, queries: Tensor, k: int, per_class: int) -> tuple[Neighbors, ClassNeighbors]:
        if self._labels is None:
            raise NotReadyError("searching by class needs labels; build the index with labels=.")
        check_positive_int(per_class, "per_class")
        found, by_class = self._search(queries, k, per_class)
        return found, cast(ClassNeighbors, by_class)

    def _search(self, queries: Tensor, k: int, per_class: int) -> tuple[Neighbors, ClassNeighbors | None]:
        queries = self.place(self.check_queries(queries, k))
        blocks = queries.split(self._block_queries(k, per_class))
        found = [self._search_block(block, k, per_class) for block in blocks]
        near = Neighbors(torch.cat([f[0].distances for f in found]), torch.cat([f[0].ids for f in found]))
        if not per_class:
            return near, None
        classes = [cast(ClassNeighbors, f[1]) for f in found]
        return near, ClassNeighbors(torch.cat([c.distances for c in classes]), torch.cat([c.ids for c in classes]))

    def place(self, queries: Tensor) -> Tensor:
        """Checked queries as they are searched: on the index's device, in its type, at unit length for cosine."""
        queries = queries.to(self.vectors.device, self.scoring.dtype)
        if self.metric.unit:
            queries = queries.clone(memory_format=torch.contiguous_format)
            normalize_(queries)
        return queries

    def spare(self, k: int) -> int:
        """How many candidates to measure for the k nearest: the more, the fewer rows need a second pass."""
        return min(len(self), k + (max(16, k // 4) if self.precision == "float32" else max(32, k)))

    def _search_block(self, queries: Tensor, k: int, per_class: int) -> tuple[Neighbors, ClassNeighbors | None]:
        measured = self.spare(k) + (_spare_of(per_class) * self._n_classes if per_class else 0)
        few = len(queries) > 0 and measured * LEAST_GAIN <= len(self)
        sketch = self._sketched(len(queries), per_class) if few else None
        if sketch is None:
            return self._search_plain(queries, k, per_class)
        return self._search_sketched(sketch, queries, k, per_class)

    def _search_plain(self, queries: Tensor, k: int, per_class: int) -> tuple[Neighbors, ClassNeighbors | None]:
        best = Best(len(queries), self.spare(k), queries)
        by_class = ClassBest(self._n_classes, per_class, len(queries), queries.device) if per_class else None
        for start, scores in self._scores(queries, self.precision):
            best.update(scores[:-1], start)
            if by_class is not None:
                by_class.update(scores, start, self._class_tables(start, len(scores) - 1))
        near = self._settled(queries, k, best.values, best.ids)
        if by_class is None:
            return near, None
        distances, ids = by_class.read(self.metric, self.scoring.scale, self.scoring.offset(queries))
        return near, ClassNeighbors(distances.to(queries.dtype), ids)

    def _sketched(self, queries: int, per_class: int) -> Sketch | None:
        """The sketch of long vectors. It costs about as much as searching RANK queries does without it.

        Neighbors by class are not the same to the last with it: it is there when they are searched first.
        """
        if self._sketch is None and (per_class or self._asked > 2 * RANK):
            self._sketch = self._new_sketch()
        self._asked += queries
        return self._sketch or None

    def _new_sketch(self) -> Sketch | Literal[False]:
        vectors = self.stored()
        if vectors is None or vectors.dtype != torch.float32 or self.precision != "float32":
            return False
        if self.dim < LEAST_DIM or len(self) < LEAST_ROWS:
            return False
        sketch = Sketch.of(vectors, self.scoring)
        sample = vectors[:: -(-len(self) // _TRIED)]
        tried = self._candidates(sketch, sample, min(_TRIED, len(self)), lambda *_: None)
        return sketch if len(tried.given_up) * 4 < len(sample) else False

    def _candidates(self, sketch: Sketch, queries: Tensor, k: int, look: Callable[[int, Tensor], None]) -> Candidates:
        rows = self._chunk_rows(width_of(len(queries)))
        return sketch.candidates(self.vectors, self.scoring, queries, k, self.spare(k), rows, look)

    def _search_sketched(
        self, sketch: Sketch, queries: Tensor, k: int, per_class: int
    ) -> tuple[Neighbors, ClassNeighbors | None]:
        scoring = self.scoring
        by_class = None
        if per_class:
            by_class = ClassBest(self._n_classes, _spare_of(per_class), len(queries), queries.device)

        def look(start: int, scores: Tensor) -> None:
            if by_class is not None:
                by_class.update(scores, start, self._class_tables(start, len(scores) - 1))

        found = self._candidates(sketch, queries, k, look)
        near = self._settled(queries, k, found.scores, found.ids)
        if len(found.given_up):
            again = self._search_plain(queries[found.given_up], k, 0)[0]
            near.distances[found.given_up], near.ids[found.given_up] = again.distances, again.ids
        if by_class is None:
            return near, None
        _, ids = by_class.read(self.metric, scoring.scale, scoring.offset(queries))
        return near, self._measured(queries, ids, per_class)

    def _measured(self, queries: Tensor, ids: Tensor, per_class: int) -> ClassNeighbors:
        """The nearest of each class among candidates (B, C, m)."""
        scoring, known = self.scoring, ids >= 0
        scores = scores_of(
            self.vectors, scoring.bias, scoring.place(queries), [r[k] for r, k in zip(ids, known, strict=True)]
        )
        keys = torch.full(ids.shape, math.inf, dtype=torch.float64, device=ids.device)
        keys[known] = torch.cat(scores).double() / scoring.scale
        keys, order = (keys + scoring.offset(queries)[:, None, None]).sort(dim=2)
        distances = self.metric.distances(keys[..., :per_class]).to(queries.dtype)
        return ClassNeighbors(distances, ids.gather(2, order[..., :per_class]))

    def _scores(self, queries: Tensor, precision: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, scores (rows + 1, B)) for each chunk; the last row of scores is PAD."""
        scoring, width = self.scoring, width_of(len(queries))
        placed = torch.zeros(width, self.dim, dtype=scoring.dtype, device=queries.device)
        placed[: len(queries)] = scoring.place(queries)
        rows = self._chunk_rows(width)
        with SCRATCH.lend(rows + 1, width, placed) as buffer:
            for start in range(0, len(self), rows):
                chunk = scoring.read(self.vectors, start, rows)
                bias = None if scoring.bias is None else scoring.bias[start : start + rows]
                product(chunk, placed, bias, buffer[: len(chunk)], precision)
                buffer[len(chunk)] = PAD
                yield start, buffer[: len(chunk) + 1, : len(queries)]

    def _chunk_rows(self, width: int) -> int:
        # The queries and what is found of them take half; scores, and what is gathered of them, a quarter each.
        row = 4 * width * self.scoring.dtype.itemsize
        if self.raw or self.vectors.dtype != self.scoring.dtype:
            row += self.dim * self.scoring.dtype.itemsize
        return max(_LEAST_ROWS, min(_CHUNK_ROWS, len(self), self.memory_mb * 2**20 // row))

    def _block_queries(self, k: int, per_class: int) -> int:
        """How many queries to search at a time, so that they, and what is found of them, take half of the memory."""
        row = 64 * self.spare(k) + 32 * self.dim
        if per_class:
            row += 64 * per_class * self._n_classes
        fitting = self.memory_mb * 2**20 // (2 * row) // QUERY_MULTIPLE * QUERY_MULTIPLE
        return max(QUERY_MULTIPLE, min(_QUERY_BLOCK, fitting))

    def _settled(self, queries: Tensor, k: int, scores: Tensor, ids: Tensor) -> Neighbors:
        approximate = scores.double() / self.scoring.scale + self.scoring.offset(queries)[:, None]
        return self.settle(queries, k, approximate, ids, self.scoring.error(queries))

    def settle(self, queries: Tensor, k: int, approximate: Tensor, ids: Tensor, error: Tensor) -> Neighbors:
        """The k nearest from candidates chosen by approximate keys; rows they leave uncertain are searched again.

        Args:
            queries: (B, D) as `place` gives them.
            approximate: (B, m) the m > k least approximate keys.
            ids: (B, m) whom they belong to; −1 for none.
            error: (B,) how far an approximate key may be from the exact one.
        """
        keys = exact_keys(self.metric, queries, self.vectors, ids)
        if self.precision == "bfloat16":
            error = error + 4 * (approximate - keys).abs().amax(1)
        keys, ids = in_order(keys, ids)
        unsure = (~certain(approximate, keys[:, k - 1], error, len(self))).nonzero()[:, 0]
        keys, ids = keys[:, :k].contiguous(), ids[:, :k].contiguous()
        if len(unsure):
            keys[unsure], ids[unsure] = self._sweep(queries[unsure], keys[unsure], ids[unsure])
        return Neighbors(self.metric.distances(keys).to(queries.dtype), ids)

    def _sweep(self, queries: Tensor, keys: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Better k nearest than those given, measuring every reference whose score leaves it a chance."""
        scoring = self.scoring
        nearest = [(keys[row : row + 1], ids[row : row + 1]) for row in range(len(queries))]
        beyond = scoring.error(queries) - scoring.offset(queries)
        for start, scores in self._scores(queries, "float32"):
            reach = torch.stack([found[0, -1] for found, _ in nearest])
            ceiling = ((reach + beyond) * scoring.scale).to(scores.dtype)
            near = (scores[:-1] <= ceiling).T.contiguous()
            for row in near.any(1).nonzero()[:, 0].tolist():
                old_keys, old_ids = nearest[row]
                new = near[row].nonzero()[:, 0] + start
                new = new[~torch.isin(new, old_ids)][None]
                new_keys = exact_keys(self.metric, queries[row : row + 1], self.vectors, new)
                both = in_order(torch.cat([old_keys, new_keys], 1), torch.cat([old_ids, new], 1))
                nearest[row] = both[0][:, : keys.shape[1]], both[1][:, : keys.shape[1]]
        return torch.cat([found for found, _ in nearest]), torch.cat([found for _, found in nearest])

    # ------------------------------------------------------------------------------------- classes

    @property
    def _n_classes(self) -> int:
        return int(cast(Tensor, self._labels).max()) + 1

    def _class_tables(self, start: int, rows: int) -> list[ClassTable]:
        if (start, rows) not in self._tables:
            labels = cast(Tensor, self._labels)[start : start + rows].cpu()
            self._tables[start, rows] = class_tables(labels, self.vectors.device)
        return self._tables[start, rows]

    # ----------------------------------------------------------------------------------- transport

    def save(self, path: Path) -> None:
        """Write vectors, lengths, labels and payload as an artifact directory."""
        meta = {"metric": self.metric.name, "precision": self.precision, "memory_mb": self.memory_mb}
        with store.artifact(Path(path), KIND, SCHEMA, meta) as folder:
            for name, tensor in self._parts().items():
                if tensor is not None:
                    store.save_array(folder / f"{name}.npy", tensor)

    def _parts(self) -> dict[str, Tensor | None]:
        return {
            "vectors": self.vectors,
            "lengths": self.lengths,
            "labels": self._labels,
            "payload": self._payload,
        }

    @classmethod
    def load(cls, path: Path, mapped: bool = False) -> ExactIndex:
        """Read what `save` wrote; `mapped` leaves the vectors on disk.

        Raises:
            IntegrityError: a file is missing, truncated or altered, or they do not make an index.
        """
        manifest = store.read_manifest(Path(path), KIND, SCHEMA)
        parts = load_parts(manifest, mapped)
        try:
            return cls(**manifest.meta).adopt(cast(Tensor, parts["vectors"]), *list(parts.values())[1:])
        except (InputError, TypeError) as error:
            raise no_index(manifest, error) from error

    def to(self, device: torch.device | str) -> ExactIndex:
        if self._vectors is not None:
            moved = {k: None if v is None else v.to(device) for k, v in self._parts().items()}
            self.adopt(cast(Tensor, moved["vectors"]), moved["lengths"], moved["labels"], moved["payload"])
        return self


# ------------------------------------------------------------------------------------------- helpers


def _spare_of(per_class: int) -> int:
    """How many of a class to measure for those nearest by estimates."""
    return per_class + max(8, per_class // 8)


def load_parts(manifest: store.Manifest, mapped: bool) -> dict[str, Tensor | None]:
    """The arrays of a saved index by name, None where it has none; `mapped` leaves the vectors on disk."""
    parts: dict[str, Tensor | None] = {}
    for name in ("vectors", "lengths", "labels", "payload"):
        file = f"{name}.npy"
        known = file in manifest.files
        parts[name] = store.load_array(manifest.file(file), mapped and name == "vectors") if known else None
    return parts


def no_index(manifest: store.Manifest, error: Exception) -> IntegrityError:
    """The error for an artifact whose files are whole but do not make an index."""
    return IntegrityError(f"{str(manifest.path)!r} holds no {manifest.kind} ({reason(error)}); make it again.")


__all__ = ["ExactIndex", "normalize_"]
