"""The least move of a feature that changes its nearest reference's class: exact, with a proof on either side.

Wang, Liu, Yi, Zhou & Hsieh, arXiv 1906.03972: a quadratic program for every reference of another class, the least of
which is the answer; most programs need not be solved, because a bound shows that they cannot be the least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from robustknn import registry
from robustknn.certification.base import Certified
from robustknn.certification.bisectors import Anchors, Around, bisectors, screen, surroundings
from robustknn.certification.bisectors_certifier import FIXED, SEVERAL, unit_of
from robustknn.certification.bisectors_scene import ByGeometry, Scene, decisions, standing
from robustknn.certification.exact_qp import Box, Outer, least_move
from robustknn.checks import check_positive_int
from robustknn.classifiers import Classifier, Voter, VoterClassifier
from robustknn.progress import Progress

_NEAR = 128
_BATCH = 64
_CLOSE = 1e-9
"""How close, as a share, the two sides must come."""


@registry.certifiers.register("feature-exact")
@dataclass(frozen=True)
class FeatureExact(ByGeometry):
    """The least L2 move of a feature after which its nearest reference may be one of another class: 1-NN alone.

    `radius` is what a dual solution proves and `upper` the length of a move that does it; they meet up to rounding
    where the programs suffice. For cosine features and references are compared at unit length and the radius is
    that of the feature itself, which its length multiplies.

    Args:
        programs: the most quadratic programs a sample; where they do not suffice the radius is smaller than the
            least move, never wrong.
    """

    name: ClassVar[str] = "feature-exact"
    unit: ClassVar[str] = "L2 of the features"

    programs: int = 10_000

    def __post_init__(self) -> None:
        check_positive_int(self.programs, "programs")

    def objection(self, classifier: VoterClassifier) -> str | None:
        if len(classifier.voters) > 1:
            return SEVERAL
        k = classifier.voters[0].n_neighbors
        return f"it has {k} neighbors and not one; use 'feature-bisector'." if k > 1 else None

    @torch.no_grad()
    def certify(
        self, classifier: Classifier, x: Tensor, sample_ids: Tensor, seed: int, progress: Progress
    ) -> Certified:
        assert isinstance(classifier, VoterClassifier)
        (voter,) = classifier.voters
        features, labels, leads = decisions(classifier, x)
        radii, upper = nearest_moves(voter, features[voter.layer], labels, self.programs, None, progress)
        return Certified(labels, standing(radii, leads), unit_of(voter.layer), FIXED, torch.where(leads, upper, 0.0))


def nearest_moves(
    voter: Voter,
    features: Tensor,
    labels: Tensor,
    programs: int,
    bounds: tuple[float, float] | None,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """What is proved of the least move of every feature (N, D), and the length of a move that breaks it, (N,) each.

    Args:
        bounds: between which every number of the moved feature lies; L2 alone. None for no such bounds.
    """
    scene = Scene(voter)
    queries = scene.place(features)
    radii, upper = torch.zeros(len(features), dtype=torch.float64), torch.zeros(len(features), dtype=torch.float64)
    progress.start("certifying", len(features))
    try:
        for i, around, anchors in chain.from_iterable(surroundings(scene, queries, labels, _NEAR, 1)):
            box = None if bounds is None else _box(features[i], bounds)
            lower, found = _least(around, anchors, programs, box)
            radii[i], upper[i] = queries.radius(i, lower), float(queries.scale[i]) * found
            progress.advance()
    finally:
        progress.stop()
    return radii, upper


def _box(feature: Tensor, bounds: tuple[float, float]) -> Box:
    value = feature.double().cpu().numpy()
    return Box(np.minimum(0.0, bounds[0] - value), np.maximum(0.0, bounds[1] - value))


def _least(around: Around, anchors: Anchors, programs: int, box: Box | None) -> tuple[float, float]:
    """Two sides of the least move, by the most promising reference first.

    Every wrong reference has a lower bound, of ever more work: by the anchor, by its bisectors with the near positives,
    by its program. The one whose bound is least is looked at more closely, until it is a program that was solved.
    """
    wrong = around.negatives
    if not len(wrong):
        return np.inf, np.inf
    bound = screen(around, anchors, torch.ones(1, dtype=torch.int64))[0]
    level = torch.zeros(len(bound), dtype=torch.int8)
    near = around.scene.rows(around.positives)
    parts = list(_parts(around, near))
    best, solved = np.inf, 0
    while True:
        first = int(bound.argmin())
        least = float(bound[first])
        if level[first] == 2 or least >= best * (1 - _CLOSE) or solved == programs:
            return min(least, best), best
        if level[first] == 0:
            places = bound.masked_fill(level > 0, torch.inf).topk(min(_BATCH, int((level == 0).sum())), largest=False)
            chosen = places.indices
            bound[chosen] = torch.maximum(bound[chosen], bisectors(around, wrong[chosen], near).amax(1))
            level[chosen] = 1
            continue
        row = around.scene.rows(wrong[first : first + 1])
        inner = Outer(row.numpy(), around.keys[wrong[first : first + 1]].numpy())
        cell = least_move(inner, parts, (row[0] - around.row).numpy(), around.slack, best, box)
        bound[first] = max(least, cell.lower)
        level[first] = 2
        best, solved = min(best, cell.upper), solved + 1


def _parts(around: Around, near: Tensor) -> Iterator[Outer]:
    """The positives: the nearest by themselves, which decide most programs, and all of them."""
    yield Outer(near.numpy(), around.keys[around.positives].numpy())
    own = around.scene.of_class(around.label)[0]
    if len(own) > len(near):
        yield Outer(around.scene.class_rows(around.label).numpy(), around.keys[own].numpy())
