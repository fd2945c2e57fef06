"""How far a network can move its features, computed from its weights in float64: an upper bound, never an estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustknn.errors import InputError
from robustknn.features import OUTPUT
from robustknn.models.lipschitz import AlmostOrthogonalConv2d, AlmostOrthogonalLinear, MaxMin
from robustknn.models.normalize import Normalize
from robustknn.neighbors.refine import dot_error

_GRID = 48
"""Frequencies along each axis at which a convolution is measured."""
_ROUND_UP = 1 + 1e-10


@dataclass(frozen=True)
class Step:
    """What one layer does to distances and to rounding.

    Attributes:
        factor: ‖f(x) − f(y)‖ ≤ factor · ‖x − y‖.
        absolute: ‖ |W| |x| ‖ ≤ absolute · ‖x‖, which rounding of its sums is relative to; 0 for layers without sums.
        terms: of each sum.
        bias: the largest norm of what is added to one position.
    """

    factor: float = 1.0
    absolute: float = 0.0
    terms: int = 1
    bias: float = 0.0


def lipschitz_bound(model: nn.Module, layer: str = OUTPUT) -> float:
    """A bound L with ‖f(x) − f(y)‖₂ ≤ L·‖x − y‖₂ of a chain of layers up to and with `layer`.

    Known are linear layers and convolutions (ordinary and almost-orthogonal), ReLU, sorting of pairs, average pooling
    without overlap, folding, flattening, normalisation of pixels, dropout as it decides, and nested chains.

    Args:
        model: an nn.Sequential, such as lipschitz-cnn.
        layer: the name of one of its layers, or "(output)".

    Raises:
        InputError: the model is no chain, has no such layer, or has a layer whose constant is not known.
    """
    return math.prod(step.factor for _, step in chain(model, layer))


def chain(model: nn.Module, layer: str = OUTPUT) -> list[tuple[nn.Module, Step]]:
    """The layers up to `layer`, each with what it does to distances; see `lipschitz_bound`."""
    if not isinstance(model, nn.Sequential):
        raise InputError(
            f"the Lipschitz constant of a {type(model).__name__} is not known; use an nn.Sequential of known layers, "
            "such as lipschitz-cnn."
        )
    names = [name for name, _ in model.named_children()]
    if layer not in (OUTPUT, *names):
        raise InputError(f"layer {layer!r} is none of the model's own; choose one of {', '.join(names)}.")
    found = []
    for name, module in model.named_children():
        if isinstance(module, nn.Sequential):
            found += chain(module)
        else:
            found.append((module, _step(name, module)))
        if name == layer:
            break
    return found


@torch.no_grad()
def rounding(model: nn.Module, layer: str, x: Tensor, reach: float) -> Tensor:
    """How far the layer's features, computed as the model does, may be from exact ones, (N,) float64.

    Sums are off by at most `dot_error` of their absolute values, which holds but with negligible probability.

    Args:
        x: (N, …) inputs, placed.
        reach: the bound holds within this distance of each input too.
    """
    error = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    factor = 1.0
    for module, step in chain(model, layer):
        size = x.flatten(1).double().norm(dim=1) + factor * reach + error
        x = module(x)
        positions = x[0].numel() // x.shape[1]
        added = step.absolute * size + step.bias * math.sqrt(positions)
        error = step.factor * error + dot_error(step.terms + 1, x.dtype) * added
        factor *= step.factor
    return error


def _step(name: str, module: nn.Module) -> Step:
    for kinds, measure in _KNOWN:
        if isinstance(module, kinds):
            with torch.no_grad():
                return measure(module)
    raise InputError(
        f"the Lipschitz constant of layer {name!r}, a {type(module).__name__}, is not known; use layers that "
        "lipschitz_bound knows."
    )


def _plain(module: nn.Module) -> Step:
    return Step()


def _linear(module: nn.Module) -> Step:
    assert isinstance(module, nn.Linear)
    matrix = (module.kernel() if isinstance(module, AlmostOrthogonalLinear) else module.weight).double()
    return Step(_norm(matrix), _norm(matrix.abs()), matrix.shape[1], _length(module.bias))


def _convolution(module: nn.Module) -> Step:
    assert isinstance(module, nn.Conv2d)
    if module.groups > 1 or module.padding_mode != "zeros":
        raise InputError("the Lipschitz constant of a grouped or otherwise padded convolution is not known.")
    kernel = (module.kernel() if isinstance(module, AlmostOrthogonalConv2d) else module.weight).double()
    absolute = _norm(kernel.abs().sum((2, 3)))
    return Step(min(_convolved(kernel), absolute), absolute, kernel[0].numel(), _length(module.bias))


def _convolved(kernel: Tensor) -> float:
    """The norm of a convolution on an image of any size; stride, dilation and zero padding only lower it.

    At a frequency it is a matrix, whose entries are trigonometric polynomials of degree d = ⌊taps/2⌋ along each axis.
    Between N points such a polynomial is at most 1/cos(πd/N) larger than at them (Ehlich & Zeller, 1964).
    """
    transform = torch.fft.fft2(kernel, s=(_GRID, _GRID))[:, :, :, : _GRID // 2 + 1]  # the others are conjugate
    matrices = transform.permute(2, 3, 0, 1)
    if kernel.shape[0] > kernel.shape[1]:
        matrices = matrices.mH
    largest = math.sqrt(float(torch.linalg.eigvalsh(matrices @ matrices.mH).max()))  # far faster than singular values
    between = math.prod(math.cos(math.pi * (taps // 2) / _GRID) for taps in kernel.shape[2:])
    return largest / between * _ROUND_UP if max(kernel.shape[2:]) <= _GRID // 2 else math.inf


def _normalize(module: nn.Module) -> Step:
    assert isinstance(module, Normalize)
    factor = float(1 / module.std.double().min()) * _ROUND_UP
    return Step(factor, factor, 2, float((module.mean / module.std).double().norm()))


def _average(module: nn.Module) -> Step:
    assert isinstance(module, nn.AvgPool2d)
    sizes = [v if isinstance(v, tuple) else (v, v) for v in (module.kernel_size, module.stride)]
    if sizes[0] != sizes[1] or module.padding not in (0, (0, 0)) or module.ceil_mode:
        raise InputError("the Lipschitz constant of average pooling is known without overlap and padding alone.")
    taps = sizes[0][0] * sizes[0][1]
    factor = 1 / math.sqrt(taps) * _ROUND_UP
    return Step(factor, factor, taps)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2)) * _ROUND_UP


def _length(bias: Tensor | None) -> float:
    return 0.0 if bias is None else float(bias.double().norm()) * _ROUND_UP


_KNOWN: tuple[tuple[tuple[type[nn.Module], ...], Callable[[nn.Module], Step]], ...] = (
    ((nn.Linear,), _linear),
    ((nn.Conv2d,), _convolution),
    ((Normalize,), _normalize),
    ((nn.AvgPool2d,), _average),
    ((MaxMin, nn.ReLU, nn.Identity, nn.Flatten, nn.PixelUnshuffle, nn.PixelShuffle, nn.Dropout), _plain),
)
