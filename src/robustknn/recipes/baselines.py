"""Older objectives on nearest neighbors, climbed by PGD; further options are PGD's."""

from __future__ import annotations

from typing import Any

from robustknn import registry
from robustknn.attacks import PGD
from robustknn.objectives import ClassMean, FeatureTarget, NearestSubstitute

register = registry.attacks.register


@register("mean")
def mean(**options: Any) -> PGD:
    """Toward the mean of the nearest other class, the baseline of Sitawarin & Wagner (arXiv 1903.08333)."""
    return PGD(ClassMean(), **options)


@register("nearest-substitute")
def nearest_substitute(
    temperature: float = 0.3, scale: str = "nearest", n_neighbors: int | None = None, **options: Any
) -> PGD:
    """PGD on a softmax 1-NN in place of the classifier (Papernot, McDaniel & Goodfellow, arXiv 1605.07277)."""
    return PGD(NearestSubstitute(temperature, scale, n_neighbors), **options)


@register("feature-target")
def feature_target(reference: int | None = None, **options: Any) -> PGD:
    """Toward the features of one reference: the nearest of another class, or the one given."""
    return PGD(FeatureTarget(reference), **options)
