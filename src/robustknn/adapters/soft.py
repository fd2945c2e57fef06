"""A classifier of voters as a module of differentiable class scores whose arg max is the hard decision.

Handing soft nearest neighbors to a stock attack is the usual way to a false sense of robustness: log-probabilities of
the k nearest saturate, and the attack sees no gradient. Here the classifier's own rule counts soft votes as wide as the
gap to the nearest other class (`robustknn.objectives.adaptive`), so there is always one.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from robustknn.adapters.modules import ClassifierModule, lifted
from robustknn.checks import check_positive
from robustknn.classifiers import Classifier, VoterClassifier
from robustknn.errors import InputError, brief
from robustknn.objectives.adaptive import Adaptive
from robustknn.objectives.base import check_gradient
from robustknn.objectives.neighbors import voter_classifier


class Surrogate(ClassifierModule):
    """The rule's scores of soft votes, times `scale`; where another class than the hard decision leads, it is lifted.

    Neighbors are looked up anew in every call: twice the network's forward pass, and a search.

    Args:
        classifier: of voters.
        scale: logits for one unit of score. A share of votes is at most 1, so cross-entropy saturates nowhere.
        votes: how references vote softly: its bandwidth, and how many classes besides the decided one are looked at
            (an attack towards another class than these has no gradient towards it).
    """

    def __init__(self, classifier: VoterClassifier, scale: float, votes: Adaptive) -> None:
        super().__init__(classifier)
        self.bound = votes.of_voters(classifier)
        self.voters, self.requests = self.bound.voters, self.bound.requests
        self.scale, self.votes = scale, votes

    def answers(self, x: Tensor) -> Tensor:
        classifier = cast(VoterClassifier, self.classifier)
        look = classifier.look(x.detach(), self.requests)
        winner = classifier.decide(look.scores)
        features = classifier.read(x, self.bound.layers)
        if x.requires_grad and torch.is_grad_enabled():
            for layer, value in features.items():
                check_gradient(value, f"layer {layer!r}")
        ballots = self.bound.ballots(look, winner)  # those of an untargeted attack on the decided class
        soft = [b.votes(features[v.layer]) for v, b in zip(self.voters, ballots, strict=True)]
        return lifted(self.scale * classifier.combine(soft), winner)


def surrogate(classifier: Classifier, scale: float = 5.0, votes: Adaptive | None = None) -> Surrogate:
    """A classifier as a module of differentiable scores (N, C) with the hard decision's arg max, ties included.

    For gradient attacks of other libraries: pass it as the model. What they find is judged by the classifier.

    Args:
        classifier: of voters.
        scale: logits for one unit of score.
        votes: how references vote softly; by default as in the adaptive objective, with nine classes besides the
            decided one.

    Raises:
        InputError: a classifier without voters, or one with an approximate index unless `votes` allows it.
    """
    known = voter_classifier(classifier, "a surrogate with gradients")
    if votes is not None and not isinstance(votes, Adaptive):
        raise InputError(f"votes must be an Adaptive objective, whose votes are taken, not {brief(votes)}.")
    return Surrogate(known, check_positive(scale, "scale"), Adaptive(max_classes=9) if votes is None else votes)
