"""Projected gradient descent (Madry et al., arXiv 1706.06083) over any objective, in its strong form."""

from __future__ import annotations

from dataclasses import dataclass

from robustknn import registry
from robustknn.attacks.gradient import GradientAttack


@registry.attacks.register("pgd")
@dataclass(frozen=True)
class PGD(GradientAttack):
    """Steps that fall by a cosine from eps/2, with momentum, from the clean input; the best iterate is kept.

    On nearest-neighbor classifiers the schedule decides more than the loss. `PGD(schedule="constant",
    momentum=0, step=2.5 / steps, start="random", keep="last")` is the form of most papers. See `GradientAttack`
    for the parameters.
    """
