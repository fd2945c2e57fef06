"""How many references must change before a class no longer leads by votes: exact for one layer, sound for several.

Notation: T_l are the k nearest references of layer l, nearest first; s_c is the number of votes for class c over all L
layers; y leads, b is any other class. A changed reference is one row in every layer, so e of them change at most e
places of each T_l.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def inserted(labels: Tensor, y: Tensor) -> Tensor:
    """The largest e for which y leads strictly whatever e references are inserted, (N,) int64; −1 where it does not.

    Every insertion before the k-th place pushes the last one out, and makes the lead of y over b no larger where it
    votes for b. So the worst are e votes for b before all others in every layer, which leave the first k − e: y is safe
    exactly if for every b

        Σ_l cnt_{l,b}(first k − e) + eL < Σ_l cnt_{l,y}(first k − e).

    Args:
        labels: (N, k, L) of the nearest references.
        y: (N,) the classes that must keep leading.
    """
    k, layers = labels.shape[1:]
    lead = leads(labels, y).flip(1)  # by e = 0..k
    return (lead - layers * torch.arange(k + 1, device=labels.device) > 0).sum(1) - 1


def leads(labels: Tensor, y: Tensor) -> Tensor:
    """By how many votes y leads the best other class among the first j of every layer, j = 0..k: (N, k + 1) int64.

    The most votes of a class among the first j are the largest running count met so far, so no table of all classes is
    needed: the work grows with k, not with the number of classes.
    """
    layers = labels.shape[2]
    flat = labels.flatten(1)
    own = flat == y[:, None]
    others = running_counts(flat).masked_fill(own, 0).cummax(1).values
    lead = (own.cumsum(1) - others)[:, layers - 1 :: layers]
    return torch.cat([torch.zeros_like(lead[:, :1]), lead], 1)


def running_counts(labels: Tensor) -> Tensor:
    """How often each label has occurred in its row up to its own place, (N, m) → (N, m)."""
    order = labels.argsort(dim=1, stable=True)
    sorted_ = labels.gather(1, order)
    place = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    new = torch.ones_like(sorted_, dtype=torch.bool)
    new[:, 1:] = sorted_[:, 1:] != sorted_[:, :-1]
    first = torch.where(new, place, 0).cummax(1).values
    return torch.empty_like(labels).scatter_(1, order, place - first + 1)


def modified(labels: Tensor, ids: Tensor, y: Tensor) -> Tensor:
    """The largest e for which y leads strictly whatever e references are modified, (N,) int64; −1 where it does not.

    Modified: removed, moved, relabeled or replaced, which is e removed and e inserted. With e insertions the first
    k − e of what was not removed are left of every T_l, whoever was removed: those behind the k-th never come in.
    In one layer the attacker removes e votes for y and inserts e for b, and no choice does worse, so y is safe
    exactly if s_y − s_b > 2e. In several, what y loses in layer l stands among the last e of T_l or was removed from
    before them. Over all layers y loses at most min(eL, q + A): q votes for y among the last e of each layer, A the
    most that e references have before these; b gains at most e in each layer. Safe if s_y − s_b > eL + min(eL, q + A).

    Args:
        labels, ids: (N, k, L) of the nearest references; one reference has one id in all layers.
        y: (N,) the classes that must keep leading.
    """
    layers = labels.shape[2]
    lead = leads(labels, y)[:, -1]
    safe = (lead - 1).div(2 * layers, rounding_mode="floor").clamp_min(-1)
    if layers == 1:
        return safe
    own = labels == y[:, None, None]
    possible = (lead - 1).div(layers, rounding_mode="floor").clamp_min(-1)  # b gains e in every layer
    return _bisect(lambda e: lead - e * layers - lost_at_most(own, ids, e) > 0, safe, possible)


def lost_at_most(own: Tensor, ids: Tensor, e: Tensor) -> Tensor:
    """The most votes that a class can lose with e references modified, (N,): min(eL, q + A) of `modified`.

    Args:
        own: (N, k, L), whether a neighbor votes for it.
        ids: (N, k, L).
        e: (N,).
    """
    k, layers = own.shape[1:]
    last = torch.arange(k, device=own.device)[None, :, None] >= k - e[:, None, None]
    behind = (own & last).sum((1, 2))
    before = own & ~last
    # Ids below 0 stand for no reference: each its own, so that they are never counted as one in several layers.
    apart = -1 - torch.arange(k * layers, device=own.device).expand(len(own), -1)
    held = torch.where(before.flatten(1), ids.flatten(1), apart).sort(1).values
    # Of references with m votes each, Σ max(0, m − v + 1) have an equal one v − 1 places before them.
    runs = [((held[:, v:] == held[:, : held.shape[1] - v]) & (held[:, v:] >= 0)).sum(1) for v in range(layers + 1)]
    with_v_or_more = [runs[v] - runs[v + 1] for v in range(layers)]
    most = torch.stack([torch.minimum(n, e) for n in with_v_or_more]).sum(0)
    return torch.minimum(e * layers, behind + most)


def _bisect(holds: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The largest whole number in [low, high] for which `holds`, true at `low` and then false for good, (N,)."""
    while bool((low < high).any()):
        middle = (low + high + 1).div(2, rounding_mode="floor")
        passed = holds(middle.clamp_min(0)) & (middle > low)
        low, high = torch.where(passed, middle, low), torch.where(passed, high, torch.maximum(middle - 1, low))
    return low
