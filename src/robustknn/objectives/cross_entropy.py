"""The network's own cross-entropy: the objective of transfer attacks, blind to the neighbors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustknn import registry
from robustknn.classifiers.base import Classifier, Look
from robustknn.errors import InputError
from robustknn.features import FeatureExtractor
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective, check_gradient


@registry.objectives.register("cross-entropy")
@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Cross-entropy of the network's softmax head, −log softmax(f(x))_y; its negative for a target.

    On a nearest-neighbor classifier this is a *transfer* attack: what it leaves is not white-box robustness.
    """

    def bind(self, classifier: Classifier) -> BoundObjective:
        if classifier.extractor is None:
            raise InputError(
                "the cross-entropy objective needs the network's own output, and this classifier knows no network; "
                "use a black-box attack."
            )
        return _Bound(classifier.extractor, classifier.n_classes)


class _Bound(BoundObjective):
    def __init__(self, extractor: FeatureExtractor, n_classes: int) -> None:
        self._extractor, self._n_classes = extractor, n_classes

    def check(self, x: Tensor) -> None:
        with torch.enable_grad():
            logits = self._extractor.logits(x.detach().requires_grad_(True))
        check_gradient(logits, "the network's output")
        width = logits.shape[1]
        if width != self._n_classes:
            raise InputError(
                f"the network returns {width} numbers where there are {self._n_classes} classes: it has no class "
                "scores to attack by cross-entropy (pgd-transfer and its kin); use an attack on the neighbors, such as "
                "'ask'."
            )

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return _Batch(self._extractor, y if target is None else target, target is not None)


class _Batch(BatchObjective):
    def __init__(self, extractor: FeatureExtractor, labels: Tensor, targeted: bool) -> None:
        self._extractor, self._labels, self._sign = extractor, labels, -1.0 if targeted else 1.0

    def loss(self, x: Tensor) -> Tensor:
        logits = self._extractor.logits(x)
        return self._sign * nn.functional.cross_entropy(logits, self._labels, reduction="none")

    def update(self, kept: Tensor | None, look: Look | None) -> None:
        if kept is not None:
            self._labels = self._labels[kept]
