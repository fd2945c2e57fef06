"""The one way of timing: two things in turn, again and again, and the ratio of their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Clock = Callable[[], float]
Task = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """How long one thing takes in units of another.

    Attributes:
        least: the quotient of the least times.
        median: the median of the quotients of neighboring runs.
        pairs: these quotients.
    """

    least: float
    median: float
    pairs: list[float]

    def times(self, factor: float) -> Ratio:
        """The same in another unit."""
        return Ratio(factor * self.least, factor * self.median, [factor * pair for pair in self.pairs])


def against(base: Task, cases: Mapping[str, Task], repeats: int, clock: Clock = time.process_time) -> dict[str, Ratio]:
    """Every case beside the base: base, case, base, case, …, after one run of each that does not count.

    Args:
        clock: by default the processor time of this process: on one thread it is the time taken, less what other
            processes on the machine were given meanwhile.
    """
    for task in (base, *cases.values()):
        task()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            times[name].append((seconds(base, clock), seconds(case, clock)))
    return {name: _ratio(pairs) for name, pairs in times.items()}


def seconds(task: Task, clock: Clock) -> float:
    """How long one run takes."""
    start = clock()
    task()
    return clock() - start


def _ratio(times: list[tuple[float, float]]) -> Ratio:
    pairs = [case / base for base, case in times]
    least = min(case for _, case in times) / min(base for base, _ in times)
    return Ratio(least, statistics.median(pairs), pairs)
