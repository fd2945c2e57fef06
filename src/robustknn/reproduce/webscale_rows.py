"""What the parts on the web-scale defense gave, as numbers of a table and points of a curve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from robustknn.evaluation.metrics import Bools, wilson, worst_case
from robustknn.reports.figures import Point
from robustknn.reproduce.experiment import WORST, Cell
from robustknn.reproduce.paired import Pair, unpacked
from robustknn.reproduce.webscale_victim import Victim

WEIGHTINGS = ("UW", "CBW-E", "CBW-D")
FGSM = ("clean", "black FGSM", "gray FGSM")
"""Columns that all images are measured on."""


def bits(row: Mapping[str, Any], key: str, name: str) -> Bools:
    """Which images a classifier gets right, (n,)."""
    return unpacked(row[key]["right"][name], row[key]["n"])


class Reader:
    """The rows of one experiment."""

    def __init__(self, victim: Victim, found: Mapping[str, Any]) -> None:
        self.victim, self.found = victim, found
        self.few = victim.few.numpy()
        self.main = {which.name: which for which in victim.attacks(curves=())}

    def right(self, part: str, column: str, name: str) -> Bools:
        """Which images a classifier gets right, by the name of a column."""
        return bits(self.found[part], self.main[column].key, name)

    def worst(self, part: str, name: str, attacked: str) -> Bools | None:
        """Which of the few images withstand everything at the main share; None where they were not attacked."""
        row = self.found.get(f"worst case, {attacked}")
        if row is None:
            return None
        others = []
        for column, which in self.main.items():
            held = self.right(part, column, name)
            others.append(held if which.few else held[self.few])
        return worst_case([unpacked(row["right"], row["n"]), *others])

    def cells(self, part: str, names: Mapping[str, str]) -> list[Cell]:
        """The lines of some classifiers.

        Args:
            part: which part measured them.
            names: what each is called in the part's rows, by what it is called in the table.
        """
        made = []
        for shown, name in names.items():
            for column in self.main:
                held = self.right(part, column, name)
                made.append(Cell.share(shown, column, int(held.sum()), len(held)))
            standing = self.worst(part, name, shown)
            if standing is not None:
                made.append(Cell.share(shown, WORST, int(standing.sum()), len(standing), WORST))
        return made

    def curve(self, part: str, name: str, who: str, scene: str, kind: str = "FGSM") -> list[list[float]]:
        """Points (dissimilarity, right, n) of an attack, from the images themselves on."""
        clean = self.right(part, "clean", name)
        points = [[0.0, int(clean.sum()), len(clean)]]
        ending = "" if who == "black" else f", {scene}"
        for which in self.victim.attacks(curves=(kind,)):
            if which.who == who and which.kind == kind:
                held = bits(self.found[part], which.key, name)
                points.append([round(self.found[f"make {which.key}{ending}"], 6), int(held.sum()), len(held)])
        return sorted(points)

    def pairs(self, part: str, better: str, worse: str, columns: Sequence[str] = FGSM) -> list[Pair]:
        """Two classifiers of one part, by column."""
        return [
            Pair.of(better, worse, column, *(self.right(part, column, name) for name in (better, worse)))
            for column in columns
        ]

    def ordering(self, part: str, endings: Iterable[str]) -> list[Pair]:
        """CBW-D against CBW-E against UW, each on the same database (named by what follows the weighting)."""
        return [
            pair
            for ending in endings
            for worse, better in pairwise(WEIGHTINGS)
            for pair in self.pairs(part, better + ending, worse + ending)
        ]


def lines_of(curves: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, list[Point]]:
    """Points (x, right, n) as those of a chart, with intervals."""
    return {
        name: [(x, right / n, wilson(int(right), int(n))) for x, right, n in points]
        for name, points in curves.items()
        if points
    }


def point(x: float, held: Bools) -> list[float]:
    """A point (x, right, n) of a curve."""
    return [x, int(np.sum(held)), len(held)]
