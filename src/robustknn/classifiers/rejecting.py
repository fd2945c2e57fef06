"""Rejecting what has too little support: a threshold on DkNN's credibility as a detector.

Papernot & McDaniel, arXiv 1803.04765, section V. An attack on it must fool the vote *and* be credible.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from robustknn import registry, store
from robustknn.checks import check_number
from robustknn.classifiers.base import Look, VoterClassifier
from robustknn.classifiers.dknn import DkNN
from robustknn.classifiers.rules import Rule
from robustknn.classifiers.saved import Saved
from robustknn.classifiers.voters import Voter
from robustknn.errors import InputError, brief
from robustknn.features import FeatureExtractor

REJECTED = -1
"""The decision on an input that is rejected; it is no class, so it is right for none."""


@registry.classifiers.register("rejecting")
class Rejecting(Saved, VoterClassifier):
    """A calibrated DkNN that rejects inputs whose credibility is below a threshold.

    A clean input that is rejected counts as an error, an attacked one as defended.

    Args:
        classifier: a calibrated DkNN.
        credibility: the least credibility that is accepted, in [0, 1].
        share: instead, the share of the calibration samples that may be rejected, in [0, 1).

    Raises:
        InputError: no calibrated DkNN, or not exactly one of `credibility` and `share`.
    """

    registered = "rejecting"

    def __init__(self, classifier: DkNN, credibility: float | None = None, *, share: float | None = None) -> None:
        if not isinstance(classifier, DkNN):
            raise InputError(f"Rejecting needs a calibrated DkNN, not {brief(classifier)}.")
        if (credibility is None) == (share is None):
            raise InputError("pass either credibility= or share=, one of the two.")
        self.classifier = classifier
        if share is not None:
            credibility = classifier.rejection_threshold(share)
        self.threshold = check_number(credibility, "credibility", "in [0, 1]", lambda v: 0 <= v <= 1)
        _ = classifier.calibration_  # says when there is none

    @property
    def published_attack(self) -> Mapping[str, Any]:  # type: ignore[override]
        return self.classifier.published_attack

    @property
    def n_classes(self) -> int:  # type: ignore[override]
        return self.classifier.n_classes

    @property
    def classes_(self) -> Any:
        """The labels of the DkNN, by class number."""
        return self.classifier.classes_

    @property
    def voters(self) -> tuple[Voter, ...]:
        return self.classifier.voters

    @property
    def rule(self) -> Rule:
        return self.classifier.rule

    @property
    def extractor(self) -> FeatureExtractor | None:
        return self.classifier.extractor

    def accepted(self, scores: Tensor) -> Tensor:
        """Whether decisions with these scores (N, C) are credible enough, (N,) bool."""
        return self.classifier.credibility_of(scores) >= self.threshold

    def decide(self, scores: Tensor) -> Tensor:
        decided = self.classifier.decide(scores)
        return torch.where(self.accepted(scores), decided, torch.full_like(decided, REJECTED))

    def lead(self, scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
        lead = self.classifier.lead(scores, y, target)
        missing = self.threshold - self.classifier.credibility_of(scores)
        return torch.where(missing > 0, torch.maximum(lead, missing), lead)

    def details(self, look: Look) -> dict[str, Tensor]:
        return self.classifier.details(look)

    def settings(self) -> dict[str, Any]:
        return {"credibility": self.threshold}

    def inner(self) -> Mapping[str, Saved]:
        return {"classifier": self.classifier}

    def to(self, device: torch.device | str) -> Self:
        """Move the DkNN to a device (in place); returns itself."""
        self.classifier.to(device)
        return self

    def fingerprint(self) -> str:
        return store.fingerprint_config({"rejects below": self.threshold, "classifier": self.classifier.fingerprint()})

    def __repr__(self) -> str:
        return f"Rejecting({self.classifier!r}, credibility={self.threshold:g})"
