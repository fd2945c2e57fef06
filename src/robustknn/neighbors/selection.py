"""The smallest of many scores: over all references, and over those of each class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustknn.neighbors.base import MISSING, Metric

_GROUP = 16

PAD = 2.0**127
"""The score of no reference: above every score, and finite in float32."""
_ID_BITS = 29
_ID_MASK = (1 << _ID_BITS) - 1
# Queries whose neighbors by class are read out at a time.
_READ_QUERIES = 16
# Rows of scores that are worked on at a time, so that they stay in the cache.
_TABLE_ROWS = 2048
# Up to so many are taken by merging, more by sorting.
_FEW = 16


class Best:
    """The m smallest scores seen so far for each query, (B, m), with the ids they belong to."""

    def __init__(self, queries: int, m: int, like: Tensor) -> None:
        self.values = torch.full((queries, m), math.inf, dtype=like.dtype, device=like.device)
        self.ids = torch.full((queries, m), MISSING, dtype=torch.int64, device=like.device)

    def update(self, scores: Tensor, start: int) -> None:
        """Take in the scores (rows, B) of references `start`…"""
        values, places = smallest(scores, self.values.shape[1])
        values = torch.cat([self.values, values], 1)
        ids = torch.cat([self.ids, places + start], 1)
        self.values, kept = values.topk(self.values.shape[1], dim=1, largest=False)
        self.ids = ids.gather(1, kept)


def smallest(scores: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m smallest of each column: (n, B) → values and places, (B, min(m, n)) each, in any order.

    When n is large the rows are split into strided groups; the m groups with the least minima hold the m
    smallest rows, so only those are sorted.
    """
    n = len(scores)
    m = min(m, n)
    groups = n // _GROUP
    if groups < 2 * m:
        values, places = scores.T.contiguous().topk(m, dim=1, largest=False, sorted=False)
        return values, places
    # Rows that do not fill a group join the candidates directly.
    whole = groups * _GROUP
    chosen = smallest(scores[:whole].unflatten(0, (_GROUP, groups)).amin(0), m)[1]
    steps = torch.arange(_GROUP, device=scores.device) * groups
    places = (chosen[..., None] + steps).flatten(1)
    if whole < n:
        places = torch.cat([places, torch.arange(whole, n, device=scores.device).expand(len(places), -1)], 1)
    values, kept = scores.T.gather(1, places).topk(m, dim=1, largest=False, sorted=False)
    return values, places.gather(1, kept)


# ------------------------------------------------------------------------------------------- classes


@dataclass(frozen=True)
class ClassTable:
    """Classes of a chunk of references and the rows of each, (classes, width), padded with the row of PAD."""

    classes: Tensor
    rows: Tensor


