"""Doing an experiment part by part: what is whole is kept, what is left is estimated, a stop loses one part."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from robustknn import store
from robustknn.errors import IntegrityError
from robustknn.reproduce.bench import Bench, code, module_digest
from robustknn.reproduce.experiment import Experiment, Part

Say = Callable[[str], None]


@dataclass(frozen=True)
class Done:
    """What an experiment gave for one data set and seed.

    Attributes:
        found: the parts' rows, by key.
        seconds: spent on them, in all sessions.
        code: the version and fingerprint of the code.
    """

    found: dict[str, Any]
    seconds: float
    code: str


def identity(experiment: Experiment, bench: Bench) -> dict[str, Any]:
    """All that decides an experiment's numbers, by name, as JSON."""
    source = bench.source()
    settings = replace(bench.settings, changed={}).to_config()
    ends = {"train": source.train, "test": source.test}
    data = {
        name: store.fingerprint_tensors({"y": s.labels, "x": s.batch(torch.arange(16))}) for name, s in ends.items()
    }
    return {"settings": settings, "data": data, "code": code(), "experiment": _sources(experiment)}


def _sources(experiment: Experiment) -> dict[str, str]:
    """The sha256 of the modules that an experiment consists of: its own, and those named *_victim that it uses."""
    homes = {kind.__module__ for kind in type(experiment).__mro__ if issubclass(kind, Experiment)}
    homes -= {Experiment.__module__}
    named = [thing for home in homes for thing in vars(sys.modules[home]).values()]
    kinds = [kind for thing in named if isinstance(thing, type) for kind in thing.__mro__]
    used = {str(getattr(thing, "__module__", "")) for thing in [*named, *kinds]}
    return {home: module_digest(home) for home in sorted(homes | {u for u in used if u.endswith("_victim")})}


class Run:
    """One experiment, data set and seed, with its folder."""

    def __init__(self, experiment: Experiment, bench: Bench) -> None:
        self.experiment, self.bench = experiment, bench
        self.identity = identity(experiment, bench)
        self.key = store.fingerprint_config(self.identity)
        settings = bench.settings
        self.folder = (
            bench.work / settings.experiment / f"{settings.data}-{settings.preset}-seed{settings.seed}" / self.key[:12]
        )
        self.parts = experiment.parts(bench)

    def place(self, part: Part) -> Path:
        """The file of a part's row; beside it, the part's own folder."""
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", part.key).strip("-")
        return self.folder / f"{slug}-{hashlib.sha256(part.key.encode()).hexdigest()[:6]}.json"

    def left(self) -> float:
        """Seconds left by the estimates."""
        return sum(part.seconds for part in self.parts if not self.place(part).exists())

    def finish(self, say: Say) -> Done:
        """Do the parts that have no row yet.

        Raises:
            IntegrityError: a row is altered; the sentence names the file.
        """
        store.write_sealed(self.folder / "identity.json", self.identity)
        found: dict[str, Any] = {}
        total = guessed = took = 0.0
        for place, part in enumerate(self.parts):
            file = self.place(part)
            if not file.exists():
                left = sum(p.seconds for p in self.parts[place:] if not self.place(p).exists())
                pace = took / guessed if guessed > 60 else 1.0  # as this machine has been against the estimates
                say(f"[{place + 1} of {len(self.parts)}] {part.key}; {clock(left * pace)} left")
                began = time.monotonic()
                row = part.run(file.with_suffix(""))
                seconds = time.monotonic() - began
                took, guessed = took + seconds, guessed + part.seconds
                store.write_sealed(file, {"run": self.key, "part": part.key, "row": row, "seconds": round(seconds, 1)})
            held = store.read_sealed(file)
            if (held.get("run"), held.get("part")) != (self.key, part.key):
                raise IntegrityError(f"{str(file)!r} belongs to another run; remove it to measure it again.")
            found[part.key] = held["row"]
            total += held["seconds"]
        return Done(found, round(total, 1), self.identity["code"])


def clock(seconds: float) -> str:
    """A duration as people say it: 40 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"about {minutes} min" if minutes < 90 else f"about {minutes // 60} h {minutes % 60:02d} min"


def estimate(runs: Sequence[Run]) -> str:
    """What is to be done and how long that takes, for who is about to wait."""
    lines = []
    for run in runs:
        settings = run.bench.settings
        todo = [part for part in run.parts if not run.place(part).exists()]
        lines.append(
            f"{settings.experiment}, {settings.data}, preset {settings.preset}, seed {settings.seed}: "
            f"{len(todo)} of {len(run.parts)} parts to do, {clock(run.left())}"
        )
    total = f"{clock(sum(run.left() for run in runs))} in all, measured on two cores of a plain CPU"
    return "\n".join([*lines, f"{total}; a stopped run goes on with the same command."])


def options_of(experiment: Experiment, preset: str, changed: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's options, some changed."""
    return {**experiment.presets[preset], **changed}
