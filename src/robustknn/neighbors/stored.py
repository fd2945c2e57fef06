"""Products with a few references of each query, read where they lie: nothing is gathered.

A copy of hundreds of long references for every query of a batch is fresh memory at every lookup: it takes longer than
all that is then computed with it.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def products_with(vectors: Tensor, z: Tensor, ids: Tensor) -> Tensor:
    """⟨z, r⟩ of each vector with some references, differentiable in z.

    Args:
        vectors: (n, D), all references.
        z: (N, D).
        ids: (N, G), those of each vector, none twice; −1 for none.

    Returns:
        (N, G); zero for none.
    """
    found: Tensor = _Products.apply(z, vectors, ids)  # type: ignore[no-untyped-call]
    return found


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, vectors: Tensor, ids: Tensor) -> Tensor:
        # Not by `save_for_backward`: references may have been made in inference mode.
        ctx.vectors, ctx.ids = vectors, ids
        present = ids >= 0
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), present.sum(1).cumsum(0)])
        found = z.new_zeros(ids.shape)
        found[present] = chosen_products(vectors, z.contiguous(), ids[present], ends)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        missing = ctx.ids < 0
        return weighted_sums(ctx.vectors, ctx.ids.clamp_min(0), grad.masked_fill(missing, 0)), None, None


def chosen_products(vectors: Tensor, queries: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
    """⟨q, r⟩ of each query with the references that are its own.

    Args:
        vectors: (n, D).
        queries: (B, D).
        ids: (m,), those of the first query, then those of the second, …; none twice for the same.
        ends: (B + 1,), where those of each begin, and m.

    Returns:
        (m,).
    """
    _silence()
    return _chosen(vectors, queries, ids, ends)


def weighted_sums(vectors: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Σ_g w_g r_g: ids and weights (N, G) → (N, D)."""
    # One pass over the rows, where gathering them first takes fifty times as long on a CPU.
    return nn.functional.embedding_bag(ids, vectors, mode="sum", per_sample_weights=weights)


def _chosen(vectors: Tensor, queries: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
    # A product of which only some entries are wanted.
    shape = (len(queries), len(vectors))
    entries = torch.sparse_csr_tensor(ends, ids, queries.new_zeros(len(ids)), shape, check_invariants=False)
    found: Tensor = torch.sparse.sampled_addmm(entries, queries, vectors.T, beta=0).values()
    return found


@cache
def _silence() -> None:
    """Torch says once a process that such tensors are new; what is used here is not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        one = torch.zeros(1, 1)
        _chosen(one, one, torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]))
