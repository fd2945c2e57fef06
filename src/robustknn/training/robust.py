"""Validation under attack: the accuracy of the network itself, after an epoch, on some validation samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from robustknn.attacks import PGD
from robustknn.batching import Samples
from robustknn.checks import check_choice, check_positive, check_positive_int
from robustknn.classifiers import Network
from robustknn.features import FeatureExtractor
from robustknn.objectives import CrossEntropy
from robustknn.threat import NORMS, ThreatModel


@dataclass(frozen=True)
class RobustCheck:
    """PGD on the cross-entropy from a random start, best iterate kept.

    It tells whether training goes well. It says nothing about a nearest-neighbor classifier on the network's features:
    attack that itself.

    Attributes:
        norm, eps, bounds: the threat model.
        steps: gradient steps.
        samples: how many validation samples, the first ones.
    """

    norm: str = "linf"
    eps: float = 8 / 255
    steps: int = 10
    samples: int = 512
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_choice(self.norm, NORMS, "norm")
        check_positive(self.eps, "eps")
        for name in ("steps", "samples"):
            check_positive_int(getattr(self, name), name)
        _ = self.threat  # refuses bounds that are none

    @property
    def threat(self) -> ThreatModel:
        """The threat model."""
        return ThreatModel(self.norm, self.eps, self.bounds)

    def accuracy(self, model: nn.Module, split: Samples) -> float:
        """The share of samples that stay right, in [0, 1]."""
        extractor, places = FeatureExtractor(model), torch.arange(min(self.samples, len(split)))
        x = extractor.place(split.batch(places))
        with torch.no_grad():
            classifier = Network(extractor, extractor.logits(x[:1]).shape[1])
        attack = PGD(objective=CrossEntropy(), steps=self.steps, start="random")
        return float(attack(classifier, x, split.labels[places], self.threat, batch_size=256).robust.double().mean())
