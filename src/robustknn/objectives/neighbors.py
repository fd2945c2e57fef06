"""What objectives that look at neighbors share: the voters they can use, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustknn.classifiers.base import Classifier, Request, VoterClassifier
from robustknn.classifiers.voters import Voter
from robustknn.errors import InputError
from robustknn.objectives.base import BoundObjective, check_gradient


def voter_classifier(classifier: Classifier, what: str) -> VoterClassifier:
    """The classifier itself; InputError for one whose references are not known.

    Args:
        what: the objective's name, for the sentence.
    """
    if not isinstance(classifier, VoterClassifier):
        raise InputError(
            f"{what} needs a classifier whose references are known; use a black-box attack: square, hop-skip-jump or "
            "boundary."
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
        if not voter.index.differentiable and not allow_approximate:
            raise InputError(
                f"the index of layer {voter.layer!r} is approximate, and references that are not the nearest weaken "
                "the attack; use an exact index, or pass allow_approximate=True."
            )
        voters.append(voter)
    return tuple(voters)


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
