"""What the papers printed, and what is to be said of differences: a text file beside each experiment.

`published/NAME.toml`, for experiment NAME:

    [note]                      # sentences under a table, by data set; "" for all
    mnist = "…"
    [mnist."kNN, DkNNB"]        # published values by data set, row and column
    FGSM = 15.79                # or "≥ 13", where the paper says that it is at least so much
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "published"
_AT_LEAST = "≥ "


@cache
def _read(experiment: str) -> dict[str, Any]:
    file = FOLDER / f"{experiment}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def published(experiment: str, data: str) -> dict[tuple[str, str], float]:
    """The published values of a table, by (row, column), in the order of the paper."""
    return {
        place: float(value.removeprefix(_AT_LEAST) if isinstance(value, str) else value)
        for place, value in _values(experiment, data).items()
    }


def printed(experiment: str, data: str) -> dict[tuple[str, str], str]:
    """The published values as they are shown."""
    return {
        place: value if isinstance(value, str) else f"{value:g}" for place, value in _values(experiment, data).items()
    }


def _values(experiment: str, data: str) -> dict[tuple[str, str], float | str]:
    table = _read(experiment).get(data, {})
    return {(row, column): value for row, cells in table.items() for column, value in cells.items()}


def note(experiment: str, data: str = "") -> str:
    """What is said under a table of a data set, or ("") under all; "" for nothing."""
    return str(_read(experiment).get("note", {}).get(data, "")).strip()
