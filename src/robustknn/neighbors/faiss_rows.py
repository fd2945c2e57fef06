"""Vectors as faiss is given them: in chunks, in float32, at unit length for cosine, padded where codes need it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustknn import rng, store
from robustknn.checks import check_finite
from robustknn.errors import InputError
from robustknn.neighbors.base import Metric
from robustknn.neighbors.faiss_module import as_float32
from robustknn.neighbors.refine import normalize_

_MARKS = 16


def prepared(metric: Metric, rows: Tensor, width: int) -> Tensor:
    """Rows (n, D) as (n, width) float32 for faiss; zeros behind the D numbers change no distance."""
    made = as_float32(rows)
    if metric.unit:
        made = made.clone() if made.data_ptr() == rows.data_ptr() else made
        normalize_(made)
    return nn.functional.pad(made, (0, width - made.shape[1])) if made.shape[1] < width else made


def chunks(metric: Metric, vectors: Tensor, width: int, memory_mb: int) -> Iterator[Tensor]:
    """Vectors (n, D), read once from first to last in chunks that take little memory.

    Raises:
        InputError: NaN or infinite values, and float64, which faiss cannot hold.
    """
    # Rows as they come, in float32, at unit length and padded: four of each at a time.
    rows = max(1, memory_mb * 2**20 // (16 * width))
    for part in vectors.split(rows):
        _check_finite(part, vectors)
        yield prepared(metric, part, width)


def sample(metric: Metric, vectors: Tensor, width: int, count: int, seed: int) -> Tensor:
    """About `count` of the vectors, one drawn at random from each of so many equal stretches; all of n ≤ count."""
    n = len(vectors)
    if count >= n:
        _check_finite(vectors, vectors)
        return prepared(metric, vectors, width)
    drawn = vectors.index_select(0, rng.one_a_stretch(n, count, seed, "train"))
    _check_finite(drawn, vectors)
    return prepared(metric, drawn, width)


def _check_finite(part: Tensor, vectors: Tensor) -> None:
    """InputError for values in a part of the vectors that are not finite; it names the first of all the vectors."""
    try:
        check_finite(part, "the references")
    except InputError:
        check_finite(vectors, "the references")
        raise


@dataclass(frozen=True)
class Marks:
    """A few rows by which indexed vectors are known again: their ids, and the rows (len(ids), D) in float32."""

    ids: list[int]
    rows: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> Marks:
        """Those of vectors (n, D), evenly spaced."""
        ids = list(range(0, len(vectors), max(1, len(vectors) // _MARKS)))
        return cls(ids, _rows(vectors, ids))

    def digest(self) -> str:
        """A sha256 of the rows."""
        return store.fingerprint_tensors({"rows": self.rows})

    def check(self, metric: Metric, vectors: Tensor, n: int) -> None:
        """InputError for vectors that are not the n which were indexed."""
        shape = (n, self.rows.shape[1])
        if tuple(vectors.shape) != shape:
            raise InputError(
                f"the index holds {n} vectors of length {shape[1]}, these are {tuple(vectors.shape)}; attach those "
                "that were indexed, in their order."
            )
        then, now = self.rows, _rows(vectors, self.ids)
        if metric.unit:
            then, now = nn.functional.normalize(then, dim=1), nn.functional.normalize(now, dim=1)
        if not torch.allclose(now, then, rtol=1e-3, atol=1e-3 * float(then.abs().max())):
            raise InputError(
                "the index holds other vectors than these; attach those that were indexed, in their order, or build it "
                "over these."
            )


def _rows(vectors: Tensor, ids: list[int]) -> Tensor:
    return vectors.index_select(0, torch.tensor(ids, device=vectors.device)).float().cpu()
