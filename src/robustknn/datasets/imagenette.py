"""Imagenette (Howard, github.com/fastai/imagenette): ten easy classes of ImageNet, in folders of JPEG files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from robustknn.datasets.folder import image_folder
from robustknn.datasets.protocols import Official
from robustknn.errors import InputError
from robustknn.registry import datasets

CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
FOLDERS = ("imagenette2-160", "imagenette2-320", "imagenette2")
"""As the archives unpack, the smallest first; each holds train/ and val/, a folder a class."""


@datasets.register("imagenette")
def imagenette(root: Path | None = None, size: int = 128) -> Official:
    """Ten classes of ImageNet, 9,469 / 3,925 color photographs, cut to a square of `size` pixels.

    Args:
        root: the data root, which holds one of the archives unpacked (`imagenette2-160.tgz` and its like).
        size: side of the square; the ASK papers take 128.

    Raises:
        InputError: there is no such folder, or its classes are others.
    """
    if root is None:
        raise InputError(
            "data set 'imagenette' is read from files, and no folder is known; set it with ROBUSTKNN_DATA or "
            "--data-root."
        )
    found = next((root / name for name in FOLDERS if (root / name / "train").is_dir()), None)
    if found is None:
        raise InputError(
            f"data set 'imagenette' was not found: {str(root)!r} holds none of {', '.join(FOLDERS)}; unpack "
            "imagenette2-160.tgz (github.com/fastai/imagenette) there."
        )
    official = image_folder(found, size)
    if official.class_names != tuple(CLASSES):
        raise InputError(f"{str(found)!r} holds other classes than Imagenette's ten; unpack the archive again.")
    return replace(official, name="imagenette", class_names=tuple(CLASSES.values()))
