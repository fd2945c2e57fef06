"""What stands under RAILS: an objective on the nearest neighbors that its candidates evolve from.

RAILS (arXiv 2107.02840) without evolution is a vote of the nearest references, which has a gradient where selection has
none. Athalye, Carlini & Wagner, arXiv 1802.00420, section 4: attack what can be differentiated, judge by the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustknn import registry
from robustknn.checks import check_positive_int
from robustknn.classifiers.base import Classifier, Look
from robustknn.classifiers.dknn import DkNN
from robustknn.classifiers.rails import RAILS
from robustknn.errors import InputError, brief
from robustknn.objectives.ask import ASK
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective, SelfRenewing, check_objective


@registry.objectives.register("knn-stage")
@dataclass(frozen=True)
class KNNStage(Objective):
    """An objective on the neighbors of `RAILS.knn_stage()`.

    A look at the neighbors is cheap and one at RAILS is not, so the stage has looks of its own, every `look_every`
    gradients; the attack's looks (`check_every`) ask RAILS.

    Args:
        objective: what is climbed, such as ASK() or Adaptive().
        look_every: gradients between two looks for neighbors.
    """

    objective: Objective = field(default_factory=ASK)
    look_every: int = 10

    def __post_init__(self) -> None:
        check_objective(self.objective, "ASK()")
        check_positive_int(self.look_every, "look_every")

    def bind(self, classifier: Classifier) -> BoundObjective:
        if not isinstance(classifier, RAILS):
            raise InputError(
                f"the knn-stage objective attacks RAILS, not {brief(classifier)}; use its own objective "
                f"({brief(self.objective)}) for neighbors, a black-box attack (square, hop-skip-jump or boundary) for "
                "anything else."
            )
        return _Bound(self, classifier.stage)


class _Bound(BoundObjective):
    def __init__(self, config: KNNStage, stage: DkNN) -> None:
        self.config, self.stage, self.inner = config, stage, config.objective.bind(stage)

    def check(self, x: Tensor) -> None:
        self.inner.check(x)

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return _Batch(self, self.inner.start(x, y, target, self.look(x)))

    @torch.no_grad()
    def look(self, x: Tensor) -> Look:
        """The neighbors of inputs."""
        return self.stage.look(x, self.inner.requests)


class _Batch(SelfRenewing):
    def __init__(self, bound: _Bound, inner: BatchObjective) -> None:
        super().__init__(bound.config.look_every)
        self._bound, self._inner = bound, inner

    def renew(self, x: Tensor) -> None:
        self._inner.update(None, self._bound.look(x))

    def current(self, x: Tensor) -> Tensor:
        return self._inner.loss(x)

    def update(self, kept: Tensor | None, look: Look | None) -> None:
        self._inner.update(kept, None)
