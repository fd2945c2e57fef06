"""DAEkNN: deep k-nearest neighbors over clean and adversarial references, weighted by how near they are.

Wang, Chen & Hero, "Deep Adversarially-Enhanced k-Nearest Neighbors", arXiv 2108.06797. How adversarial references are
made is in `robustknn.recipes.daeknn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from robustknn import registry
from robustknn.classifiers.base import Look
from robustknn.classifiers.dknn import DkNN, chosen_layers
from robustknn.classifiers.estimator import NeighborEstimator
from robustknn.classifiers.set_weights import SetWeighted
from robustknn.errors import InputError, brief
from robustknn.features import FeatureExtractor
from robustknn.reference import ReferenceSet

WAT_SHARE = 0.25
"""Of ε_h, what DAEkNN without adversarial training is hardened with; the paper says that it is small, not which."""


@registry.classifiers.register("daeknn")
class DAEkNN(NeighborEstimator):
    """Votes of the k nearest clean and the k nearest adversarial references at every layer, the nearer set first.

    argmax_c Σ_l Σ_s w_s^l p_c^l(s), with p_c^l(s) the share of class c among the k nearest references of set s at
    layer l and w_s^l = softmax_s(−d_s^l / scale) of their mean distances d (arXiv 2108.06797, eqs. 6, 7, 11); see
    `SetWeighted`. The defaults are the published ones.

    Args:
        references: the clean references.
        adversarial: adversarial examples of labelled inputs under the same network, with their true labels: one set, or
            several (of several strengths and attacks; future work of the paper). `recipes.adversarial_references`
            makes one.
        n_neighbors: k, in every set and at every layer.
        metric: "l2", "cosine" or "ip".
        layers: which of the references' layers vote; None takes all.
        weighting: how sets are weighted: "paper"; "released", the opposite sign, as in the released code; "uniform",
            "clean" or "adversarial"; or one number a set, the clean one first.
        scale: what distances are divided by before the softmax: a number (1 as published), or "mean".
        features: the extractor for `fit`, which makes the clean references; None compares raw inputs.
        index: the search engine, by name.
        batch_size: samples a forward pass in `predict` and its kin.

    Raises:
        InputError: no adversarial set; one of another network, other layers, other feature lengths or other classes
            than the references; k above the size of a set; a weighting or scale that cannot work.
    """

    registered = "daeknn"
    hardening_share = 1.0
    """Of the strength that a configuration names: what its adversarial references are made with."""
    published_attack = MappingProxyType({"name": "pgd-transfer", "steps": 10})

    def __init__(
        self,
        references: ReferenceSet | None = None,
        adversarial: ReferenceSet | Sequence[ReferenceSet] | None = None,
        n_neighbors: int = 5,
        *,
        metric: str = "l2",
        layers: Sequence[str] | None = None,
        weighting: str | Sequence[float] = "paper",
        scale: float | str = 1.0,
        features: FeatureExtractor | None = None,
        index: str = "exact",
        batch_size: int = 256,
    ) -> None:
        self.references = references
        self.adversarial = adversarial
        self.n_neighbors = n_neighbors
        self.metric = metric
        self.layers = layers
        self.weighting = weighting
        self.scale = scale
        self.features = features
        self.index = index
        self.batch_size = batch_size
        super().__init__()

    def voter_layers(self, references: ReferenceSet) -> list[str]:
        return chosen_layers(self.layers, references)

    def further_sets(self) -> dict[str, list[ReferenceSet]]:
        return {"adversarial": self._adversarial()}

    def _adversarial(self) -> list[ReferenceSet]:
        given = self.adversarial
        sets = [given] if isinstance(given, ReferenceSet) else given
        if sets is None or (isinstance(sets, (list, tuple)) and not sets):
            raise InputError(
                "DAEkNN needs adversarial references; name a hardening strength (--hardening 8/255), pass "
                "adversarial= what robustknn.recipes.adversarial_references makes, or use DkNN, which votes without."
            )
        if not isinstance(sets, (list, tuple)) or not all(isinstance(held, ReferenceSet) for held in sets):
            raise InputError(f"adversarial must be a ReferenceSet or a list of several, not {brief(given)}.")
        return list(sets)

    @property
    def rule(self) -> SetWeighted:
        given: Any = self.weighting
        weighting = tuple(given) if isinstance(given, (list, tuple)) else given
        return SetWeighted(1 + len(self._adversarial()), weighting, self.scale)

    def check_parameters(self) -> None:
        super().check_parameters()
        if not isinstance(self.index, str):
            raise InputError("DAEkNN searches several reference sets; name an engine in index=, such as 'exact'.")
        _ = self.rule
        if not self.__sklearn_is_fitted__():
            return  # the references are yet to be made
        clean, adversarial = self.references_, self._adversarial()
        for place, held in enumerate(adversarial, 1):
            what = "the adversarial set" if len(adversarial) == 1 else f"adversarial set {place}"
            _check_alike(clean, held, self.voter_layers(clean), what)
            if self.n_neighbors > len(held):
                raise InputError(
                    f"n_neighbors = {self.n_neighbors} exceeds the {len(held)} references of {what}; lower it or make "
                    "more."
                )

    def set_weights(self, X: Any) -> Any:
        """How much each reference set counts at each layer, (N, L, S); the clean references come first."""
        x, plain = self._input(X)
        weights = torch.cat(list(self._in_batches(x, lambda part: self._set_weights(self.look(part)))))
        return weights.cpu().numpy() if plain else weights

    def _set_weights(self, look: Look) -> Tensor:
        return self.rule.set_weights([voter.votes(look.nearest[voter]) for voter in self.voters])

    def details(self, look: Look) -> dict[str, Tensor]:
        return {"adversarial_weight": self._set_weights(look)[:, :, 1:].sum(2).mean(1)}


def _check_alike(clean: ReferenceSet, held: ReferenceSet, layers: list[str], what: str) -> None:
    """Refuse an adversarial set whose features cannot be compared with those of the references."""
    made = held.model_fingerprint, clean.model_fingerprint
    if None not in made and made[0] != made[1]:
        raise InputError(
            f"{what} was made with another network than the references (its weights or structure differ); make it anew "
            "with this one."
        )
    if held.n_classes != clean.n_classes:
        raise InputError(
            f"{what} has {held.n_classes} classes, the references {clean.n_classes}; make it from data of the same "
            "classes."
        )
    missing = [layer for layer in layers if layer not in held.layers]
    if missing:
        raise InputError(
            f"{what} holds the layers {', '.join(held.layers)}, not {', '.join(missing)}; make it with these too."
        )
    for layer in layers:
        if held.dim(layer) != clean.dim(layer):
            raise InputError(
                f"{what} has features of length {held.dim(layer)} at layer {layer!r}, the references "
                f"{clean.dim(layer)}; make it from inputs of the same size, pooled alike."
            )
        if _preprocessing(held, layer) != _preprocessing(clean, layer) and None not in made:
            raise InputError(
                f"{what} was made with another pooling, normalising, centering or transform of layer {layer!r} than "
                "the references; make it with their extractor."
            )
    if held.device != clean.device:
        raise InputError(f"{what} is on {held.device}, the references on {clean.device}; move one with to(device).")


def _preprocessing(held: ReferenceSet, layer: str) -> tuple[Any, ...] | None:
    """How the features of a layer were made, as far as it is known."""
    made = held.preprocessing
    if made is None:
        return None
    by_layer = (made.get(part, {}).get(layer) for part in ("pool", "center", "transform"))
    return (made["normalize"], *by_layer)


@registry.classifiers.register("daeknn-wat")
class WAT(DAEkNN):
    """DAEkNN without adversarial training: over a network of standard training, its references hardened less.

    That the network is one of standard training is up to who chooses it. A configuration's hardening counts
    `WAT_SHARE` of itself.
    """

    registered = "daeknn-wat"
    hardening_share = WAT_SHARE


@registry.classifiers.register("daeknn-wad")
class WAD(DkNN):
    """DAEkNN without adversarial references: the DkNN on the same network, under the protocol of DAEkNN's paper."""

    registered = "daeknn-wad"
    hardening_share = 0.0
    published_attack = DAEkNN.published_attack

    def __init__(
        self,
        references: ReferenceSet | None = None,
        n_neighbors: int = 5,
        *,
        metric: str = "l2",
        layers: Sequence[str] | None = None,
        comparison: str = ">=",
        correction: str = "paper",
        features: FeatureExtractor | None = None,
        index: str = "exact",
        batch_size: int = 256,
    ) -> None:
        super().__init__(
            references,
            n_neighbors,
            metric=metric,
            layers=layers,
            comparison=comparison,
            correction=correction,
            features=features,
            index=index,
            batch_size=batch_size,
        )
