"""Progress of long work, with the time left: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol


class Progress(Protocol):
    """What long work reports to."""

    def start(self, what: str, total: int, done: int = 0) -> None: ...
    def advance(self, amount: int = 1) -> None: ...
    def rename(self, what: str) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Reports nothing; the default inside the library."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        return None

    def advance(self, amount: int = 1) -> None:
        return None

    def rename(self, what: str) -> None:
        return None

    def stop(self) -> None:
        return None


@dataclass
class _Work:
    """Some work: how much of it there is, is done, and was done when it began; `task` is its bar on a terminal."""

    what: str
    total: int
    done: int
    first: int
    began: float
    task: Any = None

    def speed(self) -> float:
        """How many a second, since the work was begun or gone on with."""
        spent = time.monotonic() - self.began
        return (self.done - self.first) / spent if spent > 0 else 0.0


class Console:
    """A rich progress bar when stderr is a terminal, else a line after 10 s, 20 s, 40 s … and every 2 minutes.

    Work begun within other work is shown beneath it, until it stops.
    """

    def __init__(self, first: float = 10.0, longest: float = 120.0) -> None:
        self._first_wait, self._longest, self._wait = first, longest, first
        self._bars: Any = None
        self._held: list[_Work] = []
        self._spoke = 0.0

    def start(self, what: str, total: int, done: int = 0) -> None:
        now = time.monotonic()
        work = _Work(what, total, done, done, now)
        self._held.append(work)
        self._spoke, self._wait = now, self._first_wait
        if sys.stderr.isatty():
            if self._bars is None:
                self._bars = _bars()
                self._bars.start()
            work.task = self._bars.add_task(what, total=total, completed=done, rate="")

    def advance(self, amount: int = 1) -> None:
        if not self._held:
            return
        work = self._held[-1]
        work.done += amount
        speed = work.speed()
        if work.task is not None:
            self._bars.update(work.task, advance=amount, rate=_rate(speed))
            return
        now = time.monotonic()
        if now - self._spoke >= self._wait:
            self._spoke, self._wait = now, min(2 * self._wait, self._longest)
            left = (work.total - work.done) / speed if speed > 0 else 0.0
            print(
                f"{work.what}: {work.done} of {work.total}, {_rate(speed)}, {_clock(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def rename(self, what: str) -> None:
        """Call the work that is going on something else, such as what it has come to."""
        if not self._held:
            return
        self._held[-1].what = what
        if self._held[-1].task is not None:
            self._bars.update(self._held[-1].task, description=what)

    def stop(self) -> None:
        if not self._held:
            return
        work = self._held.pop()
        if work.task is None:
            return
        self._bars.refresh()
        if self._held:
            self._bars.remove_task(work.task)
        else:
            self._bars.stop()
            self._bars = None

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._held:
            self.stop()


def _bars() -> Any:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=RichConsole(stderr=True),
        transient=True,
    )


def _rate(speed: float) -> str:
    """So many a second, to three figures."""
    return f"{speed:,.0f}/s" if speed >= 100 else f"{speed:.3g}/s"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
