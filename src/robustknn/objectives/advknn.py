"""AdvKNN: climb linear heads that learned what the neighbors vote.

Li et al., "AdvKNN: Adversarial Attacks on K-Nearest Neighbor Classifiers with Approximate Gradients",
arXiv 1911.06591.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from robustknn import registry
from robustknn.checks import check_choice, check_layers, check_number, check_positive
from robustknn.classifiers.base import Classifier, Look, Request, VoterClassifier
from robustknn.classifiers.rules import count_votes, decide
from robustknn.classifiers.voters import Voter
from robustknn.errors import InputError, brief
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective
from robustknn.objectives.dknnb import DkNNB, Head, HeadTraining, head_loss, head_voters
from robustknn.objectives.head_training import trained_head
from robustknn.objectives.neighbors import NeighborBound, voter_classifier
from robustknn.progress import Console


@registry.objectives.register("advknn")
@dataclass(frozen=True)
class AdvKNN(Objective):
    """The loss of linear heads (DkNNB) that learned the vote fractions of the references, one a layer.

    With f_l the logits of layer l's head, q_l their softmax, p_l the clean input's vote fractions and t_l the label
    they elect:

    * "published": Σ_l λ (−log q_l,t) + KL(p_l‖q_l); without consistency learning Σ_l −log q_l,t. For a target, p is
      all the target's and the loss is descended;
    * "margin", the default: T log Σ_{c≠y} (v_c + v₀) exp(f̄_c / T) − f̄_y with f̄ the mean over layers of f_l divided by
      its spread over the references, and v the votes at the last look. It does not saturate, classes compete over the
      sum of layers as they do in the vote, and a class that holds votes already is preferred.

    Heads are trained when a classifier is met first, and kept for as long as the process lives; `train_heads` and
    `DkNNB.save` keep them longer.

    Args:
        loss: "margin" or "published".
        consistency: heads learn the vote fractions and the published loss has its KL; False: the kNN label alone.
        weight: λ.
        loss_weights: (λ, weight of L_CL) of the published loss while it is climbed, where they are not those by which
            heads learn: the released code attacks one layer by (20, 1) under BIM and (1, 0) under FGSM.
        temperature: T, in spreads.
        floor: v₀, what a class without votes counts.
        features: "voter" gives heads features as the voters compare them, "raw" as the network makes them.
        penalty, max_references, seed: of the heads, see `HeadTraining`.
        layers: the layers attacked; None takes those that vote.
        heads: a folder with heads that `DkNNB.save` wrote, trained with these settings, instead of training them.
    """

    loss: str = "margin"
    consistency: bool = True
    weight: float = 0.3
    loss_weights: tuple[float, float] | None = None
    temperature: float = 0.5
    floor: float = 0.01
    features: str = "voter"
    penalty: float = 1e-4
    max_references: int | None = 20_000
    seed: int = 0
    layers: tuple[str, ...] | None = None
    heads: str | None = None

    def __post_init__(self) -> None:
        check_choice(self.loss, ("margin", "published"), "loss")
        check_positive(self.temperature, "temperature")
        check_positive(self.floor, "floor")
        object.__setattr__(self, "layers", check_layers(self.layers))
        if self.loss_weights is not None:
            self._check_loss_weights()
        if self.heads is not None and not isinstance(self.heads, str):
            raise InputError(f"heads must be the path of saved heads, as text, or None, not {self.heads!r}.")
        _ = self.training  # what cannot work says so now

    @classmethod
    def published(cls, **changes: Any) -> Self:
        """The paper's setting: λ L_CLS + L_CL on raw features, heads trained on all references."""
        return cls(**{"loss": "published", "features": "raw", "max_references": None, **changes})

    def _check_loss_weights(self) -> None:
        given = self.loss_weights
        if not isinstance(given, (list, tuple)) or len(given) != 2:
            raise InputError(f"loss_weights must be two numbers, of L_CLS and of L_CL, or None, not {brief(given)}.")
        for each in given:
            check_number(each, "each of loss_weights", "of at least 0 and finite", lambda v: 0 <= v < math.inf)
        if not any(given) or self.loss != "published":
            raise InputError("loss_weights are of loss='published', and one of them must be above 0.")
        object.__setattr__(self, "loss_weights", tuple(given))

    @property
    def weights(self) -> tuple[float, float]:
        """Those of L_CLS and of L_CL in the published loss."""
        return self.training.weights if self.loss_weights is None else self.loss_weights

    @property
    def training(self) -> HeadTraining:
        """How its heads are trained."""
        shared = {f.name for f in fields(HeadTraining)} & {f.name for f in fields(self)}
        return HeadTraining(**{name: getattr(self, name) for name in shared})

    def bind(self, classifier: Classifier) -> BoundObjective:
        known = voter_classifier(classifier, "AdvKNN")
        voters = head_voters(known, self.layers)
        if self.heads is None:
            with Console() as progress:
                heads = [trained_head(v, known.n_classes, self.training, progress) for v in voters]
        else:
            heads = self._loaded(known, voters)
        return _Bound(self, known, voters, heads)

    def _loaded(self, classifier: VoterClassifier, voters: Sequence[Voter]) -> list[Head]:
        saved = DkNNB.load(cast(str, self.heads), classifier)
        for field in fields(HeadTraining):
            here, there = getattr(self.training, field.name), getattr(saved.training, field.name)
            if here != there:
                raise InputError(
                    f"the heads in {self.heads!r} were trained with {field.name}={there!r}, not {here!r}; pass that, "
                    "or train others."
                )
        missing = [v.layer for v in voters if v.layer not in saved.heads]
        if missing:
            raise InputError(
                f"the heads in {self.heads!r} are of layers {', '.join(saved.heads)}, and {missing[0]!r} is attacked "
                "too; train them for all, or name fewer in layers=."
            )
        return [saved.heads[v.layer] for v in voters]


