"""How many references must change before a class no longer leads by votes: exact for one layer, sound for several.

Notation: T_l are the k nearest references of layer l, nearest first; s_c is the number of votes for class c over all L
layers; y leads, b is any other class. A changed reference is one row in every layer, so e of them change at most e
places of each T_l.
"""

from __future__ import annotations

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


def modified(labels: Tensor, y: Tensor) -> Tensor:
    """The largest e for which y leads strictly whatever e references are modified, (N,) int64; −1 where it does not.

    Modified: removed, moved, relabeled or replaced, which is e removed and e inserted. Of every T_l at least the first
    k − e of what was not removed are left; those behind the k-th never come in where e are inserted before. So in each
    layer y loses at most e votes and b gains at most e: y is safe if for every b

        s_y − s_b > 2eL.

    In one layer e votes for y can be removed and e for b inserted, so that this is exact. In several a reference need
    not vote in all of them, so that it is not always: rarely are more changes needed than it says.

    Args:
        labels: (N, k, L) of the nearest references.
        y: (N,) the classes that must keep leading.
    """
    lead = leads(labels, y)[:, -1]
    return (lead - 1).div(2 * labels.shape[2], rounding_mode="floor").clamp_min(-1)
