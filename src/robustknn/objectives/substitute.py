"""A differentiable substitute of the nearest-neighbor rule: a softmax over negative squared distances.

Papernot, McDaniel & Goodfellow, "Transferability in Machine Learning", arXiv 1605.07277, section on nearest neighbors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from robustknn import registry
from robustknn.checks import check_choice, check_positive, check_positive_int
from robustknn.classifiers.base import Classifier, Look, Request, VoterClassifier
from robustknn.classifiers.voters import Voter
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective
from robustknn.objectives.classes import nearest_classes, winners
from robustknn.objectives.neighbors import NeighborBatch, NeighborBound, usable_voters, voter_classifier
from robustknn.objectives.sides import Sides


@registry.objectives.register("nearest-substitute")
@dataclass(frozen=True)
class NearestSubstitute(Objective):
    """Cross-entropy of a softmax 1-NN toward the class of the nearest reference of another class.

    q_j = softmax_j(−‖z − r_j‖² / T) over the references, p_c = Σ_{j of class c} q_j; loss = Σ_l log p_c with c the
    wrong class whose reference is nearest in that lookup, or the target. The softmax runs over the nearest
    references of the true class and of the nearest others, outside of which q is negligible.

    Args:
        temperature: T; with scale = "nearest" of squared distances divided by that to the nearest guide.
        scale: "nearest", or "none" for raw squares, as published (with T = 1).
        n_neighbors: references of each class; None takes k.
        max_classes: classes besides c, the nearest; None takes all.
        allow_approximate: take neighbors from an index that is not exact.
    """

    temperature: float = 0.3
    scale: str = "nearest"
    n_neighbors: int | None = None
    max_classes: int | None = 4
    allow_approximate: bool = False

    def __post_init__(self) -> None:
        check_positive(self.temperature, "temperature")
        check_choice(self.scale, ("nearest", "none"), "scale")
        if self.n_neighbors is not None:
            check_positive_int(self.n_neighbors, "n_neighbors")
        if self.max_classes is not None:
            check_positive_int(self.max_classes, "max_classes")

    def bind(self, classifier: Classifier) -> BoundObjective:
        known = voter_classifier(classifier, "the nearest-substitute objective")
        return _Bound(self, known, usable_voters(known, allow_approximate=self.allow_approximate))


class _Bound(NeighborBound):
    def __init__(self, config: NearestSubstitute, classifier: VoterClassifier, voters: tuple[Voter, ...]) -> None:
        self.config, self.winners = config, winners(classifier)
        self.counts = [config.n_neighbors or v.n_neighbors for v in voters]
        requests = [Request(v, per_class=n) for v, n in zip(voters, self.counts, strict=True)]
        super().__init__(classifier, voters, requests)

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return _Batch(self, y, target, cast(Look, look))


class _Batch(NeighborBatch[_Bound, Sides]):
    def look_up(self, look: Look) -> list[Sides]:
        bound = self._bound
        found = [look.by_class[v].first(n) for v, n in zip(bound.voters, bound.counts, strict=True)]
        wanted = self._target
        if wanted is None:
            nearest = [f.distances[:, :, :1] for f in found]
            wanted = nearest_classes(nearest, self._y, 1, bound.winners)[:, 1]
        most = bound.config.max_classes
        classes = nearest_classes([f.distances for f in found], wanted, most, None)
        sides = []
        for voter, near in zip(bound.voters, found, strict=True):
            ids = near.ids.gather(1, classes[:, :, None].expand(-1, -1, near.ids.shape[2]))
            sides.append(Sides.make(voter, ids.flatten(1), (ids >= 0).flatten(1).long(), look))
        return sides

    def loss(self, x: Tensor) -> Tensor:
        config = self._bound.config
        features = self._bound.classifier.read(x, self._bound.layers)
        total: Tensor | float = 0.0
        for voter, sides, n in zip(self._bound.voters, self._parts, self._bound.counts, strict=True):
            keys = sides.keys(features[voter.layer])
            if config.scale == "nearest":
                keys = keys / sides.scale()
            logits = (-keys / config.temperature).masked_fill(sides.signs == 0, float("-inf"))
            own = torch.logsumexp(logits[:, :n], 1)
            total = total + own - torch.logsumexp(logits, 1)
        return cast(Tensor, total)
