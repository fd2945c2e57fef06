"""APGD on the network's own class scores, as AutoAttack runs it; on nearest neighbors these are transfer attacks.

APGD on the ASK margin is the optimizer's own name and default, `apgd`. Further options are APGD's.
"""

from __future__ import annotations

from typing import Any

from robustknn import registry
from robustknn.attacks import APGD
from robustknn.objectives import DLR, CrossEntropy, LogitMargin

register = registry.attacks.register


@register("apgd-ce")
def apgd_ce(start: str = "random", **options: Any) -> APGD:
    """APGD on the network's cross-entropy, blind to the neighbors: 100 steps from a random start."""
    return APGD(objective=CrossEntropy(), start=start, **options)


@register("apgd-dlr")
def apgd_dlr(start: str = "random", **options: Any) -> APGD:
    """APGD on the network's difference of logits ratio, blind to the neighbors: 100 steps from a random start."""
    return APGD(objective=DLR(), start=start, **options)


@register("apgd-margin")
def apgd_margin(start: str = "random", **options: Any) -> APGD:
    """APGD on the network's logit margin, blind to the neighbors: 100 steps from a random start."""
    return APGD(objective=LogitMargin(), start=start, **options)
