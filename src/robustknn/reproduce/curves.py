"""Curves of accuracy with intervals, in the style of the reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from robustknn.evaluation.metrics import wilson
from robustknn.reports.figures import Chart, chart_of, figure_of, line

Curve = Sequence[Sequence[float]]
"""Points (x, right, n)."""


def accuracy_curves(
    stem: str, title: str, caption: str, curves: Mapping[str, Curve], axis: str, head: str, *, log: bool = False
) -> Chart:
    """Accuracy against something, a line for each name, 95 % intervals.

    Args:
        stem, title, caption: of the `Chart`.
        curves: points (x, right, n) by name.
        axis: what x is.
        head: what stands over the chart.
        log: a logarithmic axis.
    """
    with figure_of(stem, 2.6 + 0.2 * len(curves)) as (figure, axes):
        for place, (name, points) in enumerate(curves.items()):
            shown = [(x, right / n, wilson(int(right), int(n))) for x, right, n in points]
            line(axes, shown, place, name)
        if log:
            axes.set_xscale("log")
        axes.set(ylim=(0, 101), xlabel=axis, ylabel="right, % of samples", title=head)
        axes.margins(x=0.03)
        figure.legend(loc="outside lower left", ncols=1)
        return chart_of(figure, stem, title, caption)
