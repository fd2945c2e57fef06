"""Training of a Lipschitz network: cross-entropy beyond a margin, so that classes end far apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from robustknn import registry
from robustknn.checks import check_positive
from robustknn.training.methods import Batch, Method


@registry.methods.register("lipschitz-margin")
@dataclass(frozen=True)
class LipschitzMargin(Method):
    """T · cross-entropy of (s − √2·margin·onehot(y)) / T on the class scores s: every class is pushed 2·margin apart.

    In a 1-Lipschitz network no change of the input below (s_y − s_j)/√2 lets class j overtake; the loss asks for
    `margin` of it, and what is learned for the scores spreads the embedding below them (Prach & Lampert, arXiv
    2208.03160, section 4.3).

    Args:
        margin: the input radius that training aims at, in L2.
        temperature: T, how softly the margin is asked for.
    """

    name: ClassVar[str] = "lipschitz-margin"

    margin: float = 1.58
    temperature: float = 0.25

    def __post_init__(self) -> None:
        check_positive(self.margin, "margin")
        check_positive(self.temperature, "temperature")

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        scores = model(batch.x)
        wanted = nn.functional.one_hot(batch.y, scores.shape[1]) * (math.sqrt(2) * self.margin)
        loss = nn.functional.cross_entropy((scores - wanted) / self.temperature, batch.y)
        return {"margin": self.temperature * loss}
