"""The command line: parse, call, print.

Exit codes: 0 done, 1 a floor is not met, 2 the user's mistake in one sentence, 130 stopped.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import typer

from robustknn._version import __version__
from robustknn.errors import RobustKNNError

STOPPED = 130
_PACKAGE = Path(__file__).parents[1]

app = typer.Typer(
    name="robustknn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="How robust is a classifier that decides by nearest neighbors in a network's feature space?",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    from robustknn.registry import load_installed_plugins

    load_installed_plugins()


def _as_note(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as people at a terminal read it; those of other libraries keep their place in the source."""
    if category is UserWarning and Path(filename).is_relative_to(_PACKAGE):
        return f"robustknn: note: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def whole_app() -> typer.Typer:
    """The app with all of its commands."""
    from robustknn.cli import certify, commands, index, plan, reproduce  # noqa: F401  (registers them)

    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    # Read by torch at its first allocation: large tensors, such as the guides of an attack, then live on huge pages,
    # which saves a fifth of an attack's time where Linux has them on request.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    warnings.formatwarning = _as_note
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or file may not know every character we print
            stream.reconfigure(errors="replace")
    try:
        code = whole_app()(args=None if arguments is None else list(arguments), standalone_mode=False)
    except RobustKNNError as error:
        print(f"robustknn: {error}", file=sys.stderr)
        return 2
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except Exception as error:
        # Mistakes in the flags themselves: typer words them, we only keep them to one line.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            message = error.format_message()
            if message:  # without arguments the help is shown, and nothing is wrong that it does not answer
                print(f"robustknn: {message} (see --help)", file=sys.stderr)
            return 2
        raise
    if code == STOPPED:  # newer typer makes this of Ctrl-C by itself, and says nothing
        print("robustknn: stopped; the same command goes on after what was finished.", file=sys.stderr)
    return int(code or 0)
