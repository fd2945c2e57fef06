"""Which classes an objective should consider: those that can win, the nearest first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from robustknn.classifiers.base import VoterClassifier
from robustknn.classifiers.rules import VoteShare
from robustknn.classifiers.voters import Voter


def winners(classifier: VoterClassifier) -> Tensor | None:
    """Which classes have references enough to win a vote, (C,) bool; None where all have.

    A class with V votes wins when no other gets more than V − 1. Let every voter find as many of its references as
    there are: it can win if the others, with no more than V − 1 each, can take the votes that are left. Classes that
    cannot are a bait: near, and never the decision. Under another rule only classes without any reference are known
    not to win.
    """
    counts = torch.stack([class_counts(v, classifier.n_classes) for v in classifier.voters])
    if type(classifier.rule) is not VoteShare:
        return _unless_all(counts.any(0))
    k = torch.tensor([v.n_neighbors for v in classifier.voters])
    total, most = int(k.sum()), counts.minimum(k[:, None]).sum(0)
    # Σ_j min(most_j, t) for every t: each unit up to t is there for the classes that reach it.
    reaching = torch.bincount(most, minlength=total + 1).flip(0).cumsum(0).flip(0)
    at_most = torch.cat([torch.zeros(1, dtype=torch.int64), reaching[1:].cumsum(0)])
    limit = (most - 1).clamp_min(0)
    can = (most > 0) & (most + at_most[limit] - limit >= total)
    return _unless_all(can)


def sure_winners(classifier: VoterClassifier) -> Tensor | None:
    """Which classes have references enough to win whatever the others get, (C,) bool; None where all have, or the
    rule is not the vote."""
    if type(classifier.rule) is not VoteShare:
        return None
    enough = [class_counts(v, classifier.n_classes) > v.n_neighbors // 2 for v in classifier.voters]
    sure = torch.stack(enough).all(0)
    return _unless_all(sure)


def _unless_all(these: Tensor) -> Tensor | None:
    return None if bool(these.all()) or int(these.sum()) < 2 else these


def class_counts(voter: Voter, n_classes: int) -> Tensor:
    """How many references each class has, (C,)."""
    return torch.bincount(voter.references.labels.cpu(), minlength=n_classes)


def nearest_classes(distances: Sequence[Tensor], labels: Tensor, at_most: int | None, winners: Tensor | None) -> Tensor:
    """The own class and the `at_most` nearest others of the winners, (N, M): by mean distance, summed over voters."""
    total: Tensor | float = 0.0
    for d in distances:
        finite = torch.isfinite(d)
        mean = torch.where(finite, d, torch.zeros_like(d)).sum(2) / finite.sum(2).clamp_min(1)
        mean = torch.where(finite.any(2), mean, torch.full_like(mean, float("inf")))
        known = torch.isfinite(mean)
        usual = torch.where(known, mean, torch.zeros_like(mean)).abs().sum(1, keepdim=True)
        total = total + mean * known.sum(1, keepdim=True) / usual.clamp_min(torch.finfo(mean.dtype).tiny)
    ranked, wanted = cast(Tensor, total), distances[0].shape[1]
    if winners is not None:
        ranked, wanted = ranked.masked_fill(~winners.to(ranked.device), float("inf")), int(winners.sum())
    ranked = ranked.scatter(1, labels[:, None], float("-inf"))
    wanted = wanted if at_most is None else min(at_most + 1, wanted)
    return ranked.topk(wanted, dim=1, largest=False).indices
