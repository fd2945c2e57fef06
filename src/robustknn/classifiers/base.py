"""Classifiers: anything with scores, and those made of voters and a rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robustknn.checks import check_inputs, check_labels, class_numbers
from robustknn.classifiers.rules import TIE, Rule, Votes, decide, margin
from robustknn.classifiers.voters import Voter
from robustknn.errors import InputError
from robustknn.features import FeatureExtractor
from robustknn.neighbors import ClassNeighbors, Neighbors
from robustknn.reference import ReferenceSet


class Classifier(ABC):
    """What can be attacked and evaluated: class scores of a batch, and a decision by the highest.

    Attributes:
        n_classes: the number of classes.
        extractor: the network it stands on, or None when nothing is known but the scores.
        published_attack: the attack by which the classifier's paper measured robustness, by registered name and
            options: what a report shows beside the worst case.
    """

    n_classes: int
    published_attack: Mapping[str, Any] = MappingProxyType({"name": "pgd-transfer"})

    attackable: ClassVar[str] = "use a black-box attack: square, hop-skip-jump or boundary"
    """What attacks it where an objective on neighbors cannot, for the sentence that says so."""

    @property
    def extractor(self) -> FeatureExtractor | None:
        """The network the classifier stands on; None when only scores are known."""
        return None

    @property
    def reference_sets(self) -> tuple[ReferenceSet, ...]:
        """The reference sets it decides by; none where nothing is known of them."""
        return ()

    @property
    def enough(self) -> float:
        """By how much another class must lead, in scores, for an attack to be done with a sample."""
        return TIE

    @abstractmethod
    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """Class scores (N, C) of a batch, float64, without gradient.

        Args:
            x: (N, …) inputs.
            sample_ids: (N,) identities, for classifiers that draw random numbers (see `robustknn.rng`).
        """

    def labels(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """Predicted class numbers (N,); of tied classes the smallest."""
        return self.decide(self.scores(x, sample_ids))

    def decide(self, scores: Tensor) -> Tensor:
        """The decision of each row of scores (N,): the highest, and of tied classes the smallest number."""
        return decide(scores)

    def lead(self, scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
        """By how much the defender leads, (N,): below zero beyond a tie an attack has succeeded.

        Args:
            scores: (N, C), what `scores` returned.
            y: (N,) true classes.
            target: (N,) the classes that the attacker wants, or None for any wrong one.
        """
        return margin(scores, y) if target is None else -margin(scores, target)

    def numbers(self, y: Any, n: int, what: str = "y") -> Tensor:
        """Labels of n samples as class numbers (N,) int64: what `fit` saw, or 0..C − 1 for a given reference set.

        Raises:
            InputError: another number of labels, or a label that is no class of this classifier.
        """
        classes = named_classes(self)
        if classes is not None:
            y = class_numbers(y, classes, what)
        return check_labels(y, n, self.n_classes, what)

    def place(self, x: Any) -> Tensor:
        """Inputs checked, on the classifier's device, in its floating point type."""
        x = check_inputs(x)
        return x if self.extractor is None else self.extractor.place(x)

    @abstractmethod
    def fingerprint(self) -> str:
        """A sha256 of everything that decides."""


def named_classes(classifier: Classifier) -> np.ndarray[Any, Any] | None:
    """The labels (C,) that a classifier was fitted on; None when they are the class numbers 0..C − 1."""
    classes = getattr(classifier, "classes_", None)
    if classes is None:
        return None
    classes = np.asarray(classes)
    return None if classes.dtype.kind in "iuf" and np.array_equal(classes, np.arange(len(classes))) else classes


def check_classifier(value: Any, what: str = "classifier") -> Classifier:
    """The classifier itself; InputError for anything else, such as the model it would stand on."""
    if isinstance(value, Classifier):
        return value
    kind, how = type(value).__name__, "KNN(ReferenceSet.build(FeatureExtractor(model), data))"
    if isinstance(value, (nn.Module, FeatureExtractor)):
        raise InputError(f"{what} is a model ({kind}); make a classifier of it first: {how}.")
    if isinstance(value, ReferenceSet):
        raise InputError(f"{what} is a reference set; make a classifier of it first: KNN(references).")
    raise InputError(f"{what} must be a Classifier such as {how}, not {kind}.")


@dataclass(frozen=True)
class Request:
    """Neighbors wanted besides those of the decision: the nearest overall, and the nearest of every class."""

    voter: Voter
    nearest: int = 0
    per_class: int = 0


