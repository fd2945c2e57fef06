"""The command line called inside the test's process: its exit code and what it printed."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from robustknn.cli import main


def without_progress(err: str) -> str:
    """What was said beside the progress of work that a busy machine made long."""
    return re.sub(r"^[^:\n]+: \d+ of \d+, [0-9.,e+-]+/s, [0-9:]+ left\n", "", err, flags=re.M)


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def call(*arguments: str | Path | float) -> Done:
    """`robustknn ARGUMENTS`; an error that the command line does not word itself is raised, as in a process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(a) for a in arguments])
    return Done(code, out.getvalue(), without_progress(err.getvalue()))


def succeed(*arguments: str | Path | float) -> str:
    """What a command that must work prints."""
    done = call(*arguments)
    assert done.code == 0, done.err
    assert done.err == ""
    return done.out


def refuse(*arguments: str | Path | float) -> str:
    """The one sentence by which a command refuses: exit code 2, nothing on stdout, no traceback."""
    done = call(*arguments)
    assert done.code == 2, done
    assert done.out == ""
    assert done.err.startswith("robustknn: ")
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    sentence = done.err.removeprefix("robustknn: ").strip()
    assert sentence[-1] in ".?)", sentence
    assert "Traceback" not in sentence
    return sentence


def results(run: Path) -> dict[str, bytes]:
    """The files of a run that must repeat: all but clock times, the environment and what shows either."""
    kept = [p for p in run.rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors", ".parquet")]
    skipped = ("environment.json", "summary.json")
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in kept if p.name not in skipped}
