"""Prediction sets by split conformal prediction: classes enough to hold the true one with a stated probability.

Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random World", 2005, chapter 4; per class ("Mondrian"): 4.5.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from robustknn.checks import check_number
from robustknn.errors import InputError


def check_coverage(value: Any) -> float:
    """A coverage above 0 and below 1; InputError otherwise."""
    return check_number(value, "coverage", "above 0 and below 1", lambda v: 0 < v < 1)


def needed(coverage: float) -> int:
    """The fewest calibration samples by which a coverage can be promised: n with ⌈(n + 1) · coverage⌉ ≤ n."""
    share = Fraction(str(coverage))  # as it was written: 0.9 is nine tenths
    return math.ceil(share / (1 - share))


def cutoff(nonconformity: Tensor, coverage: float, of: str = "") -> Tensor:
    """The nonconformity up to which classes belong to the set: the ⌈(n + 1) · coverage⌉-th smallest, a scalar.

    Where the n calibration samples and a new one are exchangeable, the new one's own class is in the set with at least
    this probability, over the draw of all of them. Equal values belong to the set, so ties only make it larger.

    Args:
        nonconformity: (n,) of the calibration samples with their own label, ascending.
        of: whose samples they are, for the message.

    Raises:
        InputError: too few samples for this coverage.
    """
    n = len(nonconformity)
    if n < needed(coverage):
        raise InputError(
            f"a coverage of {coverage:g} needs at least {needed(coverage)} calibration samples{of}, there are {n}; "
            "calibrate with more, or ask for less."
        )
    place = math.ceil((n + 1) * Fraction(str(coverage)))
    return nonconformity[place - 1]


def cutoffs(nonconformity: Tensor, labels: Tensor | None, n_classes: int, coverage: float) -> Tensor:
    """The cutoff of every class, (C,): one for all, or, with labels (n,), each by the samples of that class.

    Raises:
        InputError: too few samples (of a class) for this coverage.
    """
    if labels is None:
        return cutoff(nonconformity, coverage).expand(n_classes)
    return torch.stack([cutoff(nonconformity[labels == c], coverage, f" of class {c}") for c in range(n_classes)])
