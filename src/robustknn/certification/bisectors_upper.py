"""Moves that are known to break a decision: the other side of a certificate."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from robustknn.certification.bisectors import Around
from robustknn.certification.exact_qp import Outer, least_move

_HALVINGS = 30
_NEAR = 256


def crowd(around: Around, first: int, size: int) -> Tensor:
    """The `size` references of the class of one negative that are nearest to it, of those near the query; itself first.

    Returns:
        Ids, fewer where the class has fewer.
    """
    scene = around.scene
    ids = scene.of_class(int(scene.labels[first]))[0]
    ids = ids[around.keys[ids].topk(min(len(ids), max(_NEAR, 4 * size)), largest=False).indices]
    apart = (scene.rows(ids) - scene.rows(torch.tensor([first]))).norm(dim=1).masked_fill(ids == first, -1.0)
    return ids[apart.topk(min(size, len(ids)), largest=False).indices]


def straight(around: Around, size: int) -> Tensor:
    """The move (D,) to the middle of the class of which `size` references are nearest."""
    scene, keys = around.scene, around.keys
    classes = [c for c in scene.labels.unique().tolist() if c != around.label]
    best, chosen = math.inf, around.negatives[:0]
    for c in classes:
        own = scene.of_class(c)[0]
        near = keys[own].topk(min(size, len(own)), largest=False)
        if len(own) >= min(size, len(around.negatives)) and float(near.values[-1]) < best:
            best, chosen = float(near.values[-1]), own[near.indices]
    if not len(chosen):
        chosen = around.negatives[keys[around.negatives].topk(min(size, len(around.negatives)), largest=False).indices]
    return scene.rows(chosen).mean(0) - around.row


def by_programs(around: Around, n_neighbors: int, pivots: int) -> Iterator[Tensor]:
    """Moves (D,), each the least that makes enough references of one class nearer than all but few positives.

    Wang et al., arXiv 1906.03972, section 4: around every pivot, one of the nearest negatives, the references of its
    class that are nearest to it are to become the neighbors.
    """
    scene, few = around.scene, n_neighbors // 2
    size = n_neighbors - few
    wrong = around.negatives
    for first in wrong[around.keys[wrong].topk(min(pivots, len(wrong)), largest=False).indices].tolist():
        inner = crowd(around, first, size)
        rows = scene.rows(inner)
        middle = rows.mean(0)
        positives = around.positives[:_NEAR]
        others = scene.rows(positives)
        kept = (others - middle).norm(dim=1).argsort()[few:]
        held = Outer(others[kept].numpy(), around.keys[positives[kept]].numpy())
        chosen = Outer(rows.numpy(), around.keys[inner].numpy())
        cell = least_move(chosen, [held], (middle - around.row).numpy(), around.slack, rounds=60)
        if cell.move is not None:
            yield torch.from_numpy(cell.move)


def shortest(around: Around, move: Tensor, products: Tensor, n_neighbors: int, cutoff: float = math.inf) -> float:
    """The least length of a move in a direction that breaks the decision, found by halving; ∞ where none does.

    Args:
        move: (D,).
        products: (n,) its inner products with all references.
        cutoff: lengths from which on nothing is gained.
    """

    def broken(share: float) -> bool:
        near = (around.keys - 2 * share * products).topk(n_neighbors, largest=False).indices
        counts = torch.bincount(around.scene.labels[near], minlength=around.label + 1)
        own = int(counts[around.label])
        counts[around.label] = -1
        return own <= int(counts.max())

    length = float(move.norm())
    low, high = 0.0, min(1.0 + 1e-7, cutoff / max(length, 1e-300))
    if not broken(high):
        return math.inf
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if broken(middle) else (middle, high)
    return high * length
