"""A plugin whose parts behave otherwise in the workers of a cluster than at home."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from ray_source import misbehave

from robustknn import registry
from robustknn.attacks import Attack, Job
from robustknn.datasets import load
from robustknn.errors import InputError


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
