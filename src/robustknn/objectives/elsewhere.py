"""References that the classifier takes for another class: what attacks move to, and where they start from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustknn.classifiers.base import Look, Request, VoterClassifier
from robustknn.classifiers.rules import TIE
from robustknn.classifiers.voters import Voter

PER_CLASS = 4
"""References of each class that are candidates, the nearest of every voter."""
_POOL = 8
"""Candidates of a voter, over all classes, whose decision is asked for."""


@dataclass
class Elsewhere:
    """Candidates of a batch, (N, P): references of another label, or of the wanted one.

    Attributes:
        ids: −1 where there are fewer than P.
        distances: in the feature space, each voter's divided by its mean and all summed; infinite for a missing one.
        decided: bool, whether the classifier gives the reference another class than the true one (the wanted one), no
            tie.
    """

    ids: Tensor
    distances: Tensor
    decided: Tensor

    def nearest(self, count: int, distances: Tensor | None = None) -> Tensor:
        """The `count` nearest, (N, count), those the classifier gives another class first; −1 where there are fewer.

        Args:
            distances: (N, P) to go by instead of those in the feature space.
        """
        distances = self.distances if distances is None else distances.masked_fill(self.ids < 0, float("inf"))
        by_distance = distances.argsort(dim=1, stable=True)
        by_decision = self.decided.gather(1, by_distance).logical_not().long().argsort(dim=1, stable=True)
        ids = self.ids.gather(1, by_distance.gather(1, by_decision))[:, :count]
        return torch.nn.functional.pad(ids, (0, count - ids.shape[1]), value=-1)


def candidate_requests(voters: tuple[Voter, ...]) -> tuple[Request, ...]:
    """What `candidates` needs a look to hold."""
    return tuple(Request(v, per_class=PER_CLASS) for v in voters)


@torch.no_grad()
def candidates(
    classifier: VoterClassifier, voters: tuple[Voter, ...], look: Look, y: Tensor, target: Tensor | None
) -> Elsewhere:
    """The references of other labels nearest to the inputs looked at, each decided by the classifier.

    Args:
        voters: over the same references, whose neighbors by class the look holds.
        y: (N,) true classes.
        target: (N,) the classes wanted, or None for any but the true one.
    """
    ids = torch.cat([_of_voter(look, v, y, target) for v in voters], 1).sort(1, descending=True).values
    ids[:, 1:][ids[:, 1:] == ids[:, :-1]] = -1
    known, total = ids >= 0, torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    for voter in voters:
        z = look.features[voter.layer]
        keys = voter.index.metric.keys(z, voter.references.rows(voter.layer, ids.clamp_min(0)))
        distances = voter.index.metric.distances(keys) * known
        mean = distances.abs().sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp_min(1)
        total += distances / mean.clamp_min(torch.finfo(torch.float64).tiny)
    lead = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    lead[known] = _leads(classifier, ids, known, y, target)
    return Elsewhere(ids, total.masked_fill(~known, float("inf")), known & (lead < -TIE))


def _of_voter(look: Look, voter: Voter, y: Tensor, target: Tensor | None) -> Tensor:
    """The nearest of a voter's neighbors by class that may do, (N, P)."""
    found = look.by_class[voter]
    distances = found.distances[:, :, :PER_CLASS].masked_fill(found.ids[:, :, :PER_CLASS] < 0, float("inf"))
    own = torch.nn.functional.one_hot(y if target is None else target, distances.shape[1]).bool()
    distances = distances.masked_fill((own if target is None else ~own)[:, :, None], float("inf")).flatten(1)
    near = distances.topk(min(_POOL, distances.shape[1]), dim=1, largest=False)
    return found.ids[:, :, :PER_CLASS].flatten(1).gather(1, near.indices).masked_fill(near.values.isinf(), -1)


def _leads(classifier: VoterClassifier, ids: Tensor, known: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    """By how much the defender leads on the references at the known places, by their stored features."""
    row, wanted = known.nonzero()[:, 0], ids[known]
    each, place = wanted.unique(return_inverse=True)
    votes = [v.votes(v.index.search(v.references.rows(v.layer, each), v.n_neighbors)) for v in classifier.voters]
    scores = classifier.combine(votes)[place]
    return classifier.lead(scores, y[row], None if target is None else target[row])
