"""DkNNB: linear heads that stand in for the votes of nearest neighbors, trained on the references themselves.

Li et al., "AdvKNN: Adversarial Attacks on K-Nearest Neighbor Classifiers with Approximate Gradients",
arXiv 1911.06591: one fully connected layer from the features of a layer to the classes, the network frozen, trained
on what the neighbors of the training samples vote.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from robustknn import store
from robustknn.checks import check_choice, check_number, check_positive, check_positive_int, check_whole
from robustknn.classifiers.base import VoterClassifier
from robustknn.classifiers.voters import Voter
from robustknn.errors import InputError, IntegrityError
from robustknn.objectives.guides import prepared

KIND, SCHEMA = "heads", 1
FEATURES = ("voter", "raw")
_KEYS: WeakKeyDictionary[Voter, str] = WeakKeyDictionary()


@dataclass(frozen=True)
class HeadTraining:
    """How heads are trained. One loss, λ L_CLS + L_CL, on references whose neighbors are searched among the others.

    Args:
        consistency: learn the votes, L_CL = KL(p‖q); False learns the kNN label alone.
        weight: λ, of L_CLS = −log q_t. Without L_CL it does not matter.
        features: "voter" gives heads the features as the voter compares them (unit length for cosine), "raw" as the
            network makes them.
        penalty: of the squared length of the weights, for features of a mean squared length of 1.
        max_references: references to learn from, drawn at random; None takes all. The search for their neighbors
            is what takes the time.
        steps: at most so many of L-BFGS; those that serve the held-out tenth of the references best are kept.
        seed: of the draw.
    """

    consistency: bool = True
    weight: float = 0.3
    features: str = "voter"
    penalty: float = 1e-4
    max_references: int | None = 20_000
    steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.consistency, bool):
            raise InputError(f"consistency must be True or False, not {self.consistency!r}.")
        check_positive(self.weight, "weight")
        check_choice(self.features, FEATURES, "features")
        check_number(self.penalty, "penalty", "of at least 0 and finite", lambda v: 0 <= v < float("inf"))
        if self.max_references is not None:
            check_positive_int(self.max_references, "max_references")
        check_positive_int(self.steps, "steps")
        check_whole(self.seed, "seed")

    @property
    def weights(self) -> tuple[float, float]:
        """Those of L_CLS and of L_CL."""
        return (self.weight, 1.0) if self.consistency else (1.0, 0.0)


@dataclass(frozen=True, eq=False)
class Head:
    """Class logits W (z − c) + b of features z, of unit length where the head wants them so.

    Attributes:
        weight: (C, D) W, float32.
        bias: (C,) b.
        center: (D,) c, kept apart so that a common offset of all features costs no digits.
        unit: features are scaled to unit length.
        spread: the root mean square of the logits about each reference's mean logit.
        votes: what was learned from, as a sha256: references, layer, metric and k.
    """

    weight: Tensor
    bias: Tensor
    center: Tensor
    unit: bool
    spread: float
    votes: str

    def __call__(self, z: Tensor) -> Tensor:
        """(N, D) → (N, C), differentiable."""
        z = prepared(z, "cosine" if self.unit else "l2") - self.center.to(z)
        return nn.functional.linear(z, self.weight.to(z), self.bias.to(z))


@dataclass(frozen=True, eq=False)
class DkNNB:
    """One head for every attacked layer.

    Attributes:
        heads: by layer.
        training: how they were trained.
    """

    heads: dict[str, Head]
    training: HeadTraining

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the heads as an artifact directory."""
        held = list(self.heads.items())
        meta = {
            "layers": [layer for layer, _ in held],
            "votes": [head.votes for _, head in held],
            "unit": [head.unit for _, head in held],
            "spread": [head.spread for _, head in held],
            "training": asdict(self.training),
        }
        tensors: dict[str, Tensor] = {}
        for place, (_, head) in enumerate(held):
            tensors |= {f"{place}.{name}": getattr(head, name) for name in ("weight", "bias", "center")}
        with store.artifact(Path(path), KIND, SCHEMA, meta, overwrite) as folder:
            store.save_tensors(folder / "heads.safetensors", tensors)

    @classmethod
    def load(cls, path: str | Path, classifier: VoterClassifier) -> Self:
        """Read what `save` wrote.

        Raises:
            IntegrityError: it is not whole, or was trained on votes that are not this classifier's.
        """
        manifest = store.read_manifest(Path(path), KIND, SCHEMA)
        tensors = store.load_tensors(manifest.file("heads.safetensors"))
        heads: dict[str, Head] = {}
        try:
            meta = manifest.meta
            training = HeadTraining(**meta["training"])
            said = zip(meta["layers"], meta["votes"], meta["unit"], meta["spread"], strict=True)
            for place, (layer, votes, unit, spread) in enumerate(said):
                parts = {name: tensors[f"{place}.{name}"] for name in ("weight", "bias", "center")}
                heads[layer] = Head(**parts, unit=bool(unit), spread=float(spread), votes=str(votes))
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{str(path)!r} holds no heads that can be read; train them again.") from error
        held = classifier.voters[0].references.layers
        for layer, head in heads.items():
            if layer not in held or head.votes not in {votes_of(v) for v in head_voters(classifier, (layer,))}:
                raise IntegrityError(
                    f"the heads in {str(path)!r} were trained for another classifier (layer {layer!r}: other "
                    "references, metric or k); train some for this one with train_heads(classifier)."
                )
        return cls(heads, training)


def head_voters(classifier: VoterClassifier, layers: tuple[str, ...] | None = None) -> tuple[Voter, ...]:
    """The voters whose votes heads learn: those that vote at these layers, else new ones like the first.

    Raises:
        InputError: a layer that the references do not hold; close matches are named.
    """
    own = classifier.voters
    if layers is None:
        return own
    voters: list[Voter] = []
    for name in layers:
        layer = own[0].references.layer(name)
        there = [v for v in own if v.layer == layer]
        first = own[0]
        voters += there or [classifier.other_voter(first.references, layer, first.n_neighbors, first.metric)]
    return tuple(voters)


def votes_of(voter: Voter) -> str:
    """A sha256 of all that the votes of references depend on."""
    if voter not in _KEYS:
        said: dict[str, Any] = {
            "references": voter.references.fingerprint(),
            "layer": voter.layer,
            "metric": voter.metric,
            "k": voter.n_neighbors,
        }
        if not voter.index.exact:  # what it finds is not determined by these
            some = voter.references.rows(voter.layer, torch.arange(min(64, len(voter.references))))
            found = voter.index.search(some, voter.n_neighbors).ids
            said["answers"] = store.fingerprint_tensors({"ids": found})
        _KEYS[voter] = store.fingerprint_config(said)
    return _KEYS[voter]


def head_loss(logits: Tensor, p: Tensor, t: Tensor, weights: tuple[float, float]) -> Tensor:
    """λ L_CLS + μ L_CL of each sample, (N,): −log q_t and KL(p‖q) with q the softmax of the logits.

    Args:
        logits: (N, C).
        p: (N, C) vote fractions.
        t: (N,) the label they elect.
        weights: λ and μ.
    """
    log_q = nn.functional.log_softmax(logits, 1)
    loss = weights[0] * -log_q.gather(1, t[:, None])[:, 0]
    if not weights[1]:
        return loss
    p = p.to(log_q)
    return loss + weights[1] * (torch.xlogy(p, p) - p * log_q).sum(1)
