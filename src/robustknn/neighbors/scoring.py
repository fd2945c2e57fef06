"""What one matrix product computes for a search: scores, which order like the distances up to rounding.

The key of L2, ‖q − r‖², is expanded about a center c near the middle of the references: with q' = q − c and
r' = r − c it is ‖q'‖² + 2⟨q', c⟩ + ‖r'‖² − 2⟨q', r⟩. The first two terms are the same for all references of a
query, ‖r'‖² is known beforehand, and the product is with the references as they are stored. Data far from the
origin then cancel by ‖q'‖‖r‖ rather than by ‖q‖‖r‖. Cosine's key of unit vectors is half of that of L2 (a vector of
length zero is at a right angle to all, ½ more), and is found in the same way, so that features which all point about
the same way are told apart.

Everything is multiplied by a power of two that brings the references to about unit length, which is exact, so
that neither squares nor products leave the range of float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustknn.checks import check_finite
from robustknn.errors import InputError
from robustknn.neighbors.base import Metric
from robustknn.neighbors.refine import at_unit_length, block_rows, dot_error

_SAMPLE = 1024
_LARGEST = 1e38
# Cosine searches unit vectors; rounding to a stored type leaves them this far from unit length at most.
_NOT_UNIT = 0.02
# Between these a length and its reciprocal are normal numbers of float32, and so is what they scale.
_USUAL = (1e-30, 1e30)


@dataclass(frozen=True)
class Scoring:
    """How scores are computed and what they say about keys.

    Attributes:
        metric: the metric.
        dtype: that of the product.
        center: (D,) float64, zero for ip.
        scale: the power of two that keys are multiplied by.
        radius: the largest ‖r‖.
        spread: the largest ‖r − center‖, zero for ip.
        deviation: how far ‖r‖ is from 1 at most, where cosine searches unit vectors.
        bias: (n,) the part of a score that depends on the reference alone, or None when there is none.
        shrink: (n,) what brings each reference to unit length, where cosine searches references as they came.
    """

    metric: Metric
    dtype: torch.dtype
    center: Tensor
    scale: float
    radius: float
    spread: float
    deviation: float
    bias: Tensor | None
    shrink: Tensor | None = None

    @classmethod
    def of(cls, metric: Metric, vectors: Tensor, raw: bool = False) -> Scoring:
        """Scores for these references (n, D), read once, block by block; 8 to 16 bytes a reference are kept of them.

        Args:
            raw: cosine finds them as they came: they are brought to unit length whenever they are read.

        Raises:
            InputError: NaN or infinite values; vectors that cosine should search are not of unit length.
        """
        centered, raw = metric.name != "ip", raw and metric.unit
        dtype = torch.promote_types(vectors.dtype, torch.float32)

        def wide(part: Tensor) -> Tensor:
            return (at_unit_length(part)[0].to(dtype) if raw else part).double()

        center = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
        if centered:
            sample = vectors[:: -(-len(vectors) // _SAMPLE)]
            for part in sample.split(block_rows(vectors)):
                center += wide(part).sum(0) / len(sample)
        radius = deviation = spread = 0.0
        squares = torch.empty(len(vectors) if centered else 0, dtype=torch.float64, device=vectors.device)
        shrink = torch.empty(len(vectors), dtype=dtype, device=vectors.device) if raw else None
        step = block_rows(vectors)
        for i in range(0, len(vectors), step):
            rows = vectors[i : i + step]
            if shrink is not None:
                rows, were = at_unit_length(rows)
                shrink[i : i + step] = were.masked_fill_(were == 0, 1).reciprocal_()
            rows = rows.to(dtype).double()
            lengths = rows.norm(dim=1)
            if not bool(lengths.isfinite().all()):
                check_finite(vectors, "the references")
            radius = max(radius, float(lengths.max()))
            if centered:
                far = (rows - center).norm(dim=1)  # not in place: float64 rows are the references
                spread = max(spread, float(far.max()))
                squares[i : i + step] = far.square_()
            if metric.unit:
                zero = lengths == 0
                squares[i : i + step].mul_(0.5).add_(zero * 0.5)
                deviation = max(deviation, float((lengths - 1).masked_fill(zero, 0).abs().max()))
        if deviation > _NOT_UNIT:
            raise InputError(
                "cosine searches references of unit length and these are not; normalize them, or let build() do it."
            )
        exponent = max(-500, min(500, math.frexp(radius)[1])) if radius else 0
        scale = 2.0 ** (-2 * exponent)
        bias = squares.mul_(scale).to(dtype) if centered else None
        return cls(metric, dtype, center, scale, radius, spread, deviation, bias, shrink)

    def read(self, vectors: Tensor, start: int, rows: int) -> Tensor:
        """References `start`… as they are multiplied: in the product's type, at unit length for cosine."""
        part = vectors[start : start + rows]
        if self.shrink is None:
            return part.to(self.dtype)
        factor = self.shrink[start : start + rows]
        low, high = _USUAL
        usual = (factor > low) & (factor < high)
        if bool(usual.all()):
            return part * factor[:, None] if part.dtype == self.dtype else part.to(self.dtype).mul_(factor[:, None])
        return at_unit_length(part)[0].to(self.dtype)

    @property
    def factor(self) -> float:
        """What the product ⟨q', r⟩ counts in a key."""
        return -2.0 if self.metric.name == "l2" else -1.0

    def place(self, queries: Tensor) -> Tensor:
        """The queries that the references are multiplied with, (B, D): their product, plus the bias, is the score.

        A query so long that its scores could overflow is cut; `error` then certifies nothing.
        """
        wide = (queries.double() - self.center) * (self.factor * self.scale)
        limit = self._limit(queries.shape[1])
        return wide.clamp_(-limit, limit).to(self.dtype)

    def _limit(self, dim: int) -> float:
        return min(_LARGEST, _LARGEST / (4 * math.sqrt(dim) * max(self.radius, 1e-300)))

    def offset(self, queries: Tensor) -> Tensor:
        """What turns a query's scores, divided by the scale, into keys by addition, (B,) float64."""
        if self.metric.name == "ip":
            return torch.zeros(len(queries), dtype=torch.float64, device=queries.device)
        wide = queries.double()
        moved = wide - self.center
        squares = (moved * moved).sum(1) + 2 * (moved @ self.center)
        return (squares + 1 - (wide * wide).sum(1)) / 2 if self.metric.unit else squares

    def error(self, queries: Tensor) -> Tensor:
        """How far the key that a score tells may be from the exact one, (B,) float64; ∞ where a query is cut."""
        dim, info = queries.shape[1], torch.finfo(self.dtype)
        wide = queries.double()
        length = (wide - self.center).norm(dim=1)
        product = length * self.radius
        rounding = 2 * (dot_error(dim, self.dtype) + 4 * info.eps) * product + 8 * info.eps * self.spread**2
        if self.shrink is not None:  # unit length is rounded to once here and once more in `read`
            rounding += 4 * info.eps * (length + self.spread)
        # What is lost where a query or a product falls below the smallest normal number.
        rounding += 4 * info.tiny * (dim + math.sqrt(dim) * self.radius) / self.scale
        return self._bound(rounding, wide.norm(dim=1), length * (2 * self.scale) > self._limit(dim))

    def plain_error(self, queries: Tensor) -> Tensor:
        """The same for an engine that computes ‖q‖² + ‖r‖² − 2⟨q, r⟩, or −⟨q, r⟩, as it stands, in this dtype."""
        dim, info = queries.shape[1], torch.finfo(self.dtype)
        length = queries.double().norm(dim=1)
        reach = (length + self.radius).square()
        size = reach if self.metric.name == "l2" else length * self.radius
        rounding = 2 * (dot_error(dim, self.dtype) + 4 * info.eps) * size + 4 * info.tiny * dim
        return self._bound(rounding, length, reach > _LARGEST)

    def _bound(self, rounding: Tensor, length: Tensor, beyond: Tensor) -> Tensor:
        if self.metric.unit:
            # With ‖q‖ = 1 + ε and ‖r‖ = 1 + δ, (1 + ‖r‖²)/2 − ⟨q, r⟩ is off by at most |ε| + 2|δ| + O(δ² + ε²).
            rounding = rounding + 2.5 * self.deviation + 1.1 * (length - 1).abs() * (length > 0)
        bound: Tensor = rounding.masked_fill_(beyond, math.inf)
        return bound
