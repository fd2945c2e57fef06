"""What ASK costs against the number of references, of classes and of dimensions: what its authors leave open.

Time does not depend on what the references are, so they are random numbers, and the network is a random linear map of
the digits. As released, the loss compares with the K nearest references of every class; the one here compares with the
means of the nearest classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from robustknn import rng
from robustknn.classifiers import KNN
from robustknn.features import FeatureExtractor
from robustknn.objectives import ASK
from robustknn.objectives.base import BatchObjective, BoundObjective
from robustknn.reference import ReferenceSet
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.experiment import Cell, Experiment, Part, Presets, experiments

if TYPE_CHECKING:
    from robustknn.reports.figures import Chart

OBJECTIVES = {"as released": ASK.published(metric="cosine", temperature=0.01), "here": ASK()}
DECISION = "decision, ms"
NEIGHBORS, PIXELS, LAYER = 5, 64, "1"
AXES = ("references", "classes", "dimensions")
_MOST = {"cpu": (100_000, 1000, 4096), "paper": (1_000_000, 1000, 4096)}
_BASE = (20_000, 10, 512)
_LADDERS = ((1000, 10_000, 100_000, 1_000_000), (10, 100, 1000), (64, 512, 4096))


@experiments.register("ask-scale")
class ASKScale(Experiment):
    """Milliseconds and kilobytes an image."""

    paper, table = "ASK (arXiv 2106.14300)", "its cost"
    title = "What the decision, the guides of ASK and a gradient step cost, by references, classes and dimensions"
    data = ("digits",)
    presets: ClassVar[Presets] = {
        name: {"images": 64, "repeats": 5, **{f"most_{axis}": top for axis, top in zip(AXES, tops, strict=True)}}
        for name, tops in _MOST.items()
    }

    def parts(self, bench: Bench) -> list[Part]:
        return [
            Part(_said(at), 1 + at[0] * at[2] * 1e-7 + at[1] * at[2] * 1e-5, lambda _, at=at: measure(bench, *at))  # type: ignore[misc]
            for at in dict.fromkeys(at for axis in range(len(AXES)) for at in settings(bench.settings.options, axis))
        ]

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        made = []
        for row, held in found.items():
            for column in columns():
                unit = column.rpartition(", ")[2]
                made.append(Cell.mean(row, column, held[column], unit))
        return made

    def draw(self, record: Mapping[str, Any]) -> list[Chart]:
        rows = {(r["row"], r["column"]): r for r in record["rows"]}
        charts = []
        for axis, name in enumerate(AXES):
            held = settings(record["options"], axis)
            lines = {
                column.removesuffix(", ms"): [(at[axis], rows[_said(at), column]["mean"]) for at in held]
                for column in columns()
                if column.endswith("ms")
            }
            charts.append(_chart(name, lines))
        return charts


def settings(options: Mapping[str, Any], axis: int) -> list[tuple[int, int, int]]:
    """References, classes and dimensions, one of them on its ladder and the others at their base or below."""
    most = tuple(int(options[f"most_{name}"]) for name in AXES)
    base = tuple(min(usual, top) for usual, top in zip(_BASE, most, strict=True))
    made = []
    for value in _LADDERS[axis]:
        if value <= most[axis]:
            at = [*base]
            at[axis] = value
            made.append((at[0], at[1], at[2]))
    return made


def columns() -> list[str]:
    """What is measured, with its unit at the end."""
    parts = ("guides", "gradient step", "memory of guides")
    return [
        DECISION,
        *(f"{part} {said}, {'kB' if 'memory' in part else 'ms'}" for said in OBJECTIVES for part in parts),
    ]


def _said(at: Sequence[int]) -> str:
    return "{:,} references, {:,} classes, {:,} dimensions".format(*at)


def measure(bench: Bench, references: int, classes: int, dimensions: int) -> dict[str, list[float]]:
    """Every column's numbers, one a repeat, per image."""
    x, classifier = _victim(bench, references, classes, dimensions)
    y = torch.arange(len(x), device=x.device) % classes
    found: dict[str, list[float]] = {column: [] for column in columns()}
    for repeat in range(bench["repeats"] + 1):
        row = {DECISION: _milliseconds(lambda: classifier.look(x), bench) / len(x)}
        for said, objective in OBJECTIVES.items():
            bound = objective.bind(classifier)
            batch = bound.start(x, y, None, classifier.look(x, bound.requests))

            def look(bound: BoundObjective = bound) -> None:
                bound.start(x, y, None, classifier.look(x, bound.requests))

            def step(batch: BatchObjective = batch) -> None:
                moved = x.detach().requires_grad_(True)
                torch.autograd.grad(batch.loss(moved).sum(), moved)

            row[f"guides {said}, ms"] = _milliseconds(look, bench) / len(x)
            row[f"gradient step {said}, ms"] = _milliseconds(step, bench) / len(x)
            row[f"memory of guides {said}, kB"] = _size(batch) / 1000 / len(x)
        if repeat:  # the first warms up
            for column, value in row.items():
                found[column].append(round(value, 6))
    return found


def _victim(bench: Bench, references: int, classes: int, dimensions: int) -> tuple[Tensor, KNN]:
    """Inputs (B, 1, 8, 8), and a kNN over random references on a random linear map."""
    split = bench.source().test
    x = split.batch(torch.arange(min(bench["images"], len(split)))).to(bench.device)
    model = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, dimensions, bias=False)).eval().requires_grad_(False)
    with torch.no_grad():
        model[1].weight.copy_(_normal(dimensions, PIXELS, bench.seed, "map"))  # type: ignore[operator]
    model.to(bench.device)
    vectors = _normal(references, dimensions, bench.seed, "references").to(bench.device)
    labels = torch.arange(references) % classes
    held = ReferenceSet({LAYER: vectors}, labels, n_classes=classes, features=FeatureExtractor(model, [LAYER]))
    return x, KNN(held, NEIGHBORS, metric="cosine")


def _normal(rows: int, width: int, seed: int, purpose: str) -> Tensor:
    return rng.normal(torch.arange(rows), (width,), seed, "ask scale", purpose)


def _milliseconds(work: Callable[[], Any], bench: Bench) -> float:
    began = time.perf_counter()
    work()
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def _size(batch: Any) -> int:
    """Bytes of the tensors of a batch's guides."""
    parts = [part for guides in batch._parts for part in (guides, guides.rows)]
    # What the index holds in any case does not count.
    held = [getattr(part, field.name) for part in parts for field in fields(part) if field.name != "stored"]
    return sum(value.nbytes for value in held if isinstance(value, Tensor))


def _chart(axis: str, lines: Mapping[str, Sequence[tuple[int, float]]]) -> Chart:
    """Milliseconds an image on logarithmic axes."""
    from matplotlib.ticker import LogLocator

    from robustknn.reports.figures import PALETTE, chart_of, figure_of
    from robustknn.reproduce.figures import COLUMN, plain_numbers

    with figure_of(axis, 2.3 + 0.2 * len(lines), COLUMN) as (figure, axes):
        for place, (name, points) in enumerate(lines.items()):
            x, y = zip(*points, strict=True)
            axes.loglog(x, y, color=PALETTE[place], marker="os^Dv"[place], label=name)
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.set(xlabel=axis, ylabel="ms an image")
        axes.set_title(f"Cost of ASK by {axis}")
        figure.legend(loc="outside lower left", ncols=1)
        return chart_of(figure, axis, f"Milliseconds an image against {axis}: {', '.join(lines)}.")
