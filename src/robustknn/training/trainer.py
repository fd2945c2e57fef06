"""One trainer for every method: counted order, a checkpoint after every epoch, exact resumption."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from robustknn import rng
from robustknn.batching import Samples, batches
from robustknn.checks import check_labels, check_positive_int
from robustknn.errors import InputError, RobustKNNError
from robustknn.features import FeatureExtractor
from robustknn.models import checkpoint, load_weights
from robustknn.progress import Progress, Silent
from robustknn.training import checkpoints
from robustknn.training.augment import crop_and_flip
from robustknn.training.checkpoints import LOG, EpochRecord, best_epoch
from robustknn.training.config import TrainConfig
from robustknn.training.methods import Method, Standard
from robustknn.training.randomness import seeded

_LOOK_EVERY = 64
"""Steps between two looks at whether the loss is finite: looking waits for the device."""


class TrainingData(Protocol):
    """What is trained on (see `robustknn.datasets.DataSource`)."""

    @property
    def train(self) -> Samples: ...

    @property
    def validation(self) -> Samples | None: ...


@dataclass(frozen=True)
class TrainResult:
    """What training gave. The model holds the weights of `epoch`.

    Attributes:
        history: one record an epoch.
        epoch: the selected epoch, counted from 1.
        best_epoch: the one of highest validation accuracy; None without a validation split.
        checkpoint: the folder of the selected epoch's checkpoint; None when nothing was written.
        last: the folder of the last epoch's checkpoint.
        log: the table of epochs, CSV.
    """

    history: tuple[EpochRecord, ...]
    epoch: int
    best_epoch: int | None
    checkpoint: Path | None = None
    last: Path | None = None
    log: Path | None = None


def train(
    model: nn.Module,
    data: TrainingData,
    config: TrainConfig,
    out: str | Path | None = None,
    *,
    method: Method | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a model in place; it ends in eval mode with the selected weights.

    Called again with the same `out`, it goes on after the last finished epoch, and on the CPU ends with the
    same weights, bit for bit, as a run that was never interrupted.

    Args:
        model: a network (B, …) → (B, C). For reproducible initial weights, make it with `initialise`.
        data: its `train` and, where it has one, its `validation` split; samples in the model's input range.
        config: the settings.
        out: the run's folder; None keeps nothing on disk.
        method: what is minimised; standard training by default.
        device: where to train; by default where the model is.
        progress: where to report, in steps over all epochs.

    Raises:
        InputError: data the model cannot take, a device that is not there, or a loss that is no longer finite
            (finished epochs are kept).
        ResumeError: `out` was made with another setting, model, method or data set.
        IntegrityError: a checkpoint in `out` is altered.
        StorageError: the disk refused; the checkpoints before are whole.
    """
    method = method or Standard()
    if device is not None:
        _move(model, device)
    _check(model, data, config)
    run = None if out is None else Path(out)
    trainer = _Trainer(model, data, config, method, progress or Silent())
    if run is None:
        return trainer.fit(None, {})
    made_with = checkpoints.identity(model, method, config, data.train, data.validation)
    trainer.history = checkpoints.resume(run, model, trainer.optimizer, made_with)
    return trainer.fit(run, made_with)


def accuracy(model: nn.Module, split: Samples, batch_size: int = 256) -> float:
    """The share of a split's samples whose highest output is their label, in eval mode.

    Raises:
        InputError: the split is empty, or the model returns no class scores (N, C) for it.
    """
    if not len(split):
        raise InputError("accuracy needs at least one sample; the split is empty.")
    features = FeatureExtractor(model)
    right = 0
    with torch.no_grad():
        for x, y in batches(split, check_positive_int(batch_size, "batch_size")):
            right += int((features.logits(features.place(x)).argmax(1).cpu() == y).sum())
    return right / len(split)


