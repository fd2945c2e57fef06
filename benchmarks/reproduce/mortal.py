"""A source and an attack by which a worker of a cluster dies once; at home they are what they wrap. Also a plugin."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from robustknn.attacks import PGD, Job
from robustknn.objectives import Adaptive, Objective
from robustknn.registry import attacks

HOME, MARK = "MORTAL_HOME", "MORTAL_MARK"
"""Variables of the environment: the process that is spared, and the folder in which a death is noted."""


def die_once(what: str) -> None:
    """End this process as a power cut would, if it is a worker's and no other has died of this."""
    mark = Path(os.environ.get(MARK, os.devnull)) / f"{what}-died"
    if os.environ.get(HOME, str(os.getpid())) != str(os.getpid()) and not mark.exists():
        mark.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)


class Mortal:
    """A source whose reader dies once, in a worker, on the way to the middle of it."""

    def __init__(self, source: Any) -> None:
        self.source, self.labels, self.described = source, source.labels, source.described

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, positions: Tensor) -> Tensor:
        """The samples at these positions."""
        if bool((positions == len(self) // 2).any()):
            die_once("building")
        return self.source.batch(positions)


@attacks.register("mortal-adaptive", "The adaptive attack; a worker that runs it dies once.")
@dataclass(frozen=True)
class MortalAdaptive(PGD):
    """PGD with the adaptive objective."""

    objective: Objective = Adaptive()  # noqa: RUF009  (it is frozen)

    def run(self, job: Job) -> None:
        """Die, or attack."""
        die_once("evaluating")
        super().run(job)
