"""Move to the features of a chosen image: feature matching, the plainest attack on whoever decides by features.

Sabour, Cao, Faghri & Fleet, "Adversarial Manipulation of Deep Representations", arXiv 1511.05122; the baseline of
Sitawarin & Wagner, arXiv 1903.08333.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from robustknn import registry
from robustknn.checks import check_whole
from robustknn.classifiers.base import Classifier, Look, VoterClassifier
from robustknn.classifiers.voters import Voter
from robustknn.errors import InputError
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective
from robustknn.objectives.elsewhere import candidate_requests, candidates
from robustknn.objectives.neighbors import NeighborBatch, NeighborBound, usable_voters, voter_classifier
from robustknn.objectives.sides import Sides, check_same_references


@registry.objectives.register("feature-target")
@dataclass(frozen=True)
class FeatureTarget(Objective):
    """Near the features of one reference, in all layers.

    loss = −Σ_l ‖z_l − r_l‖ / s_l with s_l the distance at the last lookup (of unit vectors for cosine; −⟨z, r⟩ for
    inner products). The reference is the nearest of those with another label that the classifier gives another
    class (the target, if there is one), chosen anew at every lookup.

    Args:
        reference: the id of the reference to move to instead, for all inputs.
        allow_approximate: take neighbors from an index that is not exact.
    """

    reference: int | None = None
    allow_approximate: bool = False

    def __post_init__(self) -> None:
        if self.reference is not None:
            check_whole(self.reference, "reference", 0)

    def bind(self, classifier: Classifier) -> BoundObjective:
        known = voter_classifier(classifier, "the feature-target objective")
        voters = usable_voters(known, allow_approximate=self.allow_approximate)
        n = min(len(v.references) for v in voters)
        if self.reference is not None and self.reference >= n:
            raise InputError(f"there is no reference {self.reference}; the last of {n} is {n - 1}.")
        return _Bound(self, known, voters)


class _Bound(NeighborBound):
    def __init__(self, config: FeatureTarget, classifier: VoterClassifier, voters: tuple[Voter, ...]) -> None:
        check_same_references(voters)
        self.config = config
        super().__init__(classifier, voters, candidate_requests(voters) if config.reference is None else ())

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return _Batch(self, y, target, cast(Look, look))

    def chosen(self, look: Look, y: Tensor, target: Tensor | None) -> Tensor:
        """The reference to move to, (N, 1); −1 where there is none."""
        if self.config.reference is not None:
            return torch.full_like(y, self.config.reference)[:, None]
        return candidates(self.classifier, self.voters, look, y, target).nearest(1)


class _Batch(NeighborBatch[_Bound, Sides]):
    def look_up(self, look: Look) -> list[Sides]:
        ids = self._bound.chosen(look, self._y, self._target)
        return [Sides.make(voter, ids, (ids >= 0).long(), look) for voter in self._bound.voters]

    def loss(self, x: Tensor) -> Tensor:
        features = self._bound.classifier.read(x, self._bound.layers)
        total: Tensor | float = 0.0
        for voter, sides in zip(self._bound.voters, self._parts, strict=True):
            distance = sides.roots(sides.keys(features[voter.layer])) / sides.roots(sides.size)
            total = total - (sides.signs * distance)[:, 0]
        return cast(Tensor, total)
