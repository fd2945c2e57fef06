"""Guides of Sitawarin & Wagner's losses found by sorting, one input at a time, for tests to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def distance(a: Array, b: Array, metric: str) -> float:
    """As the classifier measures: L2, 1 − cos, −⟨a, b⟩."""
    if metric == "ip":
        return float(-a @ b)
    if metric == "l2":
        return float(np.sqrt(((a - b) ** 2).sum()))
    return float(1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def sphere(a: Array, b: Array, metric: str) -> float:
    """The Euclidean distance, of unit vectors for cosine."""
    if metric == "cosine":
        a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return float(np.sqrt(((a - b) ** 2).sum()))


def nearest_of(z: Array, rows: Array, labels: Array, c: int, m: int, metric: str) -> list[int]:
    """The m references of class c nearest to z."""
    members = np.flatnonzero(labels == c)
    order = np.argsort([distance(z, rows[j], metric) for j in members], kind="stable")
    return [int(j) for j in members[order][:m]]


def other_class(layers: Sequence[tuple[Array, Array]], labels: Array, own: int, m: int, metric: str) -> int:
    """The class whose m nearest references are nearest in the mean, each layer's means divided by their average.

    Inner products are divided by the average of their sizes.
    """
    classes = np.unique(labels)
    ranking = np.zeros(len(classes))
    for z, rows in layers:
        means = np.array(
            [
                np.mean([distance(z, rows[j], metric) for j in nearest_of(z, rows, labels, int(c), m, metric)])
                for c in classes
            ]
        )
        ranking += means / np.abs(means).mean()
    ranking[own] = np.inf
    return int(np.argmin(ranking))