def class_tables(labels: Tensor, device: torch.device) -> list[ClassTable]:
    """Tables of a chunk's classes, for labels (rows,) on the CPU; the row behind the last is padding.

    Classes are taken by size, so that those of a table are about as large and little is padding.
    """
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    firsts = counts.cumsum(0) - counts
    by_size = [c for c in counts.argsort(stable=True).tolist() if counts[c]]
    tables = []
    while by_size:
        width = int(counts[by_size[-1]])
        taken = max(1, _TABLE_ROWS // width)
        classes = torch.tensor(sorted(by_size[-taken:]))
        del by_size[-taken:]
        place = torch.arange(width)
        rows = order[(firsts[classes][:, None] + place).clamp_max(len(order) - 1)]
        rows[place >= counts[classes][:, None]] = len(labels)
        tables.append(ClassTable(classes.to(device), rows.to(device)))
    return tables


class ClassBest:
    """The K smallest scores seen so far of every class.

    A score is kept as a float64 whose lowest bits are the reference's id: a float32 leaves 29 of them unused.
    The least of such numbers is the least score together with whom it belongs to, so that neither sorting nor
    bookkeeping of places is needed. (Scores in float64 are rounded to 23 bits.)
    """

    def __init__(self, classes: int, k: int, queries: int, device: torch.device) -> None:
        self._packed = torch.full((classes, k, queries), PAD, dtype=torch.float64, device=device)

    def update(self, scores: Tensor, start: int, tables: list[ClassTable]) -> None:
        """Take in the scores (rows + 1, B) of references `start`…, whose last row is PAD."""
        k = self._packed.shape[1]
        for table in tables:
            part = scores.index_select(0, table.rows.view(-1)).view(*table.rows.shape, scores.shape[1])
            ids = (table.rows + start)[..., None]
            if part.shape[1] >= 2 * k * _GROUP:
                part, ids = _narrow(part, ids, k)
            self._packed[table.classes] = _least(_pack(part, ids, self._packed[table.classes]), k)

    def read(self, metric: Metric, scale: float, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Distances in float64, ascending, and ids, (B, C, K) each; ∞ and −1 where a class has fewer.

        A key is a score divided by `scale` plus the query's `offset` (B,).
        """
        classes, k, queries = self._packed.shape
        distances = torch.empty(queries, classes, k, dtype=torch.float64, device=offset.device)
        ids = torch.empty(queries, classes, k, dtype=torch.int64, device=offset.device)
        for rows in torch.arange(queries, device=offset.device).split(_READ_QUERIES):
            packed = self._packed[:, :, rows].permute(2, 0, 1).contiguous()
            missing = packed >= PAD
            bits = packed.view(torch.int64)
            ids[rows] = (bits & _ID_MASK).masked_fill_(missing, MISSING)
            scores = bits.bitwise_and_(~_ID_MASK).view(torch.float64)
            keys = scores.div_(scale).add_(offset[rows, None, None])
            distances[rows] = metric.distances(keys).masked_fill_(missing, math.inf)
        return distances, ids


def _pack(scores: Tensor, ids: Tensor, more: Tensor | None = None) -> Tensor:
    """Scores (c, w, B) with their ids in the lowest bits, followed by what is packed already."""
    classes, width, queries = scores.shape
    extra = 0 if more is None else more.shape[1]
    packed = torch.empty(classes, width + extra, queries, dtype=torch.float64, device=scores.device)
    bits = packed[:, :width].copy_(scores).view(torch.int64)
    if scores.dtype == torch.float64:
        bits.bitwise_and_(~_ID_MASK)
    bits.bitwise_or_(ids)
    if more is not None:
        packed[:, width:] = more
    return packed


def _least(packed: Tensor, k: int) -> Tensor:
    """The k smallest along the middle dimension, ascending: (c, w, B) → (c, k, B).

    A few are found by merging sorted runs, one in the beginning for every row: whole planes of numbers are
    compared at a time, where sorting each column branches at every number.
    """
    if k > _FEW or packed.device.type != "cpu":
        return packed.transpose(1, 2).contiguous().topk(k, dim=2, largest=False).values.transpose(1, 2)
    runs: list[Tensor] = [packed]
    left_over: list[Tensor] = []
    while (count := runs[0].shape[1]) > 1:
        if count % 2:
            left_over = _merge(left_over, [plane[:, -1:] for plane in runs], k)
        half = count // 2
        runs = _merge([plane[:, :half] for plane in runs], [plane[:, half : 2 * half] for plane in runs], k)
    return torch.cat(_merge(runs, left_over, k), 1)


def _merge(a: list[Tensor], b: list[Tensor], k: int) -> list[Tensor]:
    """The first k of two sorted sequences, merged by Batcher's odd–even network (AFIPS 1968)."""
    if not a or not b:
        return (a or b)[:k]
    if len(a) == len(b) == 1:
        least = [torch.minimum(a[0], b[0])]
        return least if k == 1 else [*least, torch.maximum(a[0], b[0])]
    even = _merge(a[::2], b[::2], k // 2 + 1)
    odd = _merge(a[1::2], b[1::2], k // 2)
    merged = even[:1]
    for place in range(max(len(odd), len(even) - 1)):
        pair = [*odd[place : place + 1], *even[place + 1 : place + 2]]
        if len(pair) == 2:
            pair = [torch.minimum(*pair)] + ([torch.maximum(*pair)] if len(merged) < k - 1 else [])
        merged += pair
    return merged[:k]


def _narrow(part: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and ids that hold the k smallest: those of the k strided groups with the least minima, and the rest."""
    groups = part.shape[1] // _GROUP
    whole = groups * _GROUP
    minima = part[:, :whole].unflatten(1, (_GROUP, groups)).amin(1)
    number = torch.arange(groups, device=part.device)[None, :, None]
    chosen = _least(_pack(minima, number), k).view(torch.int64) & _ID_MASK
    steps = torch.arange(_GROUP, device=part.device) * groups
    places = (chosen[:, None] + steps[None, :, None, None]).flatten(1, 2)
    rest = torch.arange(whole, part.shape[1], device=part.device)[None, :, None]
    places = torch.cat([places, rest.expand(part.shape[0], -1, part.shape[2])], 1)
    return part.gather(1, places), ids.expand(-1, -1, part.shape[2]).gather(1, places)
