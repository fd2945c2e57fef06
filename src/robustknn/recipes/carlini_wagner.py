"""Carlini & Wagner's L2 attack, "Towards Evaluating the Robustness of Neural Networks", arXiv 1608.04644."""

from __future__ import annotations

import math
from typing import Any

from robustknn import registry
from robustknn.attacks import TanhBox
from robustknn.checks import check_number, check_positive_int
from robustknn.objectives import LogitMargin, Objective


@registry.attacks.register("cw-l2")
def cw_l2(
    objective: Objective | None = None,
    confidence: float = 0.0,
    steps: int = 1000,
    search_steps: int = 9,
    c0: float = 1e-3,
    lr: float | None = None,
    **options: Any,
) -> TanhBox:
    """Carlini & Wagner's minimum-norm attack on the network's logits, blind to the neighbors.

    An example counts when the classifier itself is fooled, which may take more than fooling its network.

    Args:
        objective: another margin to climb, such as ASK().
        confidence: κ, the margin beyond which nothing is asked for.
        steps: the most steps a search; usual are 1,000 to 10,000.
        lr: Adam's learning rate; None takes .01, and 10 / steps with fewer than 1,000 steps, so that black and white
            pixels, which start at ±7.25 in tanh space, get as far.
        options: further ones of TanhBox.
    """
    settings: dict[str, Any] = {
        "optimizer": "adam",
        "final_lr": 1.0,
        "rise": 10.0,
        "fall": 2.0,
        "check_every": max(1, steps // 100),
        "refresh_every": 0,
        "peak": 1.0,
        "bisections": 0,
        "abort_early": True,
        "ceiling": check_number(confidence, "confidence", "that is finite", math.isfinite),
    }
    climbed = LogitMargin() if objective is None else objective
    lr = max(0.01, 10 / check_positive_int(steps, "steps")) if lr is None else lr
    return TanhBox(climbed, lr=lr, steps=steps, search_steps=search_steps, c0=c0, **{**settings, **options})
