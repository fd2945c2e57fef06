"""Regional maximum activations of convolutions: Tolias, Sicre & Jégou, arXiv 1511.05879, section 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from robustknn.checks import check_positive_int
from robustknn.errors import InputError
from robustknn.transforms.base import Transform
from robustknn.transforms.projection import Projection

OVERLAP = 0.4
"""How much of a region its neighbor should share along the longer side of a map that is not square."""
_MOST = 7


@cache
def regions(height: int, width: int, levels: int = 3) -> tuple[tuple[int, int, int], ...]:
    """The square regions of a map, (top, left, side) each, scale after scale.

    At scale l their side is ⌊2 min(H, W)/(l + 1)⌋, at least 1, and there are l of them along the shorter side and
    l + m − 1 along the longer one, evenly spaced from end to end. m is 1 for a square map, else the number from 2 to 7
    for which neighbors at the first scale overlap most nearly by 40 %. A small map repeats some.
    """
    short, long = min(height, width), max(height, width)
    extra = 0
    if long > short:
        extra = min(range(1, _MOST), key=lambda m: abs(1 - (long - short) / (m * short) - OVERLAP))
    found = []
    for level in range(1, levels + 1):
        side = max(1, 2 * short // (level + 1))
        tops, lefts = (
            _places(size, side, level + (extra if size == long and long > short else 0)) for size in (height, width)
        )
        found += [(top, left, side) for top in tops for left in lefts]
    return tuple(found)


def _places(size: int, side: int, count: int) -> list[int]:
    """Where `count` regions begin."""
    return [i * (size - side) // (count - 1) if count > 1 else 0 for i in range(count)]


def regional_maxima(maps: Tensor, levels: int = 3) -> Tensor:
    """The largest activation of every channel in every region, at unit length: (N, C, H, W) → (N, R, C).

    Raises:
        InputError: no maps.
    """
    if maps.ndim != 4:
        raise InputError(
            f"regional maxima need the maps of a convolution (N, C, H, W), not {tuple(maps.shape)}; choose such a "
            "layer and pool='flatten'."
        )
    parts = [maps[:, :, t : t + s, l : l + s].amax((2, 3)) for t, l, s in regions(*maps.shape[2:], levels)]
    return nn.functional.normalize(torch.stack(parts, 1), dim=2)


@dataclass(frozen=True, eq=False)
class RegionalMax(Transform):
    """R-MAC: maps (N, C, H, W) → (N, C), the sum of the regions' maxima, each and the sum scaled to unit length.

    Args:
        levels: L, the scales of regions.
        whitening: a whitened `Projection` of the regions' vectors, after which each is scaled to unit length again;
            None for none. See `robustknn.fitting.with_rmac`.
    """

    kind: ClassVar[str] = "rmac"
    levels: int = 3
    whitening: Projection | None = None

    def __post_init__(self) -> None:
        check_positive_int(self.levels, "levels")

    def __call__(self, value: Tensor) -> Tensor:
        maxima = regional_maxima(value, self.levels)
        if self.whitening is not None:
            n, r, _ = maxima.shape
            maxima = nn.functional.normalize(self.whitening(maxima.flatten(0, 1)), dim=1).view(n, r, -1)
        return nn.functional.normalize(maxima.sum(1), dim=1)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.whitening is None else self.whitening.tensors()

    def settings(self) -> dict[str, Any]:
        return {"levels": self.levels}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        return cls(settings["levels"], Projection.of(tensors, {}) if tensors else None)

    def __repr__(self) -> str:
        return f"RegionalMax({self.levels}{'' if self.whitening is None else f', {self.whitening!r}'})"
