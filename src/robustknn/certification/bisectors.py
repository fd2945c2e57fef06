"""How far a query must move before b references of other classes can be among its k nearest: a bound by bisectors.

Wang, Liu, Yi, Zhou & Hsieh, "Evaluating the Robustness of Nearest Neighbor Classifiers: A Primal-Dual Perspective",
arXiv 1906.03972, for any k and any number of classes, ties counted as failure.

For b negatives j to be among the k nearest, at most k − b positives i are, so that each of these j is as near as all
but k − b positives: the move reaches the bisectors of j and of all these i, the a-th farthest of which, a = k − b + 1,
is the a-th largest eps_ij. Hence the move is at least the b-th smallest over j of the a-th largest over i of eps_ij.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from robustknn.certification.bisectors_scene import Queries, Scene

_BLOCK = 64
"""Queries whose keys with all references are held at a time."""
_ANCHORS = 4
"""Positives that are anchors themselves."""
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
class Anchors:
    """Points near the nearest positives, (P, D), with their squared distances to all references, (P, n)."""

    points: Tensor
    squared: Tensor


def surroundings(
    scene: Scene, queries: Queries, labels: Tensor, nearest: int | None, most: int
) -> Iterator[list[tuple[int, Around, Anchors]]]:
    """Block by block every query's place, its surroundings, and anchors of its `most` nearest positives.

    A few positives are anchors themselves, of many it is their mean. The products of queries and anchors with all
    references are all that is computed of most references. Queries come class by class.
    """
    for places in labels.argsort(stable=True).split(_BLOCK):
        keys = scene.keys(queries.rows[places])
        arounds = [
            Around.of(scene, queries.rows[i], row, float(queries.slack[i]), int(labels[i]), nearest)
            for i, row in zip(places.tolist(), keys, strict=True)
        ]
        points = [scene.rows(held.positives[:most]) for held in arounds]
        points = [rows if len(rows) <= _ANCHORS else rows.mean(0, keepdim=True) for rows in points]
        squared = scene.squared_distances(torch.cat(points)).split([len(rows) for rows in points])
        anchors = [Anchors(rows, apart) for rows, apart in zip(points, squared, strict=True)]
        yield list(zip(places.tolist(), arounds, anchors, strict=True))


def depths(around: Around, anchors: Anchors, a: Tensor, b: Tensor, visits: int | None = None) -> Tensor:
    """For each of M pairs: the b-th smallest over negatives of the a-th largest over positives of eps_ij, (M,).

    Negatives are looked at in the order of a bound that costs no product with the positives, until what is left cannot
    be among the b smallest: exact over the positives of `around`, and hence at most what it is over all of them.

    Args:
        anchors: the points that the bound goes through.
        a, b: (M,) int64, at least 1.
        visits: at about how many negatives to look; the others count by their bound. None for all it takes.

    Returns:
        Radii, rounded down; 0 where there are fewer than a positives, ∞ where there are fewer than b negatives.
    """
    found = torch.zeros(len(a), dtype=torch.float64)
    found[b > len(around.negatives)] = torch.inf
    known = (a <= len(around.positives)) & (b <= len(around.negatives))
    if bool(known.any()):
        found[known] = _search(around, anchors, a[known], b[known], visits)
    return found


def screen(around: Around, anchors: Anchors, a: Tensor) -> Tensor:
    """A lower bound (M, negatives) of the a-th largest eps_ij of every negative: the least of the a nearest positives.

    A positive is within |p_i − n_j| ≤ min(|x − p_i| + |x − n_j|, |p_i − c| + |c − n_j|) of a negative, with c the
    anchor that is nearest to it.
    """
    keys, slack = around.keys, around.slack
    near = around.positives[: int(a.max())]
    apart = (around.scene.rows(near)[:, None] - anchors.points).norm(dim=2) * _ROUND_UP
    reach, anchor = apart.min(1)
    others, own = keys[around.negatives], keys[near]
    by_query = (others + slack).clamp_min(0).sqrt()
    bound = torch.full((len(a), len(others)), torch.inf, dtype=torch.float64)
    for c, squared in enumerate(anchors.squared):
        by_anchor = (squared[around.negatives] + slack).sqrt()
        for m, count in enumerate(a.tolist()):
            members = (anchor[:count] == c).nonzero()[:, 0]
            if len(members):
                last = float(own[members[-1]])
                most = torch.minimum(by_query + math.sqrt(max(0.0, last + slack)), by_anchor + reach[members].max())
                least = (others - last - slack).clamp_min_(0) / most.mul_(2 * _ROUND_UP).clamp_min_(1e-300)
                torch.minimum(bound[m], least, out=bound[m])
    return bound


def bisectors(around: Around, negatives: Tensor, rows: Tensor) -> Tensor:
    """eps_ij, rounded down, of some negatives (m,) and the positives of `around`, whose rows are given: (m, P)."""
    others, slack = around.scene.rows(negatives), around.slack
    squares = others.square().sum(1)[:, None] + rows.square().sum(1) - 2 * others @ rows.T
    apart = around.keys[negatives][:, None] - around.keys[around.positives] - slack
    return apart.clamp_min_(0) / (2 * _ROUND_UP * squares.add_(slack).clamp_min_(1e-300).sqrt_())


def _search(around: Around, anchors: Anchors, a: Tensor, b: Tensor, visits: int | None) -> Tensor:
    bound = screen(around, anchors, a)
    ids, settled = around.negatives, torch.zeros(len(around.negatives), dtype=torch.bool)
    rows, deepest = around.scene.rows(around.positives), int(a.max())
    while True:
        places = _smallest(bound, b)
        enough = visits is not None and int(settled.sum()) >= visits
        if enough or bool(settled[places].all()):
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
