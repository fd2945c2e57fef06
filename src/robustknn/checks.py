"""Checks of what comes in, each with one sentence that says what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustknn.errors import InputError, brief

Bounds = tuple[float, float]
# How many numbers are looked at at a time.
_CHECKED = 1 << 24


def as_tensor(value: Any, what: str) -> Tensor:
    """A tensor from a tensor, an array or nested lists of numbers."""
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
        if array.dtype == object or array.dtype.kind in "USO":
            raise TypeError
        # Arrays read from files may have the other byte order, which torch does not know.
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} must be a tensor or an array of numbers, not {type(value).__name__}.") from error


def check_inputs(value: Any, bounds: Bounds | None = None, what: str = "x") -> Tensor:
    """A batch of inputs: (N, …) floating point, finite, inside `bounds` when given.

    Args:
        value: tensor or array. Integers are refused rather than scaled: 0..255 pixels would silently be out of
            the range that eps is measured in.
        bounds: the least and greatest value an input may take, or None when it may take any.

    Raises:
        InputError: wrong type, fewer than two dimensions, no sample, NaN or infinity, out of range.
    """
    x = as_tensor(value, what)
    if x.ndim < 2:
        raise InputError(
            f"{what} has shape {tuple(x.shape)}; pass a batch whose first dimension counts the samples, "
            "e.g. x[None] for a single one."
        )
    if not x.is_floating_point():
        raise InputError(
            f"{what} has dtype {_short(x.dtype)}; convert it to floating point first (8-bit images: x.float() / 255)."
        )
    if x.numel() == 0:
        raise InputError(f"{what} holds no value (shape {tuple(x.shape)}); pass at least one sample.")
    check_finite(x, what)
    if bounds is not None:
        low, high = bounds
        least, greatest = float(x.min()), float(x.max())
        # One rounding step of float32 is forgiven and undone: images computed elsewhere end at 1.0000001.
        slack = 1e-6 * max(1.0, abs(low), abs(high))
        if least < low - slack or greatest > high + slack:
            raise InputError(
                f"{what} ranges over [{least:g}, {greatest:g}], outside the bounds [{low:g}, {high:g}]; "
                "scale it, or state other bounds (normalisation belongs inside the model)."
            )
        if least < low or greatest > high:
            x = x.clamp(low, high)
    return x


def check_finite(x: Tensor, what: str) -> None:
    """InputError when a value is NaN or infinite; names the first sample that has one. Works in little memory."""
    rows = max(1, _CHECKED * len(x) // max(1, x.numel())) if x.ndim else 1
    for place, part in enumerate(x.split(rows) if x.ndim else (x[None],)):
        # The sum is finite whenever every value is and no overflow happens: one cheap pass for the common case.
        if not bool(torch.isfinite(part.sum())) and not bool(torch.isfinite(part).all()):
            bad = int((~torch.isfinite(part)).reshape(part.shape[0], -1).any(dim=1).nonzero()[0])
            bad += place * rows
            raise InputError(f"{what} has NaN or infinite values, first in sample {bad}; remove or repair it.")


def check_labels(value: Any, n: int | None, n_classes: int | None, what: str = "y") -> Tensor:
    """Class labels: (N,) integers in 0..n_classes − 1, as int64.

    Raises:
        InputError: wrong shape, not integers, another number than samples, out of range.
    """
    y = as_tensor(value, what)
    if y.ndim != 1:
        raise InputError(f"{what} has shape {tuple(y.shape)}; pass one class number a sample, shape (N,).")
    if y.is_floating_point() and bool((y == y.to(torch.int64)).all()):
        y = y.to(torch.int64)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InputError(f"{what} has dtype {_short(y.dtype)}; class labels are integers 0..C-1.")
    if n is not None and y.shape[0] != n:
        raise InputError(f"{what} has {y.shape[0]} labels for {n} samples; pass one label a sample.")
    y = y.to(torch.int64)
    if len(y):
        least, greatest = int(y.min()), int(y.max())
        if least < 0 or (n_classes is not None and greatest >= n_classes):
            top = ".." if n_classes is None else f"..{n_classes - 1}"
            found = least if least < 0 else greatest
            raise InputError(f"{what} holds the label {found}, outside 0{top}; map labels to 0..C-1 first.")
    return y


def class_numbers(value: Any, classes: np.ndarray[Any, Any], what: str = "y") -> np.ndarray[Any, Any]:
    """The places (N,) in `classes` of labels of any kind: numbers, text, what an estimator was fitted on.

    Raises:
        InputError: not one label a sample, or a label that is no class.
    """
    labels = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if labels.ndim != 1:
        raise InputError(f"{what} has shape {labels.shape}; pass one label a sample, shape (N,).")
    places = {label: place for place, label in enumerate(classes.tolist())}
    unknown = [label for label in dict.fromkeys(labels.tolist()) if label not in places]
    if unknown:
        raise InputError(
            f"{what} holds the label {brief(unknown[0])}, a class that the references lack; leave it out (classes: "
            f"{brief(list(places))})."
        )
    return np.asarray([places[label] for label in labels.tolist()], dtype=np.int64)


def check_positions(value: Any, n: int, where: str = "") -> Tensor:
    """Positions 0..n − 1 as int64 (B,) from whole numbers or a mask (n,).

    Raises:
        InputError: anything else; the sentence names the position and, with `where`, the argument it came in.
    """
    positions = as_tensor(value, f"positions{where}").cpu()
    if positions.dtype == torch.bool and positions.shape == (n,):
        return positions.nonzero()[:, 0]
    if not positions.numel():
        return torch.zeros(0, dtype=torch.int64)
    if positions.ndim != 1 or positions.is_floating_point() or positions.dtype == torch.bool:
        raise InputError(
            f"positions{where} have shape {tuple(positions.shape)} and dtype {positions.dtype}; pass whole numbers "
            f"(B,) or a mask of {n} booleans."
        )
    least, greatest = int(positions.min()), int(positions.max())
    if least < 0 or greatest >= n:
        wrong = least if least < 0 else greatest
        raise InputError(f"position {wrong}{where} is outside 0..{n - 1} of a split of {n}.")
    return positions.to(torch.int64)


def check_positive_int(value: Any, what: str) -> int:
    """A whole number of at least 1."""
    return check_whole(value, what, 1)


def check_number(value: Any, what: str, allowed: str, holds: Callable[[float], bool]) -> float:
    """A number for which `holds` is true; InputError, which says in words what is allowed, otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real) or not holds(float(value)):
        raise InputError(f"{what} must be a number {allowed}, not {brief(value)}.")
    return float(value)


