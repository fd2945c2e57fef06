"""Progress of long work, with the time left: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Protocol


class Progress(Protocol):
    """What long work reports to."""

    def start(self, what: str, total: int, done: int = 0) -> None: ...
    def advance(self, amount: int = 1) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Reports nothing; the default inside the library."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        return None

    def advance(self, amount: int = 1) -> None:
        return None

    def stop(self) -> None:
        return None


class Console:
    """A rich progress bar when stderr is a terminal, else a line after 10 s, 20 s, 40 s … and every 2 minutes."""

    def __init__(self, first: float = 10.0, longest: float = 120.0) -> None:
        self._first_wait, self._longest, self._wait = first, longest, first
        self._bar: Any = None
        self._what, self._total, self._done, self._first = "", 0, 0, 0
        self._began = self._spoke = 0.0

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.stop()
        self._what, self._total, self._done, self._first = what, total, done, done
        self._began = self._spoke = time.monotonic()
        self._wait = self._first_wait
        if sys.stderr.isatty():
            from rich.console import Console as RichConsole
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as RichProgress

            bar = RichProgress(
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
            bar.start()
            self._bar = (bar, bar.add_task(what, total=total, completed=done, rate=""))

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, advance=amount, rate=_rate(self._speed()))
            return
        now = time.monotonic()
        if now - self._spoke >= self._wait:
            self._spoke, self._wait = now, min(2 * self._wait, self._longest)
            speed = self._speed()
            left = (self._total - self._done) / speed if speed > 0 else 0.0
            print(
                f"{self._what}: {self._done} of {self._total}, {_rate(speed)}, {_clock(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def _speed(self) -> float:
        """How many a second, since the work was begun or gone on with."""
        spent = time.monotonic() - self._began
        return (self._done - self._first) / spent if spent > 0 else 0.0

    def stop(self) -> None:
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _rate(speed: float) -> str:
    """So many a second, to three figures."""
    return f"{speed:,.0f}/s" if speed >= 100 else f"{speed:.3g}/s"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
