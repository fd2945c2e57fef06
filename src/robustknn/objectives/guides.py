"""Guides: the references that a loss looks at, for every sample of a batch, and differentiable distances to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from robustknn.classifiers.voters import Voter


@dataclass
class Guides:
    """The references one voter's loss looks at, for every sample of a batch.

    All distances come from ‖z − r‖² = ‖z − c‖² − 2⟨z − c, r − c⟩ + ‖r − c‖² with a center c: distances do not feel a
    common offset of all features, but their rounding does. Vectors have unit length for cosine, where 1 − ⟨z, r⟩ is
    half of it.

    Attributes:
        metric: "l2", "cosine" or "ip".
        vectors: (N, G, D), relative to the center.
        center: (N, D); zero for ip.
        squares: (N, G) squared lengths, relative to the center.
    """

    metric: str
    vectors: Tensor
    center: Tensor
    squares: Tensor

    @staticmethod
    def gather(voter: Voter, ids: Tensor, dtype: torch.dtype) -> Guides:
        """The references with these ids (N, G); what stands at a missing one (−1) must be masked by the caller."""
        index = voter.index
        rows = (index.reconstruct_unit(ids) if voter.metric == "cosine" else index.reconstruct(ids)).to(dtype)
        center = torch.zeros_like(rows[:, 0]) if voter.metric == "ip" else rows.mean(1)
        rows -= center[:, None]
        return Guides(voter.metric, rows, center, rows.norm(dim=2).square())

    def select(self, index: Tensor) -> Self:
        """The guides of some samples."""
        return replace(self, vectors=self.vectors[index], center=self.center[index], squares=self.squares[index])

    def distances(self, z: Tensor) -> Tensor:
        """The distance of each sample to its guides, (N, G). ip: ‖z‖·max‖guide‖ − ⟨z, guide⟩, the first held fixed."""
        if self.metric == "ip":
            z = z.to(self.vectors.dtype)
            lengths = z.detach().norm(dim=1, keepdim=True) * self.squares.amax(1, keepdim=True).sqrt()
            from_reach: Tensor = lengths - products(self.vectors, z)
            return from_reach
        squared = self.squared(z)
        if self.metric == "cosine":
            return squared / 2
        # At a reference itself the distance has no gradient; a floor far below the others keeps it finite.
        floor = (1e-12 * self.squares.amax(1, keepdim=True)).clamp_min(torch.finfo(squared.dtype).tiny)
        distances: Tensor = torch.maximum(squared, floor).sqrt()
        return distances

    def squared(self, z: Tensor) -> Tensor:
        """‖z − guide‖², of unit vectors for cosine, (N, G); not for ip."""
        z = prepared(z.to(self.vectors.dtype), self.metric) - self.center
        squared: Tensor = (z * z).sum(1, keepdim=True) - 2 * products(self.vectors, z) + self.squares
        return squared


def products(guides: Tensor, z: Tensor) -> Tensor:
    """⟨z, guide⟩ of each sample with its guides: (N, G, D) and (N, D) → (N, G)."""
    # With the single vector on the left the product and its gradient run at the speed of the memory on a CPU;
    # the other way round they take five times as long.
    return torch.bmm(z[:, None], guides.transpose(1, 2))[:, 0]


def prepared(z: Tensor, metric: str) -> Tensor:
    """Features as the metric compares them: of unit length for cosine."""
    return nn.functional.normalize(z, dim=-1) if metric == "cosine" else z
