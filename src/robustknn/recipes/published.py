"""The protocol of each classifier's own paper, as one attack: what the worst case is shown beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustknn import registry
from robustknn.attacks import Attack, Job
from robustknn.classifiers import Classifier
from robustknn.config import from_config


@registry.attacks.register("published")
@dataclass(frozen=True)
class Published(Attack):
    """The attack that the classifier's own paper reports robustness under (`Classifier.published_attack`).

    Those of the papers here are made on the network alone, so what they leave is not the classifier's robustness.
    """

    role: ClassVar[str] = "published"

    @property
    def transfer(self) -> bool:
        return True

    def check(self, classifier: Classifier, x: Tensor) -> None:
        attack_of(classifier).check(classifier, x)

    def run(self, job: Job) -> None:
        attack_of(job.classifier).run(job)


def attack_of(classifier: Classifier) -> Attack:
    """The attack that `classifier.published_attack` names."""
    made: Attack = from_config(dict(classifier.published_attack), registry.attacks)
    return made
