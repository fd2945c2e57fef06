"""An objective of one's own, climbed by PGD: leave the centroid of the true class for the nearest other one.

robustknn evaluate --plugin examples/own_objective.py --attack pgd --attack-option objective=centroid …
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustknn import InputError, registry
from robustknn.classifiers import Classifier, Look, VoterClassifier
from robustknn.objectives import BatchObjective, BoundObjective, Objective


@registry.objectives.register("centroid")
@dataclass(frozen=True)
class Centroid(Objective):
    """Distance to the true class's centroid minus that to the nearest other one, in the first voter's layer."""

    def bind(self, classifier: Classifier) -> BoundObjective:
        if not isinstance(classifier, VoterClassifier):
            raise InputError("the centroid objective needs a classifier whose references are known.")
        return _Bound(classifier)


class _Bound(BoundObjective):
    def __init__(self, classifier: VoterClassifier) -> None:
        self.classifier, self.layer = classifier, classifier.voters[0].layer
        references = classifier.voters[0].references
        rows = references.rows(self.layer, torch.arange(len(references)))
        self.centers = torch.stack([rows[references.labels == c].mean(0) for c in range(references.n_classes)])

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return _Batch(self, y if target is None else target, target is not None)


class _Batch(BatchObjective):
    def __init__(self, bound: _Bound, labels: Tensor, targeted: bool) -> None:
        self.bound, self.labels, self.sign = bound, labels, -1.0 if targeted else 1.0

    def loss(self, x: Tensor) -> Tensor:
        z = self.bound.classifier.read(x, [self.bound.layer])[self.bound.layer]
        distances = torch.cdist(z, self.bound.centers)
        own = distances.gather(1, self.labels[:, None])
        others = distances.scatter(1, self.labels[:, None], float("inf")).amin(1)
        return self.sign * (own[:, 0] - others)

    def update(self, kept: Tensor | None, look: Look | None) -> None:
        if kept is not None:
            self.labels = self.labels[kept]
