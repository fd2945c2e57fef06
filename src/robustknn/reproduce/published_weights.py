"""Weights that others trained and published: where they lie, and whether they are those."""

from __future__ import annotations

from pathlib import Path

from robustknn import store
from robustknn.datasets.files import data_root
from robustknn.errors import InputError, IntegrityError

SOURCE = "github.com/akamaster/pytorch_resnet_cifar10"
WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th"}
"""Files of that repository (BSD); the last letters are those of their sha256."""


def weights_file(root: Path | str | None, model: str, otherwise: str = "") -> Path:
    """The published weights of a model, below the folder of the data sets or its `models`.

    Args:
        root: the folder of the data sets; None takes ROBUSTKNN_DATA.
        otherwise: what may be done without them, for the sentence where they are missing.

    Raises:
        InputError: they are not there.
        IntegrityError: the file is not the published one.
    """
    name, home = WEIGHTS[model], data_root(root)
    places = [] if home is None else [home / "models" / name, home / name]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise InputError(
            f"the published weights {name!r} are not in 'models' below the folder of the data; put them there (from "
            f"{SOURCE}){otherwise and f', or {otherwise}'}."
        )
    if not store.sha256_file(file).startswith(file.stem.rpartition("-")[2]):
        raise IntegrityError(f"{str(file)!r} is not the published file; get it again.")
    return file
