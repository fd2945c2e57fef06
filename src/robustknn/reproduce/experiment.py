"""What an experiment is: one table or figure of a paper, as parts that are measured one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from robustknn import rng
from robustknn.evaluation.metrics import wilson
from robustknn.registry import Registry

if TYPE_CHECKING:
    from robustknn.reports.figures import Chart
    from robustknn.reproduce.bench import Bench

experiments: Registry[Any] = Registry("experiment", "robustknn.reproduce")

PUBLISHED = "published protocol"
"""A number measured by the attack of the paper."""
WORST = "adaptive worst case"
"""A number measured by `worst-case` on the classifier as it decides."""
_RESAMPLES = 2000

Presets = Mapping[str, Mapping[str, Any]]
Place = tuple[str, str]
"""A row and a column."""
Front = Mapping[str, tuple[Place, Place, Place]]
"""By method: clean, published protocol, worst case."""


@dataclass(frozen=True)
class Part:
    """A piece of work whose result is kept once it is whole.

    Attributes:
        key: its name, unique in the experiment.
        seconds: what is left of it on two cores of a plain CPU, from measured constants; 0 for what is done.
        run: does it, given a folder of its own for what must survive a kill inside; returns JSON.
    """

    key: str
    seconds: float
    run: Callable[[Path], Any]


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
        row, column: where it stands; the published number of the same place is shown beside it.
        value: in the unit.
        n: samples it was measured on.
        interval: 95 %, in the unit; None where nothing was sampled.
        protocol: PUBLISHED or WORST.
    """

    row: str
    column: str
    value: float
    n: int
    interval: tuple[float, float] | None = None
    protocol: str = PUBLISHED
    unit: str = "%"

    @classmethod
    def share(cls, row: str, column: str, right: int, n: int, protocol: str = PUBLISHED) -> Cell:
        """A share of n samples in per cent, with Wilson's interval."""
        low, high = wilson(right, n)
        return cls(row, column, 100 * right / n, n, (100 * low, 100 * high), protocol)

    @classmethod
    def mean(cls, row: str, column: str, values: Sequence[float], unit: str, protocol: str = PUBLISHED) -> Cell:
        """A mean over samples, with its interval by `bootstrap`."""
        mean, low, high = bootstrap(values)
        return cls(row, column, mean, len(values), (low, high), protocol, unit)


def bootstrap(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of a sample, and its 95 % interval by a counted percentile bootstrap of 2,000 draws."""
    held, n = torch.tensor(list(values), dtype=torch.float64), len(values)
    means = [
        float(held[(rng.uniform(torch.arange(n), (), draw, "bootstrap", dtype=torch.float64) * n).long()].mean())
        for draw in range(_RESAMPLES if n > 1 else 1)
    ]
    low, high = held.new_tensor(means).quantile(held.new_tensor([0.025, 0.975])).tolist()
    return float(held.mean()), low, high


class Experiment(ABC):
    """A table or figure of a paper. Subclasses are registered with `@experiments.register("paper-table2")`.

    Attributes:
        paper, table: where the published numbers stand.
        title: what it shows, in a sentence without its end.
        data: the data sets it can run on, as `robustknn.datasets.load` names them.
        presets: options by preset, JSON; `--set key=value` changes one. Every experiment has "cpu" and "paper".
        cuda: presets that are refused without a CUDA device.
        front: for the front page, by method: where its clean accuracy, its accuracy under the published protocol and
            its worst case stand.
        suite: the registered name of its worst case at strength "standard".
    """

    paper: ClassVar[str]
    table: ClassVar[str]
    title: ClassVar[str]
    data: ClassVar[tuple[str, ...]]
    presets: ClassVar[Presets]
    cuda: ClassVar[tuple[str, ...]] = ()
    front: ClassVar[Front] = {}
    suite: ClassVar[str] = "worst-case"

    @abstractmethod
    def parts(self, bench: Bench) -> list[Part]:
        """The work, in order. It must be quick: nothing is loaded before a part runs."""

    @abstractmethod
    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        """The numbers of the table, from what the parts gave, by key."""

    def pictures(self, bench: Bench, found: Mapping[str, Any]) -> dict[str, Any]:
        """What the figures need beside the table, as small JSON; of the first seed alone it is kept."""
        return {}

    def draw(self, record: Mapping[str, Any]) -> list[Chart]:
        """The figures of a record (one data set, all seeds); the same bytes for the same record."""
        return []
