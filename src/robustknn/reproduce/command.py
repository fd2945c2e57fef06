"""What `robustknn reproduce` does, apart from reading its flags."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robustknn.checks import check_choice
from robustknn.errors import InputError, unknown_name
from robustknn.evaluation.experiment import pick_device
from robustknn.progress import Progress
from robustknn.reproduce.bench import Bench, Settings
from robustknn.reproduce.experiment import Experiment, experiments
from robustknn.reproduce.record import path_of, refuse_other, write_record
from robustknn.reproduce.running import Run, Say, estimate


@dataclass(frozen=True)
class Order:
    """What is asked for (see the flags of `robustknn reproduce`)."""

    name: str
    preset: str
    datasets: tuple[str, ...]
    device: str
    seeds: tuple[int, ...]
    changed: Mapping[str, Any]
    root: str | None
    work: Path
    out: Path
    download: bool = False

    def command(self, data: str, seed: int) -> str:
        """The command that makes one record again."""
        words = ["robustknn", "reproduce", self.name, "--dataset", data, "--preset", self.preset, "--seed", str(seed)]
        return shlex.join([*words, *(w for k, v in self.changed.items() for w in ("--set", f"{k}={v}"))])


def ordered(order: Order, progress: Progress) -> tuple[list[Run], str]:
    """The runs of an order, checked, and the estimate to be printed before they start.

    Raises:
        InputError: an unknown name, data set, preset or option, a missing file, no CUDA where the preset needs it, or
            records at other settings in the folder for records.
    """
    kind = experiments.entry(order.name).build
    experiment: Experiment = kind()
    check_choice(order.preset, tuple(experiment.presets), f"the preset of {order.name}")
    preset = experiment.presets[order.preset]
    for key, value in order.changed.items():
        if key not in preset:
            raise unknown_name(f"option of {order.name}:", key, preset)
        if not _alike(value, preset[key]):
            raise InputError(
                f"option {key} of {order.name} is {preset[key]!r} by default; {value!r} is of another kind."
            )
    device = pick_device(order.device).type if order.device == "auto" else str(pick_device(order.device))
    if order.preset in experiment.cuda and not device.startswith("cuda"):
        there = "" if torch.cuda.is_available() else " (there is none here)"
        raise InputError(
            f"preset {order.preset!r} of {order.name} needs a CUDA device{there}; use one, or --preset cpu."
        )
    runs = []
    for data in order.datasets or experiment.data[:1]:
        if data not in experiment.data:
            raise unknown_name(f"data set of {order.name}:", data, experiment.data)
        for seed in order.seeds:
            options = {**preset, **order.changed}
            settings = Settings(order.name, data, order.preset, seed, options, dict(order.changed), device)
            bench = Bench(settings, order.work, order.root, order.download, progress)
            refuse_other(path_of(order.out, order.name, data, order.preset), bench)
            runs.append(Run(experiment, bench))
    return runs, estimate(runs)


def perform(order: Order, runs: list[Run], say: Say) -> Iterator[Path]:
    """Do the runs, one after another, and take each from the list: what it holds in memory is given back.

    Yields:
        The record of each, when it is written.
    """
    while runs:
        run = runs.pop(0)
        settings = run.bench.settings
        done = run.finish(say)
        path = path_of(order.out, order.name, settings.data, settings.preset)
        write_record(path, run.experiment, run.bench, done, order.command(settings.data, settings.seed))
        del run
        yield path


def _alike(value: Any, default: Any) -> bool:
    """Whether a value can stand in the place of a default; None in a preset means "all", a whole number."""
    if default is None or value is None:
        return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, (int, float)):
        return isinstance(value, int if isinstance(default, int) else (int, float)) and value > 0
    return isinstance(value, type(default))
