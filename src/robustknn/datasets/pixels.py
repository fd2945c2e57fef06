"""From an image file to pixels: 8 bits, gray or color, resized and cut where that is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np

from robustknn.errors import InputError, IntegrityError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_MODES = {1: "L", 3: "RGB"}


def mode_of(channels: int) -> str:
    """PIL's mode for so many channels; InputError for any but 1 and 3."""
    if channels not in _MODES:
        raise InputError(f"images are read as gray (channels=1) or color (channels=3), not channels={channels!r}.")
    return _MODES[channels]


def decoded(file: Path | IO[bytes], name: str, size: int | None = None, channels: int = 3) -> np.ndarray[Any, Any]:
    """(channels, H, W) uint8.

    Args:
        file: the image.
        name: what it is called in an error.
        size: the shorter side is resized to it (bilinear) and the middle is cut out; None leaves the image as it is.

    Raises:
        IntegrityError: it cannot be read as an image.
        InputError: its pixels have more than 8 bits.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            mode = image.mode
            pixels = image.convert(mode_of(channels))
    except InputError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise _unreadable(name, error) from error
    if mode.startswith(("I", "F")):
        raise InputError(f"{name!r} has pixels of more than 8 bits (mode {mode}); convert it to 8 bits first.")
    if size is not None:
        pixels = ImageOps.fit(pixels, (size, size), Image.Resampling.BILINEAR)
    array = np.array(pixels)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def header_shape(file: Path, channels: int = 3) -> tuple[int, int, int]:
    """(channels, H, W), from the header alone."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return channels, image.height, image.width
    except Exception as error:
        raise _unreadable(str(file), error) from error


def _unreadable(name: str, error: Exception) -> IntegrityError:
    return IntegrityError(f"image {name!r} cannot be read ({error}); restore or remove it.")
