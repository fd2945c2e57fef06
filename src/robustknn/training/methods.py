"""What a training step minimises. A method is a frozen configuration; the trainer does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from robustknn import registry
from robustknn.training.robust import RobustCheck
from robustknn.training.stream import ReferenceStream


@dataclass(frozen=True)
class Batch:
    """One training step's samples, and where in the run it stands.

    Attributes:
        x: (B, …) inputs, augmented where the run augments.
        y: (B,) int64 labels.
        ids: (B,) int64, what counted randomness is keyed by, together with `seed` and `step`.
        step: optimizer steps taken before, from the first epoch on.
        share: the part of all steps that is done, in [0, 1).
        seed: of the run.
        stream: gives further training samples, by class.
    """

    x: Tensor
    y: Tensor
    ids: Tensor
    step: int
    share: float
    seed: int
    stream: ReferenceStream


class Method(ABC):
    """The loss of a batch. Implementations are frozen dataclasses, whose fields a checkpoint records.

    Attributes:
        name: what the method is called.
    """

    name: ClassVar[str]

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """The mean loss of a batch by part, scalars; their sum is minimised, each is logged.

        Args:
            model: the network, in training mode, on the batch's device.
        """

    @property
    def check(self) -> RobustCheck | None:
        """The attack that validation should be made under; None where robustness is not the aim."""
        return None


@registry.methods.register("standard")
@dataclass(frozen=True)
class Standard(Method):
    """Cross-entropy on the samples as they are."""

    name: ClassVar[str] = "standard"

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return {"cross-entropy": nn.functional.cross_entropy(model(batch.x), batch.y)}
