"""The charts of a report, in one style, as SVG and PNG files with the same bytes for the same run."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from robustknn.evaluation.summary import AttackSummary, ClassifierSummary
from robustknn.evaluation.transfer import Transferability
from robustknn.reports.words import distance, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, RULE, FILL = "#1c1f24", "#5b626c", "#d5d8dd", "#c3c8cf"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe & Ito's colors (jfly.uni-koeln.de/color, 2008), without the yellow, which is too faint on white."""
_MARKERS = ("o", "s", "^", "D", "v")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.2, 1.5)))

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": SOFT,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.dpi": 72,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a name with two dollar signs is a name
    "xtick.color": SOFT,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.color": SOFT,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 9,
    "ytick.major.size": 0,
}
_WIDTH = 4.5


@dataclass(frozen=True)
class Chart:
    """A finished figure.

    Attributes:
        stem: its file name without the ending.
        title: what it shows, for who cannot see it.
        caption: what the page writes under it, or "".
    """

    stem: str
    title: str
    caption: str
    svg: bytes
    png: bytes


def accuracy_chart(classifier: ClassifierSummary, stem: str, unit: str) -> Chart:
    """Accuracy against eps with 95 % intervals, a line for each attack, from the clean accuracy at eps 0.

    Args:
        unit: the norm, for the axis.
    """
    with figure_of(stem, 2.7 + 0.2 * len(classifier.attacks)) as (figure, axes):
        clean = (0.0, classifier.clean_accuracy, classifier.clean_accuracy_interval)
        for place, attack in enumerate(classifier.attacks):
            points = [(p.eps, p.robust_accuracy, p.robust_accuracy_interval) for p in attack.curve]
            points = points if points and points[0][0] == 0 else [clean, *points]
            line(axes, points, place, visible(attack.name, 32))
        if classifier.attacks:
            main = classifier.attacks[0].eps
            worst = [(main, classifier.worst_case_accuracy, classifier.worst_case_accuracy_interval)]
            axes.axvline(main, color=SOFT, linewidth=0.8, linestyle=(0, (1, 2)))
            if len(classifier.attacks) > 1:
                dots(axes, worst, color=INK, marker="*", markersize=9, linestyle="none", label="all attacks together")
        else:
            dots(axes, [clean], color=INK, marker="o", label="no attack")
        axes.set(ylim=(0, 101), xlim=(0, None), xlabel=f"eps ({unit})", ylabel="right, % of samples")
        axes.margins(x=0.03)
        axes.set_title(visible(classifier.name, 32))
        figure.legend(loc="outside lower left", ncols=1)
        return chart_of(figure, stem, f"Accuracy of {visible(classifier.name)} against eps, one line for each attack.")


def credibility_chart(
    classifier: ClassifierSummary,
    attack: AttackSummary,
    clean: NDArray[np.float64],
    attacked: NDArray[np.float64],
    stem: str,
) -> Chart:
    """Histogram of the credibility of samples without attack (filled) and attacked (outlined)."""
    edges = np.linspace(0, 1, 21)
    shares = [100 * np.histogram(v, edges)[0] / max(len(v), 1) for v in (clean, attacked)]
    with figure_of(stem, 2.4) as (figure, axes):
        axes.stairs(shares[0], edges, fill=True, color=FILL, label="without attack")
        axes.stairs(shares[1], edges, color=PALETTE[1], linewidth=1.8, label="attacked")
        axes.set(xlim=(0, 1), ylim=(0, None), xlabel="credibility", ylabel="% of samples")
        axes.set_title(f"{visible(classifier.name, 24)}, {visible(attack.name, 24)}")
        figure.legend(loc="outside lower left", ncols=2)
        title = f"Credibility of {visible(classifier.name)}, clean and under {visible(attack.name)}."
        means = (classifier.mean_credibility, attack.mean_credibility, attack.mean_credibility_success)
        caption = "Mean {} without attack, {} attacked, {} where the attack fooled the classifier.".format(
            *map(distance, means)
        )
        return chart_of(figure, stem, title, caption)


def transfer_chart(matrix: Transferability, stem: str = "transferability", width: float = _WIDTH) -> Chart:
    """Accuracy of every classifier (columns) on the examples made on every other (rows), as shades and numbers."""
    shares = 100 * np.asarray(matrix.accuracy)
    rows, columns = shares.shape
    with figure_of(stem, 1.2 + 0.34 * rows, width) as (figure, axes):
        shades = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto").to_rgba(shares)[..., :3]
        for row in range(rows):
            for column in range(columns):
                color = max("white", INK, key=partial(contrast, shades[row, column]))
                axes.text(column, row, f"{shares[row, column]:.1f}", ha="center", va="center", color=color)
        axes.set_xticks(range(columns), [visible(name, 16) for name in matrix.targets])
        axes.set_yticks(range(rows), [visible(name, 16) for name in matrix.sources])
        axes.set(xlabel="scored on", ylabel="made on")
        axes.grid(visible=False)
        # Over names and matrix: over a narrow matrix alone it would run out of the figure.
        size, weight = STYLE["axes.titlesize"], STYLE["axes.titleweight"]
        figure.suptitle(f"right, % of {matrix.n:,} samples", x=0, ha="left", size=size, weight=weight)
        return chart_of(figure, stem, "Accuracy of each classifier on the examples made on each of them.")


def contrast(one: Any, other: Any) -> float:
    """The contrast ratio of two colors by WCAG 2, from 1 to 21."""
    from matplotlib.colors import to_rgb

    def luminance(color: Any) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(color)]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


Point = tuple[float, float, tuple[float, float]]


def line(axes: Axes, points: list[Point], place: int, label: str) -> None:
    """Points with intervals, joined, in the color, marker and dash of a place."""
    dots(
        axes,
        points,
        color=PALETTE[place % len(PALETTE)],
        marker=_MARKERS[place % len(_MARKERS)],
        linestyle=_DASHES[place % len(_DASHES)],
        label=label,
    )


def dots(axes: Axes, points: list[Point], **look: Any) -> None:
    """Shares (x, share, interval) as points in % with their intervals."""
    x = [p[0] for p in points]
    y = np.array([100 * p[1] for p in points])
    low, high = (np.array([100 * p[2][side] for p in points]) for side in (0, 1))
    reach = [np.maximum(y - low, 0), np.maximum(high - y, 0)]
    axes.errorbar(x, y, yerr=reach, elinewidth=1.1, capsize=2, capthick=1.1, clip_on=False, **look)


@contextmanager
def figure_of(stem: str, height: float, width: float = _WIDTH) -> Iterator[tuple[Figure, Axes]]:
    """A figure in the report's style, the same bytes for the same stem and content; sizes in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # a user's matplotlibrc changes nothing
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": stem})
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def chart_of(figure: Figure, stem: str, title: str, caption: str = "") -> Chart:
    """A finished figure as SVG and PNG."""
    svg, png = io.BytesIO(), io.BytesIO()
    about = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # no date, no version: the same run, the same bytes
    figure.savefig(svg, format="svg", metadata=about)
    figure.savefig(png, format="png", metadata={"Software": None})
    return Chart(stem, title, caption, svg.getvalue(), png.getvalue())
