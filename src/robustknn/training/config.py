"""The settings of a training run, and the learning rate they mean at every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from robustknn.checks import check_choice, check_number, check_positive_int, check_whole
from robustknn.errors import InputError
from robustknn.training.robust import RobustCheck

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "step", "cosine", "one-cycle")
SELECTIONS = ("best", "last", "robust")
PRECISIONS = ("float32", "bf16")
_ONE_CYCLE_START = 1 / 25
_ONE_CYCLE_END = 1 / 25e4


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained.

    Attributes:
        epochs: passes over the training samples.
        batch_size: samples a step.
        optimizer: "sgd", "adam" or "adamw".
        lr: the (highest) learning rate.
        momentum: of sgd; the others ignore it.
        weight_decay: L2 penalty (sgd, adam) or decoupled decay (adamw).
        nesterov: Nesterov momentum, sgd alone.
        schedule: "constant"; "step": × `gamma` at the start of each epoch in `milestones` (counted from 0);
            "cosine": from lr to 0; "one-cycle": by cosines from lr/25 up to lr in the first `warmup` of all
            steps, then down to lr/250000 (Smith & Topin, arXiv 1708.07120). The last two change at every step.
        milestones, gamma: of the step schedule.
        warmup: of the one-cycle schedule, the share of the steps in which the learning rate rises.
        augment: random crops of images padded by 4 pixels, and horizontal flips.
        seed: of the order of the samples, of augmentation, of dropout and of what a method draws.
        select: which weights the model ends with: "last", or those of the validation split's highest accuracy,
            "best" as it is or "robust" under attack (of equal ones the earliest).
        precision: "float32", or "bf16" for the forward passes (autocast; the weights stay as they are).
        channels_last: images are stored with their channels last, which suits many CPUs and GPUs.
        robust: the attack under which validation accuracy is measured too; None takes the method's own, if it has
            one.

    Raises:
        InputError: a value out of range, or a setting that the chosen optimizer or schedule does not have.
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    schedule: str = "constant"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup: float = 0.3
    augment: bool = False
    seed: int = 0
    select: str = "last"
    precision: str = "float32"
    channels_last: bool = False
    robust: RobustCheck | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            self._set(name, check_positive_int(getattr(self, name), name))
        check_choice(self.optimizer, OPTIMIZERS, "optimizer")
        check_choice(self.schedule, SCHEDULES, "schedule")
        check_choice(self.select, SELECTIONS, "select")
        check_choice(self.precision, PRECISIONS, "precision")
        if self.robust is not None and not isinstance(self.robust, RobustCheck):
            raise InputError(f"robust must be a RobustCheck, such as RobustCheck(eps=8 / 255), not {self.robust!r}.")
        self._check_number("lr", "above 0", lambda v: 0 < v < math.inf)
        self._check_number("momentum", "at least 0 and below 1", lambda v: 0 <= v < 1)
        self._check_number("weight_decay", "at least 0", lambda v: 0 <= v < math.inf)
        self._check_number("gamma", "above 0 and at most 1", lambda v: 0 < v <= 1)
        self._check_number("warmup", "above 0 and below 1", lambda v: 0 < v < 1)
        for name in ("nesterov", "augment", "channels_last"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, not {getattr(self, name)!r}.")
        self._set("seed", check_whole(self.seed, "seed"))
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise InputError("nesterov needs optimizer='sgd' with a momentum above 0; change one of them.")
        self._check_milestones()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_number(self, name: str, allowed: str, holds: Callable[[float], bool]) -> None:
        self._set(name, check_number(getattr(self, name), name, allowed, holds))

    def _check_milestones(self) -> None:
        try:
            milestones = tuple(self.milestones)
        except TypeError as error:
            raise InputError(f"milestones must be a list of epochs, not {self.milestones!r}.") from error
        milestones = tuple(check_positive_int(milestone, "a milestone") for milestone in milestones)
        if list(milestones) != sorted(set(milestones)):
            raise InputError(f"milestones must ascend, and {list(milestones)} do not; sort them, each once.")
        if milestones and milestones[-1] >= self.epochs:
            raise InputError(
                f"milestone {milestones[-1]} is never reached in {self.epochs} epochs, counted from 0; lower it or "
                "train longer."
            )
        if (self.schedule == "step") != bool(milestones):
            raise InputError(
                "schedule='step' needs milestones, the epochs at which the learning rate drops, e.g. (100, 150)."
                if self.schedule == "step"
                else f"milestones belong to schedule='step', not to {self.schedule!r}; leave them out or change it."
            )
        self._set("milestones", milestones)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0 over all epochs."""
        total = self.epochs * steps_per_epoch
        if self.schedule == "step":
            epoch = step // steps_per_epoch
            return self.lr * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
        if self.schedule == "cosine":
            return _cosine(self.lr, 0.0, step / total)
        if self.schedule == "one-cycle":
            top = self.warmup * total - 1  # the step, as a fraction, at which the learning rate is highest
            if step <= top:
                return _cosine(self.lr * _ONE_CYCLE_START, self.lr, step / top if top > 0 else 1.0)
            return _cosine(self.lr, self.lr * _ONE_CYCLE_END, (step - top) / (total - 1 - top))
        return self.lr

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the model's parameters that require a gradient.

        Raises:
            InputError: none does.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise InputError("no parameter of the model requires a gradient; nothing can be trained.")
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters,
                lr=self.lr,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                nesterov=self.nesterov,
            )
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, lr=self.lr, weight_decay=self.weight_decay)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))
