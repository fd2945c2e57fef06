"""The web-scale nearest-neighbor defense: what the network said of an input's nearest images, averaged.

Dubey, van der Maaten, Yalniz, Li & Mahajan, "Defense Against Adversarial Images using Web-Scale Nearest-Neighbor
Search", CVPR 2019, arXiv 1903.01612.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from robustknn import registry
from robustknn.checks import check_choice, check_positive, check_positive_int
from robustknn.classifiers.one_layer import OneLayer
from robustknn.classifiers.rules import Rule, Votes
from robustknn.errors import InputError
from robustknn.features import FeatureExtractor
from robustknn.neighbors import NeighborIndex
from robustknn.payload import check_probabilities
from robustknn.reference import ReferenceSet

PUBLISHED = {"UW": "uniform", "CBW-E": "entropy", "CBW-D": "gap"}
"""The paper's names of the weightings."""
WEIGHTINGS = tuple(PUBLISHED.values())
_ROUNDING = 1e-12
"""A difference of entropies that rounding alone makes."""
_PREPARED: Any = WeakTensorKeyDictionary()


def confidence(probabilities: Tensor, weighting: str, top: int = 20, power: float = 3.0) -> Tensor:
    """How much each stored softmax vector s counts, (…, C) → (…) float64.

    * "uniform" (UW): 1.
    * "entropy" (CBW-E): |log C + Σ_c s_c log s_c|, with 0·log 0 = 0.
    * "gap" (CBW-D): Σ_{m=2}^{M+1} (ŝ_1 − ŝ_m)^P, ŝ in descending order; M is cut to C − 1.

    Args:
        top: M.
        power: P.
    """
    if weighting == "uniform":
        return torch.ones_like(probabilities[..., 0], dtype=torch.float64)
    s = probabilities.double()
    s = s / s.sum(-1, keepdim=True)
    if weighting == "entropy":
        weight = (np.log(s.shape[-1]) + torch.xlogy(s, s).sum(-1)).abs()
        return torch.where(weight > _ROUNDING, weight, torch.zeros_like(weight))
    largest = s.topk(min(top, s.shape[-1] - 1) + 1, dim=-1).values
    return (largest[..., :1] - largest[..., 1:]).pow(power).sum(-1)


@dataclass(frozen=True)
class PayloadMean(Rule):
    """The mean of the neighbors' stored softmax vectors, weighted by how sure each of them is.

    Σ_j w_j c_j s_j / Σ_j w_j c_j with w_j the vote and c_j the `confidence` of neighbor j, so that scores are class
    probabilities; the mean over voters where there are several. Where no neighbor is sure of anything (all c_j = 0)
    all count alike.

    Args:
        weighting: "uniform", "entropy" or "gap".
        top: M of the gap.
        power: P of the gap.
    """

    weighting: str = "gap"
    top: int = 20
    power: float = 3.0

    def __call__(self, votes: Sequence[Votes], n_classes: int) -> Tensor:
        return torch.stack([self._mean(v) for v in votes]).mean(0)

    def _mean(self, votes: Votes) -> Tensor:
        plain = votes.weights
        s, sureness = self._prepared(votes.payload)
        sure = plain.double() * sureness
        total = sure.sum(1, keepdim=True)
        shares = torch.where(total > 0, sure / _above_zero(total), plain / _above_zero(plain.sum(1, keepdim=True)))
        mean: Tensor = (shares.to(plain)[:, None] @ s.to(plain))[:, 0]
        return mean

    def _prepared(self, payload: Tensor | None) -> tuple[Tensor, Tensor]:
        """The softmax vectors (N, G, C) and their confidence (N, G), made once for the many steps of an attack."""
        if payload is None:
            check_probabilities(None)
        known = _PREPARED.get(payload)
        if known is None or known[0] != self:
            assert payload is not None
            # Half precision misses the sum of one by more than the scores of a tie may differ.
            kind = torch.promote_types(payload.dtype, torch.float32)
            s = nn.functional.normalize(payload.to(kind), p=1.0, dim=-1)
            known = self, s, confidence(payload, self.weighting, self.top, self.power)
            _PREPARED[payload] = known
        return known[1], known[2]


