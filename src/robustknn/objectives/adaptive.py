"""The adaptive objective: the classifier's own rule, fed with soft votes instead of hard ones.

The idea that an attack should relax the decision it attacks is Athalye et al.'s (arXiv 1802.00420) and Tramèr et al.'s
(arXiv 2002.08347); the soft vote is an entropic top-k (`robustknn.objectives.soft_votes`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from robustknn import registry
from robustknn.checks import check_choice, check_positive, check_positive_int
from robustknn.classifiers.base import Classifier, Look, Request, VoterClassifier
from robustknn.classifiers.network import Network
from robustknn.classifiers.rules import Votes
from robustknn.classifiers.voters import Voter
from robustknn.errors import InputError
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective
from robustknn.objectives.classes import class_counts, nearest_classes, winners
from robustknn.objectives.guides import Guides
from robustknn.objectives.logit_margin import LogitMargin
from robustknn.objectives.neighbors import NeighborBatch, NeighborBound, usable_voters, voter_classifier
from robustknn.objectives.soft_votes import soft_topk

LOSSES = ("margin", "rival")
_SPARE = 8
"""References of a class beyond those that a decision needs, for what comes nearer until the next lookup."""
_SMALLEST = 1e-6
"""The least bandwidth, as a share of the distance to the farthest guide."""


@registry.objectives.register("adaptive")
@dataclass(frozen=True)
class Adaptive(Objective):
    """The margin of the classifier's own rule when every voter's k nearest vote softly.

    Voter by voter the guides j vote with w_j = σ((τ − d_j)/h), Σ_j w_j = k; the rule makes class scores s of these
    votes and of the differentiable distances, and the loss is smax_{c≠y} s_c − s_y, for a target t
    s_t − smax_{c≠t} s_c. It needs to know nothing of the rule, so any present or future one is attacked as it decides.

    The bandwidth is fixed at every lookup of neighbors, for each voter by itself: h = max(floor · τ, reach · gap) with
    τ the distance of the k-th neighbor and gap that from τ to the (⌊k/2⌋ + 1)-th reference of the nearest class that
    could win (of the target), zero where it is nearer. A narrower one does not see the references that have to come
    in, a wider one smooths away who votes. Inner products are taken from the largest one possible, ‖z‖·max‖r‖, so that
    they are distances from zero up, as cosines are.

    A reference's class is its label, or, where references carry a payload, what the rule decides if all of the
    neighbors are like it. A `Network` decides by its class scores: there the loss is `LogitMargin`.

    Args:
        floor: the least bandwidth, as a share of τ.
        reach: the bandwidth as a share of the gap.
        smooth: the temperature of smax, as a share of the range of the scores; None takes 0.1, and 0.2 for a target,
            which any class may block.
        max_classes: how many classes besides the true one have guides, the nearest ones; None takes all.
        loss: "margin", or "rival": the best other class's score minus the next one's, without that of y. A margin
            draws all rivals near and their votes stay divided; this one gathers votes for one of them, and finds
            some of what the margin does not. With a target, and with two classes, it is the margin.
        allow_approximate: take neighbors from an index that is not exact.
    """

    floor: float = 0.01
    reach: float = 0.5
    smooth: float | None = None
    max_classes: int | None = 3
    loss: str = "margin"
    allow_approximate: bool = False

    def __post_init__(self) -> None:
        check_choice(self.loss, LOSSES, "loss")
        for name in ("floor", "reach"):
            check_positive(getattr(self, name), name)
        if self.smooth is not None:
            check_positive(self.smooth, "smooth")
        if self.max_classes is not None:
            check_positive_int(self.max_classes, "max_classes")

    def temperature(self, targeted: bool) -> float:
        """The share of the range of the scores that smoothes their maximum."""
        return (0.2 if targeted else 0.1) if self.smooth is None else self.smooth

    def on(self, classifier: Classifier) -> Objective:
        return LogitMargin() if isinstance(classifier, Network) else self  # a network decides by its class scores

    def bind(self, classifier: Classifier) -> BoundObjective:
        climbed = self.on(classifier)
        if climbed is not self:
            return climbed.bind(classifier)
        return self.of_voters(voter_classifier(classifier, "the adaptive objective"))

    def of_voters(self, classifier: VoterClassifier) -> AdaptiveBound:
        """The objective on a classifier of voters."""
        return AdaptiveBound(self, classifier, usable_voters(classifier, allow_approximate=self.allow_approximate))


class AdaptiveBound(NeighborBound):
    """The adaptive objective on one classifier: which references vote softly, and for whom.

    Attributes:
        requests: what a look has to bring.
    """

    def __init__(self, config: Adaptive, classifier: VoterClassifier, voters: tuple[Voter, ...]) -> None:
        self.config = config
        # Where few references are guides by their class, all of them may be among the k: those behind the k-th have to
        # be guides too, or every weight is 1 and the votes have no gradient.
        self.spare = {v: _spare(v, classifier.n_classes, config.max_classes) for v in voters}
        requests = [Request(v, v.n_neighbors + self.spare[v], _own(v.n_neighbors)) for v in voters]
        super().__init__(classifier, voters, requests)
        self.winners = winners(classifier)

    def check(self, x: Tensor) -> None:
        super().check(x)
        look = self.classifier.look(x, self.requests)
        y = look.scores.argmax(1)  # a class in any case: a decision may be to reject
        with torch.enable_grad():
            loss = self.start(x, y, None, look).loss(x.detach().requires_grad_(True))
        if not loss.requires_grad:
            kind = type(self.classifier.rule).__name__
            raise InputError(
                f"the scores of the rule {kind} have no gradient in the weights of the votes; write it with "
                "differentiable operations, or use a black-box attack such as 'square'."
            )

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return _Batch(self, y, target, cast(Look, look))

    def ballots(self, look: Look, y: Tensor, target: Tensor | None = None) -> list[Ballot]:
        """Every voter's guides and bandwidths at the point looked at, for an attack on classes y (N,)."""
        found = [look.by_class[v].first(v.n_neighbors // 2 + 1).distances for v in self.voters]
        if target is None:
            rivals = nearest_classes(found, y, self.config.max_classes, self.winners)[:, 1:]
            wanted = rivals
        else:
            others = None if self.config.max_classes is None else self.config.max_classes - 1
            rivals = nearest_classes(found, target, others, None)
            wanted = target[:, None]
        return [
            Ballot.make(self.classifier, v, look, guide_ids(look, v, y, rivals, self.spare[v]), wanted, self.config)
            for v in self.voters
        ]


class _Batch(NeighborBatch[AdaptiveBound, "Ballot"]):
    def look_up(self, look: Look) -> list[Ballot]:
        return self._bound.ballots(look, self._y, self._target)

    def loss(self, x: Tensor) -> Tensor:
        bound = self._bound
        features = bound.classifier.read(x, bound.layers)
        votes = [b.votes(features[v.layer]) for v, b in zip(bound.voters, self._parts, strict=True)]
        scores = bound.classifier.combine(votes)
        lead = soft_lead(scores, self.labels, bound.config.temperature(self.targeted))
        if self.targeted:
            return lead
        single = bound.config.loss == "margin" or scores.shape[1] < 3
        return -lead if single else rival_lead(scores, self.labels)


@dataclass
class Ballot:
    """One voter's guides and what they say.

    Attributes:
        guides: (N, G).
        present: (N, G) bool.
        labels: (N, G).
        payload: (N, G, M) or None.
        bandwidth: (N, 1), h.
        n_neighbors: k.
    """

    guides: Guides
    present: Tensor
    labels: Tensor
    payload: Tensor | None
    bandwidth: Tensor
    n_neighbors: int

    @classmethod
    def make(
        cls,
        classifier: VoterClassifier,
        voter: Voter,
        look: Look,
        ids: Tensor,
        wanted: Tensor,
        config: Adaptive,
    ) -> Ballot:
        """What the guides say at the point looked at.

        Args:
            ids: (N, G) of the guides, −1 for none.
            wanted: (N, m) classes whose victory the attack may seek.
        """
        z, k = look.features[voter.layer], voter.n_neighbors
        present = ids >= 0
        guides = Guides.of(voter, ids, z.to(torch.promote_types(z.dtype, torch.float32)))
        made = cls(guides, present, voter.labels_of(ids), voter.payload_of(ids), torch.empty(0), k)
        distances = guides.distances(z).detach().masked_fill(~present, float("inf"))
        made.bandwidth = bandwidth(distances, made.classes(classifier, distances), wanted, k, config)
        return made

    def select(self, index: Tensor) -> Ballot:
        """The ballots of some samples."""
        return replace(
            self,
            guides=self.guides.select(index),
            present=self.present[index],
            labels=self.labels[index],
            payload=None if self.payload is None else self.payload[index],
            bandwidth=self.bandwidth[index],
        )

    def votes(self, z: Tensor) -> Votes:
        """The soft votes at features z (N, D)."""
        distances = self.guides.distances(z)
        weights = soft_topk(distances, self.n_neighbors, self.bandwidth, self.present)
        if self.guides.metric == "ip":  # back to −⟨z, r⟩, which a rule sees in the hard decision
            reach = self.guides.squares.amax(1, keepdim=True).sqrt()
            distances = distances - z.detach().to(reach).norm(dim=1, keepdim=True) * reach
        return Votes(weights, distances, self.labels, self.n_neighbors, self.payload)

    def classes(self, classifier: VoterClassifier, distances: Tensor) -> Tensor:
        """The class that each guide speaks for, (N, G)."""
        if self.payload is None:
            return self.labels
        # All voters see k neighbors like this one: whatever the rule makes of a payload, it decides by this one's.
        columns = [t.flatten(0, 1)[:, None] for t in (distances, self.labels, self.payload)]
        weights = torch.full_like(columns[0], self.n_neighbors)
        alike = Votes(weights, columns[0], columns[1], self.n_neighbors, columns[2])
        scores = classifier.combine([alike] * len(classifier.voters))
        return classifier.decide(scores).view(self.labels.shape)


def _own(k: int) -> int:
    """How many references of the true class are guides."""
    return k + min(k, _SPARE)


def _rival(k: int) -> int:
    """How many references of another class are guides: a majority of votes, and some beyond."""
    return k // 2 + 1 + min(k // 2 + 1, _SPARE)


def _spare(voter: Voter, n_classes: int, max_classes: int | None) -> int:
    """How many of the references behind the k-th nearest are guides.

    None where those that are taken by class are more than k whichever classes are chosen.
    """
    k = voter.n_neighbors
    counts = class_counts(voter, n_classes).clamp_max(_rival(k)).sort().values
    taken = counts if max_classes is None else counts[: max_classes + 1]
    return min(k, _SPARE, len(voter.references) - k) if int(taken.sum()) <= k else 0


def guide_ids(look: Look, voter: Voter, y: Tensor, rivals: Tensor, spare: int = 0) -> Tensor:
    """Which references are guides, (N, G), −1 for none: the nearest, then the nearest of every class, no one twice.

    G is the number of the references taken by class. Those of the k nearest that are not among them take the places
    of the last in their class.

    Args:
        y: (N,) classes of which `_own(k)` are taken.
        rivals: (N, M) classes of which `_rival(k)` are taken.
        spare: how many besides the k nearest are taken whatever their class.
    """
    near, by_class = look.nearest[voter].first(voter.n_neighbors + spare).ids, look.by_class[voter].ids
    own, rival = min(_own(voter.n_neighbors), by_class.shape[2]), min(_rival(voter.n_neighbors), by_class.shape[2])
    ids = [near, by_class.gather(1, y[:, None, None].expand(-1, 1, own))[:, 0]]
    ids.append(by_class.gather(1, rivals[:, :, None].expand(-1, -1, rival)).flatten(1))
    place = [torch.full(near.shape[1:], -1.0), torch.arange(own) / own]
    place.append((torch.arange(rival) / rival).repeat(rivals.shape[1]))
    joined, order = torch.cat(ids, 1), torch.cat(place).to(near.device)
    again = _seen_before(joined) | (joined < 0)
    first = order.expand(joined.shape).masked_fill(again, float("inf")).argsort(dim=1, stable=True)
    first = first[:, : max(near.shape[1], own + rival * rivals.shape[1])]
    return joined.masked_fill(again, -1).gather(1, first)


def _seen_before(ids: Tensor) -> Tensor:
    """Whether the same id stands further left in its row, (N, G) bool."""
    order = ids.argsort(dim=1, stable=True)
    known = ids.gather(1, order)
    same = torch.zeros_like(known, dtype=torch.bool)
    same[:, 1:] = known[:, 1:] == known[:, :-1]
    return torch.zeros_like(same).scatter(1, order, same)


def bandwidth(distances: Tensor, classes: Tensor, wanted: Tensor, k: int, config: Adaptive) -> Tensor:
    """h of each row, (N, 1), without gradient.

    Args:
        distances: (N, G) to the guides, from zero up; infinite for a missing one.
        classes: (N, G) whom they speak for.
        wanted: (N, m) classes whose victory the attack may seek. One with fewer guides than a majority counts only
            where all have fewer, with its last.
    """
    tau = _ranked(distances, k)
    theirs = (classes[:, None] == wanted[:, :, None]) & torch.isfinite(distances)[:, None]
    last = _ranked(distances[:, None].masked_fill(~theirs, float("inf")), k // 2 + 1)[..., 0]  # (N, m)
    enough = theirs.sum(2) > k // 2
    likely = enough | ~enough.any(1, keepdim=True)
    nearest = last.masked_fill(~likely, float("inf")).amin(1, keepdim=True)
    gap = torch.nan_to_num((nearest - tau).clamp_min(0), posinf=0.0)
    # Where the input lies on its k nearest and the others do as well, any width will do that is above zero.
    least = _SMALLEST * _ranked(distances, distances.shape[1])
    width = torch.maximum(config.floor * tau, config.reach * gap)
    return torch.maximum(width, least).clamp_min(torch.finfo(width.dtype).tiny ** 0.5)


def _ranked(distances: Tensor, rank: int) -> Tensor:
    """The rank-th smallest of the last dimension, or the greatest finite one where there are fewer; kept as one."""
    ordered = distances.sort(-1).values
    found = torch.isfinite(ordered).sum(-1, keepdim=True)
    return ordered.gather(-1, (found.clamp_max(rank) - 1).clamp_min(0))


def rival_lead(scores: Tensor, labels: Tensor) -> Tensor:
    """max_{c≠y} s_c minus the next of scores (N, C), C ≥ 3; the largest itself where the next is minus infinity."""
    best, second = scores.scatter(1, labels[:, None], float("-inf")).topk(2, dim=1).values.unbind(1)
    return best - torch.where(torch.isfinite(second), second, torch.zeros_like(second))


def soft_lead(scores: Tensor, labels: Tensor, smooth: float) -> Tensor:
    """s_y − smax_{c≠y} s_c of scores (N, C), smax_c s_c = T log Σ exp(s_c/T) with T = smooth · (max s − min s)."""
    held = scores.detach()
    usable = torch.isfinite(held)
    high = held.masked_fill(~usable, float("-inf")).amax(1, keepdim=True)
    low = held.masked_fill(~usable, float("inf")).amin(1, keepdim=True)
    temperature = torch.where(high > low, smooth * (high - low), torch.ones_like(high))
    own = scores.gather(1, labels[:, None])[:, 0]
    others = scores.scatter(1, labels[:, None], float("-inf"))
    return own - temperature[:, 0] * torch.logsumexp(others / temperature, 1)
