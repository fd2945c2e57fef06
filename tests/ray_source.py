"""Samples that behave otherwise in the workers of a cluster than at home; importable by the workers."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from torch import Tensor

from robustknn.errors import NotReadyError


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
