"""Inputs as small pictures inside the page: images as PNG data URIs, vectors and series as line or bar plots."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

LARGE, SMALL = 112, 56
"""The longest side, in pixels, of a sample and of a reference in the page; larger images are reduced to it."""

_PLOT_WIDTH, _PLOT_HEIGHT = 112, 64
_MOST_BARS, _MOST_POINTS, _MOST_SERIES = 32, 224, 4
_IMAGE_SIDE, _IMAGE_RATIO = 8, 4
_LOSSLESS, _QUALITY = 600, 85  # bytes of a picture that is never lossy, and how good a lossy one is


@dataclass(frozen=True)
class Picture:
    """An image (`uri`) or a plot (`path`, SVG path data in a box of width × height).

    Attributes:
        pixelated: shown with hard pixel edges (False for an image that was reduced).
        bars: the plot is made of filled bars, else of lines.
    """

    width: int
    height: int
    uri: str = ""
    path: str = ""
    bars: bool = False
    pixelated: bool = True

    @property
    def size(self) -> int:
        """Bytes it takes in the page."""
        return len(self.uri) + len(self.path)


def kind_of(shape: tuple[int, ...]) -> str:
    """What inputs of this shape are: "image", "series", "vector", or "other" (not drawn).

    (C, H, W) and (H, W, 3) are images; two dimensions are one when they are about square, else channels of a series.
    """
    sides = tuple(s for s in shape if s != 1)
    if len(shape) == 3 and len(sides) == 3:
        return "image"
    if len(sides) == 2:
        square = min(sides) >= _IMAGE_SIDE and max(sides) <= _IMAGE_RATIO * min(sides)
        return "image" if square or (len(shape) == 3 and shape[0] == 1) else "series"
    if len(sides) <= 1:
        return "vector" if len(shape) == 1 else "series"
    return "other"


@dataclass(frozen=True)
class Pen:
    """Draws inputs of one shape on one scale.

    Attributes:
        kind: see `kind_of`.
        low, high: the values drawn as black and white, or at the bottom and the top.
    """

    kind: str
    low: float
    high: float

    @classmethod
    def of(cls, shape: tuple[int, ...], bounds: tuple[float, float] | None, values: Iterable[Tensor]) -> Pen:
        """The pen for inputs within `bounds`; without bounds the scale is the range of `values`."""
        if bounds is not None:
            return cls(kind_of(shape), float(bounds[0]), float(bounds[1]))
        ranges = [(float(v.min()), float(v.max())) for v in values if v.numel()]
        low, high = (min(r[0] for r in ranges), max(r[1] for r in ranges)) if ranges else (0.0, 1.0)
        return cls(kind_of(shape), low, high if high > low else low + 1)

    def draw(self, x: Tensor, side: int, view: bool = False) -> Picture | None:
        """One input (*shape); None where its kind is not drawn.

        Args:
            view: a large image may be lossy, which makes it several times smaller.
        """
        if self.kind == "other":
            return None
        values = x.detach().to(torch.float64).numpy()
        share = np.clip((values - self.low) / (self.high - self.low), 0, 1)
        return _image(share, side, view) if self.kind == "image" else _plot(share, base=self._zero())

    def change(self, delta: Tensor, scale: float, view: bool = False) -> Picture | None:
        """A difference of two inputs, ±scale drawn as white and black, 0 in the middle."""
        return Pen(self.kind, -scale, scale).draw(delta, LARGE, view)

    def _zero(self) -> float:
        return min(1.0, max(0.0, -self.low / (self.high - self.low)))


def _image(share: NDArray[np.float64], side: int, view: bool) -> Picture:
    from PIL import Image, features

    pixels = _channels_last(share)
    image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    reduced = max(image.size) > side
    if reduced:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    uri = _encoded(image, "PNG", optimize=True)
    if view and len(uri) > _LOSSLESS and features.check("webp"):
        uri = min(uri, _encoded(image, "WEBP", quality=_QUALITY, method=4), key=len)
    return Picture(image.width, image.height, uri, pixelated=not reduced)


def _encoded(image: Image.Image, form: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def _channels_last(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """(H, W) gray or (H, W, 3) color; the mean of any other number of channels."""
    share = share.squeeze()
    if share.ndim == 2:
        return share
    if share.shape[-1] == 3 and share.shape[0] != 3:
        return share
    return share.transpose(1, 2, 0) if share.shape[0] == 3 else share.mean(0)


def _plot(share: NDArray[np.float64], base: float) -> Picture:
    rows = np.atleast_1d(share.squeeze())[:_MOST_SERIES]
    if rows.ndim == 1:
        values = share.reshape(-1)
        if len(values) <= _MOST_BARS:
            return Picture(_PLOT_WIDTH, _PLOT_HEIGHT, path=_bars(values, base), bars=True)
        rows = values[None]
    return Picture(_PLOT_WIDTH, _PLOT_HEIGHT, path="".join(_line(row) for row in rows))


def _bars(values: NDArray[np.float64], base: float) -> str:
    step = _PLOT_WIDTH / len(values)
    parts = []
    for place, value in enumerate(values):
        # A bar of no height would not be seen at all.
        bottom, top = sorted((base, float(value)))
        height = max((top - bottom) * _PLOT_HEIGHT, 0.8)
        parts.append(
            f"M{place * step + 0.1 * step:.1f} {(1 - bottom) * _PLOT_HEIGHT:.1f}h{0.8 * step:.1f}v{-height:.1f}"
            f"h{-0.8 * step:.1f}z"
        )
    return "".join(parts)


def _line(values: NDArray[np.float64]) -> str:
    if len(values) > _MOST_POINTS:
        values = values[np.linspace(0, len(values) - 1, _MOST_POINTS).round().astype(int)]
    x = np.linspace(1, _PLOT_WIDTH - 1, len(values))
    y = 1 + (1 - values) * (_PLOT_HEIGHT - 2)
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
