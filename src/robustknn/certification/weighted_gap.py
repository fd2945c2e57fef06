"""How many samples must change before sets weighted by distance no longer name a class first (DAEkNN): a sound bound.

A changed sample changes its row in every reference set, since the adversarial references are made from it. So every set
at every layer may have e rows changed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustknn.classifiers.rules import TIE
from robustknn.classifiers.set_weights import SetWeighted

SLACK = 1e-9
"""Of sums of shares and of distances in float64."""


def largest(
    rule: SetWeighted, now: Tensor, labels: Tensor, distances: Tensor, y: Tensor, n_classes: int, insert: bool
) -> Tensor:
    """The largest e for which y leads beyond a tie by the bound below, (N,) int64; −1 where it does not.

    In set s at layer l the vote shares of y and b differ by at least g_s: after e insertions by
    (cnt_y − cnt_b − e) / k among the first k − e, after e modifications by (s_y − s_b − 2e) / k, and never below −1.
    Their mean distance lies between that of the first k − e with e more at distance 0, and its present value
    (inserted) or that of those e + 1..e + k (modified). Weights that such distances can give sum to 1, each in an
    interval; the least Σ_s w_s g_s over these is what is left of the lead at this layer.

    Args:
        now: (N, L, S) the weights of the sets.
        labels: (N, L, S, k) of the nearest references.
        distances: (N, L, S, K), K ≥ k, those behind the k-th too where references are modified; ∞ for none.
        y: (N,).
        insert: whether references are inserted, else modified.
    """
    k = labels.shape[3]
    best = torch.full_like(y, -1)
    alive = torch.ones_like(y, dtype=torch.bool)
    for e in range(k if insert else (k - 1) // 2 + 1):
        shares = _shares(labels, n_classes, e, insert)
        mine = shares.gather(3, y[:, None, None, None].expand(*shares.shape[:3], 1))
        reach = 1 if insert else 2
        gaps = (mine - shares - reach * e / k).clamp_min(-1)
        low, high = _weights(rule, now, *_distances(distances, k, e, insert))
        lead = _least(gaps, low, high).mean(1).scatter(1, y[:, None], math.inf).amin(1)
        alive = alive & (lead > TIE + SLACK)
        if not bool(alive.any()):
            break
        best = torch.where(alive, e, best)
    return best


def _shares(labels: Tensor, n_classes: int, e: int, insert: bool) -> Tensor:
    """The vote shares of what surely stays in view, (N, L, S, C)."""
    k = labels.shape[3]
    near = labels[..., : k - e] if insert else labels
    counts = torch.zeros(*labels.shape[:3], n_classes, dtype=torch.float64, device=labels.device)
    return counts.scatter_add_(3, near, torch.ones_like(near, dtype=torch.float64)) / k


def _distances(distances: Tensor, k: int, e: int, insert: bool) -> tuple[Tensor, Tensor]:
    """The least and the greatest mean distance, (N, L, S) each."""
    least = distances[..., : k - e].sum(-1) / k
    start = 0 if insert else e
    behind = distances[..., start : start + k]
    greatest = behind.mean(-1) if behind.shape[-1] == k else torch.full_like(least, math.inf)
    return least - SLACK, greatest + SLACK


def _weights(rule: SetWeighted, now: Tensor, least: Tensor, greatest: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest weight of each set, (N, L, S) each."""
    if rule.weighting not in ("paper", "released"):
        return now, now
    if rule.scale == "mean":  # d_s over the mean of all sets grows with d_s and falls with the others'
        sets = least.shape[-1]
        others_most = greatest.sum(-1, keepdim=True) - greatest
        others_least = least.sum(-1, keepdim=True) - least
        least, greatest = (
            sets * least / (least + others_most).clamp_min(SLACK),
            sets * greatest / (greatest + others_least).clamp_min(SLACK),
        )
    else:
        least, greatest = least / float(rule.scale), greatest / float(rule.scale)
    low, high = (-greatest, -least) if rule.weighting == "paper" else (least, greatest)
    return _softmax(low, high), _softmax(high, low)


def _softmax(mine: Tensor, others: Tensor) -> Tensor:
    """exp(mine_s) / (exp(mine_s) + Σ_{t ≠ s} exp(others_t)), (…, S) → (…, S)."""
    apart = others[..., None, :] - mine[..., :, None]
    same = torch.eye(mine.shape[-1], dtype=torch.bool, device=mine.device)
    return 1 / (1 + apart.exp().masked_fill(same, 0).sum(-1))


def _least(gaps: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The least Σ_s w_s g_s over low ≤ w ≤ high with Σ_s w_s = 1: (N, L, S, C), (N, L, S) twice → (N, L, C)."""
    values, order = gaps.sort(2)
    room = (high - low)[..., None].expand_as(gaps).gather(2, order)
    spare = (1 - low.sum(2))[:, :, None, None]
    fill = torch.minimum((spare - (room.cumsum(2) - room)).clamp_min(0), room)
    least: Tensor = (low[..., None] * gaps).sum(2) + (fill * values).sum(2)
    return least