@dataclass
class Look:
    """One look at a batch: features, neighbors and the hard decision, from one forward pass and one search.

    Attributes:
        features: {layer: (N, D)}.
        scores: (N, C) float64, the hard decision's.
        nearest: neighbors by voter (at least its k).
        by_class: neighbors by voter and class, where they were requested.
    """

    features: dict[str, Tensor]
    scores: Tensor
    nearest: dict[Voter, Neighbors] = field(default_factory=dict)
    by_class: dict[Voter, ClassNeighbors] = field(default_factory=dict)

    def select(self, rows: Tensor) -> Look:
        """The look at some of the inputs, (n,) places."""
        return Look(
            {k: v[rows] for k, v in self.features.items()},
            self.scores[rows],
            {k: Neighbors(v.distances[rows], v.ids[rows]) for k, v in self.nearest.items()},
            {k: ClassNeighbors(v.distances[rows], v.ids[rows]) for k, v in self.by_class.items()},
        )


class VoterClassifier(Classifier):
    """Voters and a rule. Subclasses provide `voters`, `rule` and `extractor`."""

    @property
    @abstractmethod
    def voters(self) -> tuple[Voter, ...]:
        """The voters, in the order in which the rule receives their votes."""

    @property
    @abstractmethod
    def rule(self) -> Rule:
        """How their votes are combined."""

    @property
    def reference_sets(self) -> tuple[ReferenceSet, ...]:
        return tuple(dict.fromkeys(v.references for v in self.voters))

    @torch.no_grad()
    def look(self, x: Tensor, requests: Sequence[Request] = ()) -> Look:
        """Features, neighbors and the hard decision of a batch, in one forward pass and one search a voter.

        Args:
            x: (N, …) inputs, placed.
            requests: neighbors that an attack wants besides; they cost no second pass over the references.
        """
        wanted: dict[Voter, Request] = {v: Request(v, v.n_neighbors) for v in self.voters}
        for r in requests:
            seen = wanted.get(r.voter, Request(r.voter))
            wanted[r.voter] = Request(r.voter, max(seen.nearest, r.nearest), max(seen.per_class, r.per_class))
        features = self.read(x, [v.layer for v in wanted])
        look = Look(features, torch.empty(0))
        for voter, request in wanted.items():
            queries = features[voter.layer]
            if request.per_class:
                near, classes = voter.index.search_both(queries, max(request.nearest, 1), request.per_class)
                look.by_class[voter] = classes.widened(self.n_classes)
            else:
                near = voter.index.search(queries, max(request.nearest, 1))
            look.nearest[voter] = near
        votes = [voter.votes(look.nearest[voter]) for voter in self.voters]
        look.scores = self.combine(votes)
        return look

    def other_voter(self, references: ReferenceSet, layer: str, n_neighbors: int, metric: str) -> Voter:
        """A voter that does not vote here, for objectives that look at other layers or metrics; made once."""
        made: dict[Any, Voter] = self.__dict__.setdefault("_other_voters", {})
        key = (references, layer, n_neighbors, metric)
        if key not in made:
            made[key] = Voter.make(references, layer, n_neighbors, metric)
        return made[key]

    def combine(self, votes: Sequence[Votes]) -> Tensor:
        """Class scores from the voters' votes: the rule."""
        return self.rule(votes, self.n_classes)

    def read(self, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Features of some layers, differentiable when gradients are on."""
        extractor = self.extractor
        if extractor is None:
            raise InputError("this classifier knows no model, so no input can be classified; give it features=.")
        missing = [layer for layer in dict.fromkeys(layers) if layer not in extractor.layers]
        if missing:
            extractor = self.voters[0].references.extractor().select(list(dict.fromkeys(layers)))
        features = extractor(x)
        for voter in self.voters:
            found = features.get(voter.layer)
            if found is not None and found.shape[1] != voter.index.dim:
                raise InputError(
                    f"inputs of shape {tuple(x.shape[1:])} give features of length {found.shape[1]} at layer "
                    f"{voter.layer!r}, the references have {voter.index.dim}; pass inputs of the same size."
                )
        return features

    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        return self.look(self.place(x)).scores

    def details(self, look: Look) -> dict[str, Tensor]:
        """Further figures of each input (N,), by name, for the rows of an evaluation."""
        return {}
