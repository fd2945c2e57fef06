"""Combination rules: the voters' weighted neighbors → class scores.

A rule is given weights. The hard decision passes weight 1 for the k nearest; a soft attack passes soft weights
through the same rule, so that every rule is attacked as it decides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TIE = 1e-6
"""Scores that differ by no more than this are tied: voter weights are computed in floating point, and a tie in
exact arithmetic must be one in every precision."""


@dataclass(frozen=True)
class Votes:
    """What one voter says about each of N inputs, by G references.

    Attributes:
        weights: (N, G), how much each reference counts: 1 and 0 in the hard decision, 0 for a missing one.
        distances: (N, G), to each reference.
        labels: (N, G) int64.
        n_neighbors: the voter's k.
        payload: (N, G, M) or None.
    """

    weights: Tensor
    distances: Tensor
    labels: Tensor
    n_neighbors: int
    payload: Tensor | None = None


class Rule(ABC):
    """How voters are combined. Scores are differentiable in weights and distances."""

    @abstractmethod
    def __call__(self, votes: Sequence[Votes], n_classes: int) -> Tensor:
        """Class scores (N, C), larger for more likely classes."""


class VoteShare(Rule):
    """The share of all votes that a class gets: kNN with one voter, DkNN's sum over layers with several.

    argmax_c Σ_l |{i ∈ Ω_l : label i = c}| is DkNN's decision, the class of least nonconformity
    (Papernot & McDaniel, arXiv 1803.04765, section III).
    """

    def __call__(self, votes: Sequence[Votes], n_classes: int) -> Tensor:
        total = sum(v.n_neighbors for v in votes)
        return torch.stack([count_votes(v, n_classes) for v in votes]).sum(0) / total


def count_votes(votes: Votes, n_classes: int) -> Tensor:
    """Σ of the weights of each class's references, (N, C)."""
    counts = votes.weights.new_zeros(len(votes.weights), n_classes)
    return counts.scatter_add(1, votes.labels, votes.weights)


def decide(scores: Tensor) -> Tensor:
    """The predicted class of each row: the highest score, and of tied classes the smallest number, (N,)."""
    return (scores >= scores.amax(1, keepdim=True) - TIE).to(torch.uint8).argmax(1)


def margin(scores: Tensor, y: Tensor) -> Tensor:
    """The score of y minus the best other score, (N,). An attacker has won strictly when it is below −TIE."""
    own = scores.gather(1, y[:, None])[:, 0]
    others = scores.scatter(1, y[:, None], float("-inf"))
    return own - others.amax(1)


def strictly_lost(scores: Tensor, y: Tensor) -> Tensor:
    """Whether another class beats y beyond a tie, (N,) bool: the success of an untargeted attack."""
    return margin(scores, y) < -TIE


def strictly_won(scores: Tensor, target: Tensor) -> Tensor:
    """Whether `target` beats every other class beyond a tie, (N,) bool: the success of a targeted attack."""
    return margin(scores, target) > TIE
