"""Adversarial references: attacked inputs with their true labels, for classifiers that vote over them.

Wang, Chen & Hero, "Deep Adversarially-Enhanced k-Nearest Neighbors", arXiv 2108.06797, equations 8 and 9.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from robustknn import registry
from robustknn.attacks.base import Attack, check_attack
from robustknn.classifiers import Classifier, Network, check_classifier
from robustknn.config import to_config
from robustknn.errors import InputError
from robustknn.features import FeatureExtractor
from robustknn.progress import Progress
from robustknn.reference import ReferenceSet
from robustknn.threat import ThreatModel, check_reach, check_threat


@dataclass(frozen=True)
class Hardening:
    """How one set of adversarial references is made.

    Args:
        threat: norm, hardening strength ε_h and bounds.
        attack: the attack; by default PGD on the network's cross-entropy, 10 constant steps of ε_h / 4 from a random
            start, the last iterate, as the paper's.
    """

    threat: ThreatModel
    attack: Attack = field(default_factory=lambda: registry.attacks.create("pgd-transfer", steps=10))

    def __post_init__(self) -> None:
        check_threat(self.threat)
        check_attack(self.attack)

    def weakened(self, share: float) -> Hardening:
        """The same with a share of the strength."""
        return Hardening(self.threat.with_eps(self.threat.eps * share), self.attack)


def adversarial_references(
    features: FeatureExtractor,
    data: Any,
    hardening: Hardening | ThreatModel,
    *,
    classifier: Classifier | None = None,
    n_classes: int | None = None,
    keep_images: bool = False,
    seed: int = 0,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> ReferenceSet:
    """D_adv = {(attack(x_i, ε_h), y_i)}: attacked inputs with their true labels (eqs. 8 and 9).

    What it was made by is kept with the set, as `made_by`: the attack, the threat model, the seed, and the
    fingerprints of network and classifier.

    Args:
        features: the extractor of the clean references.
        data: the clean inputs and their labels, as for `ReferenceSet.build`.
        hardening: attack and threat model; a threat model alone takes the paper's attack.
        classifier: what is attacked; by default the network's own softmax head. An input that is a reference of a
            nearest-neighbor classifier is its own nearest neighbor there.
        n_classes: the number of classes; by default the largest label plus one.
        keep_images: keep the adversarial inputs too.
        seed: of the attack's randomness, which counts from it and each input's place in the data.
        batch_size: samples attacked at once.
        progress: where to report.

    Raises:
        InputError: bad data, an attack that cannot work on the classifier, or a network without class scores.
    """
    made = hardening_of(hardening)
    victim = None if classifier is None else check_classifier(classifier)

    def attacked(x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        nonlocal victim
        if victim is None:
            victim = Network(features, features.logits(features.place(x[:1])).shape[1])
        check_reach(made.threat, x)
        _check_radii(made.threat.eps, places)
        threat = made.threat.select(places)
        found = made.attack(victim, x, y, threat, sample_ids=places, seed=seed, batch_size=len(x))
        return found.x_adv.to(x.device)

    return ReferenceSet.build(
        features,
        data,
        n_classes=n_classes,
        keep_images=keep_images,
        alter=attacked,
        made_by={
            "attack": to_config(made.attack, registry.attacks),
            "threat": made.threat.to_config(),
            "seed": seed,
            "model": features.fingerprint(),
            "classifier": None if victim is None else victim.fingerprint(),
        },
        batch_size=batch_size,
        progress=progress,
    )


def _check_radii(eps: float | Tensor, places: Tensor) -> None:
    if isinstance(eps, Tensor) and eps.ndim and int(places.max()) >= len(eps):
        raise InputError(f"eps has {len(eps)} radii, fewer than there are inputs; pass one radius, or one an input.")


def hardening_of(value: Hardening | ThreatModel) -> Hardening:
    """The hardening itself, or that of a threat model by the paper's attack."""
    return value if isinstance(value, Hardening) else Hardening(check_threat(value))
