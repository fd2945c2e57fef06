"""Soft votes: how much each reference counts among the k nearest, differentiable in the distances.

w_j = σ((τ − d_j)/h) with Σ_j w_j = k is the entropic relaxation of choosing the k smallest of d, optimal transport to
two bins of k and of the rest (Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020); with two bins
it has this closed form in the threshold τ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SHARE = 1e-6
"""How near 0 and 1 the share of those that vote is taken, for the bracket of τ."""


def soft_topk(distances: Tensor, k: int, bandwidth: Tensor, present: Tensor) -> Tensor:
    """The soft votes w_j = σ((τ − d_j)/h) of each row, which sum to k; differentiable in the distances.

    τ, the soft k-th distance, follows the distances by dτ/dd_j = w_j(1 − w_j) / Σ_i w_i(1 − w_i). As h → 0 the k
    nearest get weight 1 and the others 0.

    Args:
        distances: (N, G).
        k: how many vote. In a row with no more than k references all of them get weight 1.
        bandwidth: h, (N, 1), above zero; held fixed in the gradient.
        present: (N, G) bool; what is missing gets weight 0 and no gradient.

    Returns:
        (N, G), each in [0, 1].
    """
    h, count = bandwidth.detach(), present.sum(1, keepdim=True)
    known = distances.masked_fill(~present, 0)
    with torch.no_grad():
        held = distances.masked_fill(~present, float("inf"))
        tau = _threshold(held, k, h, present, count)
        pull = _pull((tau - held) / h)
    # An inner product with zero, for its gradient: that of τ.
    tau = tau + (pull * (known - known.detach())).sum(1, keepdim=True)
    weights = torch.sigmoid((tau - known) / h)
    return torch.where(present & (count > k), weights, present.to(weights))


def _threshold(held: Tensor, k: int, h: Tensor, present: Tensor, count: Tensor) -> Tensor:
    """τ by bisection down to rounding, (N, 1); anything in rows where no more than k are present."""
    share = (k / count.clamp_min(1).to(held)).clamp(_SHARE, 1 - _SHARE)
    # Where the nearest has weight k/G the sum is at most k, where the farthest has it at least k.
    shift = h * torch.logit(share)
    low = held.amin(1, keepdim=True) + shift
    high = held.masked_fill(~present, float("-inf")).amax(1, keepdim=True) + shift
    for _ in range(math.ceil(-math.log2(torch.finfo(held.dtype).eps)) + 4):
        middle = (low + high) / 2
        below = torch.sigmoid((middle - held) / h).sum(1, keepdim=True) < k
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    # Of the two, which differ by rounding, the one at which k vote even where h is less than rounding.
    return torch.nan_to_num(high, posinf=0.0, neginf=0.0)


def _pull(u: Tensor) -> Tensor:
    """w(1 − w) of w = σ(u), each row divided by its sum: the share of each reference in τ's derivative, (N, G).

    By logarithms, so that a row whose weights are all rounded to 0 and 1 keeps those nearest to the threshold.
    """
    size = u.abs()
    return torch.nan_to_num(torch.softmax(-size - 2 * torch.log1p(torch.exp(-size)), 1))
