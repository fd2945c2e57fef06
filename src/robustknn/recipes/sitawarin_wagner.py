"""Sitawarin & Wagner's two attacks: "On the Robustness of Deep K-Nearest Neighbors" (arXiv 1903.08333) and
"Minimum-Norm Adversarial Examples on KNN and KNN-Based Models" (arXiv 2003.06559).

Further options are those of the optimizer.
"""

from __future__ import annotations

from typing import Any

from robustknn import registry
from robustknn.attacks import PGD, TanhBox
from robustknn.objectives import NeighborHinge, SoftCount

register = registry.attacks.register


@register("sw1")
def sw1(n_guides: int | None = None, metric: str | None = None, c0: float = 0.1, **options: Any) -> TanhBox:
    """Minimum norm by the soft count of neighbors, scale-free, guides and radius looked up anew."""
    return TanhBox(SoftCount(n_guides=n_guides, metric=metric), c0=c0, **options)


@register("sw1-published")
def sw1_published(
    n_guides: int = 75,
    threshold: str | float | tuple[float, ...] = "average",
    steps: int = 1000,
    fixed_radius: bool = False,
    **options: Any,
) -> TanhBox:
    """Sitawarin & Wagner's first attack as released: Adam, fixed thresholds, guides of the clean input.

    Args:
        n_guides: m: 75 for kNN, 500 for DkNN.
        threshold: η of each layer, or "average": the mean distance of references to their k-th neighbor.
        steps: the most steps a search.
        fixed_radius: the L∞ form: the tanh box of side 2 eps around the input, and no search of c.
    """
    settings: dict[str, Any] = {
        "optimizer": "adam",
        "lr": 0.1,
        "final_lr": 1.0,
        "search_steps": 1 if fixed_radius else 5,
        "c0": 10.0,
        "rise": 10.0,
        "fall": 2.0,
        "refresh_every": 0,
        "check_every": max(1, steps // 10),
        "hard_box": fixed_radius,
        "penalty": not fixed_radius,
        "peak": 1.0,
        "bisections": 0,
        "abort_early": True,
    }
    return TanhBox(SoftCount.published(n_guides, threshold), steps=steps, **{**settings, **options})


@register("sw2")
def sw2(n_guides: int | None = None, **options: Any) -> TanhBox:
    """Minimum norm by hinges around the k-ball, layers commensurable, guides and radius looked up anew."""
    return TanhBox(NeighborHinge(n_guides), **options)


@register("sw2-published")
def sw2_published(n_guides: int | None = None, **options: Any) -> TanhBox:
    """Sitawarin & Wagner's second attack as its authors evaluate it: RMSprop, 10 searches of 1,000 steps.

    Their full evaluation starts from the five nearest misclassified references too: `starts=5`.
    """
    settings: dict[str, Any] = {
        "optimizer": "rmsprop",
        "lr": 0.1,
        "final_lr": 1.0,
        "steps": 1000,
        "search_steps": 10,
        "c0": 1.0,
        "rise": 10.0,
        "fall": 10.0,
        "refresh_every": 200,
        "check_every": 100,
        "narrow": True,
        "peak": 1.0,
        "bisections": 0,
    }
    return TanhBox(NeighborHinge.published(n_guides), **{**settings, **options})


@register("sw2-pgd")
def sw2_pgd(n_guides: int | None = None, check_every: int = 1, **options: Any) -> PGD:
    """PGD on the hinges around the k-ball, guides and radius looked up anew at every step."""
    return PGD(NeighborHinge(n_guides), check_every=check_every, **options)
