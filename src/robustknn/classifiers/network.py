"""The network's own softmax head as a classifier: what nearest-neighbor classifiers are compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustknn import registry, store
from robustknn.checks import check_positive_int
from robustknn.classifiers.base import Classifier
from robustknn.errors import InputError
from robustknn.features import FeatureExtractor


@registry.classifiers.register("network")
class Network(Classifier):
    """Softmax of the network's output.

    Args:
        model: a module that returns class scores (N, C), or an extractor over one.
        n_classes: C.
    """

    attackable = "use pgd-transfer, apgd-margin, adaptive (the margin of its scores) or square"

    def __init__(self, model: nn.Module | FeatureExtractor, n_classes: int) -> None:
        self._extractor = model if isinstance(model, FeatureExtractor) else FeatureExtractor(model)
        self.n_classes = check_positive_int(n_classes, "n_classes")

    @property
    def extractor(self) -> FeatureExtractor:
        return self._extractor

    @torch.no_grad()
    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        logits = self._extractor.logits(self.place(x))
        if logits.shape[1] != self.n_classes:
            raise InputError(f"the network returns {logits.shape[1]} scores for {self.n_classes} classes; match them.")
        return logits.double().softmax(1)

    def fingerprint(self) -> str:
        return store.fingerprint_config({"network": self._extractor.fingerprint(), "n_classes": self.n_classes})

    def __repr__(self) -> str:
        return f"Network({type(self._extractor.model).__name__}, {self.n_classes} classes)"
