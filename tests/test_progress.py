"""Progress: a bar on a terminal, a line now and then elsewhere, with the time left."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from robustknn import progress
from robustknn.progress import Console, Progress, Silent


class Clock:
    """Time that passes when told."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    reporter: Progress = Silent()
    reporter.start("work", 10, 3)
    reporter.advance()
    reporter.advance(5)
    reporter.stop()
    assert capsys.readouterr() == ("", "")


def test_a_line_now_and_then_says_how_long_it_still_takes(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Console(first=10, longest=25) as console:
        console.start("reading", 100)
        for _ in range(20):
            clock.now += 6
            console.advance(5)
    out, err = capsys.readouterr()
    assert out == ""
    # 5 of 100 every 6 seconds: 120 seconds in all. A line after 10 seconds, then 20 later, then every 25.
    assert err.splitlines() == [
        "reading: 10 of 100, 0.833/s, 1:48 left",
        "reading: 30 of 100, 0.833/s, 1:24 left",
        "reading: 55 of 100, 0.833/s, 0:54 left",
        "reading: 80 of 100, 0.833/s, 0:24 left",
    ]


def test_what_was_done_before_does_not_count_for_the_speed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(first=1, longest=1)
    console.start("attacking", 1000, done=900)
    clock.now += 10
    console.advance(10)
    assert capsys.readouterr().err == "attacking: 910 of 1000, 1/s, 1:30 left\n"
    console.start("again", 10)  # a new piece of work begins anew
    clock.now += 1
    console.advance(5)
    assert capsys.readouterr().err == "again: 5 of 10, 5/s, 0:01 left\n"


def test_work_within_work_is_told_by_itself(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(first=1, longest=1)
    console.start("scoring", 100)
    console.start("reading", 50)
    clock.now += 10
    console.advance(50)
    console.stop()
    clock.now += 10
    console.advance(10)
    console.stop()
    console.advance(1)  # of nothing
    assert capsys.readouterr().err.splitlines() == [
        "reading: 50 of 50, 5/s, 0:00 left",
        "scoring: 10 of 100, 0.5/s, 3:00 left",
    ]


def test_a_high_speed_is_told_in_whole_numbers(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(first=1)
    console.start("making references", 1_000_000)
    clock.now += 10
    console.advance(12_345)
    assert capsys.readouterr().err == "making references: 12345 of 1000000, 1,234/s, 13:20 left\n"


def test_no_speed_is_no_error(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(first=0)
    console.start("waiting", 10)
    console.advance(0)  # nothing done
    console.advance(1)  # in no time
    clock.now += 20
    console.advance(0)
    assert capsys.readouterr().err.splitlines() == [
        "waiting: 0 of 10, 0/s, 0:00 left",
        "waiting: 1 of 10, 0/s, 0:00 left",
        "waiting: 1 of 10, 0.05/s, 3:00 left",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.7, "1:00:00"),
        (3661, "1:01:01"),
        (360000, "100:00:00"),
    ],
)
def test_times_are_written_as_on_a_clock(
    seconds: float, said: str, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(first=1)
    console.start("x", 2)
    clock.now += max(seconds, 1)
    console.advance(1)
    if seconds >= 1:
        assert capsys.readouterr().err == f"x: 1 of 2, {1 / seconds:.3g}/s, {said} left\n"
    assert progress._clock(seconds) == said


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console() as console:
        console.start("building", 10, done=2)
        console.advance(3)
        console.start("searching", 7)  # beneath the first bar
        console.advance(7)
    shown = terminal.getvalue()
    assert "building" in shown
    assert "searching" in shown
    assert "5/10" in shown
    assert "7/7" in shown
    assert " of 10" not in shown
    assert shown.rstrip("\n").endswith("\x1b[2K")  # the line is erased
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is back


def test_stopping_twice_or_before_the_start_is_no_error() -> None:
    console = Console()
    console.stop()
    console.start("x", 1)
    console.stop()
    console.stop()


def test_work_is_renamed_as_it_goes_on(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console()
    console.rename("nothing yet")
    console.start("training", 100)
    console.rename("training, loss 1.5")
    clock.now += 20
    console.advance(50)
    assert capsys.readouterr().err == "training, loss 1.5: 50 of 100, 2.5/s, 0:20 left\n"
    console.stop()
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console.start("training", 2)
    console.rename("loss 0.25")
    console.advance()
    console.stop()
    assert "loss 0.25" in terminal.getvalue()
