"""Bounds on scores from a few coordinates: whom a search need not measure.

Long vectors, such as the feature maps of early layers, mostly lie near a subspace. With an orthonormal basis B of it,
a reference is r = B r̂ + r' and a query p = B p̂ + p', and by the Cauchy–Schwarz inequality

    ⟨p, r⟩ ≥ ⟨p̂, r̂⟩ − ‖p'‖‖r'‖,

so that a product with the short r̂ bounds every score from below. Whoever's bound is above the k-th score known
cannot be among the k nearest. B comes from randomised subspace iteration (Halko, Martinsson & Tropp, SIAM Review
53(2), 2011, Algorithm 4.4) over a sample of the references; the bound holds whatever B is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from robustknn.neighbors.base import MISSING
from robustknn.neighbors.product import SCRATCH, product, width_of
from robustknn.neighbors.refine import dot_error
from robustknn.neighbors.scoring import Scoring
from robustknn.neighbors.selection import PAD, Best
from robustknn.neighbors.stored import chosen_products

RANK = 512
"""The length of the coordinates, at most; a quarter of that of short vectors."""
LEAST_DIM, LEAST_ROWS = 2 * RANK, 16 * RANK
"""What is shorter, or fewer, is searched about as fast without."""
_SAMPLE = 8 * RANK
_SHORTER = 4
_ITERATIONS = 2
_READ_ROWS = 1024
# Candidates by their bounds for one that is kept; where more are within reach, the bounds are gone through again.
_WIDE = 8
# A query is given up when a larger part of the references would have to be measured: one by one they cost more.
LEAST_GAIN = 16
# A bound may be off by four errors of a score (rounded coordinates, a basis that is orthonormal up to rounding), and
# the scores it is compared with, and `certain`, by one each.
_SLACK = 8


@dataclass(frozen=True)
class Candidates:
    """Who may be among the k nearest.

    Attributes:
        scores: (B, m) the least, in any order; where more references are further than the last, a number below theirs.
        ids: (B, m) whose they are.
        given_up: (u,) queries whose bounds leave out too few; their scores are not the least.
    """

    scores: Tensor
    ids: Tensor
    given_up: Tensor


@dataclass(frozen=True)
class Sketch:
    """The coordinates of references in a subspace, and how far they are from it.

    Attributes:
        basis: (D, R), orthonormal up to rounding.
        coordinates: (n, R).
        rests: (n,) bounds of ‖r'‖ from above.
    """

    basis: Tensor
    coordinates: Tensor
    rests: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, vectors: Tensor, scoring: Scoring) -> Sketch:
        """The sketch of references (n, D) in float32, read twice; 4·R + 4 bytes a reference."""
        basis = _basis(vectors, scoring.radius)
        coordinates = vectors.new_empty(len(vectors), basis.shape[1])
        squares = torch.empty(len(vectors), dtype=torch.float64, device=vectors.device)
        for start in range(0, len(vectors), _READ_ROWS):
            rows, found = vectors[start : start + _READ_ROWS], coordinates[start : start + _READ_ROWS]
            product(rows, basis.T, None, found, "float32")
            squares[start : start + _READ_ROWS] = _squares(rows) - _squares(found)
        # Rounded coordinates leave this much of a square uncertain.
        slack = 4 * dot_error(vectors.shape[1], vectors.dtype) * scoring.radius**2
        return cls(basis, coordinates, (squares.clamp_min_(0) + slack).sqrt_().to(vectors.dtype))

    def candidates(
        self,
        vectors: Tensor,
        scoring: Scoring,
        queries: Tensor,
        k: int,
        m: int,
        rows: int,
        look: Callable[[int, Tensor], None],
    ) -> Candidates:
        """The m ≥ k least scores of each query, (B, D), and whose they are.

        Args:
            vectors: the references.
            rows: how many of them to score at a time.
            look: is shown the estimated scores (rows + 1, B) of the references from a first one on; the last row
                is PAD.
        """
        placed = scoring.place(queries)
        slack = (_SLACK * scoring.error(queries) * scoring.scale).to(placed.dtype)
        best = Best(len(queries), min(len(vectors), _WIDE * m), placed)
        for start, lower in self._bounds(placed, scoring.bias, rows, look):
            best.update(lower, start)
        bounds, order = best.values.sort(1)
        ids = best.ids.gather(1, order)
        kth = torch.stack(scores_of(vectors, scoring.bias, placed, list(ids[:, :m]))).kthvalue(k, 1).values
        reach = kth + slack
        within = (bounds <= reach[:, None]).sum(1)
        near = [row[: max(m, count)] for row, count in zip(ids, within.tolist(), strict=True)]
        more = (within == ids.shape[1]).nonzero()[:, 0]
        given_up = torch.zeros(len(queries), dtype=torch.bool)
        if ids.shape[1] < len(vectors) and len(more):
            everyone = self._within(placed[more], scoring.bias, reach[more], rows)
            for row, found in zip(more.tolist(), everyone, strict=True):
                given_up[row] = len(found) * LEAST_GAIN > len(vectors)
                near[row] = near[row] if given_up[row] else found
        scores = pad_sequence(scores_of(vectors, scoring.bias, placed, near), True, math.inf)
        scores, kept = scores.topk(m, dim=1, largest=False)
        ids = pad_sequence(near, True, MISSING).gather(1, kept)
        return Candidates(scores.minimum(reach[:, None]), ids, given_up.nonzero()[:, 0])

    def _bounds(
        self, placed: Tensor, bias: Tensor | None, rows: int, look: Callable[[int, Tensor], None] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(first row, bounds from below (rows, B)) of the scores of each chunk of so many rows."""
        width = width_of(len(placed))
        short = placed.new_zeros(width, self.basis.shape[1])
        product(placed, self.basis.T, None, short[: len(placed)], "float32")
        # What rounding leaves uncertain of a square, as for the references.
        whole = _squares(placed)
        rests = (whole - _squares(short[: len(placed)])).clamp_min_(0)
        rests = (rests + 4 * dot_error(placed.shape[1], placed.dtype) * whole).sqrt_().to(placed.dtype)
        with SCRATCH.lend(rows + 1, width, placed) as buffer:
            for start in range(0, len(self.coordinates), rows):
                chunk = self.coordinates[start : start + rows]
                beside = None if bias is None else bias[start : start + rows]
                product(chunk, short, beside, buffer[: len(chunk)], "float32")
                buffer[len(chunk)] = PAD
                scores = buffer[: len(chunk) + 1, : len(placed)]
                if look is not None:
                    look(start, scores)
                yield start, scores[:-1].addr_(self.rests[start : start + rows], rests, alpha=-1)

    def _within(self, placed: Tensor, bias: Tensor | None, reach: Tensor, rows: int) -> list[Tensor]:
        """The ids of all references whose bound is at most `reach` (B,), for each query."""
        found: list[list[Tensor]] = [[] for _ in placed]
        for start, lower in self._bounds(placed, bias, rows):
            for ids, row in zip(found, (lower <= reach).T.contiguous(), strict=True):
                ids.append(row.nonzero()[:, 0] + start)
        return [torch.cat(ids) for ids in found]


def scores_of(vectors: Tensor, bias: Tensor | None, placed: Tensor, ids: list[Tensor]) -> list[Tensor]:
    """The scores of some references for each query: ids of B rows, of any length and each once → their scores."""
    counts, wanted = [len(row) for row in ids], torch.cat(ids)
    scores = chosen_products(vectors, placed, wanted, torch.tensor([0, *counts]).cumsum(0))
    return list((scores if bias is None else scores + bias[wanted]).split(counts))


def _basis(vectors: Tensor, radius: float) -> Tensor:
    sample = vectors[:: -(-len(vectors) // _SAMPLE)] / (radius or 1.0)
    generator = torch.Generator().manual_seed(0)
    dim = vectors.shape[1]
    basis = torch.randn(dim, min(RANK, dim // _SHORTER), generator=generator, dtype=vectors.dtype)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(sample.T @ (sample @ basis)).Q
    return basis


def _squares(rows: Tensor) -> Tensor:
    return rows.double().square_().sum(1)
