"""What the losses on the network's own class scores share: transfer attacks, blind to the neighbors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from robustknn.classifiers.base import Classifier, Look
from robustknn.errors import InputError
from robustknn.features import FeatureExtractor
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective, check_gradient


class ClassScores(Objective):
    """A loss on the class scores f(x) of the network's own head.

    On a nearest-neighbor classifier this is a *transfer* attack: what it leaves is not white-box robustness.

    Attributes:
        called: the loss as sentences name it.
        least_classes: with fewer the loss is not defined.
    """

    transfer: ClassVar[bool] = True
    called: ClassVar[str]
    least_classes: ClassVar[int] = 2

    @abstractmethod
    def of_scores(self, scores: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        """The loss (N,) of scores (N, C), to ascend.

        Args:
            scores: (N, C) of the network.
            y: (N,) true classes.
            target: (N,) wanted classes, or None when any wrong one will do.
        """

    def bind(self, classifier: Classifier) -> BoundObjective:
        if classifier.extractor is None:
            raise InputError(
                f"the {self.called} objective needs the network's own output, and this classifier knows no network; "
                "use a black-box attack: square, hop-skip-jump or boundary."
            )
        if classifier.n_classes < self.least_classes:
            raise InputError(
                f"the {self.called} objective needs {self.least_classes} classes, and there are "
                f"{classifier.n_classes}; use 'logit-margin'."
            )
        return _Bound(self, classifier.extractor, classifier.n_classes)


class _Bound(BoundObjective):
    def __init__(self, config: ClassScores, extractor: FeatureExtractor, n_classes: int) -> None:
        self._config, self._extractor, self._n_classes = config, extractor, n_classes

    def check(self, x: Tensor) -> None:
        with torch.enable_grad():
            logits = self._extractor.logits(x.detach().requires_grad_(True))
        check_gradient(logits, "the network's output")
        width = logits.shape[1]
        if width != self._n_classes:
            raise InputError(
                f"the network returns {width} numbers where there are {self._n_classes} classes: it has no class "
                f"scores to attack by {self._config.called} (pgd-transfer and its kin); use an attack on the "
                "neighbors, such as 'ask'."
            )

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return ScoresBatch(self._config, self._extractor.logits, y, target)


class ScoresBatch(BatchObjective):
    """A loss on class scores, wherever they come from.

    Args:
        config: the loss.
        scores: what makes scores (N, C) of inputs.
        y, target: see `BoundObjective.start`.
    """

    def __init__(
        self, config: ClassScores, scores: Callable[[Tensor], Tensor], y: Tensor, target: Tensor | None
    ) -> None:
        self._config, self._scores, self._y, self._target = config, scores, y, target

    def loss(self, x: Tensor) -> Tensor:
        return self._config.of_scores(self._scores(x), self._y, self._target)

    def update(self, kept: Tensor | None, look: Look | None) -> None:
        if kept is not None:
            self._y = self._y[kept]
            self._target = None if self._target is None else self._target[kept]
