"""What a training step minimises. A method is a frozen configuration; the trainer does the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn


class Method(Protocol):
    """The loss of a batch. Implementations are frozen dataclasses, whose fields a checkpoint records.

    Attributes:
        name: what the method is called.
    """

    name: ClassVar[str]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, sample_ids: Tensor, step: int) -> Tensor:
        """The mean loss of a batch, a scalar to minimise.

        Args:
            model: the network, in training mode.
            x: (B, …) inputs.
            y: (B,) int64 labels.
            sample_ids: (B,) int64, what counted randomness is keyed by, together with `step`.
            step: the number of optimizer steps taken before, from the first epoch on.
        """
        ...


@dataclass(frozen=True)
class Standard:
    """Cross-entropy on the samples as they are."""

    name: ClassVar[str] = "standard"

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, sample_ids: Tensor, step: int) -> Tensor:
        return nn.functional.cross_entropy(model(x), y)
