"""DAEkNN by name: adversarial references by any attack, the classifier over them, and its leave-one-out variants.

Wang, Chen & Hero, "Deep Adversarially-Enhanced k-Nearest Neighbors", arXiv 2108.06797.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from robustknn.attacks.hardening import Hardening, adversarial_references, hardening_of
from robustknn.checks import check_choice, check_number
from robustknn.classifiers import WAD, WAT, DAEkNN
from robustknn.classifiers.daeknn import WAT_SHARE
from robustknn.errors import InputError
from robustknn.features import FeatureExtractor
from robustknn.progress import Progress
from robustknn.reference import ReferenceSet
from robustknn.threat import ThreatModel

VARIANTS = ("daeknn", "daeknn-wat", "daeknn-wad")


def daeknn(
    features: FeatureExtractor,
    data: Any,
    hardening: Hardening | ThreatModel | Sequence[Hardening | ThreatModel],
    *,
    variant: str = "daeknn",
    wat_share: float = WAT_SHARE,
    n_neighbors: int = 5,
    n_classes: int | None = None,
    keep_images: bool = False,
    seed: int = 0,
    batch_size: int = 128,
    progress: Progress | None = None,
    **options: Any,
) -> DAEkNN | WAD:
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
    if variant == "daeknn-wad" and (unknown := sorted(set(options) - set(inspect.signature(WAD).parameters))):
        raise InputError(f"daeknn-wad is a DkNN, which has no {' and no '.join(unknown)}; leave that out.")
    check_number(wat_share, "wat_share", "in (0, 1]", lambda v: 0 < v <= 1)
    given = hardening if isinstance(hardening, Sequence) else [hardening]
    if not given:
        raise InputError("hardening is empty; name at least one threat model, such as ThreatModel('linf', 8 / 255).")
    wanted = [hardening_of(each) for each in given]
    shared: dict[str, Any] = {
        "n_classes": n_classes,
        "keep_images": keep_images,
        "batch_size": batch_size,
        "progress": progress,
    }
    references = ReferenceSet.build(features, data, **shared)
    if variant == "daeknn-wad":
        return WAD(references, n_neighbors, **options)
    if variant == "daeknn-wat":
        wanted = [each.weakened(wat_share) for each in wanted]
    sets = [adversarial_references(features, data, each, seed=seed, **shared) for each in wanted]
    made = WAT if variant == "daeknn-wat" else DAEkNN
    return made(references, sets, n_neighbors, **options)
