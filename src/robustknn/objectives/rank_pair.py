"""The rank-paired margin: the r-th nearest reference of the true class against the r-th nearest of another.

With s = ⌊k/2⌋ + 1 votes a class always wins; where each of its s nearest references is nearer than the true class's of
the same rank, it has won.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from robustknn import registry
from robustknn.checks import check_positive, check_positive_int
from robustknn.classifiers.base import Classifier, Look, Request, VoterClassifier
from robustknn.classifiers.voters import Voter
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective
from robustknn.objectives.classes import nearest_classes, sure_winners, winners
from robustknn.objectives.guides import Guides
from robustknn.objectives.neighbors import NeighborBatch, NeighborBound, usable_voters, voter_classifier

_SPARE = 8
"""References of a class beyond those that are paired, for what comes nearer until the next lookup."""


@registry.objectives.register("rank-pair")
@dataclass(frozen=True)
class RankPair(Objective):
    """smax over classes c of Σ_l (1/D_l) mean_{r ≤ s} (d_y(r) − d_c(r)), s = ⌊k/2⌋ + 1, averaged over the voters l.

    d_c(r) is the distance of the r-th nearest reference of class c where the input is now, D_l the mean distance of
    the voter's guides at the last lookup, so that voters add up. Classes with fewer than s references are left out (if
    no two have more, or the rule is no vote, they are paired on those they have). For a target t the loss is −smax
    over c ≠ t of the same sum with t in the place of y.

    It knows nothing of the rule: it pulls a class's references in, each as much as the others.

    Args:
        smooth: the temperature T of smax_c a_c = T log Σ_c exp(a_c/T); a is about the relative difference of distances.
        max_classes: how many classes besides the true one are considered, the nearest ones; None takes all.
        allow_approximate: take neighbors from an index that is not exact.
    """

    smooth: float = 0.05
    max_classes: int | None = 4
    allow_approximate: bool = False

    def __post_init__(self) -> None:
        check_positive(self.smooth, "smooth")
        if self.max_classes is not None:
            check_positive_int(self.max_classes, "max_classes")

    def bind(self, classifier: Classifier) -> BoundObjective:
        known = voter_classifier(classifier, "the rank-pair objective")
        return _Bound(self, known, usable_voters(known, allow_approximate=self.allow_approximate))


class _Bound(NeighborBound):
    def __init__(self, config: RankPair, classifier: VoterClassifier, voters: tuple[Voter, ...]) -> None:
        self.config = config
        self.pairs = [v.n_neighbors // 2 + 1 for v in voters]
        requests = [Request(v, per_class=s + min(s, _SPARE)) for v, s in zip(voters, self.pairs, strict=True)]
        super().__init__(classifier, voters, requests)
        sure = sure_winners(classifier)
        self.winners = winners(classifier) if sure is None else sure

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return _Batch(self, y, target, cast(Look, look))


class _Batch(NeighborBatch[_Bound, "_Ladders"]):
    def look_up(self, look: Look) -> list[_Ladders]:
        bound = self._bound
        found = [look.by_class[v].first(s).distances for v, s in zip(bound.voters, bound.pairs, strict=True)]
        likely = None if self.targeted else bound.winners
        classes = nearest_classes(found, self.labels, bound.config.max_classes, likely)
        return [_Ladders.make(v, look, classes, r) for v, r in zip(bound.voters, bound.requests, strict=True)]

    def loss(self, x: Tensor) -> Tensor:
        bound = self._bound
        features = bound.classifier.read(x, bound.layers)
        total: Tensor | float = 0.0
        for voter, ladders, pairs in zip(bound.voters, self._parts, bound.pairs, strict=True):
            total = total + ladders.leads(features[voter.layer], pairs) / len(bound.voters)
        smooth = bound.config.smooth
        best = smooth * torch.logsumexp(cast(Tensor, total) / smooth, 1)
        return -best if self.targeted else best


@dataclass
class _Ladders:
    """The nearest references of several classes of one voter, the own class first.

    Attributes:
        guides: (N, M · K).
        present: (N, M, K) bool.
        scale: (N, 1), their mean distance at the point of the lookup.
    """

    guides: Guides
    present: Tensor
    scale: Tensor

    @classmethod
    def make(cls, voter: Voter, look: Look, classes: Tensor, request: Request) -> _Ladders:
        """The references of classes (N, M)."""
        z, by_class = look.features[voter.layer], look.by_class[voter].first(request.per_class).ids
        ids = by_class.gather(1, classes[:, :, None].expand(-1, -1, by_class.shape[2]))
        guides = Guides.of(voter, ids.flatten(1), z.to(torch.promote_types(z.dtype, torch.float32)))
        present = ids >= 0
        flat = present.flatten(1)
        mean = (guides.distances(z) * flat).sum(1, keepdim=True) / flat.sum(1, keepdim=True)
        return cls(guides, present, mean.detach().clamp_min(torch.finfo(mean.dtype).tiny))

    def select(self, index: Tensor) -> _Ladders:
        """Those of some samples."""
        return replace(self, guides=self.guides.select(index), present=self.present[index], scale=self.scale[index])

    def leads(self, z: Tensor, pairs: int) -> Tensor:
        """How far each other class leads at features z (N, D), rank by rank, in units of the scale: (N, M − 1)."""
        distances = self.guides.distances(z).view(self.present.shape)
        distances = distances.masked_fill(~self.present, float("inf"))
        ranked = distances.topk(min(pairs, distances.shape[2]), dim=2, largest=False).values
        there = torch.isfinite(ranked)
        both = there[:, :1] & there[:, 1:]
        ranked = ranked.masked_fill(~there, 0)
        ahead = ((ranked[:, :1] - ranked[:, 1:]) * both).sum(2) / both.sum(2).clamp_min(1)
        return ahead / self.scale
