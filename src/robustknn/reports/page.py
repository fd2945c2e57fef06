"""A run directory → one HTML page that needs nothing else, and its figures as files."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from robustknn import store
from robustknn._version import __version__
from robustknn.errors import InputError, IntegrityError
from robustknn.evaluation import Cell, RunDirectory, Summary, metrics, read_summary
from robustknn.evaluation.approximation import EXACTLY, engine
from robustknn.evaluation.detection import detect_at
from robustknn.evaluation.plan import BOTH, FRESH, PUBLISHED
from robustknn.evaluation.rundir import CLEAN
from robustknn.evaluation.summary import ClassifierSummary
from robustknn.reports import words
from robustknn.reports.checks import checks_of, signs_on
from robustknn.reports.explorer import explorer
from robustknn.reports.figures import Chart, accuracy_chart, credibility_chart
from robustknn.reports.neighbors import Budget, Shown, galleries
from robustknn.reports.pictures import LARGE, SMALL, kind_of
from robustknn.reports.provenance import setup_of
from robustknn.reports.roc import roc_chart
from robustknn.reports.svg import inline
from robustknn.reports.verdicts import verdicts_of
from robustknn.reports.words import visible

if TYPE_CHECKING:
    from jinja2 import Environment

SAMPLES = 6
IMAGE_BUDGET = 3_000_000
_FIGURE_BUDGET, _PAGE_BUDGET = 800_000, 4_700_000  # the rest of 5 MB is for the tables and the text
_NOUNS = {"image": ("image", "pixel"), "series": ("series", "value")}


def write_report(run: RunDirectory | str | Path, *, samples: int = SAMPLES, image_budget: int = IMAGE_BUDGET) -> Path:
    """Write `report.html`, `figures/*.svg` and `figures/*.png` into a finished run's folder.

    Everything comes from the folder: no model, data set or reference is opened and no figure counted again. The
    same run gives the same bytes.

    Args:
        run: the run or its folder; `robustknn.evaluation.finish` has written its summary.
        samples: how many samples of each classifier are shown beside their neighbors.
        image_budget: bytes of samples in the page, with their pictures; those that do not fit are left out, and the
            page says so.

    Returns:
        The path of `report.html`.

    Raises:
        InputError: the folder holds no run, or the run is not finished.
        IntegrityError: a file is altered, or the summary is of other rows.
    """
    if samples < 0 or image_budget < 0:
        raise InputError(f"samples and image_budget must be at least 0, not {samples!r} and {image_budget!r}.")
    run = RunDirectory.of(run)
    for file, missing in (
        ("run.json", "holds no run"),
        ("summary.json", "holds no summary yet"),
    ):
        if not (run.path / file).is_file():
            raise InputError(f"{str(run.path)!r} {missing}; pass the folder of a finished evaluation.")
    summary = read_summary(run)
    if summary.run != run.key:
        raise IntegrityError(
            f"summary.json in {str(run.path)!r} is of another run; write it again with robustknn report."
        )
    charts = _charts(run, summary)
    page = render("report.html.j2", _context(run, summary, charts, samples, image_budget))
    return write_page(run.path, page, chain.from_iterable(charts.values()))


# ------------------------------------------------------------------------------------------- contents


def _context(
    run: RunDirectory, summary: Summary, charts: dict[str, list[Chart]], samples: int, image_budget: int
) -> dict[str, Any]:
    plan = run.header["plan"]
    noun, unit = _NOUNS.get(_kind(run), ("sample", "value"))
    pictures, drawings = Budget(image_budget), Budget(_FIGURE_BUDGET)
    shown = galleries(run, summary, samples, pictures, _drawn_sample)
    drawn = {group: inlined(made, drawings) for group, made in charts.items()}
    room = _PAGE_BUDGET - (pictures.total - pictures.left) - (drawings.total - drawings.left)
    attacked = any(c.attacks for c in summary.classifiers)
    return {
        "summary": summary,
        "threat": summary.threat,
        "scored": plan["scored"],
        "noun": noun,
        "data": plan["describe"].get("data", ""),
        "verdicts": verdicts_of(plan, summary, noun, unit),
        "columns": [_columns(c) for c in summary.classifiers],
        "approximate": [c for c in summary.classifiers if c.approximation is not None],
        "exactly": EXACTLY,
        "randomized": [c for c in summary.classifiers if c.fresh_accuracy is not None],
        "fresh": FRESH,
        "both": BOTH,
        "checks": checks_of(plan, summary),
        "flagged": {
            (c.name, a.name): bool(signs_on(summary, c.name, a.name)) for c in summary.classifiers for a in c.attacks
        },
        "figures": drawn,
        "figures_left_out": drawings.refused,
        "galleries": shown,
        "explorer": explorer(run, summary, room, pictures.left) if attacked else None,
        "image_budget": image_budget,
        "sizes": (LARGE, SMALL),
        "setup": setup_of(run),
        "version": __version__,
    }


def _columns(c: ClassifierSummary) -> dict[str, Any]:
    """What was published beside what is left, of one classifier."""
    options = ", ".join(f"{k} {v}" for k, v in c.published_attack.items() if k != "name")
    return {
        "name": c.name,
        "clean": c.clean_accuracy,
        "published": next((a for a in c.attacks if a.role == PUBLISHED), None),
        "protocol": str(c.published_attack.get("name", "")) + (f" ({options})" if options else ""),
        "searched": c.searched,
        "worst": c.worst_case_accuracy,
        "interval": c.worst_case_accuracy_interval,
        "attacks": c.attacks,
    }


def _kind(run: RunDirectory) -> str:
    """What the inputs are, as far as the run kept any."""
    for classifier in run.header["plan"]["classifier_names"]:
        kept = run.tensors(Cell(classifier, CLEAN))
        if "x" in kept:
            return kind_of(tuple(kept["x"].shape[1:]))
    images = [v for k, v in run.gallery().items() if k.startswith("images ")]
    return kind_of(tuple(images[0].shape[1:])) if images else "other"


def _charts(run: RunDirectory, summary: Summary) -> dict[str, list[Chart]]:
    """Numbered file names: names of classifiers may differ in case alone, and file systems may not see it."""
    unit = words.norm(summary.threat)
    accuracy, credibility, detection = [], [], []
    for i, c in enumerate(summary.classifiers, 1):
        accuracy.append(accuracy_chart(c, f"accuracy-{i}-{slug(c.name)}", unit))
        clean = _credibility(run.rows(Cell(c.name, CLEAN)))
        detections = {}
        for j, a in enumerate(c.attacks, 1):
            rows = run.rows(Cell(c.name, a.name, a.eps))
            attacked = _credibility(rows)
            if clean is not None and attacked is not None:
                stem = f"credibility-{i}-{slug(c.name)}-{j}-{slug(a.name)}"
                credibility.append(credibility_chart(c, a, clean, attacked, stem))
                lost = _credibility(rows, metrics.fooled(rows))
                if a.rejection and lost is not None and len(lost):
                    at, shares = [r.threshold for r in a.rejection], [r.share for r in a.rejection]
                    detections[a.name] = detect_at(at, shares, clean, lost, suspicious="low")
        if detections:
            detection.append(roc_chart(detections, f"detection-{i}-{slug(c.name)}", visible(c.name, 32)))
    return {"accuracy": accuracy, "credibility": credibility, "detection": detection}


def _credibility(
    rows: Mapping[str, NDArray[Any]], where: NDArray[np.bool_] | None = None
) -> NDArray[np.float64] | None:
    """The credibility of the samples of a cell, or of some of them; None where there is none."""
    values = rows.get("credibility")
    if values is None:
        return None
    known = np.isfinite(values)
    chosen: NDArray[np.float64] = values[known if where is None else known & where]
    return chosen


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", name)[:40]


def inlined(charts: list[Chart], budget: Budget) -> list[tuple[str, str]]:
    """(SVG element, caption) of the charts that fit."""
    drawn = [(inline(c.svg, f"{c.stem}-", c.title), c.caption) for c in charts]
    return [(svg, caption) for svg, caption in drawn if budget.take(len(svg))]


# ---------------------------------------------------------------------------------------------- page


def write_page(folder: Path, page: str, charts: Iterable[Chart]) -> Path:
    """Write `figures/` and then `report.html` into a folder; the path of the page."""
    for chart in charts:
        store.write_bytes(folder / "figures" / f"{chart.stem}.svg", chart.svg)
        store.write_bytes(folder / "figures" / f"{chart.stem}.png", chart.png)
    store.write_text(folder / "report.html", page)
    return folder / "report.html"


def render(template: str, context: dict[str, Any]) -> str:
    """A page by one of the templates, with the style sheet and the script in it as far as it uses them."""
    from markupsafe import Markup

    templates = _templates()
    assert templates.loader is not None
    inside: dict[str, str] = {}
    for kind in ("css", "js"):
        source = templates.loader.get_source(templates, f"report.{kind}")[0]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        inside |= {kind: Markup(source), f"{kind}_sha256": digest}
    return templates.get_template(template).render(**inside, **context)


def _drawn_sample(view: Shown, attack: str, opened: bool, key: str) -> str:
    """A sample of a gallery as HTML; `key` names its chart within the page."""
    macros: Any = _templates().get_template("macros.html.j2").module
    html: str = macros.sample(view, attack, opened, key).strip()
    return html


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("robustknn.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {n: getattr(words, n) for n in ("name", "percent", "distance", "number", "visible")}
    environment.filters["engine"] = engine
    environment.globals |= {n: getattr(words, n) for n in ("plural", "radius", "norm", "LABEL", "LONG")}
    return environment
