"""Sitawarin & Wagner's second objective: hinges on the squared distances of guides, around the k-ball.

"Minimum-Norm Adversarial Examples on KNN and KNN-Based Models", arXiv 2003.06559.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from robustknn import registry
from robustknn.checks import check_choice, check_whole
from robustknn.classifiers.base import Classifier, Look, VoterClassifier
from robustknn.classifiers.voters import Voter
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective
from robustknn.objectives.neighbors import usable_voters, voter_classifier
from robustknn.objectives.sides import SidesBatch, SidesBound

MARGIN = 1e-5
"""How far beyond the threshold a guide has to be (the paper's constant), in the unit of the keys."""


@runtime_checkable
class Narrowing(Protocol):
    """A batch objective that can ask for less once a sample has been fooled (the paper's dynamic m)."""

    def narrow(self, share: Tensor) -> None:
        """Ask for a share (N,) in [0, 1] of all guides: 1 for all, 0 for no more than a majority of votes needs."""


@registry.objectives.register("neighbor-hinge")
@dataclass(frozen=True)
class NeighborHinge(Objective):
    """Guides of the true class outside the k-ball, guides of the nearest other class inside.

    loss = −Σ_l Σ_j max(0, t_j (D_lj − η_l) + 10⁻⁵), D the squared feature distance to guide j, η_l that to the k-th
    neighbor at the last lookup, t_j = −1 for the m/2 nearest references of the true class and 1 for those of the
    other class whose m/2 nearest are nearest in the mean. The loss is zero where every guide is on its side. For a
    target its own references are pulled in and those of its nearest rival are pushed out.

    Args:
        n_guides: m, both classes together; None takes 2k, as the paper's evaluation.
        scale: "radius" divides each sample's and layer's hinges by η, so that layers count alike; "none" takes raw
            squares, as published.
        guide_layer: "each" layer has its own guides; "first" takes those nearest in the first layer for all, as
            published.
        allow_approximate: take neighbors from an index that is not exact.
    """

    n_guides: int | None = None
    scale: str = "radius"
    guide_layer: str = "each"
    allow_approximate: bool = False

    def __post_init__(self) -> None:
        if self.n_guides is not None:
            check_whole(self.n_guides, "n_guides", 2)
        check_choice(self.scale, ("radius", "none"), "scale")
        check_choice(self.guide_layer, ("each", "first"), "guide_layer")

    @classmethod
    def published(cls, n_guides: int | None = None) -> NeighborHinge:
        """Raw squares, guides of the first layer."""
        return cls(n_guides, scale="none", guide_layer="first")

    def bind(self, classifier: Classifier) -> BoundObjective:
        known = voter_classifier(classifier, "the neighbor-hinge objective")
        return _Bound(self, known, usable_voters(known, allow_approximate=self.allow_approximate))

    def per_side(self, voter: Voter) -> int:
        """m/2 of a voter."""
        return voter.n_neighbors if self.n_guides is None else self.n_guides // 2


class _Bound(SidesBound):
    def __init__(self, config: NeighborHinge, classifier: VoterClassifier, voters: tuple[Voter, ...]) -> None:
        self.config = config
        super().__init__(classifier, voters, [config.per_side(v) for v in voters], config.guide_layer)

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return _Batch(self, y, target, cast(Look, look))


class _Batch(SidesBatch[_Bound]):
    def __init__(self, bound: _Bound, y: Tensor, target: Tensor | None, look: Look) -> None:
        super().__init__(bound, y, target, look)
        self._share = torch.ones(len(y), dtype=torch.float64, device=y.device)

    def update(self, kept: Tensor | None, look: Look | None) -> None:
        super().update(kept, look)
        self._share = self._share if kept is None else self._share[kept]

    def narrow(self, share: Tensor) -> None:
        self._share = share.to(self._share)

    def loss(self, x: Tensor) -> Tensor:
        bound = self._bound
        features = bound.classifier.read(x, bound.layers)
        total: Tensor | float = 0.0
        for voter, sides, most in zip(bound.voters, self._parts, bound.counts, strict=True):
            least = min(voter.n_neighbors // 2 + 1, most)
            signs = sides.narrowed((least + self._share * (most - least)).ceil())
            distances = sides.keys(features[voter.layer]) - sides.threshold
            if bound.config.scale == "radius":
                distances = distances / sides.scale()
            total = total - (signs.abs() * (MARGIN - signs * distances).clamp_min(0)).sum(1)
        return cast(Tensor, total)
