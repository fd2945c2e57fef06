"""Sitawarin & Wagner's first objective: a soft count of the guides within the k-ball.

"On the Robustness of Deep K-Nearest Neighbors", arXiv 1903.08333.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from robustknn import registry
from robustknn.checks import check_choice, check_positive, check_positive_int
from robustknn.classifiers.base import Classifier, Look, VoterClassifier
from robustknn.classifiers.voters import Voter
from robustknn.errors import InputError
from robustknn.neighbors.base import METRICS
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective
from robustknn.objectives.neighbors import usable_voters, voter_classifier
from robustknn.objectives.sides import Sides, SidesBatch, SidesBound

MNIST_THRESHOLDS = (0.748, 0.743, 0.567, 0.195)
"""The paper's η of the four layers of its MNIST network, of features of unit length."""
_SAMPLED = 1000
"""References whose k-th neighbor the average threshold is taken over."""


@registry.objectives.register("soft-count")
@dataclass(frozen=True)
class SoftCount(Objective):
    """The number of guides within the k-ball, each counted by a sigmoid of its distance.

    loss = −Σ_l Σ_j w_j σ(a (η_l − d_lj)), d the feature distance to guide j, η_l the radius of the ball, w_j = 1 for
    references of the true class and −1 for those of one wrong class, the nearest. For a target w is 1 for its
    nearest rival and −1 for its own references. The sigmoid has hardly a gradient where every guide is far outside
    the ball: what is scale-free here makes that less frequent, not impossible.

    Args:
        steepness: a; with scale = "radius" of distances divided by η.
        threshold: η: "sample" the distance to the k-th neighbor at the last lookup, "average" the mean of that over
            1,000 of the references (each without itself), or numbers, one for all layers or one a layer.
        scale: "radius" divides distances by η, so that neither a nor the layers depend on the size of features;
            "none" takes them as they are, as published.
        repel: guides of the true class, as many as of the wrong one, are counted too. The released attack has none.
        n_guides: m, of each of the two classes; None takes k.
        metric: "l2", "cosine" (Euclidean distance of features of unit length, as published) or "ip"; None takes each
            voter's own.
        guide_layer: "each" layer has its own guides; "first" takes those nearest in the first layer for all, as
            published.
        allow_approximate: take neighbors from an index that is not exact.
    """

    steepness: float = 4.0
    threshold: str | float | tuple[float, ...] = "sample"
    scale: str = "radius"
    repel: bool = True
    n_guides: int | None = None
    metric: str | None = None
    guide_layer: str = "each"
    allow_approximate: bool = False

    def __post_init__(self) -> None:
        check_positive(self.steepness, "steepness")
        if isinstance(self.threshold, list):
            object.__setattr__(self, "threshold", tuple(self.threshold))
        if isinstance(self.threshold, str):
            check_choice(self.threshold, ("sample", "average"), "threshold")
        else:
            for value in self.threshold if isinstance(self.threshold, tuple) else (self.threshold,):
                check_positive(value, "threshold")
        check_choice(self.scale, ("radius", "none"), "scale")
        if self.n_guides is not None:
            check_positive_int(self.n_guides, "n_guides")
        if self.metric is not None:
            check_choice(self.metric, METRICS, "metric")
        check_choice(self.guide_layer, ("each", "first"), "guide_layer")

    @classmethod
    def published(
        cls, n_guides: int = 75, threshold: str | float | tuple[float, ...] = "average", steepness: float = 4.0
    ) -> SoftCount:
        """The released attack's setting: unit features, a = 4, fixed η, m guides of one wrong class (75; DkNN 500)."""
        return cls(steepness, threshold, "none", False, n_guides, "cosine", "first")

    def bind(self, classifier: Classifier) -> BoundObjective:
        known = voter_classifier(classifier, "the soft-count objective")
        return _Bound(self, known, usable_voters(known, self.metric, self.allow_approximate))


class _Bound(SidesBound):
    def __init__(self, config: SoftCount, classifier: VoterClassifier, voters: tuple[Voter, ...]) -> None:
        self.config = config
        counts = [config.n_guides or v.n_neighbors for v in voters]
        super().__init__(classifier, voters, counts, config.guide_layer)
        self.fixed = _fixed(config.threshold, voters)

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return _Batch(self, y, target, cast(Look, look))

    def radius(self, place: int, sides: Sides) -> tuple[Tensor, Tensor]:
        """η of a voter, and what distances are divided by, both (N, 1)."""
        if self.fixed is None:
            radius = sides.roots(sides.threshold)
            scale = sides.roots(sides.scale())
        else:
            radius = scale = torch.full_like(sides.threshold, self.fixed[place])
        return radius, scale if self.config.scale == "radius" else torch.ones_like(scale)


class _Batch(SidesBatch[_Bound]):
    def loss(self, x: Tensor) -> Tensor:
        bound = self._bound
        features = bound.classifier.read(x, bound.layers)
        total: Tensor | float = 0.0
        for place, (voter, sides) in enumerate(zip(bound.voters, self._parts, strict=True)):
            radius, scale = bound.radius(place, sides)
            distances = sides.roots(sides.keys(features[voter.layer]))
            counted = torch.sigmoid(bound.config.steepness * (radius - distances) / scale)
            signs = sides.signs if bound.config.repel else sides.signs.clamp_max(0)
            total = total - (signs * counted).sum(1)
        return cast(Tensor, total)


_averages: weakref.WeakKeyDictionary[Voter, float] = weakref.WeakKeyDictionary()


def _fixed(threshold: str | float | tuple[float, ...], voters: tuple[Voter, ...]) -> tuple[float, ...] | None:
    """η of every voter, or None where each sample has its own."""
    if threshold == "sample":
        return None
    if threshold == "average":
        if any(v.metric == "ip" for v in voters):
            raise InputError("inner products have no average radius; use threshold='sample'.")
        return tuple(_average_radius(v) for v in voters)
    values = threshold if isinstance(threshold, tuple) else (threshold,) * len(voters)
    if len(values) != len(voters):
        raise InputError(f"threshold has {len(values)} values for {len(voters)} layers; pass one, or one a layer.")
    return tuple(float(v) for v in values)


def _average_radius(voter: Voter) -> float:
    """The mean Euclidean distance of references to their k-th neighbor, themselves left out; computed once."""
    if voter not in _averages:
        n = len(voter.references)
        ids = torch.arange(0, n, max(1, -(-n // _SAMPLED)), device=voter.references.labels.device)
        k = min(voter.n_neighbors + 1, n)
        kth = voter.index.search(voter.references.rows(voter.layer, ids), k).distances[:, -1].double()
        _averages[voter] = float(((2 * kth).sqrt() if voter.metric == "cosine" else kth).mean())
    return _averages[voter]
