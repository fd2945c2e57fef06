"""The chart of a sample's way to its example: the lead of the true class along the straight line between the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH, HEIGHT = 320, 120
_SIDE, _TOP, _BOTTOM = 40, 10, 26
_DOT = 3.2


@dataclass(frozen=True)
class WayChart:
    """Leads at evenly spaced points, the first of them of the sample, the last of its example.

    Attributes:
        leads: of the true class; below 0 another one leads.
        lost: the first point from which on another class leads to the end, None where none does at the end.
        decisions: the names of the classes decided for.
    """

    leads: Sequence[float]
    lost: int | None
    decisions: Sequence[str]

    @property
    def box(self) -> str:
        """The chart's `viewBox`."""
        return f"0 0 {WIDTH} {HEIGHT}"

    @property
    def line(self) -> str:
        """Path data of the line."""
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in self._points())

    @property
    def held(self) -> str:
        """Path data of the points at which the true class leads or is tied: dots."""
        return "".join(
            f"M{x - _DOT:.1f} {y:.1f}a{_DOT} {_DOT} 0 1 0 {2 * _DOT} 0a{_DOT} {_DOT} 0 1 0 {-2 * _DOT} 0z"
            for (x, y), lead in zip(self._points(), self.leads, strict=True)
            if lead >= 0
        )

    @property
    def lost_points(self) -> str:
        """Path data of the points at which another class leads: triangles."""
        side = 1.25 * _DOT
        return "".join(
            f"M{x:.1f} {y - side:.1f}l{side:.1f} {1.8 * side:.1f}h{-2 * side:.1f}z"
            for (x, y), lead in zip(self._points(), self.leads, strict=True)
            if lead < 0
        )

    @property
    def zero(self) -> float:
        """Where 0 lies, in the box."""
        return round(self._height(0.0), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(height, text) of the ends of the scale, without those that would touch the 0."""
        return [
            (round(self._height(v), 1), f"{v:.2g}".replace("-", "−"))
            for v in self._span()
            if abs(self._height(v) - self._height(0.0)) > 12
        ]

    @property
    def said(self) -> str:
        """The chart in a sentence."""
        steps = len(self.leads) - 1
        if self.lost is None:
            changed = "never below zero" if min(self.leads) >= 0 else "below zero in between, but not at the end"
        elif self.lost == 0:
            changed = "below zero from the start"
        elif self.lost == steps:
            changed = "below zero only there"
        else:
            changed = f"below zero from {100 * self.lost / steps:.0f} % of the way on"
        return f"lead {self.leads[0]:.2f} at the sample, {self.leads[-1]:.2f} at the example, {changed}".replace(
            "-", "−"
        )

    @property
    def decided(self) -> list[tuple[str, str]]:
        """(from where, decision) wherever the decision changes, the first at the sample."""
        steps = len(self.leads) - 1
        changes = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(self.decisions)) if a != b)]
        return [(f"{100 * i / steps:.0f} %", self.decisions[i]) for i in changes]

    def _span(self) -> tuple[float, float]:
        low, high = min(0.0, *self.leads), max(0.0, *self.leads)
        return (low, high) if high > low else (0.0, 1.0)

    def _height(self, lead: float) -> float:
        low, high = self._span()
        return _TOP + (high - lead) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def _points(self) -> list[tuple[float, float]]:
        steps = max(len(self.leads) - 1, 1)
        wide = WIDTH - _SIDE - 10
        return [(_SIDE + wide * i / steps, self._height(lead)) for i, lead in enumerate(self.leads)]
