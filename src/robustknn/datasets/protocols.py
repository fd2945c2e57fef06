"""How an official training and test set become the four parts an evaluation needs.

"standard" never touches the test set: calibration and validation are taken out of the official training set.
"published" is what the papers on DkNN and its attacks did: all training samples are used for training, and the
calibration samples are the first of each class of the *test* set. The evaluation leaves those out of the score
by comparing `part` and `ids`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustknn import rng
from robustknn.checks import Bounds, check_labels
from robustknn.datasets.base import DataSource, Split
from robustknn.errors import InputError

PROTOCOLS = ("standard", "published")
CALIBRATION_PER_CLASS = 75
HELD_OUT = 10
"""One in so many training samples of a class goes to validation, and at most as many to calibration."""
SEED = 0


@dataclass(frozen=True)
class Official:
    """What a loader finds: the official training and test sets, not divided yet.

    Attributes:
        published_calibration: test samples a class that the published protocol calibrates on.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    bounds: Bounds | None = (0.0, 1.0)
    published_calibration: int = CALIBRATION_PER_CLASS


def divide(official: Official, protocol: str) -> DataSource:
    """Divide a data set by a protocol.

    standard: calibration (75 samples a class, at most 10 % of the class) and validation (10 %) are stratified
    random parts of the training set, drawn by a counted permutation, the same on every machine; test is the
    official test set.

    published: train and test are the official sets; calibration is the first `published_calibration` samples
    of each class of the test set, at most half of the class; validation is None.

    Raises:
        InputError: a class has no training sample, a label has no class name, the shapes of the two parts differ.
    """
    _check(official)
    train, test = official.train, official.test
    calibration: Split | None
    validation: Split | None
    if protocol == "published":
        first = [
            (test.labels == label).nonzero()[:, 0][: min(official.published_calibration, int(count) // 2)]
            for label, count in enumerate(torch.bincount(test.labels))
        ]
        calibration, validation = _taken(test, first), None
    else:
        kept, calibrating, validating = [], [], []
        for label in range(len(official.class_names)):
            order = shuffled_class(train.labels, label, "standard protocol")
            tenth = len(order) // HELD_OUT
            stop = min(CALIBRATION_PER_CLASS, tenth)
            calibrating.append(order[:stop])
            validating.append(order[stop : stop + tenth])
            kept.append(order[stop + tenth :])
        calibration, validation = _taken(train, calibrating), _taken(train, validating)
        train = train.subset(torch.cat(kept).sort().values)
    return DataSource(
        official.name, train, calibration, validation, test, official.class_names, official.bounds, protocol
    )


def shuffled_class(labels: Tensor, label: int, purpose: str) -> Tensor:
    """The positions of one class in a counted random order."""
    members = (labels == label).nonzero()[:, 0]
    return members[rng.permutation(len(members), SEED, purpose, label)]


def _taken(split: Split, positions: list[Tensor]) -> Split | None:
    """The samples at these positions in the split's own order; None when there is none."""
    chosen = torch.cat(positions).sort().values
    return split.subset(chosen) if len(chosen) else None


def _check(official: Official) -> None:
    train, test, n_classes = official.train, official.test, len(official.class_names)
    for split, what in ((train, "training"), (test, "test")):
        if not len(split):
            raise InputError(f"data set {official.name!r} has no {what} sample.")
        check_labels(split.labels, None, n_classes, f"the {what} set of {official.name!r}")
    if train.shape != test.shape:
        raise InputError(
            f"training samples of {official.name!r} have shape {train.shape}, test samples {test.shape}; "
            "make them the same."
        )
    empty = (torch.bincount(train.labels, minlength=n_classes) == 0).nonzero()[:, 0]
    if len(empty):
        raise InputError(
            f"class {official.class_names[int(empty[0])]!r} of {official.name!r} has no training sample; add some, "
            "or number the classes 0..C-1 without gaps."
        )
