"""Accuracy under attack against accuracy without: a point for each layer, a line for each classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from robustknn.reports.figures import PALETTE, Chart, chart_of, figure_of
from robustknn.reproduce.figures import COLUMN

_MARKERS = "os^Dv"


class Point(NamedTuple):
    """A point by what stands at it, and rows of a record for x and y, in per cent."""

    label: str
    x: Mapping[str, Any]
    y: Mapping[str, Any]


def tradeoff_chart(stem: str, title: str, lines: Mapping[str, Sequence[Point]]) -> Chart:
    """Points with 95 % intervals both ways, each named; those of single layers are joined in order."""
    with figure_of(stem, 3.0, COLUMN) as (figure, axes):
        for place, (name, points) in enumerate(lines.items()):
            color = PALETTE[place % len(PALETTE)]
            axes.errorbar(
                [p.x["mean"] for p in points],
                [p.y["mean"] for p in points],
                xerr=_reach([p.x for p in points]),
                yerr=_reach([p.y for p in points]),
                color=color,
                marker=_MARKERS[place % len(_MARKERS)],
                elinewidth=1.1,
                capsize=2,
                linestyle="none",
                label=name,
            )
            single = [p for p in points if "+" not in p.label]
            axes.plot([p.x["mean"] for p in single], [p.y["mean"] for p in single], color=color, linestyle=":")
            for point in points:
                right = place > 0 or point not in single
                axes.annotate(
                    point.label.removeprefix("layer").removeprefix("s").strip(),
                    (point.x["mean"], point.y["mean"]),
                    xytext=(5 if right else -5, 4 if place else -11),
                    ha="left" if right else "right",
                    textcoords="offset points",
                    fontsize=8,
                )
        axes.set(xlabel="right without attack, %", ylabel="right under attack, %")
        axes.margins(0.12)
        axes.set_title(title)
        figure.legend(loc="outside lower left", ncols=len(lines))
        named = "; ".join(
            f"{name}: " + ", ".join(f"{p.label} {p.x['mean']:.1f} and {p.y['mean']:.1f} %" for p in points)
            for name, points in lines.items()
        )
        said = f"Accuracy under attack against accuracy without, {title}."
        return chart_of(figure, stem, said, f"Numbers at the points are layers. {named}.")


def _reach(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """How far intervals reach below and above."""
    return [[0.0 if r["interval"] is None else abs(r["interval"][end] - r["mean"]) for r in rows] for end in (0, 1)]
