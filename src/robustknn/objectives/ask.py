"""The adversarial soft-kNN loss (ASK): be far from the references of the true class, near those of another.

Wang, Chang, Li, Rajapakse & Hero, "ASK: Adversarial Soft k-Nearest Neighbor Attack and Defense",
arXiv 2106.14300, IEEE Access 10 (2022).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from robustknn import registry
from robustknn.checks import Weights, check_choice, check_layers, check_positive_int, check_positives, one_each
from robustknn.classifiers.base import Classifier, Look, Request, VoterClassifier
from robustknn.classifiers.voters import Voter
from robustknn.errors import InputError
from robustknn.neighbors.base import METRICS
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective
from robustknn.objectives.classes import nearest_classes, sure_winners, winners
from robustknn.objectives.guides import Gathered, Guides, prepared, products
from robustknn.objectives.neighbors import NeighborBatch, NeighborBound, check_exact, voter_classifier


@registry.objectives.register("ask")
@dataclass(frozen=True)
class ASK(Objective):
    """Soft votes of the K nearest references of every class.

    With s(z, r) the cosine of feature z and reference r, or minus their L2 distance:

    * class-wise: S_c = mean_j s(z, r_cj) / T over the K nearest references of class c; the published loss is
      the cross-entropy of S;
    * instance-wise: q = softmax_j(s(z, r_j) / T) over the references of all classes, p_c = Σ_{j of class c} q_j;
      the published loss is −log(p_y + 10⁻⁶).

    Several layers l are summed with weights κ_l, each with its own references and temperature T_l.

    Both published losses saturate: with T fixed, the softmax of raw distances is one-hot for most inputs and the
    gradient exactly zero (the released defaults leave hard-kNN accuracy .85 where .28 is reachable). The defaults
    here need no temperature: distances are divided by their own mean, so only their ratios count, and the loss
    is a margin, whose gradient never vanishes. `ASK.published()` gives the released setting.

    Args:
        kind: "class-wise" or "instance-wise".
        loss: "margin": class-wise D_y − smin_{c≠y} D_c of the mean distances D, averaged over layers, with the smooth
            minimum smin D = −T log Σ exp(−D/T), instance-wise max_{c≠y} log p_c − log p_y; or "cross-entropy", as
            published, layer by layer.
        mean: how the K L2 distances of a class are averaged, class-wise: "arithmetic" (as published) or "quadratic",
            the root of the mean square, which is as strong and needs the K references' mean alone.
        scale: "mean" divides the distances of each sample and layer by their mean, "none" takes them as they are.
        metric: "l2", "cosine" or "ip"; None takes each voter's own.
        n_neighbors: K, the references of each class; None takes, where means of classes are enough (see `mean`), the
            voter's k and, at every other lookup, ⌊k/2⌋ + 1, the votes that always win, of the classes that have so
            many; else at most 15 of k. With k alone, a class whose near references are just enough is missed.
        temperature: T, or one a layer (the class-wise margin takes their mean, since classes compete over the sum
            of layers as they do in the vote).
        weight: κ, or one a layer.
        layers: the layers attacked; None takes those that vote.
        include_self: instance-wise only: the clean features of the image itself join class y.
        max_classes: how many classes besides the true one are considered, the nearest ones, chosen anew with the
            neighbors; None takes all. Few suffice, and memory stays bounded with 1,000 classes.
        allow_approximate: take neighbors from an index that is not exact.
    """

    kind: str = "class-wise"
    loss: str = "margin"
    mean: str = "quadratic"
    scale: str = "mean"
    metric: str | None = None
    n_neighbors: int | None = None
    temperature: Weights = 0.05
    weight: Weights = 1.0
    layers: tuple[str, ...] | None = None
    include_self: bool = False
    max_classes: int | None = 4
    allow_approximate: bool = False

    def __post_init__(self) -> None:
        check_choice(self.kind, ("class-wise", "instance-wise"), "kind")
        check_choice(self.loss, ("margin", "cross-entropy"), "loss")
        check_choice(self.mean, ("arithmetic", "quadratic"), "mean")
        check_choice(self.scale, ("mean", "none"), "scale")
        if self.metric is not None:
            check_choice(self.metric, METRICS, "metric")
        if self.n_neighbors is not None:
            check_positive_int(self.n_neighbors, "n_neighbors")
        if self.max_classes is not None:
            check_positive_int(self.max_classes, "max_classes")
        object.__setattr__(self, "layers", check_layers(self.layers))
        for name in ("temperature", "weight"):
            object.__setattr__(self, name, check_positives(getattr(self, name), name))
        if self.include_self and self.kind != "instance-wise":
            raise InputError("include_self belongs to kind='instance-wise'.")

    @classmethod
    def published(cls, kind: str = "class-wise", **changes: object) -> ASK:
        """The released attack's setting: raw L2 distances, T = 0.1, K = 5, cross-entropy."""
        settings: dict[str, object] = {
            "loss": "cross-entropy",
            "mean": "arithmetic",
            "scale": "none",
            "temperature": 0.1,
            "metric": "l2",
            "n_neighbors": 5,
            "max_classes": None,
        }
        return cls(kind=kind, **{**settings, **changes})  # type: ignore[arg-type]

    def bind(self, classifier: Classifier) -> BoundObjective:
        known = voter_classifier(classifier, "ASK")
        voters = self._voters(known)
        check_exact(voters, self.allow_approximate)
        return _Bound(self, known, voters)

    def _voters(self, classifier: VoterClassifier) -> tuple[Voter, ...]:
        """The classifier's own voters where layer and metric are theirs, else new ones over the same references."""
        own = classifier.voters
        if self.layers is None:
            wanted = [(v, v.layer) for v in own]
        else:
            by_set = {v.references: v for v in reversed(own)}  # the first voter of each reference set
            pairs = [(held.layer(name), held) for name in self.layers for held in reversed(by_set)]
            wanted = [
                (next((v for v in own if v.layer == layer and v.references is held), by_set[held]), layer)
                for layer, held in pairs
            ]
        voters = []
        for usual, layer in wanted:
            metric = usual.metric if self.metric is None else self.metric
            if usual.layer == layer and usual.metric == metric:
                voters.append(usual)
            else:
                voters.append(classifier.other_voter(usual.references, layer, usual.n_neighbors, metric))
        return tuple(voters)

    def per_class(self, voter: Voter, turn: int = 0) -> int:
        """K for a voter, in turn 0 or 1; never less in turn 0."""
        if self.n_neighbors is not None:
            return self.n_neighbors
        if not self.by_means(voter):
            return min(voter.n_neighbors, 15)
        return voter.n_neighbors // 2 + 1 if turn else voter.n_neighbors

    def by_means(self, voter: Voter) -> bool:
        """Whether the loss needs no more of a class's references than their mean."""
        return self.kind == "class-wise" and (voter.metric != "l2" or self.mean == "quadratic")


