"""Exact distances, in float64, of the references that a rounded search found; and their order.

Every engine that searches by rounded arithmetic finds somewhat more candidates than asked, measures them here,
and returns them ordered by (distance, id). The k first are certain when no reference outside the candidates
can be nearer, which follows from how far a rounded key can be from the exact one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustknn.neighbors.base import Metric

# How many numbers are widened to float64 at a time: what stays in a core's cache, in fresh memory or in memory that is
# used again, or what fills a GPU.
_CPU_BLOCK = 2**16
_REUSED = 2**18
_GPU_BLOCK = 2**23


def block_rows(vectors: Tensor, numbers: int = _CPU_BLOCK) -> int:
    """How many rows of these vectors to widen to float64 at a time; so many `numbers` on a CPU."""
    return max(1, (numbers if vectors.device.type == "cpu" else _GPU_BLOCK) // vectors.shape[1])


def exact_keys(
    metric: Metric, queries: Tensor, vectors: Tensor, ids: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The keys, measured in `dtype`, of queries (B, D) with the vectors of their own ids (B, m); ∞ for −1. (B, m)."""
    keys = torch.empty(ids.shape, dtype=dtype, device=ids.device)
    if not ids.numel():
        return keys
    room = block_rows(vectors, _REUSED)
    columns = min(ids.shape[1], room)
    rows = max(1, room // columns)
    # Memory that is used again costs no page faults, which took longer than the arithmetic.
    most, dim = min(rows, len(ids)) * columns, vectors.shape[1]
    gathered = vectors.new_empty(most, dim)
    widened = None if vectors.dtype == dtype else torch.empty(most, dim, dtype=dtype, device=vectors.device)
    known, queries = ids.clamp_min(0), queries.to(dtype)
    for i in range(0, len(ids), rows):
        for j in range(0, ids.shape[1], columns):
            part = known[i : i + rows, j : j + columns]
            found = torch.index_select(vectors, 0, part.reshape(-1), out=gathered[: part.numel()])
            wide = found if widened is None else widened[: part.numel()].copy_(found)
            keys[i : i + rows, j : j + columns] = metric.keys_(queries[i : i + rows], wide.view(*part.shape, dim))
    return keys.masked_fill_(ids < 0, math.inf)


def in_order(keys: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and ids (B, m) by ascending key, equal keys by ascending id."""
    by_id = ids.argsort(dim=1)
    order = by_id.gather(1, keys.gather(1, by_id).argsort(dim=1, stable=True))
    return keys.gather(1, order), ids.gather(1, order)


def certain(approximate: Tensor, kth: Tensor, error: Tensor, n: int) -> Tensor:
    """Rows whose k nearest are among their candidates, (B,).

    Args:
        approximate: (B, m) keys by which the candidates were chosen: the m least of all.
        kth: (B,) the k-th least exact key among the candidates.
        error: (B,) how far an approximate key may be from the exact one.
        n: the number of references.
    """
    if approximate.shape[1] == n:
        return approximate.isfinite().all(1)
    return approximate.isfinite().all(1) & (approximate.amax(1) - kth > error)


def dot_error(dim: int, dtype: torch.dtype) -> float:
    """What a dot product ⟨q, r⟩ of `dim` terms may be off by, relative to ‖q‖‖r‖.

    λ√D·u with λ = 6: each product is off by less with probability above 1 − 2D·exp(−λ²/2) (Higham & Mary, SIAM
    J. Sci. Comput. 41(5), 2019, Theorem 2.4); blocked summation, as matrix products do it, is off by far less.
    """
    return 6 * math.sqrt(dim) * torch.finfo(dtype).eps / 2


def at_unit_length(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, D) at unit length, in float64, and the lengths (n,) they have. Zero stays zero.

    The arithmetic is float64: squares of float32 numbers would leave the range from 1e±19 on.
    """
    wide = rows.to(torch.float64, copy=True)
    length = wide.norm(dim=1)
    return wide.div_(length.masked_fill(length == 0, 1)[:, None]), length


def normalize_(vectors: Tensor) -> Tensor:
    """Scale rows to unit length in place, block by block; returns the lengths they had. Zero stays zero."""
    lengths = torch.empty(len(vectors), dtype=vectors.dtype, device=vectors.device)
    step = block_rows(vectors)
    for i in range(0, len(vectors), step):
        rows = vectors[i : i + step]
        unit, length = at_unit_length(rows)
        rows.copy_(unit)
        lengths[i : i + step] = length
    return lengths
