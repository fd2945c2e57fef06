"""Margins between the network's class scores: transfer objectives that do not saturate as cross-entropy does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustknn import registry
from robustknn.objectives.class_scores import ClassScores


@registry.objectives.register("logit-margin")
@dataclass(frozen=True)
class LogitMargin(ClassScores):
    """The best other class score minus the true one's, max_{c≠y} f_c − f_y; f_t − max_{c≠t} f_c for a target t.

    Carlini & Wagner, arXiv 1608.04644, f₆, without its cut at zero. Positive exactly where the network is fooled.
    On a nearest-neighbor classifier this is a *transfer* attack: what it leaves is not white-box robustness.
    """

    called: ClassVar[str] = "logit-margin"

    def of_scores(self, scores: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        own = (y if target is None else target)[:, None]
        lead = scores.gather(1, own)[:, 0] - scores.scatter(1, own, -torch.inf).amax(1)
        return -lead if target is None else lead


@registry.objectives.register("dlr")
@dataclass(frozen=True)
class DLR(ClassScores):
    """The difference of logits ratio (Croce & Hein, arXiv 2003.01690, eqs. 6 and 7): the margin, free of scale.

    With the scores in falling order f_π1 ≥ f_π2 ≥ …:

    * −(f_y − max_{c≠y} f_c) / (f_π1 − f_π3), at least 3 classes;
    * for a target t, −(f_y − f_t) / (f_π1 − (f_π3 + f_π4)/2), at least 4 classes. With 3 classes the divisor is
      f_π1 − f_π3, which does not feel the scale either.

    With 2 classes every ratio of differences is constant, so there is no such loss: `bind` refuses, and names the
    logit margin. On a nearest-neighbor classifier this is a *transfer* attack.
    """

    called: ClassVar[str] = "dlr"
    least_classes: ClassVar[int] = 3

    def of_scores(self, scores: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        top = scores.topk(min(4, scores.shape[1]), dim=1).values
        own = scores.gather(1, y[:, None])[:, 0]
        if target is None:
            other, low = scores.scatter(1, y[:, None], -torch.inf).amax(1), top[:, 2]
        else:
            other, low = scores.gather(1, target[:, None])[:, 0], top[:, 2:].mean(1)
        # Where three scores are equal there is no ratio: the floor keeps the loss finite and the next step decides.
        return (other - own) / (top[:, 0] - low).clamp_min(1e-12)