def _above_zero(total: Tensor) -> Tensor:
    """Divisors: ones in place of zeros, whose quotients are not used."""
    return torch.where(total > 0, total, torch.ones_like(total))


@registry.classifiers.register("retrieval")
class RetrievalClassifier(OneLayer):
    """The weighted mean of the softmax vectors that were stored with the k nearest references.

    The references' labels decide nothing; they may be those that the network gave (`ReferenceSet.build(…,
    labels="payload")`), so that any images can be a database.

    Args:
        references: references that carry the network's softmax vectors: `ReferenceSet.build(…, payload="softmax")`; or
            None, and `fit(X, y)` makes them.
        n_neighbors: k (the paper's K).
        weighting: how much a neighbor counts: "uniform" (UW), by "entropy" (CBW-E) or by "gap" (CBW-D); the paper's
            names are known too. See `confidence`.
        top: M of the gap, cut to C − 1 where there are fewer classes.
        power: P of the gap.
        metric: "l2", "cosine" or "ip".
        layer: which of the references' layers; may be left out when there is one.
        features: the extractor for `fit`, over a network that returns class scores in the order of the sorted labels;
            None compares raw inputs, and the stored vectors are then their labels, one-hot.
        index: the search engine, by name, or an index of one's own over the references.
        batch_size: samples a forward pass in `predict` and its kin.

    Raises:
        InputError: references without class probabilities, or of another number of classes than their labels; an
            unknown weighting; what `KNN` refuses.
    """

    registered = "retrieval"
    published_attack = MappingProxyType({"name": "fgsm-transfer"})
    needs_payload = "softmax"

    def __init__(
        self,
        references: ReferenceSet | None = None,
        n_neighbors: int = 50,
        *,
        weighting: str = "gap",
        top: int = 20,
        power: float = 3.0,
        metric: str = "l2",
        layer: str | None = None,
        features: FeatureExtractor | None = None,
        index: str | NeighborIndex = "exact",
        batch_size: int = 256,
    ) -> None:
        self.references = references
        self.n_neighbors = n_neighbors
        self.weighting = weighting
        self.top = top
        self.power = power
        self.metric = metric
        self.layer = layer
        self.features = features
        self.index = index
        self.batch_size = batch_size
        super().__init__()

    def check_parameters(self) -> None:
        super().check_parameters()
        check_choice(self.weighting, (*WEIGHTINGS, *PUBLISHED), "weighting")
        check_positive_int(self.top, "top")
        check_positive(self.power, "power")

    def check_references(self, references: ReferenceSet) -> None:
        width = check_probabilities(references.stored_payload)
        if width != references.n_classes:
            raise InputError(
                f"the stored softmax vectors have {width} classes, the references' labels {references.n_classes}; "
                "build the references with labels='payload' (--labels payload), or with a network of these classes."
            )

    def voting_references(self, references: ReferenceSet) -> ReferenceSet:
        # Attacks look for the nearest of every class: by what the references say, not by what they are called.
        return references.labelled_by_payload()

    def read_references(self, features: FeatureExtractor, X: Any, y: Any) -> ReferenceSet:
        if self.features is None:
            made = super().read_references(features, X, y)
            made.stored_payload = nn.functional.one_hot(made.labels, made.n_classes).float()
            return made
        return ReferenceSet.build(features, (X, y), payload=self.needs_payload, batch_size=self.batch_size)

    @property
    def rule(self) -> Rule:
        return PayloadMean(PUBLISHED.get(self.weighting, self.weighting), self.top, float(self.power))

    def settings(self) -> dict[str, Any]:
        said = super().settings()
        return {**said, "weighting": PUBLISHED.get(self.weighting, self.weighting), "power": float(self.power)}
