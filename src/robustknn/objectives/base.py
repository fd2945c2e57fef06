"""What an attack climbs: a differentiable stand-in for the classifier's error, per sample.

An objective is a frozen configuration. `bind` returns what belongs to one classifier (voters to search, trained
heads), `start` what belongs to one batch (guides, thresholds).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from robustknn.classifiers.base import Classifier, Look, Request
from robustknn.errors import InputError


class Objective(ABC):
    """A loss to ascend. Implementations are frozen dataclasses: they print, compare and hash.

    Attributes:
        transfer: whether it looks at the network alone and not at the neighbors.
    """

    transfer: ClassVar[bool] = False

    def on(self, classifier: Classifier) -> Objective:
        """What stands for this objective on a classifier: itself, for most."""
        return self

    @abstractmethod
    def bind(self, classifier: Classifier) -> BoundObjective:
        """The objective for one classifier.

        Raises:
            InputError: it cannot be used on this classifier; the sentence says what can.
        """


class BoundObjective(ABC):
    """An objective and a classifier.

    Attributes:
        requests: the neighbors it wants whenever the attack looks at the classifier.
    """

    requests: tuple[Request, ...] = ()

    def check(self, x: Tensor) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuse what only a forward pass of some inputs x (N, …) shows.

        Raises:
            InputError: nothing to climb, such as a network without gradient; the sentence says what to do.
        """

    @abstractmethod
    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        """The objective for one batch.

        Args:
            x: (N, …) clean inputs.
            y: (N,) true labels.
            target: (N,) wanted labels of a targeted attack, or None.
            look: what the classifier said of x; None for one that has no voters.
        """


def check_objective(value: object, such: str) -> None:
    """InputError when a parameter is no objective; `such` is one that may stand there."""
    if not isinstance(value, Objective):
        raise InputError(f"objective must be an Objective such as {such}, not {value!r}.")


def check_gradient(value: Tensor, what: str) -> None:
    """InputError when a value that was computed from inputs that need a gradient has none."""
    if not value.requires_grad:
        raise InputError(
            f"{what} has no gradient: the network's forward pass detaches (torch.no_grad, inference_mode, detach or "
            "NumPy inside it); take that out, or use an attack that needs no gradient."
        )


class BatchObjective(ABC):
    """An objective on one batch of inputs."""

    @abstractmethod
    def loss(self, x: Tensor) -> Tensor:
        """The loss of each input (N,), differentiable in x; the attack makes it larger."""

    @abstractmethod
    def update(self, kept: Tensor | None, look: Look | None) -> None:
        """Go on, after a look at where the inputs are now.

        Args:
            kept: (n,) places of the samples that go on, among the present ones (repeats allowed); None for all.
            look: what the classifier says of those samples now, to look up neighbors anew; None keeps the old.
        """


class SelfRenewing(BatchObjective):
    """An objective that looks anew by itself, every so many gradients.

    Args:
        every: gradients between two looks.
    """

    def __init__(self, every: int) -> None:
        self._every, self._since = every, 0

    def loss(self, x: Tensor) -> Tensor:
        if self._since == self._every:
            self.renew(x.detach())
            self._since = 0
        self._since += 1
        return self.current(x)

    @abstractmethod
    def renew(self, x: Tensor) -> None:
        """Look at inputs x (N, …), which are where the batch is now."""

    @abstractmethod
    def current(self, x: Tensor) -> Tensor:
        """The loss of each input (N,), by the last look."""
