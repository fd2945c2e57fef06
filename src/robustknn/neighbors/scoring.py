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

from robustknn.errors import InputError
from robustknn.neighbors.base import Metric
from robustknn.neighbors.refine import block_rows, dot_error, row_lengths

_SAMPLE = 1024
_LARGEST = 1e38
# Cosine searches unit vectors; rounding to a stored type leaves them this far from unit length at most.
_NOT_UNIT = 0.02


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
    """

    metric: Metric
    dtype: torch.dtype
    center: Tensor
    scale: float
    radius: float
    spread: float
    deviation: float
    bias: Tensor | None

    @classmethod
    def of(cls, metric: Metric, vectors: Tensor) -> Scoring:
        """Scores for these references (n, D), read once.

        Raises:
            InputError: NaN or infinite values; vectors that cosine should search are not of unit length.
        """
        centered = metric.name != "ip"
        center = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
        if centered:
            sample = vectors[:: -(-len(vectors) // _SAMPLE)]
            for part in sample.split(block_rows(vectors)):
                center += part.double().sum(0) / len(sample)
        lengths, spreads = row_lengths(vectors, center)
        deviation = 0.0
        if metric.unit:
            deviation = float((lengths[lengths > 0] - 1).abs().max()) if bool((lengths > 0).any()) else 0.0
            if deviation > _NOT_UNIT:
                raise InputError(
                    "cosine searches references of unit length and these are not; normalize them, or let build() do it."
                )
        radius = float(lengths.max())
        exponent = max(-500, min(500, math.frexp(radius)[1])) if radius else 0
        scale = 2.0 ** (-2 * exponent)
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        if not centered:
            return cls(metric, dtype, center, scale, radius, 0.0, deviation, None)
        spread = float(spreads.max())
        bias = spreads.square_()
        if metric.unit:
            bias.mul_(0.5).add_((lengths == 0) * 0.5)
        return cls(metric, dtype, center, scale, radius, spread, deviation, bias.mul_(scale).to(dtype))

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
