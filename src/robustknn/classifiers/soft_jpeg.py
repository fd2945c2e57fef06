"""JPEG as a differentiable function, for the gradient of attacks: exact but for the rounding of the coefficients.

The idea of a soft rounding behind the cosine transform is Shin & Song's ("JPEG-resistant adversarial images", 2017).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

BLOCK = 8
_LUMA = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
"""Y, Cb, Cr of RGB (ITU-T T.871)."""


@cache
def tables(quality: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The 64 divisors of luma and chroma coefficients that Pillow takes for a quality, row by row."""
    from PIL import Image

    held = io.BytesIO()
    Image.new("RGB", (BLOCK, BLOCK)).save(held, "JPEG", quality=quality)
    with Image.open(held) as image:
        found = image.quantization  # type: ignore[attr-defined]
    return tuple(found[0]), tuple(found[1])


def soft_jpeg(x: Tensor, quality: int, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """What JPEG makes of images (N, 1 or 3, H, W) in [0, 1], with another rounding of the divided coefficients.

    Args:
        rounded: takes the place of rounding.
    """
    luma, chroma = tables(quality)
    if x.shape[1] == 1:
        return (_plane(255 * x - 128, luma, rounded) + 128) / 255
    mix = torch.tensor(_LUMA, dtype=x.dtype, device=x.device)
    y, colors = torch.einsum("ij,njhw->nihw", mix, 255 * x).split((1, 2), 1)
    y = _plane(y - 128, luma, rounded) + 128
    height, width = x.shape[2:]
    # Rows and columns are repeated to even numbers before chroma is halved.
    even = nn.functional.pad(colors, (0, width % 2, 0, height % 2), mode="replicate")
    small = _plane(nn.functional.avg_pool2d(even, 2), chroma, rounded)
    colors = nn.functional.interpolate(small, scale_factor=2.0, mode="bilinear")[:, :, :height, :width]
    return torch.einsum("ij,njhw->nihw", mix.double().inverse().to(mix), torch.cat([y, colors], 1)) / 255


def _plane(plane: Tensor, divisors: tuple[int, ...], rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Blocks to coefficients, divided, rounded, multiplied, and back."""
    n, channels, height, width = plane.shape
    padded = nn.functional.pad(plane, (0, -width % BLOCK, 0, -height % BLOCK), mode="replicate")
    rows, columns = padded.shape[2] // BLOCK, padded.shape[3] // BLOCK
    blocks = padded.view(n, channels, rows, BLOCK, columns, BLOCK).transpose(3, 4)
    basis = _cosines().to(plane)
    step = torch.tensor(divisors, dtype=plane.dtype, device=plane.device).view(BLOCK, BLOCK)
    coefficients = rounded(basis @ blocks @ basis.T / step) * step
    made = (basis.T @ coefficients @ basis).transpose(3, 4).reshape(padded.shape)
    return made[:, :, :height, :width]


@cache
def _cosines() -> Tensor:
    """The orthonormal cosine transform, (8, 8) float64."""
    places = torch.arange(BLOCK, dtype=torch.float64)
    basis = (math.pi / BLOCK * (places + 0.5) * places[:, None]).cos() * math.sqrt(2 / BLOCK)
    basis[0] /= math.sqrt(2)
    return basis
