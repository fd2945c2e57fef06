"""The least L2 move that fools a kNN in input space, solved exactly: what no attack may beat.

Seen from x the decision of a kNN is constant on polyhedral cells (Yang et al., arXiv 1906.03310), so the least move
into a given cell is a convex quadratic program, {min ‖δ‖ : Gδ ≥ h}, and the least of all cells is the optimum.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Array = NDArray[np.float64]
Box = tuple[float, float] | None


def least_move(G: Array, h: Array) -> tuple[float, Array | None]:
    """min ‖δ‖ subject to Gδ ≥ h: a lower bound that a dual solution proves, and δ (inf and None if infeasible).

    A least distance problem is a non-negative least squares problem (Lawson & Hanson, 1974, ch. 23). Its multipliers
    u ≥ 0 prove ‖δ‖ ≥ ⟨u, h⟩ / ‖Gᵀu‖ for every feasible δ, whatever the solver's accuracy.
    """
    if (h <= 0).all():
        return 0.0, np.zeros(G.shape[1])
    rows = np.linalg.norm(G, axis=1)
    G, h = G / rows[:, None], h / rows
    scale = h.max()
    u, _ = nnls(np.vstack([G.T, h / scale]), np.append(np.zeros(G.shape[1]), 1.0), maxiter=50 * sum(G.shape))
    if 1.0 - (h / scale) @ u < 1e-12:
        return np.inf, None
    # The move once more from the constraints that hold with equality: the residual above has half of the digits.
    tight = u > 0
    delta = np.linalg.lstsq(G[tight], h[tight], rcond=1e-12)[0]
    multipliers = np.linalg.lstsq(G[tight].T, delta, rcond=1e-12)[0].clip(0)
    bound = multipliers @ h[tight] / np.linalg.norm(G[tight].T @ multipliers)
    return float(bound), (delta if (G @ delta - h).min() > -1e-9 * scale else None)


def box_rows(x: Array, bounds: Box) -> tuple[Array, Array]:
    """lo ≤ x + δ ≤ hi as rows of Gδ ≥ h."""
    if bounds is None:
        return np.zeros((0, len(x))), np.zeros(0)
    eye = np.eye(len(x))
    return np.vstack([eye, -eye]), np.concatenate([bounds[0] - x, x - bounds[1]])


def nearer(x: Array, to: Array, than: Array) -> tuple[Array, Array]:
    """‖x + δ − to‖ ≤ ‖x + δ − r‖ for every row r of `than`, as rows of Gδ ≥ h."""
    return 2 * (to - than), ((x - to) ** 2).sum() - ((x - than) ** 2).sum(1)


def one_nn(x: Array, y: int, references: Array, labels: NDArray[Any], bounds: Box = None) -> tuple[float, float]:
    """The least L2 move after which the nearest reference has another label: (proved lower bound, a move that does it).

    One program for every wrong reference: being nearer to it than to all references of class y is enough, whatever
    the other wrong ones do. Wrong references are tried by their distance to the bisector (the largest over the
    positives, Wang et al., arXiv 1906.03972), and dropped where that alone exceeds the best.
    """
    positives, negatives = references[labels == y], references[labels != y]
    gap = ((x - negatives) ** 2).sum(1)[:, None] - ((x - positives) ** 2).sum(1)
    apart = np.linalg.norm(negatives[:, None] - positives, axis=2)
    bisector = (gap / (2 * np.maximum(apart, 1e-300))).max(1).clip(0)
    room, wall = box_rows(x, bounds)
    lower, upper = np.inf, np.inf
    for j in np.argsort(bisector):
        if bisector[j] >= lower:
            break
        G, h = nearer(x, negatives[j], positives)
        bound, delta = least_move(np.vstack([G, room]), np.concatenate([h, wall]))
        if bound < lower:
            assert delta is not None, "a bound without a move that reaches it: the solver failed"
            lower, upper = bound, float(np.linalg.norm(delta))
    return lower, upper


def knn(x: Array, y: int, references: Array, labels: NDArray[Any], k: int) -> tuple[float, float]:
    """The least L2 move after which another class has strictly more of the k nearest: (proved lower bound, move).

    One program for every set of k references in which a wrong class leads: all its members nearer than all others.
    """
    cells = []
    for members in itertools.combinations(range(len(labels)), k):
        counts = np.bincount(labels[list(members)], minlength=labels.max() + 1)
        if np.delete(counts, y).max(initial=0) > counts[y]:
            others = np.delete(references, members, axis=0)
            rows = [nearer(x, references[i], others) for i in members]
            G, h = np.vstack([g for g, _ in rows]), np.concatenate([v for _, v in rows])
            cells.append(((h / np.linalg.norm(G, axis=1)).max(), G, h))
    lower, upper = np.inf, np.inf
    for alone, G, h in sorted(cells, key=lambda cell: float(cell[0])):
        if alone >= lower:  # one constraint of the cell costs as much as the best of all
            break
        bound, delta = least_move(G, h)
        if bound < lower:
            assert delta is not None, "a bound without a move that reaches it: the solver failed"
            lower, upper = bound, float(np.linalg.norm(delta))
    return lower, upper
