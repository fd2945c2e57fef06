"""Certificates of a kNN under moves of its features: the bisector bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustknn import registry
from robustknn.certification.base import Certified
from robustknn.certification.bisectors import Around, depths, surroundings
from robustknn.certification.bisectors_scene import ByGeometry, Scene, decisions, standing
from robustknn.certification.bisectors_upper import by_programs, shortest, straight
from robustknn.checks import check_choice, check_positive_int
from robustknn.classifiers import Classifier, VoterClassifier
from robustknn.progress import Progress

_MOVES = 256
"""Moves whose products with all references are held at a time."""
UPPERS = ("none", "straight", "programs")
SEVERAL = "it has several voters; use 'feature-votes'."
TIES = "A tie of votes or of distances counts as failure."
FIXED = ("The network and the references are fixed and trusted.", TIES)


@registry.certifiers.register("feature-bisector")
@dataclass(frozen=True)
class FeatureBisector(ByGeometry):
    """How far the features of an input may move, in L2, before its k-nearest-neighbor decision can change.

    With t = ⌊k/2⌋ the decision stands below the (k − t)-th smallest over references n_j of other classes of the
    (t + 1)-th largest over references p_i of its own of max(0, |x − n_j|² − |x − p_i|²) / 2|p_i − n_j|. For cosine the
    same holds with features and references at unit length, times the length of the feature, because decisions do not
    depend on that length.

    Args:
        nearest: how many of the nearest references of the decision's class are compared, at least t + 1; fewer give
            a smaller radius, never a wrong one; None compares all.
        visits: at about how many references of other classes to look, those first that a cheaper bound says may count;
            the others count by that bound, which gives a smaller radius, never a wrong one, and only where features
            lie so that many are about equally far. None for all it takes.
        upper: how moves that break the decision are looked for: "none"; "straight", toward the nearest wrong class;
            "programs", besides, the least moves into `pivots` cells of neighbors.
        pivots: of "programs".
    """

    name: ClassVar[str] = "feature-bisector"
    unit: ClassVar[str] = "L2 of the features"

    nearest: int | None = 128
    visits: int | None = 1024
    upper: str = "straight"
    pivots: int = 10

    def __post_init__(self) -> None:
        check_effort(self.nearest, self.visits)
        check_choice(self.upper, UPPERS, "upper")
        check_positive_int(self.pivots, "pivots")

    def objection(self, classifier: VoterClassifier) -> str | None:
        return SEVERAL if len(classifier.voters) > 1 else None

    @torch.no_grad()
    def certify(
        self, classifier: Classifier, x: Tensor, sample_ids: Tensor, seed: int, progress: Progress
    ) -> Certified:
        assert isinstance(classifier, VoterClassifier)
        (voter,) = classifier.voters
        features, labels, leads = decisions(classifier, x)
        scene = Scene(voter)
        queries = scene.place(features[voter.layer])
        k = voter.n_neighbors
        a, b = torch.tensor([k // 2 + 1]), torch.tensor([k - k // 2])
        nearest = None if self.nearest is None else max(self.nearest, int(a))
        radii = torch.zeros(len(x), dtype=torch.float64)
        upper = torch.full((len(x),), torch.inf, dtype=torch.float64)
        progress.start("certifying", len(x))
        try:
            for block in surroundings(scene, queries, labels, nearest, int(a)):
                for i, around, anchors in block:
                    radii[i] = queries.radius(i, float(depths(around, anchors, a, b, self.visits)))
                    progress.advance()
                for i, length in self._broken({i: around for i, around, _ in block}, k).items():
                    upper[i] = float(queries.scale[i]) * length
        finally:
            progress.stop()
        return Certified(
            labels,
            standing(radii, leads),
            unit_of(voter.layer),
            FIXED,
            None if self.upper == "none" else torch.where(leads, upper, 0.0),
        )

    def _broken(self, arounds: dict[int, Around], k: int) -> dict[int, float]:
        """The length of the shortest move known to break each decision."""
        if self.upper == "none":
            return {}
        moves = [(i, move) for i, around in arounds.items() for move in self._moves(around, k)]
        found = dict.fromkeys(arounds, math.inf)
        for start in range(0, len(moves), _MOVES):
            part = moves[start : start + _MOVES]
            together = torch.stack([move for _, move in part])
            products = next(iter(arounds.values())).scene.products(together)
            for (i, move), row in zip(part, products, strict=True):
                found[i] = min(found[i], shortest(arounds[i], move, row, k, found[i]))
        return found

    def _moves(self, around: Around, k: int) -> list[Tensor]:
        if not len(around.negatives):
            return []
        further = by_programs(around, k, self.pivots) if self.upper == "programs" else ()
        return [straight(around, k - k // 2), *further]


def check_effort(nearest: int | None, visits: int | None) -> None:
    """Refuse limits of the search that cannot work."""
    for name, value in (("nearest", nearest), ("visits", visits)):
        if value is not None:
            check_positive_int(value, name)


def unit_of(layer: str) -> str:
    """The unit of a radius of one layer's features."""
    return f"L2 of the features of layer {layer!r}"
