"""Guides: the references that a loss looks at, for every sample of a batch, and differentiable distances to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from robustknn.classifiers.voters import Voter
from robustknn.neighbors.base import Metric
from robustknn.neighbors.refine import exact_keys
from robustknn.neighbors.stored import products_with

LEAST_DIM = 512
"""Vectors that are shorter are gathered: many short products cost as much as few copies."""


class Rows(Protocol):
    """The references of each sample of a batch, seen from a center of its own, (N, D)."""

    @property
    def center(self) -> Tensor: ...

    def products(self, z: Tensor) -> Tensor:
        """⟨z, r − center⟩ of each vector (N, D) with its own references, differentiable: (N, G)."""

    def select(self, index: Tensor) -> Rows:
        """Those of some samples."""


@dataclass(frozen=True)
class Gathered:
    """Copies of references.

    Attributes:
        vectors: (N, G, D), relative to the center.
        center: (N, D); zero for ip.
    """

    vectors: Tensor
    center: Tensor

    def products(self, z: Tensor) -> Tensor:
        return products(self.vectors, z)

    def select(self, index: Tensor) -> Gathered:
        return Gathered(self.vectors[index], self.center[index])


@dataclass(frozen=True)
class InPlace:
    """References where the index holds them, seen from the points that they were looked up at.

    Attributes:
        stored: (n, D), all references.
        ids: (N, G); −1 for none.
        center: (N, D).
    """

    stored: Tensor
    ids: Tensor
    center: Tensor

    def products(self, z: Tensor) -> Tensor:
        return products_with(self.stored, z, self.ids) - (z * self.center).sum(1, keepdim=True)

    def select(self, index: Tensor) -> InPlace:
        return InPlace(self.stored, self.ids[index], self.center[index])


@dataclass
class Guides:
    """The references one voter's loss looks at, for every sample of a batch.

    All distances come from ‖z − r‖² = ‖z − c‖² − 2⟨z − c, r − c⟩ + ‖r − c‖² with a center c: distances do not feel a
    common offset of all features, but their rounding does. Vectors have unit length for cosine, where 1 − ⟨z, r⟩ is
    half of it.

    Attributes:
        metric: "l2", "cosine" or "ip".
        rows: G references of each of N samples.
        squares: (N, G) squared lengths, relative to the center.
    """

    metric: str
    rows: Rows
    squares: Tensor

    @staticmethod
    def of(voter: Voter, ids: Tensor, z: Tensor) -> Guides:
        """The references with these ids (N, G); what stands at a missing one (−1) must be masked by the caller.

        Args:
            z: (N, D) features at the point of the lookup, of the type to compute in.
        """
        index = voter.index
        stored = index.stored() if index.dim >= LEAST_DIM and voter.metric != "ip" else None
        if stored is not None and stored.dtype == z.dtype:
            center = prepared(z.detach(), voter.metric)
            squares = exact_keys(Metric("l2"), center, stored, ids.clamp_min(0), z.dtype)
            return Guides(voter.metric, InPlace(stored, ids, center), squares)
        rows = (index.reconstruct_unit(ids) if voter.metric == "cosine" else index.reconstruct(ids)).to(z.dtype)
        center = torch.zeros_like(rows[:, 0]) if voter.metric == "ip" else rows.mean(1)
        rows -= center[:, None]
        return Guides(voter.metric, Gathered(rows, center), rows.norm(dim=2).square())

    def select(self, index: Tensor) -> Self:
        """The guides of some samples."""
        return replace(self, rows=self.rows.select(index), squares=self.squares[index])

    def distances(self, z: Tensor) -> Tensor:
        """The distance of each sample to its guides, (N, G). ip: ‖z‖·max‖guide‖ − ⟨z, guide⟩, the first held fixed."""
        if self.metric == "ip":
            z = z.to(self.squares.dtype)
            lengths = z.detach().norm(dim=1, keepdim=True) * self.squares.amax(1, keepdim=True).sqrt()
            from_reach: Tensor = lengths - self.rows.products(z)
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
        z = prepared(z.to(self.squares.dtype), self.metric) - self.rows.center
        squared: Tensor = (z * z).sum(1, keepdim=True) - 2 * self.rows.products(z) + self.squares
        return squared


def products(guides: Tensor, z: Tensor) -> Tensor:
    """⟨z, guide⟩ of each sample with its guides: (N, G, D) and (N, D) → (N, G)."""
    # With the single vector on the left the product and its gradient run at the speed of the memory on a CPU;
    # the other way round they take five times as long.
    return torch.bmm(z[:, None], guides.transpose(1, 2))[:, 0]


def prepared(z: Tensor, metric: str) -> Tensor:
    """Features as the metric compares them: of unit length for cosine."""
    return nn.functional.normalize(z, dim=-1) if metric == "cosine" else z
