"""Figures of an evaluation, each with a name that says how it is counted.

A sample is *robust* when the clean decision is right and no attack wins on it. A sample that is wrong without any
attack stays in the denominator and counts as not robust.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustknn.checks import as_tensor
from robustknn.classifiers.rules import TIE
from robustknn.errors import InputError

Z95 = 1.959963984540054
Bools = NDArray[np.bool_]


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score method (J. Am. Stat. Assoc. 22, 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At 0 and n one end is exactly 0 or 1; rounding must not move it inside.
    return (0.0 if successes == 0 else max(0.0, centre - half)), (1.0 if successes == n else min(1.0, centre + half))


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b), the balance of standard accuracy and accuracy under attack; 0 when both are 0."""
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def share(flags: Bools) -> float:
    """The share of true entries, 0 for none."""
    return float(np.mean(flags)) if len(flags) else 0.0


def mean_of(values: NDArray[np.float64], where: Bools | None = None) -> float | None:
    """The mean of the chosen values, None when none is chosen."""
    chosen = values if where is None else values[where]
    return float(np.mean(chosen)) if len(chosen) else None


def normalized_l2(x: Any, x_adv: Any) -> NDArray[np.float64]:
    """‖x − x'‖₂ / ‖x‖₂ of every sample, (N,); 0 or infinite for an input that is zero everywhere.

    Its mean is the normalized L2 dissimilarity (Guo et al., arXiv 1711.00117; Dubey et al., arXiv 1903.01612).

    Args:
        x, x_adv: inputs (N, …) as arrays or tensors.

    Raises:
        InputError: different shapes.
    """
    before, after = (as_tensor(v, "the inputs").detach().cpu().double().flatten(1).numpy() for v in (x, x_adv))
    if before.shape != after.shape:
        raise InputError(f"the inputs have shape {before.shape}, the examples {after.shape} (flattened); pass pairs.")
    moved, size = np.linalg.norm(before - after, axis=1), np.linalg.norm(before, axis=1)
    found: NDArray[np.float64] = np.divide(moved, size, out=np.where(moved > 0, np.inf, 0.0), where=size > 0)
    return found


def worst_case(robust: Sequence[Bools]) -> Bools:
    """Per sample: robust under every one of several attacks."""
    every: Bools = np.logical_and.reduce(list(robust))
    return every


def fooled(rows: Mapping[str, NDArray[Any]]) -> Bools:
    """Per sample: right without attack, and not robust."""
    lost: Bools = rows["clean_correct"].astype(bool) & ~rows["robust"].astype(bool)
    return lost


def tied(rows: Mapping[str, NDArray[Any]]) -> Bools:
    """Per sample: counted as robust, but the attacked example ends in a tie that the classifier decides wrongly.

    Other wrong decisions that count as robust are none: an example that is rejected (also for want of a clear majority
    under noise), or that fools some members alone.
    """
    wrong = rows["robust"].astype(bool) & (rows["prediction"] != rows["label"]) & (rows["prediction"] >= 0)
    tied: Bools = wrong & (np.abs(rows["margin"]) <= TIE)
    return tied


def mcnemar(a: Bools, b: Bools) -> float:
    """The one-sided exact McNemar p-value that paired outcomes `a` are true more often than `b`.

    Of the samples on which they differ, those with `a` true are Binomial(n, ½) when both are alike.
    """
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    n = only_a + only_b
    tail: int = sum(math.comb(n, k) for k in range(only_a, n + 1))
    return tail / 2**n if n else 1.0
