"""Where a training run keeps its checkpoints, and how one is found.

A run's folder holds `epoch-00007` and its like: one artifact for the last finished epoch and one for the best.
A new checkpoint never overwrites an old one, so that a run killed at any moment leaves the last epoch whole.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from robustknn import store
from robustknn.errors import InputError

KIND, SCHEMA = "checkpoint", 1
WEIGHTS = "weights.safetensors"
_NAME = re.compile(r"^epoch-(\d{5,})$")


def directory(run: Path, epoch: int) -> Path:
    """The folder of one epoch's checkpoint."""
    return run / f"epoch-{epoch:05d}"


def epochs(run: Path) -> list[int]:
    """The epochs of which a run's folder holds a checkpoint, ascending (an older one may be half deleted)."""
    if not run.is_dir():
        return []
    found = (_NAME.match(path.name) for path in run.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def open_last(run: Path) -> store.Manifest | None:
    """The checkpoint of the last finished epoch, every file checked; None when there is none."""
    found = epochs(run)
    return store.read_manifest(directory(run, found[-1]), KIND, SCHEMA) if found else None


def find(path: Path) -> Path:
    """The checkpoint that `path` names: a checkpoint's folder; a training run's folder (the checkpoint that its
    configuration selects); or `best` or `last` in a run's folder, names that stand for one of its checkpoints.

    Raises:
        InputError: there is no checkpoint.
        IntegrityError: the run's last checkpoint is altered.
    """
    if (path / store.MANIFEST).is_file():
        return path
    run, wanted = (path.parent, path.name) if path.name in ("best", "last") and not path.exists() else (path, None)
    last = open_last(run)
    if last is None:
        raise InputError(
            f"{str(path)!r} holds no checkpoint; pass a training run's folder, a checkpoint in it or a weights file."
        )
    return directory(run, selected_epoch(last.meta, wanted))


def selected_epoch(meta: dict[str, Any], wanted: str | None = None) -> int:
    """The epoch that a run's last checkpoint points to as "best" or "last" (by default as configured).

    Raises:
        InputError: the best is wanted of a run without a validation split.
    """
    if (wanted or meta["made_with"]["select"]) == "last":
        return int(meta["epoch"])
    if meta["best_epoch"] is None:
        raise InputError("this run had no validation split and so has no best epoch; use 'last'.")
    return int(meta["best_epoch"])