class _Bound(NeighborBound):
    def __init__(
        self, config: AdvKNN, classifier: VoterClassifier, voters: Sequence[Voter], heads: Sequence[Head]
    ) -> None:
        super().__init__(classifier, voters, [Request(v, nearest=v.n_neighbors) for v in voters])
        self.config, self.heads, self.training = config, heads, config.training

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return _Batch(self, y, target, cast(Look, look))

    def logits(self, x: Tensor) -> list[Tensor]:
        """Of every voter's head, (N, C)."""
        features = self.classifier.read(x, self.layers)
        return [head(features[v.layer]) for v, head in zip(self.voters, self.heads, strict=True)]

    def votes(self, look: Look) -> list[Tensor]:
        """Every voter's vote fractions, (N, C)."""
        found = []
        for voter in self.voters:
            counts = count_votes(voter.votes(look.nearest[voter]), self.classifier.n_classes)
            found.append(counts / counts.sum(1, keepdim=True).clamp_min(1))
        return found


class _Batch(BatchObjective):
    def __init__(self, bound: _Bound, y: Tensor, target: Tensor | None, look: Look) -> None:
        self._bound, self._sign = bound, 1.0 if target is None else -1.0
        self._labels = y if target is None else target
        votes = bound.votes(look)
        self._now = torch.stack(votes).mean(0)
        if target is not None:
            wanted = nn.functional.one_hot(target, bound.classifier.n_classes).to(votes[0])
            votes = [wanted] * len(votes)
        self._clean = votes

    def update(self, kept: Tensor | None, look: Look | None) -> None:
        if kept is not None:
            self._labels, self._now = self._labels[kept], self._now[kept]
            self._clean = [p[kept] for p in self._clean]
        if look is not None:
            self._now = torch.stack(self._bound.votes(look)).mean(0)

    def loss(self, x: Tensor) -> Tensor:
        bound, config = self._bound, self._bound.config
        logits = bound.logits(x)
        if config.loss == "published":
            parts = [head_loss(f, p, decide(p), config.weights) for f, p in zip(logits, self._clean, strict=True)]
            return self._sign * torch.stack(parts).sum(0)
        scaled = torch.stack([f / max(h.spread, 1e-30) for f, h in zip(logits, bound.heads, strict=True)]).mean(0)
        own = scaled.gather(1, self._labels[:, None])[:, 0]
        weights = (self._now + config.floor).log().to(scaled)
        others = (scaled / config.temperature + weights).scatter(1, self._labels[:, None], float("-inf"))
        return self._sign * (config.temperature * torch.logsumexp(others, 1) - own)