class _Bound(NeighborBound):
    def __init__(self, config: ASK, classifier: VoterClassifier, voters: tuple[Voter, ...]) -> None:
        super().__init__(classifier, voters, [Request(v, per_class=config.per_class(v)) for v in voters])
        self.config = config
        self.temperatures = one_each(config.temperature, len(voters), "temperature")
        self.weights = one_each(config.weight, len(voters), "weight")
        can, sure = winners(classifier), sure_winners(classifier)
        self.winners = (can, can if sure is None else sure)  # by turn

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return _Batch(self, y, target, cast(Look, look))


class _Batch(NeighborBatch[_Bound, "_ClassGuides"]):
    """Guides of one batch: for every voter the K nearest references of the own class and of the nearest others."""

    def __init__(self, bound: _Bound, y: Tensor, target: Tensor | None, look: Look) -> None:
        self._lookups = 0
        self._self = None
        if bound.config.include_self:
            self._self = [prepared(look.features[v.layer], v.metric) for v in bound.voters]
        super().__init__(bound, y, target, look)

    def look_up(self, look: Look) -> list[_ClassGuides]:
        bound, turn = self._bound, self._lookups % 2 if self._bound.config.n_neighbors is None else 0
        self._lookups += 1
        found = [look.by_class[voter].first(bound.config.per_class(voter, turn)) for voter in bound.voters]
        # A target may be blocked by any class; a win of another class than the true one only comes from a winner.
        likely = None if self.targeted else bound.winners[turn]
        classes = nearest_classes([f.distances for f in found], self.labels, bound.config.max_classes, likely)
        return [
            _ClassGuides.make(voter, look.features[voter.layer], f.ids, f.distances, classes, bound.config)
            for voter, f in zip(bound.voters, found, strict=True)
        ]

    def update(self, kept: Tensor | None, look: Look | None) -> None:
        super().update(kept, look)
        if kept is not None and self._self is not None:
            self._self = [own[kept] for own in self._self]

    def loss(self, x: Tensor) -> Tensor:
        bound, config = self._bound, self._bound.config
        features = bound.classifier.read(x, bound.layers)
        total: Tensor | float = 0.0
        for place, (voter, guides) in enumerate(zip(bound.voters, self._parts, strict=True)):
            z = features[voter.layer]
            own = None if self._self is None else self._self[place]
            temperature, weight = bound.temperatures[place], bound.weights[place]
            if config.kind == "class-wise":
                part = guides.class_distances(z, config.scale == "mean")
                if config.loss == "cross-entropy":
                    part = torch.logsumexp(-part / temperature, 1) + part[:, 0] / temperature
            else:
                part = guides.log_shares(z, config.scale == "mean", temperature, own)
                part = -torch.log(part[:, 0].exp() + 1e-6) if config.loss == "cross-entropy" else -part
            total = total + weight * part
        loss = cast(Tensor, total) / sum(bound.weights)
        if config.loss == "margin" and config.kind == "class-wise":
            temperature = sum(bound.temperatures) / len(bound.temperatures)
            loss = loss[:, 0] + temperature * torch.logsumexp(-loss[:, 1:] / temperature, 1)
        elif config.loss == "margin":
            loss = loss[:, 0] - loss[:, 1:].amin(1)
        return -loss if self.targeted else loss


