"""ASK-Def: adversarial training with the soft-kNN loss on deep features.

Wang, Chang, Li, Rajapakse & Hero, "ASK: Adversarial Soft k-Nearest Neighbor Attack and Defense",
arXiv 2106.14300, section IV.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from robustknn import registry
from robustknn.checks import (
    Weights,
    check_choice,
    check_layers,
    check_positive,
    check_positive_int,
    check_positives,
    one_each,
)
from robustknn.errors import InputError
from robustknn.features import FeatureExtractor, Tap
from robustknn.training.inner import PerturbedMethod
from robustknn.training.methods import Batch
from robustknn.training.robust import RobustCheck

KINDS = ("instance-wise", "class-wise")
_FLOOR = 1e-6
"""The published loss's least probability."""


@registry.methods.register("ask-def")
@dataclass(frozen=True)
class ASKDef(PerturbedMethod):
    """Cross-entropy on PGD examples + β · ASK on examples that make ASK large.

    References are random training samples of each class, drawn for every step, and their PGD copies, each with the
    label of its class. (The released code gives the copies the labels of other classes, so that 10 of 100 are right.)

    Args:
        norm, eps, bounds, steps, step, start, warmup: of the cross-entropy's examples, see `PerturbedMethod`.
        layers: whose features the loss compares, one or several.
        ask_eps: the radius of ASK's examples; None takes twice eps, as published.
        beta: β.
        kind: "instance-wise" −log Σ_{j: y_j = y} softmax_j(s_j/T), or "class-wise", the cross-entropy of the classes'
            mean similarities.
        metric: the similarity s: "cosine", or "l2", minus the distance.
        temperature: T, or one a layer.
        weight: κ, or one a layer: the loss is Σ_l κ_l L_l over the layers l.
        n_references: of each class, in every step.
        adversarial_references: whether their PGD copies are references.
        clean_references: whether they themselves are; False leaves the copies alone.
        include_self: instance-wise only: the clean features of the sample itself join its class, one more pass.
        max_classes: the classes that have references in a step: the batch's own first, others in turn; None for all.
            Bounds time and memory with many classes.
    """

    name: ClassVar[str] = "ask-def"

    eps: float = 4 / 255
    layers: tuple[str, ...] = ()
    ask_eps: float | None = None
    beta: float = 1.0
    kind: str = "instance-wise"
    metric: str = "cosine"
    temperature: Weights = 0.1
    weight: Weights = 1.0
    n_references: int = 5
    adversarial_references: bool = True
    clean_references: bool = True
    include_self: bool = False
    max_classes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise InputError("ask-def compares features; name their layers, e.g. layers=relu3.")
        layers = check_layers(self.layers) or ()
        object.__setattr__(self, "layers", tuple(str(Tap.parse(layer)) for layer in layers))
        check_choice(self.kind, KINDS, "kind")
        check_choice(self.metric, ("cosine", "l2"), "metric")
        check_positive(self.beta, "beta")
        for name in ("temperature", "weight"):
            object.__setattr__(self, name, check_positives(getattr(self, name), name))
            one_each(getattr(self, name), len(self.layers), name)
        if self.ask_eps is not None:
            check_positive(self.ask_eps, "ask_eps")
        elif self.norm == "linf" and self.bounds is not None:
            room = (self.bounds[1] - self.bounds[0]) * (1 + 1e-6)  # as forgiving as the check of the training
            if self.eps <= room < self._wide:  # beyond the room itself, the training says so
                raise InputError(
                    f"ASK's examples have twice eps, {self._wide:g}, beyond all that there is, {room:g}; set ask_eps."
                )
        check_positive_int(self.n_references, "n_references")
        for name in ("adversarial_references", "clean_references", "include_self"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, not {getattr(self, name)!r}.")
        if not (self.adversarial_references or self.clean_references):
            raise InputError("ask-def needs references: clean ones, their adversarial copies, or both.")
        if self.include_self and self.kind != "instance-wise":
            raise InputError("include_self belongs to kind='instance-wise'.")
        if self.max_classes is not None and check_positive_int(self.max_classes, "max_classes") < 2:
            raise InputError("max_classes must be at least 2: the loss compares classes.")

    @property
    def _wide(self) -> float:
        """The radius of ASK's examples."""
        return 2 * self.eps if self.ask_eps is None else self.ask_eps

    @property
    def check(self) -> RobustCheck | None:
        """At the larger of both radii, the one it is to withstand."""
        return RobustCheck(self.norm, max(self.eps, self._wide), bounds=self.bounds)

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        extractor = FeatureExtractor(model, self.layers)
        references, labels = self._references(model, batch)
        with torch.no_grad():
            held = extractor(references)
            itself = extractor(batch.x) if self.include_self else None

        def distant(x: Tensor) -> Tensor:
            return self.ask(extractor(x), held, batch.y, labels, itself).sum()

        far = self.perturb(model, distant, batch, eps=self._wide, tag="ask")
        moved = self.fooling(model, batch)
        n, alone = len(batch.x), [batch.x] if self.include_self else []
        features, scores = extractor.live(torch.cat([moved, far, *alone, references]))  # batch normalisation sees all
        sizes = [n, n, *map(len, alone), len(references)]

        def block(place: int) -> dict[str, Tensor]:
            return {layer: value.split(sizes)[place] for layer, value in features.items()}

        here, there, own = block(1), block(-1), block(2) if alone else None
        return {
            "adversarial": nn.functional.cross_entropy(scores[:n], batch.y),
            "ask": self.beta * self.ask(here, there, batch.y, labels, own).mean(),
        }

    def ask(
        self,
        z: Mapping[str, Tensor],
        references: Mapping[str, Tensor],
        y: Tensor,
        labels: Tensor,
        own: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The loss of each sample (B,): Σ_l κ_l L_l over the layers.

        Args:
            z: {layer: (B, D)} features.
            references: {layer: (R, D)}.
            y: (B,) classes.
            labels: (R,) those of the references.
            own: {layer: (B, D)} of each sample without its perturbation, one more of its class.
        """
        count = len(self.layers)
        temperatures, weights = one_each(self.temperature, count, "temperature"), one_each(self.weight, count, "weight")
        total: Tensor | float = 0.0
        for layer, temperature, weight in zip(self.layers, temperatures, weights, strict=True):
            near = similarity(z[layer], references[layer], self.metric) / temperature
            beside = None if own is None else pairwise(z[layer], own[layer], self.metric) / temperature
            total = total + weight * ask_loss(near, y, labels, self.kind, beside)
        return cast(Tensor, total)

    def _references(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The step's references (R, …) and their labels (R,)."""
        x, y, ids = batch.stream.draw(self.n_references, batch.step, self._classes(batch))
        if not self.adversarial_references:
            return x, y
        copies = self.fooling(model, batch, of=(x, y, ids), tag="references")
        return (torch.cat([x, copies]), torch.cat([y, y])) if self.clean_references else (copies, y)

    def _classes(self, batch: Batch) -> Tensor | None:
        count = batch.stream.n_classes
        if self.max_classes is None or self.max_classes >= count:
            return None
        own = batch.y.cpu().unique()
        turn = (torch.arange(count) + batch.step * self.max_classes) % count
        others = turn[~torch.isin(turn, own)][: max(self.max_classes - len(own), 1)]
        return torch.cat([own, others])


def similarity(z: Tensor, references: Tensor, metric: str) -> Tensor:
    """s of each sample with each reference, (B, R), larger for nearer ones."""
    # In half precision the product would lose what distances are made of, and autocast would take it there.
    with torch.autocast(z.device.type, enabled=False):
        wide = torch.promote_types(z.dtype, torch.float32)
        z, references = z.to(wide), references.to(wide)
        if metric == "cosine":
            return nn.functional.normalize(z, dim=1) @ nn.functional.normalize(references, dim=1).T
        # Relative to a center near all, whose squares are small; a floor keeps the root's gradient finite.
        center = references.detach().mean(0)
        z, references = z - center, references - center
        squares = (z * z).sum(1, keepdim=True) - 2 * z @ references.T + (references * references).sum(1)
        return -squares.clamp_min(1e-12).sqrt()


def pairwise(z: Tensor, other: Tensor, metric: str) -> Tensor:
    """s of each sample (B, D) with one vector of its own (B, D), (B,)."""
    with torch.autocast(z.device.type, enabled=False):
        wide = torch.promote_types(z.dtype, torch.float32)
        z, other = z.to(wide), other.to(wide)
        if metric == "cosine":
            return nn.functional.cosine_similarity(z, other, eps=1e-12)
        return -(z - other).square().sum(1).clamp_min(1e-12).sqrt()


def ask_loss(near: Tensor, y: Tensor, labels: Tensor, kind: str, own: Tensor | None = None) -> Tensor:
    """ASK of each sample (B,) from scaled similarities s/T (B, R) (the paper's eq. 4 and 5).

    Args:
        own: (B,) of each sample with one more reference of its class; instance-wise only.

    Raises:
        InputError: a sample of whose class there is no reference.
    """
    same = y[:, None] == labels
    if own is not None:
        near, same = torch.cat([near, own[:, None]], 1), nn.functional.pad(same, (0, 1), value=True)
    if not bool(same.any(1).all()):
        raise InputError("a batch has a class of which no reference was drawn; raise max_classes.")
    if kind == "instance-wise":
        share = (near.logsumexp(1) - near.masked_fill(~same, float("-inf")).logsumexp(1)).neg().exp()
        return -torch.log(share + _FLOOR)
    classes, place = labels.unique(return_inverse=True)
    sums = near.new_zeros(len(near), len(classes)).index_add(1, place, near)
    means = sums / torch.bincount(place)
    return nn.functional.cross_entropy(means, torch.searchsorted(classes, y), reduction="none")
