"""What an attack on a transformed input climbs: the margin behind the transformation, in expectation over its draws.

Backward pass differentiable approximation and expectation over transformation: Athalye, Carlini & Wagner, arXiv
1802.00420; Athalye et al., arXiv 1707.07397.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustknn import registry, rng
from robustknn.checks import check_positive_int
from robustknn.classifiers.base import Classifier, Look
from robustknn.classifiers.transformed import Transformed
from robustknn.errors import InputError, brief
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective, check_gradient
from robustknn.objectives.class_scores import ScoresBatch
from robustknn.objectives.logit_margin import LogitMargin


@registry.objectives.register("through-transform")
@dataclass(frozen=True)
class ThroughTransform(Objective):
    """max_{c≠y} log p_c − log p_y, for a target t log p_t − max_{c≠t} log p_c; p is the mean over draws.

    The gradient goes back through the transformation as it declares (`robustknn.classifiers.input_transforms`). A
    random one is drawn anew at every step, by numbers of the attack's own and not those that decide, the same for all
    samples.

    Args:
        draws: of a random transformation, a step.
        seed: of these.
    """

    draws: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive_int(self.draws, "draws")

    def bind(self, classifier: Classifier) -> BoundObjective:
        if not isinstance(classifier, Transformed):
            raise InputError(
                f"the through-transform objective attacks a Transformed network, not {brief(classifier)}; use ASK or "
                "the adaptive objective for neighbors, a black-box attack (square, hop-skip-jump or boundary) for "
                "anything else."
            )
        return _Bound(self, classifier)


class _Bound(BoundObjective):
    def __init__(self, config: ThroughTransform, classifier: Transformed) -> None:
        self.config, self.classifier = config, classifier

    def check(self, x: Tensor) -> None:
        with torch.enable_grad():
            found = self.classifier.log_probabilities(x.detach().requires_grad_(True), x.new_zeros(len(x)).long(), 1)
        check_gradient(found, "the network's output")

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return ScoresBatch(LogitMargin(), _Through(self.config, self.classifier), y, target)


class _Through:
    """The logarithms of the class probabilities, over draws that are new at every call."""

    def __init__(self, config: ThroughTransform, classifier: Transformed) -> None:
        self._config, self._classifier, self._step = config, classifier, 0

    def __call__(self, x: Tensor) -> Tensor:
        config = self._config
        fresh = self._classifier.with_seed(rng.derive(config.seed, "through", self._step))
        self._step += 1
        # One id for all: a sample's draws do not depend on where in a batch it stands.
        return fresh.log_probabilities(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), config.draws)
