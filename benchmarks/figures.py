"""The figures of docs/certification from the kept results: `python -m benchmarks.figures [--out docs/images]`.

Nothing is measured here. The SVG files are committed; a test draws them again and compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from robustknn import store
from robustknn.evaluation.metrics import wilson
from robustknn.reports.figures import INK, PALETTE, Chart, chart_of, dots, figure_of, line

RESULTS = Path(__file__).parent / "results" / "reproduce"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
SOLID, BROKEN = "-", (0, (2, 2))


def _kept(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _points(x: Sequence[float], shares: Sequence[float], n: int) -> list[tuple[float, float, tuple[float, float]]]:
    """(x, share, 95 % interval) of shares of n samples."""
    return [(at, share, wilson(round(share * n), n)) for at, share in zip(x, shares, strict=True)]


def poisoning() -> Chart:
    """Certified accuracy against the number of references modified (whole line) or inserted (broken line)."""
    found = _kept("poisoning_cifar")
    with figure_of("certified-poisoning", 3.6) as (figure, axes):
        for place, (k, row) in enumerate(found["rows"].items()):
            color = PALETTE[place]
            for way, dash in (("modify", SOLID), ("insert", BROKEN)):
                label = f"k = {int(k):,}, {'modified' if way == 'modify' else 'inserted'}"
                points = _points(row["e"], row[f"poisoning-{way}"], found["n"])
                dots(axes, points, color=color, marker="o", linestyle=dash, label=label)
        axes.set(xscale="log", ylim=(0, 101), xlabel="references the attacker controls", ylabel="certified, %")
        axes.set_xticks(row["e"], [f"{e:,}" for e in row["e"]])
        axes.minorticks_off()
        axes.set_title("CIFAR-10, kNN on ResNet-20")
        figure.legend(loc="outside lower left", ncols=2)
        return chart_of(figure, "certified-poisoning", "Certified accuracy against the number of poisoned references.")


def raw(name: str) -> Chart:
    """What is certified, what an attack leaves and what is known to be broken, of a kNN on raw MNIST images."""
    found = _kept("certified_mnist")
    stem = f"certified-raw-{name[0]}nn"
    with figure_of(stem, 3.2) as (figure, axes):
        curves: Mapping[str, Sequence[float]] = found["rows"][name]["curves"]
        for place, (label, shares) in enumerate(curves.items()):
            line(axes, _points(found["radii"], shares, found["samples"]), place, label)
        clean = found["rows"][name]["clean"]
        dots(
            axes,
            _points([0.0], [clean], found["samples"]),
            color=INK,
            marker="o",
            linestyle="none",
            label="without attack",
        )
        axes.set(ylim=(0, 101), xlim=(0, None), xlabel="L2 radius, pixels in [0, 1]", ylabel="% of samples")
        axes.set_title(f"MNIST, {name} on raw images")
        figure.legend(loc="outside lower left", ncols=1)
        return chart_of(figure, stem, f"Certified and attacked accuracy of {name} on raw MNIST images by L2 radius.")


def smoothing(sigma: str) -> Chart:
    """What is certified (whole line) and what an attack leaves (broken) of smoothed decisions on MNIST."""
    found = _kept("smoothing_mnist")
    stem = f"certified-smoothing-{sigma}"
    named = {tuple(key.split(" ", 1)): row for key, row in found["rows"].items()}
    rows = {name: row for (held, name), row in named.items() if held == sigma and not name.startswith("embedding")}
    with figure_of(stem, 3.0 + 0.2 * len(rows)) as (figure, axes):
        for place, (name, row) in enumerate(rows.items()):
            for what, dash in (("certified", SOLID), ("attacked", BROKEN)):
                points = _points(row["radii"], row[what], row["n"])
                dots(axes, points, color=PALETTE[place], marker="o", linestyle=dash, label=f"{name}: {what}")
        axes.set(ylim=(0, 101), xlim=(0, None), xlabel="L2 radius, pixels in [0, 1]", ylabel="% of samples")
        axes.set_title(f"MNIST, smoothed with σ = {sigma}")
        figure.legend(loc="outside lower left", ncols=2)
        return chart_of(figure, stem, f"Certified and attacked accuracy of smoothed classifiers at σ {sigma}.")


def charts() -> Iterator[Chart]:
    """All of them."""
    yield poisoning()
    yield from map(raw, ("1-NN", "5-NN"))
    yield from map(smoothing, dict.fromkeys(key.split(" ", 1)[0] for key in _kept("smoothing_mnist")["rows"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES)
    folder = parser.parse_args(argv).out
    for chart in charts():
        store.write_bytes(folder / f"{chart.stem}.svg", chart.svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
