"""What a benchmark found: figures with their bounds, a table of them, and a JSON file."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.timing import Ratio
from robustknn import store

DISTRIBUTIONS = ("torch", "numpy", "scikit-learn", "faiss-cpu", "usearch")
HEADER = (
    "| benchmark | figure | measured | median of pairs | bound | met |",
    "|---|---|---:|---:|---:|---|",
)


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        what: what it is, with its unit.
        value: of the least times, where it was timed.
        median: of neighboring runs, where it was timed.
        bound: what it may be; None promises nothing.
        at_least: the bound is a lower one.
        pairs: the figure of every pair of neighboring runs.
    """

    what: str
    value: float
    median: float | None = None
    bound: float | None = None
    at_least: bool = False
    pairs: Sequence[float] = ()

    @classmethod
    def of(cls, what: str, ratio: Ratio, bound: float | None = None) -> Figure:
        """A ratio of times."""
        return cls(what, ratio.least, ratio.median, bound, False, ratio.pairs)

    @property
    def met(self) -> bool | None:
        """Whether the bound holds; None when there is none."""
        if self.bound is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound


@dataclass(frozen=True)
class Result:
    """What one benchmark measured.

    Attributes:
        what: what is measured, in a sentence or two.
        repeats: how many times each thing was timed.
        figures: the numbers.
        settings: sizes and other facts needed to read them.
    """

    what: str
    repeats: int
    figures: Sequence[Figure]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether every bound holds."""
        return all(figure.met is not False for figure in self.figures)


def row(name: str, figure: Figure) -> str:
    """A figure as a row of the table."""
    median = "" if figure.median is None else f"{figure.median:.2f}"
    bound = "" if figure.bound is None else f"{'≥' if figure.at_least else '≤'} {figure.bound:.2f}"
    met = {None: "", True: "yes", False: "**MISSED**"}[figure.met]
    return f"| {name} | {figure.what} | {figure.value:.2f} | {median} | {bound} | {met} |"


def write(path: Path, name: str, result: Result, quick: bool, command: str | None = None) -> None:
    """Write a result with what it was measured on, and how: by `command`, or as one of `python -m benchmarks`."""
    import torch

    content = {
        "name": name,
        "what": result.what,
        "command": command or f"python -m benchmarks {name}{' --quick' if quick else ''}",
        "versions": versions(),
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "repeats": result.repeats,
        "settings": result.settings,
        "figures": [
            {
                "what": f.what,
                "value": round(f.value, 4),
                "median": None if f.median is None else round(f.median, 4),
                "bound": f.bound,
                "at_least": f.at_least,
                "met": f.met,
                "pairs": [round(p, 4) for p in f.pairs],
            }
            for f in result.figures
        ],
        "met": result.met,
    }
    store.write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> list[Figure]:
    """The figures of a written result."""
    entries = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return [Figure(**{k: v for k, v in entry.items() if k != "met"}) for entry in entries]


def versions() -> dict[str, str]:
    """Versions of Python, of this library and of those it is measured with."""
    from robustknn import __version__

    found = {"python": platform.python_version(), "robustknn": __version__}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu() -> str:
    """The processor's name, as far as the system tells."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
