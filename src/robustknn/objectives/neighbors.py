"""What objectives that look at neighbors share: the voters they can use, and what they refuse."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from robustknn.classifiers.base import Classifier, Look, Request, VoterClassifier
from robustknn.classifiers.voters import Voter
from robustknn.errors import InputError
from robustknn.objectives.base import BatchObjective, BoundObjective, check_gradient


def voter_classifier(classifier: Classifier, what: str) -> VoterClassifier:
    """The classifier itself; InputError for one that is not known to decide by the votes of neighbors.

    Args:
        what: the objective's name, for the sentence.
    """
    if not isinstance(classifier, VoterClassifier):
        raise InputError(
            f"{what} needs a classifier that decides by the votes of references, which {type(classifier).__name__} is "
            f"not known to do; {classifier.attackable}."
        )
    return classifier


def usable_voters(
    classifier: VoterClassifier, metric: str | None = None, allow_approximate: bool = False
) -> tuple[Voter, ...]:
    """The classifier's voters, or others over the same layers and references where it votes by another metric.

    Raises:
        InputError: an index that is not exact, unless that is allowed.
    """
    voters = []
    for own in classifier.voters:
        voter = own
        if metric is not None and own.metric != metric:
            voter = classifier.other_voter(own.references, own.layer, own.n_neighbors, metric)
        voters.append(voter)
    check_exact(voters, allow_approximate)
    return tuple(voters)


def check_exact(voters: Sequence[Voter], allow_approximate: bool) -> None:
    """InputError for an index that is not exact, unless that is allowed."""
    for voter in voters:
        if not voter.index.differentiable and not allow_approximate:
            raise InputError(
                f"the index of layer {voter.layer!r} is approximate, and references that are not the nearest weaken "
                "the attack; use an exact index, or pass allow_approximate=True."
            )


class NeighborBound(BoundObjective):
    """An objective on the features of some voters of a classifier."""

    def __init__(self, classifier: VoterClassifier, voters: Sequence[Voter], requests: Sequence[Request]) -> None:
        self.classifier, self.voters, self.requests = classifier, tuple(voters), tuple(requests)
        self.layers = [v.layer for v in self.voters]

    def check(self, x: Tensor) -> None:
        with torch.enable_grad():
            features = self.classifier.read(x.detach().requires_grad_(True), self.layers)
        for layer, value in features.items():
            check_gradient(value, f"layer {layer!r}")


class Selectable(Protocol):
    """What an objective holds of one voter for every sample of a batch."""

    def select(self, index: Tensor) -> Self:
        """The same of some samples."""


Bound = TypeVar("Bound", bound=NeighborBound)
Part = TypeVar("Part", bound=Selectable)


class NeighborBatch(BatchObjective, Generic[Bound, Part]):
    """A batch objective that holds one part for each voter, looked up anew when there is a new look."""

    def __init__(self, bound: Bound, y: Tensor, target: Tensor | None, look: Look) -> None:
        self._bound, self._y, self._target = bound, y, target
        self._parts = self.look_up(look)

    @property
    def labels(self) -> Tensor:
        """The true classes (N,), or those wanted."""
        return self._y if self._target is None else self._target

    @property
    def targeted(self) -> bool:
        """Whether the labels are those wanted."""
        return self._target is not None

    @abstractmethod
    def look_up(self, look: Look) -> list[Part]:
        """The parts for the points looked at."""

    def update(self, kept: Tensor | None, look: Look | None) -> None:
        if kept is not None:
            self._y = self._y[kept]
            self._target = None if self._target is None else self._target[kept]
        if look is not None:
            self._parts = self.look_up(look)
        elif kept is not None:
            self._parts = [part.select(kept) for part in self._parts]
