"""How far a query must move before b references of other classes can be among its k nearest: a bound by bisectors.

Wang, Liu, Yi, Zhou & Hsieh, "Evaluating the Robustness of Nearest Neighbor Classifiers: A Primal-Dual Perspective",
arXiv 1906.03972, for any k and any number of classes, ties counted as failure.

For b negatives j to be among the k nearest, at most k − b positives i are, so that each of these j is as near as all
but k − b positives: the move reaches the bisectors of j and of all these i, the a-th farthest of which, a = k − b + 1,
is the a-th largest eps_ij. Hence the move is at least the b-th smallest over j of the a-th largest over i of eps_ij.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from robustknn.certification.bisectors_scene import Queries, Scene

_BLOCK = 64
"""Queries whose keys with all references are held at a time."""
_FURTHER = 64
"""Negatives looked at more than needed, every time some are."""
_ROUND_UP = 1 + 1e-14


@dataclass(frozen=True)
class Around:
    """One query with the references as it sees them.

    Attributes:
        row: (D,) the query, as `Scene.place` gives it.
        keys: (n,) of all references.
        slack: what the difference of two keys may be off by.
        positives, negatives: ids of the references of the class decided for, nearest first, and of all others.
    """

    scene: Scene
    row: Tensor
    keys: Tensor
    slack: float
    label: int
    positives: Tensor
    negatives: Tensor

    @classmethod
    def of(cls, scene: Scene, row: Tensor, keys: Tensor, slack: float, label: int, nearest: int | None) -> Around:
        """With the `nearest` positives alone; None keeps all."""
        own, others = scene.of_class(label)
        count = len(own) if nearest is None else min(nearest, len(own))
        order = keys[own].topk(count, largest=False).indices
        return cls(scene, row, keys, slack, label, own[order], others)


@dataclass(frozen=True)
class Anchor:
    """A point near the nearest positives, (D,), with its squared distances to all references, (n,)."""

    point: Tensor
    squared: Tensor


def surroundings(
    scene: Scene, queries: Queries, labels: Tensor, nearest: int | None, most: int
) -> Iterator[list[tuple[int, Around, Anchor]]]:
    """Block by block every query's place, its surroundings, and the mean of its `most` nearest positives.

    Two products of a block of queries with all references are all that is computed of most references. Queries come
    class by class.
    """
    for places in labels.argsort(stable=True).split(_BLOCK):
        keys = scene.keys(queries.rows[places])
        arounds = [
            Around.of(scene, queries.rows[i], row, float(queries.slack[i]), int(labels[i]), nearest)
            for i, row in zip(places.tolist(), keys, strict=True)
        ]
        points = torch.stack([scene.rows(held.positives[:most]).mean(0) for held in arounds])
        squared = scene.squared_distances(points)
        anchors = [Anchor(point, row) for point, row in zip(points, squared, strict=True)]
        yield list(zip(places.tolist(), arounds, anchors, strict=True))


def depths(around: Around, anchor: Anchor, a: Tensor, b: Tensor) -> Tensor:
    """For each of M pairs: the b-th smallest over negatives of the a-th largest over positives of eps_ij, (M,).

    Exact over the positives of `around`, and hence at most what it is over all of them. Negatives are looked at in the
    order of a bound that costs no product with the positives, until what is left cannot be among the b smallest.

    Args:
        anchor: the point that the bound goes through.
        a, b: (M,) int64, at least 1.

    Returns:
        Radii, rounded down; 0 where there are fewer than a positives, ∞ where there are fewer than b negatives.
    """
    found = torch.zeros(len(a), dtype=torch.float64)
    found[b > len(around.negatives)] = torch.inf
    known = (a <= len(around.positives)) & (b <= len(around.negatives))
    if bool(known.any()):
        found[known] = _search(around, anchor, a[known], b[known])
    return found


def screen(around: Around, anchor: Anchor, a: Tensor) -> Tensor:
    """A lower bound (M, negatives) of the a-th largest eps_ij of every negative.

    The a nearest positives are within |p_i − n_j| ≤ min(|x − p_i| + |x − n_j|, |p_i − c| + |c − n_j|) of a negative.
    """
    keys, slack = around.keys, around.slack
    near = around.positives[: int(a.max())]
    spread = (around.scene.rows(near) - anchor.point).norm(dim=1).cummax(0).values[a - 1, None] * _ROUND_UP
    last, others = keys[near][a - 1, None], keys[around.negatives]
    by_query = (others + slack).clamp_min(0).sqrt() + (last + slack).clamp_min(0).sqrt()
    by_center = (anchor.squared[around.negatives] + slack).sqrt() + spread
    return (others - last - slack).clamp_min(0) / (2 * _ROUND_UP * torch.minimum(by_query, by_center)).clamp_min(1e-300)


def bisectors(around: Around, negatives: Tensor, rows: Tensor) -> Tensor:
    """eps_ij, rounded down, of some negatives (m,) and the positives of `around`, whose rows are given: (m, P)."""
    others, slack = around.scene.rows(negatives), around.slack
    squares = others.square().sum(1)[:, None] + rows.square().sum(1) - 2 * others @ rows.T
    apart = around.keys[negatives][:, None] - around.keys[around.positives] - slack
    return apart.clamp_min_(0) / (2 * _ROUND_UP * squares.add_(slack).clamp_min_(1e-300).sqrt_())


def _search(around: Around, anchor: Anchor, a: Tensor, b: Tensor) -> Tensor:
    bound = screen(around, anchor, a)
    ids, settled = around.negatives, torch.zeros(len(around.negatives), dtype=torch.bool)
    rows, deepest = around.scene.rows(around.positives), int(a.max())
    while True:
        places = _smallest(bound, b)
        wanted = places[~settled[places]]
        if not len(wanted):
            return torch.stack([row.kthvalue(int(n)).values for row, n in zip(bound, b, strict=True)])
        more = _smallest(bound.masked_fill(settled, torch.inf), torch.clamp(b + _FURTHER, max=int((~settled).sum())))
        for part in more.split(512):
            sorted_eps = bisectors(around, ids[part], rows).topk(deepest, dim=1).values
            bound[:, part] = torch.maximum(bound[:, part], sorted_eps[:, a - 1].T)
        settled[more] = True
        if len(a) > 1:  # many rows over all negatives: what can be in none of them is dropped
            done = bound.masked_fill(~settled, torch.inf)
            limit = torch.stack([row.kthvalue(int(n)).values for row, n in zip(done, b, strict=True)])
            kept = (bound < limit[:, None]).any(0) | settled
            bound, ids, settled = bound[:, kept], ids[kept], settled[kept]


def _smallest(bound: Tensor, counts: Tensor) -> Tensor:
    """Places that are among the `counts` smallest of their row, in any row."""
    found = [row.topk(int(n), largest=False).indices for row, n in zip(bound, counts, strict=True)]
    places: Tensor = torch.cat(found).unique()
    return places
