"""AdvKNN (arXiv 1911.06591): FGSM and BIM at the paper's settings, and a strong form."""

from __future__ import annotations

from typing import Any

from robustknn import registry
from robustknn.attacks import BIM, FGSM, PGD
from robustknn.objectives.advknn import AdvKNN

register = registry.attacks.register


@register("advknn")
def advknn(layers: tuple[str, ...] | None = None, heads: str | None = None, **options: Any) -> PGD:
    """PGD on the scale-free margin of heads that learned the votes."""
    return PGD(objective=AdvKNN(layers=layers, heads=heads), **options)


@register("advknn-fgsm")
def advknn_fgsm(
    consistency: bool = True,
    layers: tuple[str, ...] | None = None,
    heads: str | None = None,
    loss_weights: tuple[float, float] | None = None,
    **options: Any,
) -> FGSM:
    """AdvKNN as published, one step; consistency=False leaves consistency learning out."""
    objective = AdvKNN.published(consistency=consistency, layers=layers, heads=heads, loss_weights=loss_weights)
    return FGSM(objective=objective, **options)


@register("advknn-bim")
def advknn_bim(
    consistency: bool = True,
    layers: tuple[str, ...] | None = None,
    heads: str | None = None,
    loss_weights: tuple[float, float] | None = None,
    steps: int = 100,
    absolute_step: float = 0.01,
    **options: Any,
) -> BIM:
    """AdvKNN as published, 100 steps of 0.01; consistency=False leaves consistency learning out."""
    objective = AdvKNN.published(consistency=consistency, layers=layers, heads=heads, loss_weights=loss_weights)
    return BIM(objective=objective, steps=steps, absolute_step=absolute_step, **options)
