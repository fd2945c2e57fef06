"""PGD on the classifier's own rule with soft votes, and on the rank-paired margin."""

from __future__ import annotations

from typing import Any

from robustknn import registry
from robustknn.attacks import PGD
from robustknn.objectives.adaptive import Adaptive
from robustknn.objectives.rank_pair import RankPair

register = registry.attacks.register


@register("adaptive")
def adaptive(
    max_classes: int | None = 3,
    loss: str = "margin",
    floor: float = 0.01,
    reach: float = 0.5,
    smooth: float | None = None,
    **options: Any,
) -> PGD:
    """PGD on the classifier's own combination rule fed with soft votes: for any rule and any voters."""
    objective = Adaptive(max_classes=max_classes, loss=loss, floor=floor, reach=reach, smooth=smooth)
    return PGD(objective=objective, **options)


@register("rank-pair")
def rank_pair(max_classes: int | None = 4, **options: Any) -> PGD:
    """PGD on the margin between the r-th nearest references of the true class and of another, over a majority."""
    return PGD(objective=RankPair(max_classes=max_classes), **options)
