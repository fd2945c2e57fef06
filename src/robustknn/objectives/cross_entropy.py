"""The network's own cross-entropy: the objective of transfer attacks, blind to the neighbors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from robustknn import registry
from robustknn.objectives.class_scores import ClassScores


@registry.objectives.register("cross-entropy")
@dataclass(frozen=True)
class CrossEntropy(ClassScores):
    """Cross-entropy of the network's softmax head, −log softmax(f(x))_y; its negative for a target.

    On a nearest-neighbor classifier this is a *transfer* attack: what it leaves is not white-box robustness.
    """

    called: ClassVar[str] = "cross-entropy"

    def of_scores(self, scores: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        if target is None:
            return nn.functional.cross_entropy(scores, y, reduction="none")
        return -nn.functional.cross_entropy(scores, target, reduction="none")
