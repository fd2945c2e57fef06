"""The least move into a cell of nearest neighbors: a quadratic program with a proof of how close the answer is.

min |d| such that x + d is as near to every inner reference as to any outer one. Each pair (n, p) is a half-space
⟨u, d⟩ ≥ e, u = (n − p)/|n − p| and e the signed distance of its bisector. Only violated pairs are ever taken up; any
multipliers λ ≥ 0 of the pairs taken up prove |d| ≥ ⟨λ, e⟩ / |Uᵀλ| for all solutions, so a run that is stopped early
still gives a bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_UNIT = float(np.finfo(np.float64).eps) / 2
_AT_ONCE = 6
"""Violated pairs taken up together."""


@dataclass(frozen=True)
class Box:
    """The least and greatest move allowed in every coordinate, (D,) each."""

    low: Array
    high: Array


@dataclass(frozen=True)
class Outer:
    """References that must be no nearer, (m, D), with their keys (m,), as `Scene` gives them."""

    rows: Array
    keys: Array


@dataclass
class Cell:
    """What is known of the least move into a cell.

    Attributes:
        lower: no shorter move leads into it.
        move: (D,) one that does, strictly; None where the search was stopped before.
    """

    lower: float
    move: Array | None = None

    @property
    def upper(self) -> float:
        """The length of the move; ∞ where there is none."""
        return np.inf if self.move is None else float(np.linalg.norm(self.move))


def least_move(
    inner: Outer,
    outer: list[Outer],
    target: Array,
    slack: float,
    cutoff: float = np.inf,
    box: Box | None = None,
    rounds: int = 300,
) -> Cell:
    """The least move into the cell of `inner`, until it is proved longer than `cutoff`.

    Args:
        inner: references that are to be nearest.
        outer: those that are not, in parts; a later part is looked at when no earlier one is violated.
        target: (D,) a move that leads into the cell, along which the answer is pushed off its boundary.
        slack: what the difference of two keys may be off by.
        cutoff: where to stop.
        box: bounds of the move.
        rounds: how often to take up pairs.
    """
    U, e, margins = np.zeros((0, inner.rows.shape[1])), np.zeros(0), np.zeros(0)
    multipliers, d, lower = np.zeros(0), np.zeros(inner.rows.shape[1]), 0.0
    taken: set[tuple[int, int, int]] = set()
    for _ in range(rounds):
        pairs = _violated(inner, outer, d, taken)
        if not pairs:
            break
        for part, s, p in pairs:
            u = inner.rows[s] - outer[part].rows[p]
            apart = float(np.linalg.norm(u))
            if apart > 0:  # a reference is as near as its own copy
                signed = (inner.keys[s] - outer[part].keys[p]) / (2 * apart)
                U, e = np.vstack([U, u / apart]), np.append(e, signed)
                margins, multipliers = np.append(margins, slack / (2 * apart)), np.append(multipliers, 0.0)
        taken.update(pairs)
        multipliers, d = _ascend(U, e, multipliers, box)
        lower = max(lower, _proved(U, e - margins, multipliers, box))
        if lower >= cutoff:
            return Cell(lower)
    return Cell(lower, _inside(inner, outer, d, target))


def _violated(inner: Outer, outer: list[Outer], d: Array, taken: set[Any]) -> list[tuple[int, int, int]]:
    """The pairs (part, inner, outer) that d violates most, of the first part where it violates any."""
    inside = inner.keys - 2 * inner.rows @ d
    for part, held in enumerate(outer):
        outside = held.keys - 2 * held.rows @ d
        worst = [int(s) for s in np.argsort(-inside)[:3]]
        best = outside.argsort() if len(outside) <= _AT_ONCE else np.argpartition(outside, _AT_ONCE)[:_AT_ONCE]
        scale = 1e-11 * (np.abs(outside).max() + np.abs(inside).max())
        found = [(part, s, int(p)) for s in worst for p in best if inside[s] > outside[p] + scale]
        new = sorted((pair for pair in found if pair not in taken), key=lambda t: outside[t[2]] - inside[t[1]])
        if new:
            return new[:_AT_ONCE]
    return []


def _ascend(U: Array, e: Array, multipliers: Array, box: Box | None) -> tuple[Array, Array]:
    """The multipliers of the pairs taken up, and the move: Newton's method projected onto λ ≥ 0 (Bertsekas, 1982)."""
    gram = U @ U.T
    tolerance = 1e-12 * max(1e-300, float(np.abs(e).max()))
    value, d = _dual(U, e, multipliers, box)
    for _ in range(100):
        slope = e - U @ d
        free = (multipliers > 0) | (slope > 0)
        if np.abs(slope[free]).max(initial=0.0) <= tolerance:
            break
        H = gram[np.ix_(free, free)] if box is None else _curvature(U[free], U.T @ multipliers, box)
        newton, steepest = np.zeros_like(multipliers), np.zeros_like(multipliers)
        newton[free] = np.linalg.solve(H + 1e-13 * len(H) * np.eye(len(H)), slope[free])
        steepest[free] = slope[free]  # where the curvature of this piece says nothing of the next
        found = _climb(U, e, multipliers, newton, value, box) or _climb(U, e, multipliers, steepest, value, box)
        if found is None:
            break
        multipliers, value, d = found
    return multipliers, d


def _climb(
    U: Array, e: Array, multipliers: Array, step: Array, value: float, box: Box | None
) -> tuple[Array, float, Array] | None:
    """The first of the halved steps that raises the dual value; None where none does."""
    share = 1.0
    while share > 1e-8:
        moved = np.maximum(0.0, multipliers + share * step)
        new_value, d = _dual(U, e, moved, box)
        if new_value > value:
            return moved, new_value, d
        share /= 2
    return None


def _dual(U: Array, e: Array, multipliers: Array, box: Box | None) -> tuple[float, Array]:
    """The dual value, a lower bound of ½|d|², and the move that attains it."""
    d = U.T @ multipliers
    if box is not None:
        d = np.clip(d, box.low, box.high)
    return float(0.5 * d @ d + multipliers @ (e - U @ d)), d


def _curvature(U: Array, unclipped: Array, box: Box) -> Array:
    free = U[:, (unclipped >= box.low) & (unclipped <= box.high)]
    return free @ free.T


def _proved(U: Array, e: Array, multipliers: Array, box: Box | None) -> float:
    """The length that multipliers prove of every move, rounded down."""
    if not multipliers.any():
        return 0.0
    weight, error = float(multipliers.sum()), 4.0 * _UNIT * (int(U.shape[1]) + len(e) + 8)
    lost = error * float(multipliers @ np.abs(e))
    if box is None:
        length = float(np.linalg.norm(U.T @ multipliers)) + error * weight
        return max(0.0, (float(multipliers @ e) - lost) / length)
    value, d = _dual(U, e, multipliers, box)
    length = float(np.linalg.norm(d))
    return math.sqrt(max(0.0, 2 * (value - lost - error * length * (length + weight))))


def _inside(inner: Outer, outer: list[Outer], d: Array, target: Array) -> Array | None:
    """The move pushed toward the target until it is in the cell beyond rounding; None where that takes too much."""
    for push in (0.0, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        moved = d + push * (target - d)
        inside = float((inner.keys - 2 * inner.rows @ moved).max())
        if all(inside <= float((held.keys - 2 * held.rows @ moved).min()) for held in outer if len(held.keys)):
            return moved
    return None
