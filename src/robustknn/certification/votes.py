"""Certificates of votes over several layers: how far all their features may move together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from robustknn import registry
from robustknn.certification.base import Certified
from robustknn.certification.bisectors import depths, surroundings
from robustknn.certification.bisectors_certifier import FIXED, check_effort
from robustknn.certification.bisectors_scene import ByGeometry, Scene, decisions, standing
from robustknn.checks import check_positive, check_positive_int
from robustknn.classifiers import Classifier, Voter, VoterClassifier
from robustknn.errors import InputError
from robustknn.progress import Progress


@registry.certifiers.register("feature-votes")
@dataclass(frozen=True)
class FeatureVotes(ByGeometry):
    """How far the features of every voting layer may move at once before a DkNN's majority can change.

    At layer l b negatives among the k nearest need a move of rho_l(b), the b-th smallest over references of other
    classes of the (k − b + 1)-th largest over those of its own of the distance to their bisector. While every layer l
    moves by at most r·scale_l, at most q_l(r) = max{b : rho_l(b) ≤ r·scale_l} of its votes are lost, and the decision
    stands while 2·Σ q_l(r) < Σ k_l. For one layer this is "feature-bisector". That moves of several layers come from
    one input is not used: an attacker may be weaker than this, never stronger.

    Args:
        nearest: how many of the nearest references of the decision's class are compared, at least k; None takes all.
        visits: at about how many references of other classes to look, see `FeatureBisector`.
        scales: how far layer l moves for a radius of 1, one number a layer; None is 1 for each. With Lipschitz
            constants of the layers the radius is one of the input.
        breakpoints: at how many numbers of lost votes a layer is looked at; a number between two counts as the lower.
    """

    name: ClassVar[str] = "feature-votes"
    unit: ClassVar[str] = "L2 of the features of every layer"

    nearest: int | None = 128
    visits: int | None = 1024
    scales: Sequence[float] | None = None
    breakpoints: int = 100

    def __post_init__(self) -> None:
        check_effort(self.nearest, self.visits)
        if self.scales is not None:
            object.__setattr__(self, "scales", tuple(check_positive(s, "a scale") for s in self.scales))
        check_positive_int(self.breakpoints, "breakpoints")

    def check(self, classifier: Classifier) -> None:
        super().check(classifier)
        assert isinstance(classifier, VoterClassifier)
        if self.scales is not None and len(self.scales) != len(classifier.voters):
            raise InputError(
                f"scales holds {len(self.scales)} numbers for {len(classifier.voters)} voters; pass one each."
            )

    @torch.no_grad()
    def certify(
        self, classifier: Classifier, x: Tensor, sample_ids: Tensor, seed: int, progress: Progress
    ) -> Certified:
        assert isinstance(classifier, VoterClassifier)
        voters = classifier.voters
        scales = self.scales or (1.0,) * len(voters)
        features, labels, leads = decisions(classifier, x)
        moves, losses = [], []
        progress.start("certifying", len(x) * len(voters))
        try:
            for voter, scale in zip(voters, scales, strict=True):
                counts = lost_votes(voter.n_neighbors, self.breakpoints)
                needed = self._needed(voter, features[voter.layer], labels, counts, progress)
                moves.append(needed / scale)
                # Beyond a breakpoint all that are short of the next one may be lost.
                reached = torch.cat([counts[1:] - 1, torch.tensor([voter.n_neighbors])])
                losses.append(reached.diff(prepend=torch.zeros(1, dtype=torch.int64)))
        finally:
            progress.stop()
        needed, lost = torch.cat(moves, 1), torch.cat(losses).expand(len(x), -1)
        radii = first_break(needed, lost, sum(v.n_neighbors for v in voters))
        named = " and ".join(
            f"{voter.layer!r}" + ("" if scale == 1 else f" (times {scale:g})")
            for voter, scale in zip(voters, scales, strict=True)
        )
        return Certified(labels, standing(radii, leads), f"L2 of the features of every layer: {named}", FIXED)

    def _needed(self, voter: Voter, features: Tensor, labels: Tensor, counts: Tensor, progress: Progress) -> Tensor:
        """rho of every sample and number of lost votes, (N, M)."""
        scene = Scene(voter)
        queries = scene.place(features)
        a = voter.n_neighbors - counts + 1
        nearest = None if self.nearest is None else max(self.nearest, int(a.max()))
        needed = torch.zeros(len(features), len(counts), dtype=torch.float64)
        blocks = surroundings(scene, queries, labels, nearest, voter.n_neighbors // 2 + 1)
        for i, around, anchors in chain.from_iterable(blocks):
            found = depths(around, anchors, a, counts, self.visits)
            needed[i] = torch.tensor([queries.radius(i, value) for value in found.tolist()], dtype=torch.float64)
            progress.advance()
        return needed


def lost_votes(n_neighbors: int, most: int) -> Tensor:
    """The numbers of lost votes to look at, ascending: all of 1..k, or `most` of them with the majority's k − ⌊k/2⌋."""
    every = torch.linspace(1, n_neighbors, min(most, n_neighbors)).round().to(torch.int64)
    counts: Tensor = torch.cat([every, torch.tensor([n_neighbors - n_neighbors // 2])]).unique()
    return counts


def first_break(needed: Tensor, lost: Tensor, votes: int) -> Tensor:
    """The least move at which half of the votes may be lost, (N,); ∞ where they never are.

    Args:
        needed: (N, M) moves at which votes are lost.
        lost: (N, M) how many are.
        votes: of all layers.
    """
    order = needed.argsort(1)
    gone = lost.gather(1, order).cumsum(1)
    return needed.gather(1, order).masked_fill(2 * gone < votes, torch.inf).amin(1)
