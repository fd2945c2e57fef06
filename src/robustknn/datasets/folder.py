"""A folder of images, one folder a class, read as samples are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustknn.checks import check_positive_int
from robustknn.datasets.base import Split
from robustknn.datasets.protocols import Official, shuffled_class
from robustknn.errors import InputError, IntegrityError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
TEST_SHARE = 5
"""In a flat folder one in so many images of a class is for testing (at least one where there are two)."""


def image_folder(path: str | Path, size: int | None = None) -> Official:
    """Colour images from `path/train/<class>/*` and `path/test/<class>/*` (or `val`), or from `path/<class>/*`.

    A flat folder is divided by a counted permutation, stratified, 20 % for testing. Classes are numbered in the
    order of their names, images within a class in the order of theirs.

    Args:
        path: the folder.
        size: side of a square; every image's shorter side is resized to it (bilinear) and the middle is cut out.
            Without it all images must have one shape.

    Raises:
        InputError: no class, an empty class, a test class that training lacks, images of different shapes.
        IntegrityError: an image cannot be read.
    """
    path = Path(path)
    size = None if size is None else check_positive_int(size, "size")
    if (path / "train").is_dir():
        tested = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
        if tested is None:
            raise InputError(f"{str(path)!r} has a folder 'train' but neither 'test' nor 'val'; add one of them.")
        class_names = _classes(path / "train")
        unknown = sorted(set(_classes(tested)) - set(class_names))
        if unknown:
            raise InputError(
                f"class {unknown[0]!r} of {str(tested)!r} is not in {str(path / 'train')!r}; add it there."
            )
        train, test = _images(path / "train", class_names), _images(tested, class_names)
    else:
        class_names = _classes(path)
        train, test = _divided(_images(path, class_names))
    expected = None if size is not None else _header_shape(train[0][0])

    def split(images: list[tuple[Path, int]], part: str) -> Split:
        items = ImageItems([file for file, _ in images], size, expected)
        return Split(items, [label for _, label in images], part)

    return Official(path.resolve().name, split(train, "train"), split(test, "test"), tuple(class_names))


class ImageItems:
    """Images on the disk, decoded when they are read: (B, 3, H, W) 8-bit RGB.

    Args:
        files: the images.
        size: resize and cut to a square of this side; None reads them as they are.
        expected: without `size`, the shape (3, H, W) that every image must have; all headers are looked at now.
    """

    def __init__(self, files: list[Path], size: int | None, expected: tuple[int, ...] | None) -> None:
        self._files, self._size = files, size
        self.shape = (3, size, size) if size is not None else expected or ()
        if size is None:
            for file in files:
                shape = _header_shape(file)
                if shape != self.shape:
                    raise InputError(
                        f"{str(file)!r} has {shape[2]} × {shape[1]} pixels where the first image has {self.shape[2]} × "
                        f"{self.shape[1]}; pass size= to bring all to one shape."
                    )

    def __len__(self) -> int:
        return len(self._files)

    def read(self, places: Tensor) -> Tensor:
        return torch.stack([torch.from_numpy(_decoded(self._files[p], self._size)) for p in places.tolist()])


def _decoded(file: Path, size: int | None) -> np.ndarray[Any, Any]:
    """(3, H, W) uint8."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            mode = image.mode
            pixels = image.convert("RGB")
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise _unreadable(file, error) from error
    if mode.startswith(("I", "F")):
        raise InputError(f"{str(file)!r} has pixels of more than 8 bits (mode {mode}); convert it to 8 bits first.")
    if size is not None:
        pixels = ImageOps.fit(pixels, (size, size), Image.Resampling.BILINEAR)
    return np.array(pixels).transpose(2, 0, 1)


def _header_shape(file: Path) -> tuple[int, int, int]:
    """(3, H, W), from the header alone."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return 3, image.height, image.width
    except Exception as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> IntegrityError:
    return IntegrityError(f"image {str(file)!r} cannot be read ({error}); restore or remove it.")


def _classes(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{str(folder)!r} has no class folder; put the images of each class in a folder of its own.")
    return names


def _images(folder: Path, class_names: list[str]) -> list[tuple[Path, int]]:
    """(file, label) of every image, by class; a class may be absent, but not empty."""
    found = []
    for label, name in enumerate(class_names):
        if not (folder / name).is_dir():
            continue
        files = sorted(
            file
            for file in (folder / name).iterdir()
            if file.suffix.lower() in ENDINGS and not file.name.startswith(".") and file.is_file()
        )
        if not files:
            raise InputError(f"class folder {str(folder / name)!r} holds no image ({', '.join(ENDINGS)}); fill it.")
        found += [(file, label) for file in files]
    return found


def _divided(images: list[tuple[Path, int]]) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    labels = torch.tensor([label for _, label in images])
    testing = torch.zeros(len(images), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        order = shuffled_class(labels, label, "flat folder")
        testing[order[: max(len(order) // TEST_SHARE, int(len(order) > 1))]] = True
    chosen = testing.tolist()
    return (
        [image for image, is_test in zip(images, chosen, strict=True) if not is_test],
        [image for image, is_test in zip(images, chosen, strict=True) if is_test],
    )
