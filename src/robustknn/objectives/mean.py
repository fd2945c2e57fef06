"""The mean attack: toward the mean of another class.

A baseline of Sitawarin & Wagner, "On the Robustness of Deep K-Nearest Neighbors", arXiv 1903.08333, there a line
search in the input space.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from robustknn import registry
from robustknn.classifiers.base import Classifier, Look, VoterClassifier
from robustknn.classifiers.voters import Voter
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective
from robustknn.objectives.classes import nearest_classes, winners
from robustknn.objectives.guides import prepared
from robustknn.objectives.neighbors import NeighborBatch, NeighborBound, usable_voters, voter_classifier

_AT_ONCE = 4096


@registry.objectives.register("class-mean")
@dataclass(frozen=True)
class ClassMean(Objective):
    """Near the mean of all references of the class whose mean is nearest, the true one left out.

    loss = −Σ_l ‖z_l − μ_lc‖ / s_l, s_l the distance at the last lookup, where c is chosen anew too; c is the target
    if there is one. Cosine compares features of unit length; for inner products the distance is −⟨z, μ⟩.

    Args:
        allow_approximate: use an index that is not exact for the decision.
    """

    allow_approximate: bool = False

    def bind(self, classifier: Classifier) -> BoundObjective:
        known = voter_classifier(classifier, "the class-mean objective")
        return _Bound(known, usable_voters(known, allow_approximate=self.allow_approximate))


class _Bound(NeighborBound):
    def __init__(self, classifier: VoterClassifier, voters: tuple[Voter, ...]) -> None:
        super().__init__(classifier, voters, ())
        self.means = [_class_means(v) for v in voters]
        self.winners = winners(classifier)

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return _Batch(self, y, target, cast(Look, look))


class _Batch(NeighborBatch[_Bound, "_Goal"]):
    def look_up(self, look: Look) -> list[_Goal]:
        bound, classes = self._bound, self._target
        if classes is None:
            everywhere = []
            for voter, means in zip(bound.voters, bound.means, strict=True):
                z = prepared(look.features[voter.layer].double(), voter.metric)
                goal = means.to(z)
                distances = -z @ goal.T if voter.metric == "ip" else torch.cdist(z, goal)
                everywhere.append(distances.masked_fill(goal[:, 0].isnan(), float("inf"))[:, :, None])
            classes = nearest_classes(everywhere, self._y, 1, bound.winners)[:, 1]
        return [
            _Goal.make(voter.metric, look.features[voter.layer], means[classes.to(means.device)])
            for voter, means in zip(bound.voters, bound.means, strict=True)
        ]

    def loss(self, x: Tensor) -> Tensor:
        features = self._bound.classifier.read(x, self._bound.layers)
        total: Tensor | float = 0.0
        for voter, goal in zip(self._bound.voters, self._parts, strict=True):
            z = features[voter.layer]
            if voter.metric == "ip":
                total = total + (z * goal.mean).sum(1) / goal.scale
            else:
                total = total - (prepared(z, voter.metric) - goal.mean).norm(dim=1) / goal.scale
        return cast(Tensor, total)


@dataclass
class _Goal:
    """Where one voter's features should go.

    Attributes:
        mean: (N, D) of the class wanted.
        scale: (N,), the distance at the point of the lookup.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def make(cls, metric: str, z: Tensor, mean: Tensor) -> _Goal:
        mean = mean.to(z)
        scale = z.norm(dim=1) * mean.norm(dim=1) if metric == "ip" else (prepared(z, metric) - mean).norm(dim=1)
        return cls(mean, scale.clamp_min(torch.finfo(z.dtype).tiny))

    def select(self, index: Tensor) -> _Goal:
        """The goals of some samples."""
        return _Goal(self.mean[index], self.scale[index])


_means: weakref.WeakKeyDictionary[Voter, Tensor] = weakref.WeakKeyDictionary()


@torch.no_grad()
def _class_means(voter: Voter) -> Tensor:
    """The mean of every class's references (C, D) in float64, of unit vectors for cosine; NaN without reference."""
    if voter not in _means:
        references = voter.references
        labels = references.labels
        sums = torch.zeros(references.n_classes, references.dim(voter.layer), dtype=torch.float64, device=labels.device)
        for ids in torch.arange(len(references), device=labels.device).split(_AT_ONCE):
            rows = prepared(references.rows(voter.layer, ids).double(), voter.metric)
            sums.index_add_(0, labels[ids], rows.to(sums))
        _means[voter] = sums / torch.bincount(labels, minlength=references.n_classes)[:, None]
    return _means[voter]