class _Trainer:
    def __init__(
        self, model: nn.Module, data: TrainingData, config: TrainConfig, method: Method, progress: Progress
    ) -> None:
        self.model, self.data, self.config, self.method, self.progress = model, data, config, method, progress
        self.optimizer = config.build_optimizer(model)
        self.like: Tensor = self.optimizer.param_groups[0]["params"][0]  # says on which device, in which precision
        self.ids = checkpoints.sample_ids(data.train)
        self.steps = len(self._split_order(torch.arange(len(data.train))))
        self.history: list[EpochRecord] = []

    def fit(self, run: Path | None, made_with: dict[str, object]) -> TrainResult:
        """The epochs that are missing."""
        best: dict[str, Tensor] | None = None
        first = len(self.history)
        self.progress.start(
            f"training, {self.config.epochs} epochs", self.config.epochs * self.steps, first * self.steps
        )
        try:
            for epoch in range(first, self.config.epochs):
                self.history.append(self._epoch(epoch))
                if run is not None:
                    checkpoints.save(run, self.model, self.optimizer, made_with, self.history)
                elif self.config.select == "best" and best_epoch(self.history) == epoch + 1:
                    best = copy.deepcopy(self.model.state_dict())
        finally:
            self.progress.stop()
            self.model.eval()
        return self._finish(run, best)

    def _finish(self, run: Path | None, best: dict[str, Tensor] | None) -> TrainResult:
        history, top = tuple(self.history), best_epoch(self.history)
        last = history[-1].epoch
        epoch = top if self.config.select == "best" and top is not None else last
        if run is None:
            if best is not None:
                self.model.load_state_dict(best)
            return TrainResult(history, epoch, top)
        if epoch != last:
            load_weights(self.model, checkpoint.directory(run, epoch))
        directory = checkpoint.directory
        return TrainResult(history, epoch, top, directory(run, epoch), directory(run, last), run / LOG)

    def _epoch(self, epoch: int) -> EpochRecord:
        began = time.perf_counter()
        self.model.train()
        with seeded(rng.derive(self.config.seed, "epoch", epoch), self.like.device):
            loss = self._pass(epoch)
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise _diverged(epoch, "a weight that is")
        validation = self.data.validation
        validated = None if validation is None else accuracy(self.model, validation)
        lr = self.config.learning_rate((epoch + 1) * self.steps - 1, self.steps)
        return EpochRecord(epoch + 1, loss, validated, lr, round(time.perf_counter() - began, 3))

    def _pass(self, epoch: int) -> float:
        """One pass over the training samples; the mean loss."""
        config, split, labels, device = self.config, self.data.train, self.data.train.labels, self.like.device
        total = torch.zeros((), device=device)
        order = rng.permutation(len(split), config.seed, "epoch", epoch)
        for i, positions in enumerate(self._split_order(order)):
            step = epoch * self.steps + i
            x, y = split.batch(positions).to(self.like), labels[positions].to(device)
            ids = self.ids[positions].to(device)
            if config.augment:
                x = crop_and_flip(x, ids, config.seed, epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate(step, self.steps)
            self.optimizer.zero_grad(set_to_none=True)
            total += self._backward(x, y, ids, step) * len(positions)
            self.optimizer.step()
            self.progress.advance()
            if i % _LOOK_EVERY == _LOOK_EVERY - 1 and not math.isfinite(float(total)):
                break
        if not math.isfinite(float(total)):
            raise _diverged(epoch, "a loss that is")
        return float(total) / len(split)

    def _backward(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> Tensor:
        """The batch's loss, its gradients left in the parameters."""
        try:
            loss = self.method.loss(self.model, x, y, ids, step)
            loss.backward()
        except torch.OutOfMemoryError as error:
            raise InputError(f"the device has not enough memory for batches of {len(x)}; lower batch_size.") from error
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, RobustKNNError):
                raise
            reason = str(error).split("\n", 1)[0]
            raise InputError(f"the model cannot be trained on a batch of shape {tuple(x.shape)}: {reason}") from error
        return loss.detach()

    def _split_order(self, order: Tensor) -> Sequence[Tensor]:
        """Batches of positions. A last one of a single sample joins the one before: batch normalisation cannot
        train on it."""
        parts = list(order.split(self.config.batch_size))
        if self.config.batch_size > 1 and len(parts) > 1 and len(parts[-1]) == 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        return parts


def _diverged(epoch: int, what: str) -> InputError:
    return InputError(
        f"training gave {what} not finite in epoch {epoch + 1}; try a lower lr (finished epochs are kept)."
    )


def _move(model: nn.Module, device: torch.device | str) -> None:
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device here, or no room on it
        reason = str(error).split("\n", 1)[0].rstrip(".")
        raise InputError(f"the model cannot be moved to device {str(device)!r}: {reason}.") from error


def _check(model: nn.Module, data: TrainingData, config: TrainConfig) -> None:
    """InputError before the first step where the data, the model and the settings do not fit together."""
    if len(data.train) < 2:
        raise InputError(f"the training split holds {len(data.train)} samples; training needs at least two.")
    if data.validation is not None and not len(data.validation):
        raise InputError("the validation split is empty; pass None, or a split with samples.")
    if data.validation is None and config.select == "best":
        raise InputError("select='best' needs a validation split; use select='last' or data that has one.")
    features = FeatureExtractor(model)
    for split, what in ((data.train, "training labels"), (data.validation, "validation labels")):
        if split is not None:
            with torch.no_grad():
                n_classes = features.logits(features.place(split.batch(torch.tensor([0])))).shape[1]
            check_labels(split.labels, len(split), n_classes, what)
