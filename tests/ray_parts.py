"""Parts that behave otherwise in the workers of a cluster than at home: a plugin, and importable by the workers."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustknn import registry
from robustknn.attacks import Attack, Job
from robustknn.datasets import load
from robustknn.errors import InputError, NotReadyError


def misbehave(how: str, home: int, marker: str) -> None:
    """In another process than `home`: die once (who leaves the marker behind), die always, or refuse."""
    if os.getpid() == home:
        return
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "die once" and not Path(marker).exists():
        Path(marker).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "refuse":
        raise NotReadyError("the attack is tired; let it sleep.")


@registry.attacks.register("moody")
@dataclass(frozen=True)
class Moody(Attack):
    """Counted noise; in a worker it misbehaves on the batch that holds the first sample."""

    how: str
    home: int
    marker: str

    def run(self, job: Job) -> None:
        """One try."""
        if int(job.ids.min()) == 0:
            misbehave(self.how, self.home, self.marker)
        rows = torch.arange(len(job.x))
        job.begin(job.look(job.x, rows)[0])
        x = job.threat.random_start(job.x, job.ids, job.seed, "noise")
        job.offer(x, rows, job.look(x, rows)[0])


@registry.datasets.register("moody-digits")
def moody_digits(how: str, home: int, protocol: str = "standard") -> Any:
    """The digits; in a worker other labels, or none at all."""
    source = load("digits", protocol=protocol)
    if os.getpid() != home:
        if how == "gone":
            raise InputError("digits.npz is missing; put it there.")
        source.test.labels = source.test.labels.roll(1)
    return source


class MoodySource:
    """Samples for a database; in a worker they misbehave at one position."""

    def __init__(self, x: Tensor, labels: Tensor, how: str, place: int, marker: Path) -> None:
        self.x, self.labels, self.how, self.place = x, labels, how, place
        self.home, self.marker = os.getpid(), str(marker)

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: Tensor) -> Tensor:
        """The samples at these positions."""
        if bool((positions == self.place).any()):
            misbehave(self.how, self.home, self.marker)
        return self.x[positions]
