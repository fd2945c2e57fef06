"""Figures of records, in the report's style at the width of a column: curves, histograms, matrices, galleries."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustknn.evaluation.transfer import Transferability
from robustknn.reports.figures import FILL, INK, PALETTE, Chart, Point, chart_of, figure_of, line, transfer_chart

if TYPE_CHECKING:
    from matplotlib.axis import Axis

COLUMN = 3.3
"""Inches: a column of a two-column paper."""
Rows = Mapping[tuple[str, str], Mapping[str, Any]]
_LEGEND = 0.2
_LOW = 20  # per cent: below it an axis up to 100 shows nothing


def rows_by_place(record: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """A record's rows by (row, column)."""
    return {(row["row"], row["column"]): row for row in record["rows"]}


def point(x: float, row: Mapping[str, Any]) -> Point:
    """A share of a record, in per cent there, as a point of a curve."""
    low, high = row["interval"] or (row["mean"], row["mean"])
    return x, row["mean"] / 100, (low / 100, high / 100)


def curves_chart(
    stem: str,
    title: str,
    lines: Mapping[str, Sequence[Point]],
    x_label: str,
    *,
    marks: Mapping[str, tuple[float, float]] | None = None,
    caption: str = "",
    log: bool = False,
    y_label: str = "right, % of samples",
) -> Chart:
    """Shares with 95 % intervals against something, a line for each name.

    Args:
        lines: points (x, share, interval), in order.
        marks: single points of papers, (x, per cent).
        log: the x axis is logarithmic.
    """
    marks = marks or {}
    with figure_of(stem, 2.3 + _LEGEND * (len(lines) + len(marks)), COLUMN) as (figure, axes):
        for place, (name, points) in enumerate(lines.items()):
            line(axes, list(points), place, name)
        for (name, (x, y)), marker in zip(marks.items(), "*PX", strict=False):
            axes.plot([x], [y], linestyle="none", marker=marker, markersize=8, color=INK, label=name, clip_on=False)
        axes.set(ylim=(0, _top(lines, marks)), xlabel=x_label, ylabel=y_label)
        if log:
            axes.set_xscale("log")
            plain_numbers(axes.xaxis)
        else:
            axes.set_xlim(0, None)
        axes.set_title(title)
        figure.legend(loc="outside lower left", ncols=1)
        return chart_of(figure, stem, f"{title}: one line each for {', '.join(lines)}.", caption)


def _top(lines: Mapping[str, Sequence[Point]], marks: Mapping[str, tuple[float, float]]) -> float:
    """Where an axis of shares ends, in per cent: at all of them, but where everything lies low, just above that."""
    ends = [100 * high for points in lines.values() for _, _, (_, high) in points] + [y for _, y in marks.values()]
    return 101 if max(ends, default=100) > _LOW else 1.1 * max(ends)


def plain_numbers(axis: Axis) -> None:
    """Numbers of a logarithmic axis as they are read, at its powers of ten: the style sets no mathematics."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def histogram_chart(
    stem: str,
    title: str,
    shares: Mapping[str, Sequence[float]],
    edges: Sequence[float],
    x_label: str,
    *,
    filled: bool = True,
) -> Chart:
    """Shares in per cent of every bin, outlined; the first, where it is what others are compared with, filled."""
    with figure_of(stem, 2.1 + _LEGEND * len(shares), COLUMN) as (figure, axes):
        for place, (name, heights) in enumerate(shares.items()):
            look: dict[str, Any] = (
                {"fill": True, "color": FILL}
                if filled and not place
                else {"color": PALETTE[place - filled], "linewidth": 1.6}
            )
            axes.stairs(heights, edges, label=name, **look)
        axes.set(xlim=(edges[0], edges[-1]), ylim=(0, None), xlabel=x_label, ylabel="% of samples")
        axes.set_title(title)
        figure.legend(loc="outside lower left", ncols=1)
        return chart_of(figure, stem, f"{title}: histograms of {', '.join(shares)}.")


def matrix_chart(stem: str, shares: Mapping[str, Mapping[str, float]], n: int) -> Chart:
    """Accuracy in per cent by what examples were made by (rows) and what they were scored on (columns)."""
    targets = tuple(next(iter(shares.values())))
    table = tuple(tuple(row[target] / 100 for target in targets) for row in shares.values())
    return transfer_chart(Transferability(tuple(shares), targets, table, n), stem, COLUMN)


def gallery_chart(
    stem: str,
    title: str,
    images: Sequence[Sequence[Any]],
    names: Sequence[str],
    heads: Sequence[str],
    caption: str = "",
) -> Chart:
    """Rows of small images with a word under each.

    Args:
        images: by row, (pixels, word, wrong): pixels (H, W) or (H, W, 3) 8-bit; wrong words are set off.
        names: of the rows.
        heads: of the columns.
    """
    rows, columns = len(images), max(len(row) for row in images)
    with figure_of(stem, 0.35 + rows * (COLUMN - 0.5) / columns * 1.32, COLUMN) as (figure, first):
        first.remove()
        grid = figure.subplots(rows, columns, squeeze=False)
        for r, row in enumerate(images):
            for c in range(columns):
                axes = grid[r][c]
                axes.set(xticks=[], yticks=[])
                axes.grid(visible=False)
                for side in ("left", "bottom"):
                    axes.spines[side].set_visible(False)
                if r == 0 and c < len(heads):
                    axes.set_title(heads[c], fontsize=7, loc="center", fontweight="normal")
                if c == 0:
                    axes.set_ylabel(names[r], fontsize=7, rotation=90)
                if c < len(row):
                    pixels, word, wrong = row[c]
                    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
                    look = {"color": PALETTE[1], "fontweight": "bold"} if wrong else {"color": INK}
                    axes.set_xlabel(word, fontsize=7, labelpad=1, **look)
        return chart_of(figure, stem, title, caption)


# ---------------------------------------------------------------------------------------- small images


def packed(images: Tensor) -> dict[str, Any]:
    """Images (n, C, H, W) in [0, 1] as 8-bit JSON: their shape and base64 of their bytes."""
    held = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return {"shape": list(held.shape), "base64": base64.b64encode(held.tobytes()).decode()}


def unpacked(held: Mapping[str, Any]) -> NDArray[np.uint8]:
    """The images of `packed`, (n, H, W) for one channel, else (n, H, W, C)."""
    images = np.frombuffer(base64.b64decode(held["base64"]), np.uint8).reshape(held["shape"])
    return images[..., 0] if images.shape[-1] == 1 else images


def histogram(values: Tensor, edges: Sequence[float]) -> list[float]:
    """Per cent of the values in every bin, rounded; what lies beyond the ends counts in the bins there."""
    inside = values.double().numpy().clip(edges[0], edges[-1])
    return [round(100 * float(v) / max(len(inside), 1), 3) for v in np.histogram(inside, edges)[0]]