@dataclass
class _ClassGuides(Guides):
    """The references of several classes, own class first, or the mean of each class's where that is enough.

    The mean over a class is that of its members' mean vector and mean squared length.

    Attributes:
        shares: (N, M, K) each reference's share in its class's mean; 0 where a class has fewer than K.
        absent: (N, M) bool, classes that have none; None where all have some.
    """

    shares: Tensor
    absent: Tensor | None

    @classmethod
    def make(
        cls, voter: Voter, z: Tensor, ids: Tensor, distances: Tensor, classes: Tensor, config: ASK
    ) -> _ClassGuides:
        """From the K nearest of all classes, (N, C, K), of the features z (N, D) they were looked up at."""
        places = classes[:, :, None].expand(-1, -1, ids.shape[2])
        ids, distances = ids.gather(1, places), distances.gather(1, places)  # (N, M, K)
        present = (ids >= 0).to(torch.promote_types(z.dtype, distances.dtype))
        shares = present / present.sum(2, keepdim=True).clamp_min(1)
        metric, none = voter.metric, ~present.any(2)
        absent = none if bool(none.any()) else None  # asked here, once a lookup, and not at every step
        if not config.by_means(voter):
            all_of = Guides.of(voter, ids.flatten(1), z.to(shares))
            return cls(metric, all_of.rows, all_of.squares, shares, absent)
        means = voter.index.combine(ids.flatten(0, 1), shares.flatten(0, 1), unit=metric == "cosine")
        means = means.to(shares.dtype).view(*ids.shape[:2], -1)
        alone = torch.ones_like(shares[:, :, :1])
        if metric == "ip":
            return cls(
                metric, Gathered(means, torch.zeros_like(means[:, 0])), means.norm(dim=2).square(), alone, absent
            )
        center = means[:, 0].clone()
        means -= center[:, None]
        # mean ‖r − c‖² is what makes the mean squared distance right at z, where it is known.
        known = distances.masked_fill(ids < 0, 0).to(shares)
        known = ((2 * known if metric == "cosine" else known.square()) * shares).sum(2)
        offset = prepared(z.to(shares), metric) - center
        squares = known - (offset * offset).sum(1, keepdim=True) + 2 * products(means, offset)
        return cls(metric, Gathered(means, center), squares, alone, absent)

    def select(self, index: Tensor) -> _ClassGuides:
        """The guides of some samples."""
        absent = None if self.absent is None else self.absent[index]
        return replace(super().select(index), shares=self.shares[index], absent=absent)

    def class_distances(self, z: Tensor, scaled: bool) -> Tensor:
        """The mean distance to each class's references, (N, M), own class first.

        A class without any is as far as the farthest: where it has none in one voter of several, the others speak.
        """
        means = (self.distances(z).view(self.shares.shape) * self.shares).sum(2)
        if self.absent is not None:
            farthest = means.detach().masked_fill(self.absent, -torch.inf).amax(1, keepdim=True)
            means = torch.where(self.absent, farthest, means)
        return means / _scale(means, None) if scaled else means

    def log_shares(self, z: Tensor, scaled: bool, temperature: float, own: Tensor | None) -> Tensor:
        """log p_c of the instance-wise form, (N, M), own class first; `own` is an extra member of it."""
        distances, present = self.distances(z), self.shares.flatten(1) > 0
        scale = _scale(distances, present) if scaled else 1.0
        logits = (-distances / (temperature * scale)).masked_fill(~present, float("-inf"))
        per_class = torch.logsumexp(logits.view(self.shares.shape), 2)
        if own is not None:
            own = own.to(self.squares) - self.rows.center
            alone = Guides(self.metric, Gathered(own[:, None], self.rows.center), (own * own).sum(1, keepdim=True))
            extra = -alone.distances(z) / (temperature * scale)
            per_class = torch.cat([torch.logaddexp(per_class[:, :1], extra), per_class[:, 1:]], 1)
        return per_class - torch.logsumexp(per_class, 1, keepdim=True)


def _scale(distances: Tensor, present: Tensor | None) -> Tensor:
    """The mean of each row's distances (N, 1), without gradient."""
    distances = distances.detach()
    if present is None:
        mean = distances.mean(1, keepdim=True)
    else:
        mean = (distances * present).sum(1, keepdim=True) / present.sum(1, keepdim=True)
    return mean.clamp_min(torch.finfo(mean.dtype).tiny)
