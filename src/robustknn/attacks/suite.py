"""Several attacks as one: cheapest first, only samples that still stand go on, the worst example of each is kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustknn import rng
from robustknn.attacks.base import Attack, Job, check_attack, padded_rows
from robustknn.attacks.targets import class_requests, wrong_classes
from robustknn.checks import check_number, check_positive_int, check_whole
from robustknn.classifiers.base import Classifier, VoterClassifier
from robustknn.classifiers.rules import TIE
from robustknn.errors import InputError


class Suite(Attack):
    """The per-sample worst case over named attacks.

    Subclasses are frozen dataclasses that say which attacks, in which order.
    """

    @abstractmethod
    def members(self) -> dict[str, Attack]:
        """The attacks by name, in the order in which they run."""

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.members())

    def check(self, classifier: Classifier, x: Tensor) -> None:
        if not any(_works(attack, classifier, x) for attack in self.members().values()):
            raise InputError(
                f"no attack of {type(self).__name__} works on this classifier; use a black-box attack such as 'square'."
            )

    def usable(self, classifier: Classifier, x: Tensor) -> list[str]:
        """The names of the members that can work on a classifier; the others are left out."""
        return [name for name, attack in self.members().items() if _works(attack, classifier, x)]

    def run(self, job: Job) -> None:
        rows = torch.arange(len(job.x), device=job.x.device)
        scores, _ = job.look(job.x, rows)
        job.begin(scores)
        climbed, first = torch.zeros_like(job.zero_gradient), job.margin.clone()
        for place, (name, attack) in enumerate(self.members().items()):
            standing = job.standing()
            if not len(standing):
                return
            if isinstance(attack, Close):
                standing = standing[attack.wants(job.classifier, job.margin[standing], first[standing])]
            rows = padded_rows(standing)
            if len(rows) and _works(attack, job.classifier, job.x[:1]):
                part = job.part(rows, rng.derive(job.seed, name))
                attack.run(part)
                job.take(part, rows, place)
                if not attack.transfer and bool(part.gradient_passes.any()):
                    # No gradient to climb is a sign only where no part had one.
                    job.zero_gradient[rows] = part.zero_gradient & (job.zero_gradient[rows] | ~climbed[rows])
                    climbed[rows] = True


def _works(attack: Attack, classifier: Classifier, x: Tensor) -> bool:
    """Whether an attack can work on a classifier; x is one sample (1, …)."""
    try:
        attack.check(classifier, x)
    except InputError:
        return False
    return True


@dataclass(frozen=True)
class Members(Suite):
    """The per-sample worst case over the attacks given, in their order.

    Args:
        attacks: (name, attack) pairs, or attacks by name.
    """

    attacks: tuple[tuple[str, Attack], ...] | Mapping[str, Attack] = ()

    def __post_init__(self) -> None:
        given = tuple(self.attacks.items()) if isinstance(self.attacks, Mapping) else self.attacks
        if not isinstance(given, (list, tuple)) or not given or not all(_is_pair(each) for each in given):
            raise InputError("attacks must be (name, attack) pairs, at least one.")
        pairs = tuple((name, attack) for name, attack in given)
        if len({name for name, _ in pairs}) < len(pairs):
            raise InputError("two attacks have the same name; rename one.")
        object.__setattr__(self, "attacks", pairs)

    def members(self) -> dict[str, Attack]:
        return dict(self.attacks)


def _is_pair(value: Any) -> bool:
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    return pair and isinstance(value[0], str) and isinstance(value[1], Attack)


@dataclass(frozen=True)
class Close(Attack):
    """An attack that a suite runs on the samples alone which the attacks before it have brought close to falling.

    A long climb finds what short ones miss among these, and hardly ever elsewhere. Outside a suite it is the attack.

    Args:
        attack: what is run.
        within: the lead that the defender has left, at most, as a share of its lead without attack. A lead of one vote
            is close as well, if it was more: of few votes it is a large share, and the least there is.
    """

    attack: Attack
    within: float = 0.1

    def __post_init__(self) -> None:
        check_attack(self.attack)
        check_number(self.within, "within", "in [0, 1]", lambda v: 0 <= v <= 1)

    @property
    def transfer(self) -> bool:
        return self.attack.transfer

    def check(self, classifier: Classifier, x: Tensor) -> None:
        self.attack.check(classifier, x)

    def wants(self, classifier: Classifier, lead: Tensor, first: Tensor) -> Tensor:
        """Which samples are close, (n,) bool, from the defender's lead now and without attack, (n,) each."""
        votes = sum(v.n_neighbors for v in classifier.voters) if isinstance(classifier, VoterClassifier) else 0
        one = 1 / votes + TIE if votes else 0.0
        return (lead <= self.within * first) | ((lead <= one) & (lead < first - TIE))

    def run(self, job: Job) -> None:
        self.attack.run(job)


@dataclass(frozen=True)
class EachTarget(Attack):
    """An attack run toward one wrong class after another, the nearest first, while the sample stands.

    Any wrong decision counts, also one for another class than the one aimed at. A targeted attack knows its class
    and runs once.

    Args:
        attack: what is run.
        targets: how many classes are tried.
        first: the rank of the first one tried, from 0 (the nearest).
    """

    attack: Attack
    targets: int = 9
    first: int = 0

    def __post_init__(self) -> None:
        check_attack(self.attack)
        check_positive_int(self.targets, "targets")
        check_whole(self.first, "first", 0)

    @property
    def transfer(self) -> bool:
        return self.attack.transfer

    def check(self, classifier: Classifier, x: Tensor) -> None:
        self.attack.check(classifier, x)

    def run(self, job: Job) -> None:
        if job.target is not None:
            self.attack.run(job)
            return
        rows = torch.arange(len(job.x), device=job.x.device)
        scores, look = job.look(job.x, rows, class_requests(job.classifier))
        job.begin(scores)
        ranked = wrong_classes(job.classifier, look, scores, job.y)
        for place in range(self.first, min(self.first + self.targets, ranked.shape[1])):
            rows = padded_rows(job.standing())
            if not len(rows):
                return
            part = job.part(rows, job.seed)
            part.aim = ranked[rows, place]
            self.attack.run(part)
            job.take(part, rows)
            if place == self.first:
                job.zero_gradient[rows] = part.zero_gradient
