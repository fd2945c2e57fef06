"""Paired outcomes: two classifiers on the same images, compared by those on which they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from robustknn.evaluation.metrics import Z95, Bools, mcnemar
from robustknn.reproduce.experiment import Cell

LEVEL = 0.05


def packed(right: Bools) -> str:
    """One bit an image, as hexadecimal text: what a part's row keeps."""
    return np.packbits(right.astype(bool)).tobytes().hex()


def unpacked(text: str, n: int) -> Bools:
    """The first n bits of what `packed` made."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=n)
    return bits.astype(bool)


@dataclass(frozen=True)
class Pair:
    """Whether `better` is right more often than `worse`, as a paper says.

    Attributes:
        better, worse: which classifiers.
        column: what both were measured on.
        gained: images on which only `better` is right.
        lost: images on which only `worse` is.
        n: images in all.
        p: one-sided exact McNemar.
        reverse: the same for the reverse.
    """

    better: str
    worse: str
    column: str
    gained: int
    lost: int
    n: int
    p: float
    reverse: float

    @classmethod
    def of(cls, better: str, worse: str, column: str, first: Bools, second: Bools) -> Pair:
        """The comparison of what is right (n,) for two classifiers."""
        gained, lost = int((first & ~second).sum()), int((second & ~first).sum())
        p, reverse = mcnemar(first, second), mcnemar(second, first)
        return cls(better, worse, column, gained, lost, len(first), p, reverse)

    @property
    def name(self) -> str:
        """What is compared; what both names end with is said once."""
        (first, _, ending), (second, _, other) = (name.partition(", ") for name in (self.better, self.worse))
        return f"{first} minus {second}, {ending}" if ending == other else f"{self.better} minus {self.worse}"

    def cell(self) -> Cell:
        """The difference in points of per cent, with the 95 % interval of Agresti & Min (Stat. Med. 24, 2005)."""
        n, gained, lost = self.n + 2, self.gained + 0.5, self.lost + 0.5
        middle = (gained - lost) / n
        half = Z95 * math.sqrt(max(gained + lost - (gained - lost) ** 2 / n, 0.0)) / n
        low, high = 100 * (middle - half), 100 * (middle + half)
        value = 100 * (self.gained - self.lost) / self.n
        return Cell(self.name, self.column, value, self.n, (low, high), unit="points")


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for being tested together (Holm, Scand. J. Stat. 6, 1979), in their order."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    made, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        made[place] = highest
    return made


def verdict(pairs: Sequence[Pair], what: str) -> str:
    """How often it came out as expected, in sentences."""
    found = holm([pair.p for pair in pairs] + [pair.reverse for pair in pairs])
    holds = [pair for pair, p in zip(pairs, found[: len(pairs)], strict=True) if p <= LEVEL]
    fails = [pair for pair, p in zip(pairs, found[len(pairs) :], strict=True) if p <= LEVEL]
    said = (
        f"{what}: of {len(pairs)} paired comparisons {len(holds)} show it, {len(fails)} the reverse, "
        f"and {len(pairs) - len(holds) - len(fails)} no difference (exact McNemar, Holm, 5 %)."
    )
    for name, chosen in (("In this direction", holds), ("Reversed", fails)):
        if chosen:
            said += f" {name}: {'; '.join(_shown(pair) for pair in chosen)}."
    return said


def _shown(pair: Pair) -> str:
    return f"{pair.better} over {pair.worse}, {pair.column} (only it right: {pair.gained}, only the other: {pair.lost})"
