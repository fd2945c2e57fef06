"""Transformations of images before a network sees them: JPEG, fewer bits, total variation, random crops.

Each is offered as a defense by Guo et al., arXiv 1711.00117. Where the true gradient is zero or misleading, that of
the identity stands in for it: backward pass differentiable approximation, Athalye et al., arXiv 1802.00420.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robustknn import registry, rng
from robustknn.checks import check_positive, check_positive_int, check_whole
from robustknn.classifiers.soft_jpeg import soft_jpeg
from robustknn.errors import InputError

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

_NEAR = 1 / 16
"""How near to its turning point a value has to be to count much in the gradient of rounding. Measured on 48 training
images of CIFAR-10 behind 3 bits: of 1/64 … 1/4 and the identity, the attack leaves least with 1/16."""
_MODES = {1: "L", 3: "RGB"}
_LARGEST_STEP = 1 / 8
"""Of the dual ascent: the square of the largest singular value of the discrete gradient is below 8."""


class InputTransform(ABC):
    """Images (N, C, H, W) in [0, 1] → images of the same shape; implementations are frozen dataclasses.

    Attributes:
        random: whether it draws random numbers.
    """

    random: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        """The transformed images, differentiable (see each) when gradients are on.

        Args:
            x: (N, C, H, W).
            ids: (N,) what random numbers are counted from.
            seed: of these.
        """


@dataclass(frozen=True)
class Unchanged(InputTransform):
    """The image itself."""

    def __call__(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        return x


@registry.transformations.register("jpeg")
@dataclass(frozen=True)
class JPEG(InputTransform):
    """The image after JPEG, by Pillow with its own settings: rounded to 8 bits, chroma at half resolution.

    The gradient is that of the same steps with `steps_near` in place of the rounding of coefficients.

    Args:
        quality: 1 to 95, as Pillow takes it.
    """

    quality: int = 75

    def __post_init__(self) -> None:
        if check_whole(self.quality, "quality", 1) > 95:
            raise InputError(f"quality must be 1 to 95, not {self.quality}; Pillow advises against more.")

    def __call__(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        _check_images(x)
        if x.shape[1] not in _MODES:
            raise InputError(f"JPEG takes images of 1 or 3 channels, not {x.shape[1]}; choose another transformation.")
        pixels = (x.detach() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        coded = torch.from_numpy(np.stack([self._coded(image) for image in pixels])).permute(0, 3, 1, 2)
        soft = soft_jpeg(x, self.quality, steps_near) if x.requires_grad else x
        return straight_through(coded.to(x) / 255, soft)

    def _coded(self, pixels: Pixels) -> Pixels:
        """(H, W, C) after compression and decompression."""
        from PIL import Image

        held, mode = io.BytesIO(), _MODES[pixels.shape[2]]
        Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode).save(held, "JPEG", quality=self.quality)
        with Image.open(held) as image:
            return np.array(image).reshape(pixels.shape)


@registry.transformations.register("bit-depth")
@dataclass(frozen=True)
class BitDepth(InputTransform):
    """Every value rounded to the nearest of 2^bits levels from 0 to 1.

    Small changes do nothing to most values, and turn those that lie near the middle between two levels: the gradient
    is that of `steps_near`. With that of the identity an attack leaves twenty times as much.

    Args:
        bits: 1 to 8.
    """

    bits: int = 3

    def __post_init__(self) -> None:
        if check_whole(self.bits, "bits", 1) > 8:
            raise InputError(f"bits must be a whole number from 1 to 8, not {self.bits}.")

    def __call__(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        levels = 2**self.bits - 1
        return straight_through((x.detach() * levels).round() / levels, steps_near(x * levels) / levels)


@registry.transformations.register("total-variation")
@dataclass(frozen=True)
class TotalVariation(InputTransform):
    """The nearest image of little variation: argmin_z ½‖z − x‖² + weight Σ |∇z|, channel by channel.

    That is the model of Rudin, Osher & Fatemi (Physica D 60, 1992) with the isotropic discrete total variation, solved
    in its dual by the fast projected gradient of Beck & Teboulle (IEEE Trans. Image Process. 18, 2009). Guo et al. also
    drop pixels at random, which is left out here. The gradient is that of the solver.

    Args:
        weight: of the variation, for values in [0, 1].
        steps: of the solver.
    """

    weight: float = 0.03
    steps: int = 50

    def __post_init__(self) -> None:
        check_positive(self.weight, "weight")
        check_positive_int(self.steps, "steps")

    def __call__(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        _check_images(x)
        return self.solve(x)

    def solve(self, x: Tensor) -> Tensor:
        """The minimizer, (N, C, H, W), as far as the steps lead."""
        dual = ahead = torch.zeros(2, *x.shape, dtype=x.dtype, device=x.device)
        momentum = 1.0
        for _ in range(self.steps):
            slope = differences(x + self.weight * divergence(ahead))
            moved = ahead + _LARGEST_STEP / self.weight * slope
            # The bound before the root: where an image is flat the root has no derivative at all.
            moved = moved / moved.square().sum(0).clamp_min(1).sqrt()
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead = moved + (momentum - 1) / following * (moved - dual)
            dual, momentum = moved, following
        return x + self.weight * divergence(dual)

    def objective(self, z: Tensor, x: Tensor) -> Tensor:
        """½‖z − x‖² + weight Σ |∇z|, (N,)."""
        variation = differences(z).square().sum(0).sqrt()
        return ((z - x).square() / 2 + self.weight * variation).flatten(1).sum(1)


@registry.transformations.register("random-crop")
@dataclass(frozen=True)
class RandomCrop(InputTransform):
    """A square cut out at a random place and brought back to the size of the image (bilinear).

    It is differentiable as it is.

    Args:
        size: the side of what is cut out, in pixels, at most that of the image.
    """

    random: ClassVar[bool] = True

    size: int = 28

    def __post_init__(self) -> None:
        check_positive_int(self.size, "size")

    def __call__(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        _check_images(x)
        height, width = x.shape[2:]
        if self.size > min(height, width):
            raise InputError(f"a crop of {self.size} pixels does not fit into images of {height} × {width}; lower it.")
        places = rng.uniform(ids.to(x.device), (2,), seed, "crop", dtype=torch.float64)
        room = torch.tensor([height - self.size + 1, width - self.size + 1], device=x.device)
        corners = (places * room).long()
        reach = torch.arange(self.size, device=x.device)
        rows, columns = (corners[:, side, None] + reach for side in (0, 1))
        every = torch.arange(len(x), device=x.device)[:, None, None]
        cut = x.permute(0, 2, 3, 1)[every, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return nn.functional.interpolate(cut, (height, width), mode="bilinear", align_corners=False)


def steps_near(value: Tensor) -> Tensor:
    """What stands in for rounding in the gradient: u/(1/16 + |u|) of the distance u ∈ [−1, 1] to the turning point."""
    turn = 2 * (value - value.detach().floor()) - 1
    return turn / (_NEAR + turn.abs())


def straight_through(made: Tensor, soft: Tensor) -> Tensor:
    """The values of `made`, with the gradient of `soft`."""
    return made + (soft - soft.detach())  # added in this order they are those of `made` to the bit


def differences(z: Tensor) -> Tensor:
    """∇z, forward differences down and to the right, 0 at the far edges: (N, C, H, W) → (2, N, C, H, W)."""
    found = torch.zeros(2, *z.shape, dtype=z.dtype, device=z.device)
    found[0, :, :, :-1] = z[:, :, 1:] - z[:, :, :-1]
    found[1, :, :, :, :-1] = z[:, :, :, 1:] - z[:, :, :, :-1]
    return found


def divergence(p: Tensor) -> Tensor:
    """div p, the negative adjoint of `differences`: (2, N, C, H, W) → (N, C, H, W)."""
    found = torch.zeros_like(p[0])
    found[:, :, :-1] += p[0, :, :, :-1]
    found[:, :, 1:] -= p[0, :, :, :-1]
    found[:, :, :, :-1] += p[1, :, :, :, :-1]
    found[:, :, :, 1:] -= p[1, :, :, :, :-1]
    return found


def _check_images(x: Tensor) -> None:
    if x.ndim != 4:
        raise InputError(f"images (N, C, H, W) can be transformed, not {tuple(x.shape)}; choose 'BitDepth'.")
