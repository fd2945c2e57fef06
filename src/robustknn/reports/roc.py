"""The chart of a detector: detection against false alarms."""

from __future__ import annotations

from collections.abc import Mapping

from robustknn.errors import InputError
from robustknn.evaluation.detection import Detection
from robustknn.reports.figures import _DASHES, PALETTE, SOFT, Chart, chart_of, figure_of
from robustknn.reports.words import visible


def roc_chart(detections: Mapping[str, Detection], stem: str = "detection", classifier: str = "") -> Chart:
    """ROC curves by name, with the points that thresholds from calibration data reach.

    Args:
        detections: by the attack whose examples are to be detected.
        stem: the file's name.
        classifier: whose score detects, for the title.

    Raises:
        InputError: nothing to show.
    """
    if not detections:
        raise InputError("there is no detection to show; pass at least one, by name.")
    with figure_of(stem, 3.2 + 0.2 * len(detections)) as (figure, axes):
        for place, (name, found) in enumerate(detections.items()):
            color, dashes = PALETTE[place % len(PALETTE)], _DASHES[place % len(_DASHES)]
            label = f"{visible(name, 32)}, AUC {found.roc.auc:.2f}"
            curve = found.roc
            axes.plot(
                100 * curve.false_positive_rate,
                100 * curve.detection_rate,
                color=color,
                linestyle=dashes,
                label=label,
            )
            reached = [(100 * p.clean_rejected, 100 * p.detected) for p in found.points]
            axes.plot(*zip(*reached, strict=True), color=color, marker="o", linestyle="none", clip_on=False)
        axes.plot([0, 100], [0, 100], color=SOFT, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set(xlim=(0, 100), ylim=(0, 101), xlabel="clean rejected, %", ylabel="detected, %")
        if classifier:
            axes.set_title(classifier)
        figure.legend(loc="outside lower left", ncols=1)
        shares = ", ".join(f"{100 * p.share:g}" for p in next(iter(detections.values())).points)
        caption = f"Points: thresholds that reject {shares} % of the calibration samples."
        whose = f" by {classifier}" if classifier else ""
        title = f"Share of attacked inputs detected{whose} against share of clean inputs rejected."
        return chart_of(figure, stem, title, caption)
