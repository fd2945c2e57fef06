"""What every certificate says: for each sample a decision, and how far an attacker may go without changing it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustknn.checks import check_labels
from robustknn.classifiers import Classifier
from robustknn.errors import InputError
from robustknn.progress import Progress, Silent

ABSTAINS = -1
ITSELF = "the classifier"
INPUT_UNITS = {"l2": "L2 of the input", "linf": "L-infinity of the input", "l1": "L1 of the input"}
"""The units of certificates that a threat model of these norms can be drawn beside."""


@dataclass(frozen=True)
class Certified:
    """Certificates of N samples.

    A sample decided as `labels[i]` keeps that decision, ties counted as failure, under every change up to and
    including `radius[i]`; −1 where nothing is certified, not even the sample as it is (a tie).

    Attributes:
        labels: (N,) int64, the decision that is certified; −1 where it abstains.
        radius: (N,) float64, in `unit`; whole numbers where references are counted.
        unit: what the radius measures, e.g. "L2 of the input", "L2 of the features of layer 'relu3'", "references
            modified". Radii of different units are never compared.
        assumptions: what must hold for it to be true, a sentence each.
        upper: (N,) float64 or None: the least change known to break the decision; ∞ where none is known.
    """

    labels: Tensor
    radius: Tensor
    unit: str
    assumptions: tuple[str, ...]
    upper: Tensor | None = None

    def accuracy(self, y: Any, radii: Any) -> Tensor:
        """Certified accuracy: the share of samples that are right and certified at each radius, (R,) float64."""
        y = check_labels(y, len(self.labels), None)
        wanted = torch.as_tensor(radii, dtype=torch.float64).reshape(-1)
        right = (self.labels.cpu() == y.cpu()) & (self.labels.cpu() >= 0)
        held = right[:, None] & (self.radius.cpu().double()[:, None] >= wanted)
        shares: Tensor = held.double().mean(0)
        return shares


class Certifier(ABC):
    """A way to certify: hyper-parameters in the constructor (a frozen dataclass), data in the call.

    Attributes:
        of: whose decisions are certified. Where they are not the classifier's own (a smoothed one's, say), attacks on
            the classifier tell nothing of them and are not compared.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    of: ClassVar[str] = ITSELF

    @abstractmethod
    def check(self, classifier: Classifier) -> None:
        """Refuse, in one sentence that says what to do, a classifier for which the certificate does not hold."""

    @abstractmethod
    def certify(
        self,
        classifier: Classifier,
        x: Tensor,
        sample_ids: Tensor,
        seed: int,
        progress: Progress,
    ) -> Certified:
        """Certificates of checked inputs (N, …) on the classifier's device."""

    def __call__(
        self,
        classifier: Classifier,
        x: Any,
        sample_ids: Any = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Certified:
        """Certify the classifier's decisions.

        Args:
            classifier: what is certified.
            x: (N, …) inputs.
            sample_ids: (N,) identities, for certifiers that draw random numbers; by default 0..N − 1.
            seed: of these.
            progress: where to report.

        Raises:
            InputError: bad inputs, or a classifier for which the certificate does not hold.
        """
        self.check(classifier)
        placed = classifier.place(x)
        ids = torch.arange(len(placed)) if sample_ids is None else check_labels(sample_ids, len(placed), None, "ids")
        return self.certify(classifier, placed, ids.to(placed.device), seed, progress or Silent())


def refused(certifier: str, classifier: Classifier, why: str) -> InputError:
    """The error of a certificate asked for where it does not hold."""
    return InputError(f"{certifier!r} does not hold for {type(classifier).__name__}: {why}")