def check_positive(value: Any, what: str) -> float:
    """A finite number above 0; InputError otherwise."""
    return check_number(value, what, "above 0 and finite", lambda v: 0 < v < math.inf)


Weights = float | tuple[float, ...]
"""One number, or one a layer."""


def check_positives(value: Any, what: str) -> Any:
    """A finite number above 0, or several of them as a tuple; InputError otherwise."""
    several = tuple(value) if isinstance(value, (list, tuple)) else value
    for each in several if isinstance(several, tuple) and several else (several,):
        check_positive(each, what)
    return several


def one_each(value: Weights, n: int, what: str) -> tuple[float, ...]:
    """What one number, or one a layer, is for each of n layers; InputError for another number of them."""
    if not isinstance(value, tuple):
        return (float(value),) * n
    if len(value) != n:
        raise InputError(f"{what} has {len(value)} values for {n} layers; pass one, or one a layer.")
    return tuple(float(v) for v in value)


def check_whole(value: Any, what: str, least: int | None = None) -> int:
    """A whole number, of at least `least` when given."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or (least is not None and value < least):
        above = "" if least is None else f" of at least {least}"
        raise InputError(f"{what} must be a whole number{above}, not {brief(value)}.")
    return int(value)


def check_layers(value: Any) -> tuple[str, ...] | None:
    """Names of layers as a tuple, of one as text too; None as it is."""
    if value is None:
        return None
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"layers must be names of layers, or None for those that vote, not {brief(value)}.")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"layers names {name!r} twice; name each layer once.")
    return tuple(names)


def check_choice(value: Any, choices: tuple[str, ...], what: str) -> str:
    """One of a few names."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{what} must be one of {', '.join(map(repr, choices))}, not {brief(value)}.")
    return value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
