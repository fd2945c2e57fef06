"""A directory of certificates → one HTML page and its figures: certified accuracy, beside what attacks left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from robustknn._version import __version__
from robustknn.errors import InputError, IntegrityError
from robustknn.evaluation import CertificateDirectory, CertificatesSummary, read_certificates
from robustknn.evaluation.certificates import CertificateCell
from robustknn.evaluation.certified import AttackedPoint, CertificateSummary, whole_rows
from robustknn.reports.figures import INK, PALETTE, Chart, chart_of, dots, figure_of, line
from robustknn.reports.neighbors import Budget
from robustknn.reports.page import inlined, render, slug, write_page
from robustknn.reports.words import visible

_MOST_STEPS = 400
_FIGURE_BUDGET = 1_000_000


def write_certificates(run: CertificateDirectory | str | Path) -> Path:
    """Write `report.html` and `figures/` into a folder of certificates; from the folder alone, the same bytes again.

    Args:
        run: the run or its folder; `robustknn.evaluation.finish_certificates` has written its summary.

    Returns:
        The path of `report.html`.

    Raises:
        InputError: the folder holds no finished certificates.
        IntegrityError: a file is altered, or the summary is of other rows.
    """
    run = CertificateDirectory.of(run)
    for file, missing in (("run.json", "no certificates"), ("summary.json", "no summary yet")):
        if not (run.path / file).is_file():
            raise InputError(f"{str(run.path)!r} holds {missing}; pass the folder that robustknn certify wrote.")
    summary = read_certificates(run)
    if summary.run != run.key:
        raise IntegrityError(
            f"summary.json in {str(run.path)!r} is of another run; write it again with robustknn report."
        )
    charts = _charts(run, summary)
    page = render("certificates.html.j2", _context(run, summary, charts))
    return write_page(run.path, page, charts)


def _context(run: CertificateDirectory, summary: CertificatesSummary, charts: list[Chart]) -> dict[str, Any]:
    plan, environment = run.header["plan"], run.environment
    drawn = Budget(_FIGURE_BUDGET)
    every = [(c.name, found) for c in summary.classifiers for found in c.certificates]
    return {
        "summary": summary,
        "data": plan["describe"].get("data") or "",
        "certificates": every,
        "violations": sum(a.violations for _, found in every for a in found.attacked),
        "compared": sum(len(found.attacked) for _, found in every),
        "figures": inlined(charts, drawn),
        "figures_left_out": drawn.refused,
        "described": [(str(k), "not set" if v is None else str(v)) for k, v in plan["describe"].items()]
        + [("samples", f"{plan['samples']:,}"), ("seed", str(plan["seed"]))],
        "voters": [(name, plan["classifiers"][name]) for name in plan["classifier_names"]],
        "scored": {name: len(run.positions(name)) for name in plan["classifier_names"]},
        "command": environment.get("command", ""),
        "environment": [
            *((k, str(environment[k])) for k in ("device", "machine", "system", "threads") if k in environment),
            *((str(k), str(v)) for k, v in environment.get("versions", {}).items()),
        ],
        "identity": [*run.header["identity"].items(), ("all of it", run.key)],
        "version": __version__,
    }


def _charts(run: CertificateDirectory, summary: CertificatesSummary) -> list[Chart]:
    """A chart for every classifier and unit: what is measured alike is drawn on one axis, nothing else is."""
    charts = []
    for i, c in enumerate(summary.classifiers, 1):
        for j, unit in enumerate(dict.fromkeys(found.unit for found in c.certificates), 1):
            alike = [found for found in c.certificates if found.unit == unit]
            charts.append(certified_chart(run, c.name, alike, f"certified-{i}-{slug(c.name)}-{j}"))
    return charts


def certified_chart(run: CertificateDirectory, classifier: str, found: list[CertificateSummary], stem: str) -> Chart:
    """Certified accuracy against the radius as a step, what is known to break above it, and attacks as points.

    Args:
        found: the certificates of one classifier that are measured in one unit.
    """
    attacks = _by_attack(found)
    with figure_of(stem, 2.7 + 0.2 * (len(found) + len(attacks))) as (figure, axes):
        for place, certificate in enumerate(found):
            rows = whole_rows(run, CertificateCell(classifier, certificate.certifier))
            right = rows["decision"] == rows["label"]
            color = PALETTE[place % len(PALETTE)]
            x, y = _steps(np.where(right, rows["radius"], -1.0), inclusive=True)
            axes.step(x, y, where="pre", color=color, label=f"certified: {visible(certificate.certifier, 24)}")
            if "upper" in rows and not _whole(rows):
                x, y = _steps(np.where(right, rows["upper"], 0.0), inclusive=False)
                axes.step(x, y, where="pre", color=color, linestyle=(0, (2, 2)), label="broken above this line")
        clean = found[0].clean_accuracy, found[0].clean_accuracy_interval
        for place, (attack, points) in enumerate(attacks.items(), len(found)):
            marks = [(0.0, *clean), *((p.eps, p.robust_accuracy, p.robust_accuracy_interval) for p in points)]
            line(axes, marks, place, f"attacked: {visible(attack, 24)}")
        dots(axes, [(0.0, *clean)], color=INK, marker="o", linestyle="none", label="right without attack")
        axes.set(ylim=(0, 101), xlim=(0, None), xlabel=visible(found[0].unit, 60), ylabel="% of samples")
        axes.margins(x=0.03)
        axes.set_title(visible(classifier, 32))
        figure.legend(loc="outside lower left", ncols=1)
        return chart_of(
            figure, stem, f"Accuracy that is certified for {visible(classifier)}, by {visible(found[0].unit)}."
        )


def _by_attack(found: list[CertificateSummary]) -> dict[str, list[AttackedPoint]]:
    """The points of each attack by radius; they are the same beside every certificate of a classifier."""
    points: dict[str, list[AttackedPoint]] = {}
    for p in sorted(found[0].attacked, key=lambda p: p.eps):
        points.setdefault(p.attack, []).append(p)
    return points


def _whole(rows: dict[str, Any]) -> bool:
    """Whether certificates count references: then nothing lies between a radius and the next number."""
    finite = rows["radius"][np.isfinite(rows["radius"])]
    return bool((finite == np.round(finite)).all())


def _steps(radii: Any, inclusive: bool) -> tuple[list[float], list[float]]:
    """Where the share of samples with radius ≥ r (or > r) falls, and that share in % up to there.

    Of more than a few hundred steps only some are drawn, with the lower curve never too high, the upper never too low.
    """
    n = len(radii)
    finite = np.unique(radii[np.isfinite(radii) & (radii > 0)])
    if len(finite) > _MOST_STEPS:
        finite = finite[np.unique(np.linspace(0, len(finite) - 1, _MOST_STEPS).round().astype(int))]
    x = [0.0, *finite.tolist(), 1.02 * (float(finite[-1]) if len(finite) else 1.0)]
    y = [np.sum(radii >= r) for r in x] if inclusive else [np.sum(radii > r) for r in [0.0, *x[:-1]]]
    return x, [100 * float(count) / n for count in y]
