"""The two sides of a vote: the nearest references of one class and of its nearest rival, and the k-ball between.

Guides and threshold of Sitawarin & Wagner's attacks (arXiv 1903.08333, 2003.06559).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from robustknn.classifiers.base import Look, Request, VoterClassifier
from robustknn.classifiers.voters import Voter
from robustknn.errors import InputError
from robustknn.objectives.classes import nearest_classes, winners
from robustknn.objectives.guides import Guides
from robustknn.objectives.neighbors import NeighborBatch, NeighborBound

_LEAST_SCALE = 0.01
"""Of the mean key: where the k nearest coincide with the input, a divisor near zero would leave no slope."""


@dataclass
class Sides:
    """One voter's guides: m references of the own class, then m of the nearest other, nearest first.

    The key of a reference is its squared distance (of unit vectors for cosine); for inner products, which have no
    such distance, R − ⟨z, r⟩ with R = ‖z‖·max‖guide‖ at the point of the lookup.

    Attributes:
        guides: (N, 2m).
        signs: (N, 2m), 1 for a reference that speaks for the defender, −1 for one that speaks for the attacker,
            0 for one that is missing.
        threshold: (N, 1), the key of the k-th neighbor at the point of the lookup.
        reach: (N, 1), R; zero for metrics other than "ip".
        size: (N, 1), the mean key of the guides at the point of the lookup, what the threshold is compared with.
    """

    guides: Guides
    signs: Tensor
    threshold: Tensor
    reach: Tensor
    size: Tensor

    @classmethod
    def make(cls, voter: Voter, ids: Tensor, signs: Tensor, look: Look) -> Sides:
        """From references (N, 2m) and their signs, with the threshold at the point looked at."""
        z, near = look.features[voter.layer], look.nearest[voter].first(voter.n_neighbors).distances
        dtype = torch.promote_types(z.dtype, near.dtype)
        guides = Guides.of(voter, ids, z.to(dtype))
        # The last neighbor there is: an approximate index may find fewer than k.
        kth = near.masked_fill(near.isinf(), float("-inf")).amax(1, keepdim=True).to(dtype)
        reach = torch.zeros_like(kth)
        if voter.metric == "ip":
            reach = z.norm(dim=1, keepdim=True).to(dtype) * guides.squares.amax(1, keepdim=True).sqrt()
            threshold = reach + kth
        else:
            threshold = 2 * kth if voter.metric == "cosine" else kth.square()
        made = cls(guides, signs.to(dtype), threshold, reach, threshold)
        present = made.signs.abs()
        made.size = (made.keys(z) * present).sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp_min(1)
        return made

    def select(self, index: Tensor) -> Sides:
        """The sides of some samples."""
        return Sides(
            self.guides.select(index), self.signs[index], self.threshold[index], self.reach[index], self.size[index]
        )

    def keys(self, z: Tensor) -> Tensor:
        """The key of each guide at features z (N, D), (N, 2m), differentiable."""
        if self.guides.metric == "ip":
            reach: Tensor = self.reach - self.guides.rows.products(z.to(self.guides.squares.dtype))
            return reach
        return self.guides.squared(z)

    def roots(self, keys: Tensor) -> Tensor:
        """Distances from keys of any shape (N, …); keys themselves for inner products."""
        if self.guides.metric == "ip":
            return keys
        # At a reference itself the distance has no gradient; a floor far below the others keeps it finite.
        floor = (1e-12 * self.size).clamp_min(torch.finfo(keys.dtype).tiny)
        return torch.maximum(keys, floor).sqrt()

    def scale(self) -> Tensor:
        """The threshold as a divisor, (N, 1), a hundredth of the mean key at least."""
        least = (_LEAST_SCALE * self.size.abs()).clamp_min(torch.finfo(self.size.dtype).tiny)
        return torch.maximum(self.threshold, least)

    def narrowed(self, counts: Tensor) -> Tensor:
        """The signs with those beyond the `counts` (N,) nearest of each side set to 0, (N, 2m)."""
        m = self.signs.shape[1] // 2
        place = torch.arange(2 * m, device=counts.device) % m
        return self.signs * (place < counts[:, None])


class SidesBound(NeighborBound):
    """An objective on the two sides of each vote.

    Args:
        counts: m of each voter.
        guide_layer: "each" layer has its own guides; "first" takes those nearest in the first voter's layer for all.
    """

    def __init__(
        self, classifier: VoterClassifier, voters: Sequence[Voter], counts: Sequence[int], guide_layer: str
    ) -> None:
        self.by_first, self.counts = guide_layer == "first", list(counts)
        if self.by_first:
            check_same_references(voters)
            self.counts = self.counts[:1] * len(voters)
        requests = [Request(v, v.n_neighbors, m) for v, m in zip(voters, self.counts, strict=True)]
        super().__init__(classifier, voters, requests)
        self.winners = winners(classifier)


SidesBoundT = TypeVar("SidesBoundT", bound=SidesBound)


class SidesBatch(NeighborBatch[SidesBoundT, Sides]):
    """The sides of one batch: the labels' references, and those of the nearest class that can win against them."""

    def look_up(self, look: Look) -> list[Sides]:
        bound = self._bound
        asked = bound.voters[:1] if bound.by_first else bound.voters
        found = [look.by_class[v].first(m) for v, m in zip(asked, bound.counts, strict=False)]
        likely = None if self.targeted else bound.winners
        classes = nearest_classes([f.distances for f in found], self.labels, 1, likely)
        speaks = torch.tensor([-1.0, 1.0] if self.targeted else [1.0, -1.0], device=classes.device)[None, :, None]
        sides = []
        for place, voter in enumerate(bound.voters):
            near = found[0 if bound.by_first else place].ids
            ids = near.gather(1, classes[:, :, None].expand(-1, -1, near.shape[2]))  # (N, 2, m)
            sides.append(Sides.make(voter, ids.flatten(1), (speaks * (ids >= 0)).flatten(1), look))
        return sides


def check_same_references(voters: Sequence[Voter]) -> None:
    """InputError unless a reference has the same number in all voters."""
    if any(v.references is not voters[0].references for v in voters):
        raise InputError(
            "the voters have different references, so those nearest in one layer have no features in another; take "
            "an attack that looks its guides up layer by layer: sw1, sw2, ask or adaptive (guide_layer='each' of the "
            "objectives that have it)."
        )
