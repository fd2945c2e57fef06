"""Examples that were made on another classifier: what an attacker does who knows less than everything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustknn import registry
from robustknn.attacks.base import Attack, Job, check_attack
from robustknn.classifiers.base import Classifier, check_classifier, named_classes
from robustknn.errors import InputError


@registry.attacks.register("transferred")
@dataclass(frozen=True)
class Transferred(Attack):
    """An attack on another classifier, the source, whose examples are shown to this one.

    What the source is says what the attacker knows: black-box, another network; gray-box, the same network without the
    references, or a classifier over references of the attacker's own. In the paper of the web-scale defense
    (arXiv 1903.01612, section 4) these are the two settings.

    Args:
        source: the classifier that the examples are made on. In a configuration a table.
        attack: what is run on it; by default PGD on its network's cross-entropy. One that stops as soon as the source
            is fooled crosses over less often than one that goes on to its last step, as this one does.
    """

    source: Classifier | None = None
    attack: Attack = field(default_factory=lambda: registry.attacks.create("pgd-transfer"))

    def __post_init__(self) -> None:
        check_attack(self.attack)
        if self.source is not None:
            check_classifier(self.source, "source")

    @property
    def transfer(self) -> bool:
        return True

    def check(self, classifier: Classifier, x: Tensor) -> None:
        source = self._source()
        if source.n_classes != classifier.n_classes or _names(source) != _names(classifier):
            raise InputError(
                f"the source tells {source.n_classes} classes apart and the classifier {classifier.n_classes}, or they "
                "have other names; make the examples on a classifier of the same classes."
            )
        self.attack.check(source, source.place(x))

    def run(self, job: Job) -> None:
        source, rows = self._source(), torch.arange(len(job.x), device=job.x.device)
        job.begin(job.look(job.x, rows)[0])
        x = source.place(job.x)
        y, ids = job.y.to(x.device), job.ids.to(x.device)
        target = None if job.target is None else job.target.to(x.device)
        there = Job(source, x, y, target, ids, job.threat, job.seed, job.trace is not None)
        self.attack.run(there)
        made = there.best.to(job.x)
        job.settle(made, rows, job.look(made, rows)[0])
        job.gradient_passes += there.gradient_passes.to(job.x.device)
        job.zero_gradient |= there.zero_gradient.to(job.x.device)
        if job.trace is not None:
            job.trace += there.trace or []

    def _source(self) -> Classifier:
        if self.source is None:
            raise InputError("transferred needs the classifier that examples are made on; name it as its source.")
        return self.source


def _names(classifier: Classifier) -> Any:
    names = named_classes(classifier)
    return None if names is None else names.tolist()
