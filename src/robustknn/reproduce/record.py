"""The committed record of an experiment on one data set: every seed's numbers beside the published ones, small JSON."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from robustknn import store
from robustknn.errors import InputError, IntegrityError
from robustknn.evaluation.rundir import environment
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.experiment import Cell, Experiment
from robustknn.reproduce.papers import published
from robustknn.reproduce.running import Done

SCHEMA = 1
_DIGITS = 4


def path_of(folder: Path, experiment: str, data: str, preset: str) -> Path:
    """The file of a record."""
    return folder / f"{experiment}.{data}.{preset}.json"


def read_record(path: Path) -> dict[str, Any]:
    """A record that was written, with what was published as it is known now.

    Raises:
        IntegrityError: it is none.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        whole = held["schema"] == SCHEMA and isinstance(held["rows"], list)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{str(path)!r} is no record of an experiment; reproduce it again.") from error
    if not whole:
        raise IntegrityError(f"{str(path)!r} is a record of another schema; reproduce it again.")
    printed = published(held["experiment"], held["data"])
    rows = [{**r, "published": printed.get((r["row"], r["column"]))} for r in held["rows"]]
    return {**held, "rows": rows}


def refuse_other(path: Path, bench: Bench) -> None:
    """InputError where a record holds other settings, so that its seeds cannot stand beside new ones."""
    if path.exists() and read_record(path)["options"] != json.loads(json.dumps(dict(bench.settings.options))):
        raise InputError(
            f"{str(path)!r} holds results at other settings; name another folder with --out, or move it away."
        )


def write_record(path: Path, experiment: Experiment, bench: Bench, done: Done, command: str) -> dict[str, Any]:
    """Add a seed's numbers to the record at `path`, or begin one; what is written."""
    settings, cells = bench.settings, experiment.cells(bench, done.found)
    refuse_other(path, bench)
    held = read_record(path) if path.exists() else {}
    seed = str(settings.seed)
    about = environment(command, settings.device)
    runs = {
        **held.get("runs", {}),
        seed: {
            "command": command,
            "changed": dict(settings.changed),
            "commit": commit(),
            "code": done.code,
            "versions": about["versions"],
            "machine": {"processor": platform.machine(), "device": device_name(bench), "threads": about["threads"]},
            "seconds": done.seconds,
            "networks": [row for key, row in done.found.items() if key.startswith(("train ", "weights "))],
        },
    }
    pictures = held.get("pictures") or {"seed": settings.seed, **experiment.pictures(bench, done.found)}
    if pictures["seed"] == settings.seed:
        pictures = {"seed": settings.seed, **experiment.pictures(bench, done.found)}
    record = {
        "schema": SCHEMA,
        "experiment": settings.experiment,
        "paper": experiment.paper,
        "table": experiment.table,
        "title": experiment.title,
        "data": settings.data,
        "preset": settings.preset,
        "options": dict(settings.options),
        "rows": rows_of(held.get("rows", []), seed, cells, published(settings.experiment, settings.data)),
        "runs": dict(sorted(runs.items(), key=lambda item: int(item[0]))),
        "pictures": pictures,
    }
    store.write_text(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return record


def rows_of(
    held: Sequence[Mapping[str, Any]], seed: str, cells: Sequence[Cell], printed: Mapping[tuple[str, str], float]
) -> list[dict[str, Any]]:
    """One row for every number: published, measured by seed, mean, standard deviation, interval.

    Args:
        held: rows of before, whose other seeds are kept.
        seed, cells: what is new.
        printed: the published values.
    """
    others = {(r["row"], r["column"], r["protocol"]): r["seeds"] for r in held}
    new = {(c.row, c.column, c.protocol): c for c in cells}
    rows = []
    for place in dict.fromkeys([*new, *others]):
        seeds = {k: v for k, v in others.get(place, {}).items() if k != seed}
        if place in new:
            seeds[seed] = _measured(new[place])
        if seeds:
            seeds = dict(sorted(seeds.items(), key=lambda item: int(item[0])))
            rows.append(_row(*place, seeds, printed.get(place[:2])))
    return rows


def _measured(cell: Cell) -> dict[str, Any]:
    interval = None if cell.interval is None else [round(end, _DIGITS) for end in cell.interval]
    return {"value": round(cell.value, _DIGITS), "n": cell.n, "interval": interval, "unit": cell.unit}


def _row(row: str, column: str, protocol: str, seeds: Mapping[str, Any], printed: float | None) -> dict[str, Any]:
    """Several seeds share their test samples, so the interval stays as wide as that of one, the nearest to the mean."""
    values = [found["value"] for found in seeds.values()]
    mean = fmean(values)
    near = min(seeds.values(), key=lambda found: abs(found["value"] - mean))
    return {
        "row": row,
        "column": column,
        "protocol": protocol,
        "unit": near["unit"],
        "published": printed,
        "mean": round(mean, _DIGITS),
        "sd": round(stdev(values), _DIGITS) if len(values) > 1 else None,
        "n": near["n"],
        "interval": near["interval"],
        "seeds": dict(seeds),
    }


def commit() -> str | None:
    """The commit of the code, with "+" where files were changed since; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        found = [
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short=10", "HEAD"), ("status", "--porcelain", "--", "."))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return found[0] + ("+" if found[1] else "")


def device_name(bench: Bench) -> str:
    """The processor or accelerator, by name."""
    return torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu"
