"""Fooling a classifier credibly: another class, and credibility enough not to be rejected."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustknn import registry
from robustknn.attacks.apgd import APGD
from robustknn.attacks.base import Attack, Job, check_attack
from robustknn.checks import check_number
from robustknn.classifiers.base import Classifier
from robustknn.classifiers.dknn import DkNN
from robustknn.classifiers.rejecting import Rejecting
from robustknn.errors import InputError
from robustknn.objectives import Adaptive


def _usual() -> Attack:
    return APGD(objective=Adaptive(), steps=10, restarts=5)


@registry.attacks.register("credible")
@dataclass(frozen=True)
class Credible(Attack):
    """Any attack on a calibrated DkNN that has succeeded only when its example is credible.

    Credibility grows with the votes of the class decided for, so an objective that goes on climbing votes beyond the
    decision attacks it too; the wanted number of votes is what stops the attack. The adaptive objective does, from
    several starts; a margin of distances (ASK) finds less.

    Args:
        attack: what is run.
        share: the threshold is the one that rejects this share of the calibration samples.
        credibility: the least credibility instead, in [0, 1].
    """

    attack: Attack = field(default_factory=_usual)
    share: float | None = 0.05
    credibility: float | None = None

    def __post_init__(self) -> None:
        check_attack(self.attack)
        if self.credibility is not None:
            check_number(self.credibility, "credibility", "in [0, 1]", lambda v: 0 <= v <= 1)
        elif self.share is None:
            raise InputError("pass share= or credibility=, the threshold that the examples must pass.")
        else:
            check_number(self.share, "share", "in [0, 1)", lambda v: 0 <= v < 1)

    @property
    def parts(self) -> tuple[str, ...]:
        return self.attack.parts

    @property
    def transfer(self) -> bool:
        return self.attack.transfer

    def check(self, classifier: Classifier, x: Tensor) -> None:
        self.attack.check(self.judge(classifier), x)

    def judge(self, classifier: Classifier) -> Rejecting:
        """The classifier that rejects what is not credible enough."""
        if not isinstance(classifier, DkNN) or not classifier.is_calibrated:
            raise InputError(
                "a credible example needs a calibrated DkNN; call calibrate(x, y) with held-out samples first (a kNN "
                "with credibility is a DkNN of one layer)."
            )
        share = None if self.credibility is not None else self.share
        return Rejecting(classifier, self.credibility, share=share)

    def run(self, job: Job) -> None:
        plain = job.classifier
        job.classifier = self.judge(plain)
        self.attack.run(job)
        job.classifier = plain
        rows = torch.arange(len(job.x), device=job.x.device)
        for found, x in ((job.labels, job.best), (job.clean_labels, job.x)):
            found.copy_(plain.decide(job.look(x, rows)[0]))
