"""Accuracy under attack against accuracy without: a point for each layer, a line for each classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robustknn.reports.figures import PALETTE, Chart, chart_of, figure_of

Point = tuple[str, Mapping[str, Any], Mapping[str, Any]]
"""What stands at the point, and the rows of a record for x and y, in per cent."""
_MARKERS = "os^Dv"


def tradeoff_chart(stem: str, title: str, lines: Mapping[str, Sequence[Point]]) -> Chart:
    """Points with 95 % intervals both ways, each named, joined in order."""
    with figure_of(stem, 3.2) as (figure, axes):
        for place, (name, points) in enumerate(lines.items()):
            x, y = ([p[side]["mean"] for p in points] for side in (1, 2))
            reach = [[_reach(p[side], end) for p in points] for side in (1, 2) for end in (0, 1)]
            look = {"color": PALETTE[place % len(PALETTE)], "marker": _MARKERS[place % len(_MARKERS)]}
            axes.errorbar(
                x, y, xerr=reach[:2], yerr=reach[2:], elinewidth=1.1, capsize=2, linestyle=":", label=name, **look
            )
            for (label, *_), at in zip(points, zip(x, y, strict=True), strict=True):
                shift = (5, 4) if place else (5, -11)
                axes.annotate(label.removeprefix("layer "), at, xytext=shift, textcoords="offset points", fontsize=8)
        axes.set(xlabel="right without attack, %", ylabel="right under attack, %")
        axes.margins(0.12)
        axes.set_title(title, fontsize=9)
        figure.legend(loc="outside lower left", ncols=len(lines))
        named = "; ".join(
            f"{name}: " + ", ".join(f"{label} {p['mean']:.1f} and {q['mean']:.1f} %" for label, p, q in points)
            for name, points in lines.items()
        )
        return chart_of(figure, stem, title, f"Numbers at the points are layers. {named}.")


def _reach(row: Mapping[str, Any], end: int) -> float:
    interval = row["interval"]
    return 0.0 if interval is None else max(0.0, abs(float(interval[end]) - float(row["mean"])))
