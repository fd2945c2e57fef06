"""A classifier of one's own: neighbors vote by the inverse of their distance.

    robustknn evaluate --plugin examples/own_classifier.py --classifier weighted-knn …

Only the rule is new. Attacks that pass soft weights through a classifier's rule attack this one as it decides.
"""

from collections.abc import Sequence

from torch import Tensor

from robustknn import KNN, registry
from robustknn.classifiers import Rule, Votes


class InverseDistance(Rule):
    """Each neighbor counts 1 / distance."""

    def __call__(self, votes: Sequence[Votes], n_classes: int) -> Tensor:
        total = 0.0
        for v in votes:
            weights = v.weights / v.distances.clamp_min(1e-9)
            total = total + weights.new_zeros(len(weights), n_classes).scatter_add(1, v.labels, weights)
        return total / total.sum(1, keepdim=True)


@registry.classifiers.register("weighted-knn")
class WeightedKNN(KNN):
    """k nearest neighbors that vote by the inverse of their distance."""

    registered = "weighted-knn"

    @property
    def rule(self) -> Rule:
        return InverseDistance()
