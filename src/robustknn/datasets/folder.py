"""A folder of images, one folder a class, read as samples are needed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from robustknn.checks import check_positive_int
from robustknn.datasets.base import Split
from robustknn.datasets.pixels import ENDINGS, decoded, header_shape, mode_of
from robustknn.datasets.protocols import Official, shuffled_class
from robustknn.errors import InputError

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
    expected = None if size is not None else header_shape(train[0][0])

    def split(images: list[tuple[Path, int]], part: str) -> Split:
        items = ImageItems([file for file, _ in images], size, expected)
        return Split(items, [label for _, label in images], part)

    return Official(path.resolve().name, split(train, "train"), split(test, "test"), tuple(class_names))


class ImageItems:
    """Images on the disk, decoded when they are read: (B, channels, H, W) of 8 bits.

    Args:
        files: the images.
        size: resize and cut to a square of this side; None reads them as they are.
        expected: without `size`, the shape (channels, H, W) that every image must have; all headers are looked at now.
        channels: 3 for color, 1 for gray.
    """

    def __init__(
        self, files: list[Path], size: int | None, expected: tuple[int, ...] | None, channels: int = 3
    ) -> None:
        mode_of(channels)
        self._files, self._size, self._channels = files, size, channels
        self.shape = (channels, size, size) if size is not None else expected or ()
        if size is None:
            for file in files:
                shape = header_shape(file, channels)
                if shape != self.shape:
                    raise InputError(
                        f"{str(file)!r} has {shape[2]} × {shape[1]} pixels where the first image has {self.shape[2]} × "
                        f"{self.shape[1]}; pass size= to bring all to one shape."
                    )

    def __len__(self) -> int:
        return len(self._files)

    def read(self, places: Tensor) -> Tensor:
        files = [self._files[place] for place in places.tolist()]
        return torch.stack([torch.from_numpy(decoded(f, str(f), self._size, self._channels)) for f in files])


def images_of_folder(folder: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    """(file, label) of every image of a folder, by class, and the names of the classes; no class where it has none.

    Raises:
        InputError: no image, an empty class.
    """
    if (folder / "train").is_dir():
        raise InputError(f"{str(folder)!r} has parts; name one of them: {str(folder / 'train')!r}.")
    files = _files(folder)
    if files:
        return [(file, 0) for file in files], []
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise InputError(f"{str(folder)!r} holds no image ({', '.join(ENDINGS)}) and no class folder; name another.")
    class_names = _classes(folder)
    return _images(folder, class_names), class_names


def _files(folder: Path) -> list[Path]:
    """The images that lie in a folder itself, by name."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in ENDINGS and not file.name.startswith(".") and file.is_file()
    )


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
        files = _files(folder / name)
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
