"""DAEkNN by name: adversarial references by any attack, the classifier over them, and its leave-one-out variants.

Wang, Chen & Hero, "Deep Adversarially-Enhanced k-Nearest Neighbors", arXiv 2108.06797.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from robustknn.attacks import Attack
from robustknn.checks import check_choice, check_number
from robustknn.classifiers import Classifier, DAEkNN, DkNN, Network, check_classifier
from robustknn.config import to_config
from robustknn.errors import InputError, brief
from robustknn.features import FeatureExtractor
from robustknn.progress import Progress
from robustknn.recipes.attacks import pgd_transfer
from robustknn.reference import ReferenceSet
from robustknn.registry import attacks
from robustknn.threat import ThreatModel, check_threat

VARIANTS = ("daeknn", "daeknn-wat", "daeknn-wad")


@dataclass(frozen=True)
class Hardening:
    """How one set of adversarial references is made.

    Args:
        threat: norm, hardening strength ε_h and bounds.
        attack: the attack; by default PGD on the network's cross-entropy, 10 constant steps of ε_h / 4 from a random
            start, the last iterate, as the paper's.
    """

    threat: ThreatModel
    attack: Attack = field(default_factory=lambda: pgd_transfer(steps=10))

    def __post_init__(self) -> None:
        check_threat(self.threat)
        if not isinstance(self.attack, Attack):
            raise InputError(f"attack must be an Attack such as PGD(), not {brief(self.attack)}.")

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
    made = _hardening(hardening)
    victim = None if classifier is None else check_classifier(classifier)

    def attacked(x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        nonlocal victim
        if victim is None:
            victim = Network(features, features.logits(features.place(x[:1])).shape[1])
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
            "attack": to_config(made.attack, attacks),
            "threat": made.threat.to_config(),
            "seed": seed,
            "model": features.fingerprint(),
            "classifier": None if victim is None else victim.fingerprint(),
        },
        batch_size=batch_size,
        progress=progress,
    )


def daeknn(
    features: FeatureExtractor,
    data: Any,
    hardening: Hardening | ThreatModel | Sequence[Hardening | ThreatModel],
    *,
    variant: str = "daeknn",
    wat_share: float = 0.25,
    n_neighbors: int = 5,
    n_classes: int | None = None,
    keep_images: bool = False,
    seed: int = 0,
    batch_size: int = 128,
    progress: Progress | None = None,
    **options: Any,
) -> DAEkNN | DkNN:
    """DAEkNN, or one of the variants that its authors leave a part out of, from a network and labelled data.

    Args:
        features: the extractor of the layers that vote. For "daeknn" and "daeknn-wad" its network should have been
            trained adversarially, for "daeknn-wat" not; nothing here can tell.
        data: the inputs and labels of the references, as for `ReferenceSet.build`; read once a set.
        hardening: how the adversarial references are made: a threat model (by the paper's attack), a `Hardening`, or
            several of these, each of which gives a set.
        variant: "daeknn"; "daeknn-wat", without adversarial training: the same over a standard network, every ε_h
            reduced to `wat_share` of itself; or "daeknn-wad", without adversarial references: the DkNN.
        wat_share: see above. The paper says that the value is small, not which.
        n_neighbors: k.
        n_classes: the number of classes; by default the largest label plus one.
        keep_images: keep the inputs of all references.
        seed: of the attacks' randomness.
        batch_size: samples a batch while references are made.
        progress: where to report.
        options: further ones of the classifier, such as `weighting`.

    Raises:
        InputError: see `adversarial_references` and the classifiers.
    """
    check_choice(variant, VARIANTS, "variant")
    check_number(wat_share, "wat_share", "in (0, 1]", lambda v: 0 < v <= 1)
    given = hardening if isinstance(hardening, Sequence) else [hardening]
    if not given:
        raise InputError("hardening is empty; name at least one threat model, such as ThreatModel('linf', 8 / 255).")
    wanted = [_hardening(each) for each in given]
    shared: dict[str, Any] = {
        "n_classes": n_classes,
        "keep_images": keep_images,
        "batch_size": batch_size,
        "progress": progress,
    }
    references = ReferenceSet.build(features, data, **shared)
    if variant == "daeknn-wad":
        return DkNN(references, n_neighbors, **options)
    if variant == "daeknn-wat":
        wanted = [each.weakened(wat_share) for each in wanted]
    sets = [adversarial_references(features, data, each, seed=seed, **shared) for each in wanted]
    return DAEkNN(references, sets, n_neighbors, **options)


def _hardening(value: Any) -> Hardening:
    return value if isinstance(value, Hardening) else Hardening(check_threat(value))
