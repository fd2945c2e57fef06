"""Checks of what comes in, each with one sentence that says what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustknn.errors import InputError, brief

Bounds = tuple[float, float]


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
    """InputError when a value is NaN or infinite; names the first sample that has one."""
    # The sum is finite whenever every value is and no overflow happens: one cheap pass for the common case.
    if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).reshape(x.shape[0], -1).any(dim=1).nonzero()[0])
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


def check_positive_int(value: Any, what: str) -> int:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError(f"{what} must be a whole number of at least 1, not {brief(value)}.")
    return int(value)


def check_choice(value: Any, choices: tuple[str, ...], what: str) -> str:
    """One of a few names."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{what} must be one of {', '.join(map(repr, choices))}, not {brief(value)}.")
    return value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
