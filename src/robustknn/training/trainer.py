"""One trainer for every method: counted order, a checkpoint after every epoch, exact resumption."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robustknn import rng
from robustknn.batching import Samples, batches
from robustknn.checks import check_inputs, check_labels, check_positive_int
from robustknn.errors import InputError, RobustKNNError, brief
from robustknn.features import FeatureExtractor
from robustknn.models import checkpoint, load_weights
from robustknn.progress import Progress, Silent
from robustknn.threat import check_reach
from robustknn.training import checkpoints
from robustknn.training.augment import crop_and_flip
from robustknn.training.checkpoints import LOG, EpochRecord, best_epoch
from robustknn.training.config import TrainConfig
from robustknn.training.methods import Batch, Method, Standard
from robustknn.training.randomness import seeded
from robustknn.training.robust import RobustCheck
from robustknn.training.stream import ReferenceStream
from robustknn.training.tensorboard import TensorBoard

_LOOKED_AT = 1024
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
        best_epoch: the one of highest validation accuracy, under attack for select="robust"; None without a
            validation split.
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
    on_epoch: Callable[[EpochRecord], None] | None = None,
    tensorboard: bool = False,
    started_from: str | None = None,
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
        on_epoch: called after every epoch, once its checkpoint is written.
        tensorboard: write the epochs to `out`/tensorboard too.
        started_from: what the model's weights are, where they are not fresh: such as the fingerprint of a checkpoint.
            A run is only continued with the same. (Fresh weights are not compared: a resumed run has its own.)

    Raises:
        MissingExtraError: tensorboard is not installed.
        InputError: data the model cannot take, a device that is not there, or a loss that is no longer finite
            (finished epochs are kept).
        ResumeError: `out` was made with another setting, model, method or data set.
        IntegrityError: a checkpoint in `out` is altered.
        StorageError: the disk refused; the checkpoints before are whole.
    """
    method = method or Standard()
    if not isinstance(method, Method):
        raise InputError(f"method must be a Method such as Adversarial(eps=8 / 255), not {brief(method)}.")
    if device is not None:
        _move(model, device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    check = config.robust or method.check
    _check(model, data, config, check)
    run = None if out is None else Path(out)
    if tensorboard and run is None:
        raise InputError("tensorboard=True needs out=, the folder of the run.")
    trainer = _Trainer(model, data, config, method, check, progress or Silent())
    if on_epoch is not None:
        trainer.listeners.append(on_epoch)
    if run is None:
        return trainer.fit(None, {})
    writer = TensorBoard(run / "tensorboard") if tensorboard else None
    made_with = checkpoints.identity(model, method, config, data.train, data.validation, started_from)
    trainer.history = checkpoints.resume(run, model, trainer.optimizer, made_with)
    if writer is None:
        return trainer.fit(run, made_with)
    with writer.after(len(trainer.history)):
        trainer.listeners.append(writer.write)
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
        self,
        model: nn.Module,
        data: TrainingData,
        config: TrainConfig,
        method: Method,
        check: RobustCheck | None,
        progress: Progress,
    ) -> None:
        self.model, self.data, self.config, self.method, self.progress = model, data, config, method, progress
        self.robust = check
        self.optimizer = config.build_optimizer(model)
        self.like: Tensor = self.optimizer.param_groups[0]["params"][0]  # says on which device, in which precision
        self.ids = checkpoints.sample_ids(data.train)
        self.steps = len(self._split_order(torch.arange(len(data.train))))
        self.history: list[EpochRecord] = []
        self.listeners: list[Callable[[EpochRecord], None]] = []
        self.stream = ReferenceStream(data.train, self.ids, config.seed, self.like, self._prepare_reference)

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
                elif self.config.select != "last" and self._best() == epoch + 1:
                    best = copy.deepcopy(self.model.state_dict())
                for listener in self.listeners:
                    listener(self.history[-1])
        finally:
            self.progress.stop()
            self.model.eval()
        return self._finish(run, best)

    def _finish(self, run: Path | None, best: dict[str, Tensor] | None) -> TrainResult:
        history, top = tuple(self.history), self._best()
        last = history[-1].epoch
        epoch = top if self.config.select != "last" and top is not None else last
        if run is None:
            if best is not None:
                self.model.load_state_dict(best)
            return TrainResult(history, epoch, top)
        if epoch != last:
            load_weights(self.model, checkpoint.directory(run, epoch))
        directory = checkpoint.directory
        return TrainResult(history, epoch, top, directory(run, epoch), directory(run, last), run / LOG)

    def _best(self) -> int | None:
        return best_epoch(self.history, self.config.select)

    def _epoch(self, epoch: int) -> EpochRecord:
        began = time.perf_counter()
        self.model.train()
        with seeded(rng.derive(self.config.seed, "epoch", epoch), self.like.device):
            parts = self._pass(epoch)
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise _diverged(epoch, "a weight that is")
        validation = self.data.validation
        validated = None if validation is None else accuracy(self.model, validation)
        checked = None if validation is None or self.robust is None else self.robust.accuracy(self.model, validation)
        lr = self.config.learning_rate((epoch + 1) * self.steps - 1, self.steps)
        seconds = round(time.perf_counter() - began, 3)
        return EpochRecord(epoch + 1, sum(parts.values()), validated, lr, seconds, checked, parts)

    def _pass(self, epoch: int) -> dict[str, float]:
        """One pass over the training samples; the mean of each part of the loss."""
        config, split, labels, device = self.config, self.data.train, self.data.train.labels, self.like.device
        totals: dict[str, Tensor] = {}
        order = rng.permutation(len(split), config.seed, "epoch", epoch)
        for i, positions in enumerate(self._split_order(order)):
            step = epoch * self.steps + i
            y, ids = labels[positions].to(device), self.ids[positions].to(device)
            x = self._prepare(split.batch(positions).to(self.like), ids, config.seed, epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate(step, self.steps)
            self.optimizer.zero_grad(set_to_none=True)
            share = step / (self.steps * config.epochs)
            losses = self._backward(Batch(x, y, ids, step, share, config.seed, self.stream))
            for name, value in losses.items():
                totals[name] = totals.get(name, torch.zeros((), device=device)) + value * len(positions)
            self.optimizer.step()
            if i % _LOOK_EVERY == _LOOK_EVERY - 1 or not i:
                if not _finite(totals):
                    break
                self._tell(epoch, losses)
            self.progress.advance()
        if not _finite(totals):
            raise _diverged(epoch, "a loss that is")
        return {name: float(total) / len(split) for name, total in totals.items()}

    def _tell(self, epoch: int, losses: Mapping[str, Tensor]) -> None:
        """Say in the progress which epoch it is, what the loss of the last batch was, and how the last epoch ended."""
        shown = ", ".join(f"{name} {float(value):.3f}" for name, value in losses.items())
        for held in self.history[-1:]:
            for what, right in (("validation", held.validation_accuracy), ("under attack", held.robust_accuracy)):
                shown += "" if right is None else f", {what} {100 * right:.1f} %"
        self.progress.rename(f"training, epoch {epoch + 1} of {self.config.epochs}, {shown}")

    def _prepare(self, x: Tensor, ids: Tensor, seed: int, epoch: int) -> Tensor:
        """Samples as the network is to see them."""
        if self.config.augment:
            x = crop_and_flip(x, ids, seed, epoch)
        return x.contiguous(memory_format=torch.channels_last) if self.config.channels_last and x.ndim == 4 else x

    def _prepare_reference(self, x: Tensor, ids: Tensor, step: int) -> Tensor:
        return self._prepare(x, ids, rng.derive(self.config.seed, "references"), step)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        # Weights cast under no_grad and kept would have no gradient afterwards (in torch up to 2.9: issue 158232).
        return torch.autocast(self.like.device.type, torch.bfloat16, cache_enabled=False)

    def _backward(self, batch: Batch) -> Mapping[str, Tensor]:
        """The parts of the batch's loss, the gradients of their sum left in the parameters."""
        x = batch.x
        try:
            with self._autocast():
                losses = self.method.losses(self.model, batch)
                if not isinstance(losses, Mapping) or not losses:
                    kind, name = type(losses).__name__, type(self.method).__name__
                    raise InputError(f"{name}.losses must return the loss's parts by name, not {kind}.")
            torch.stack(list(losses.values())).sum().backward()
        except torch.OutOfMemoryError as error:
            raise InputError(f"the device has not enough memory for batches of {len(x)}; lower batch_size.") from error
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, RobustKNNError):
                raise
            reason = str(error).split("\n", 1)[0]
            raise InputError(f"the model cannot be trained on a batch of shape {tuple(x.shape)}: {reason}") from error
        return {name: value.detach() for name, value in losses.items()}

    def _split_order(self, order: Tensor) -> Sequence[Tensor]:
        """Batches of positions. A last one of a single sample joins the one before: batch normalisation cannot
        train on it."""
        parts = list(order.split(self.config.batch_size))
        if self.config.batch_size > 1 and len(parts) > 1 and len(parts[-1]) == 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        return parts


def _finite(totals: Mapping[str, Tensor]) -> bool:
    return all(math.isfinite(float(total)) for total in totals.values())


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


def _check_range(split: Samples, robust: RobustCheck) -> None:
    """InputError where samples lie outside the bounds, or eps reaches beyond the box: mostly, pixels of 0..255."""
    x = split.batch(torch.arange(min(len(split), _LOOKED_AT)))
    check_inputs(x, robust.bounds, "the training samples")
    check_reach(robust.threat, x)


def _check(model: nn.Module, data: TrainingData, config: TrainConfig, robust: RobustCheck | None) -> None:
    """InputError before the first step where the data, the model and the settings do not fit together."""
    if len(data.train) < 2:
        raise InputError(f"the training split holds {len(data.train)} samples; training needs at least two.")
    if data.validation is not None and not len(data.validation):
        raise InputError("the validation split is empty; pass None, or a split with samples.")
    if data.validation is None and config.select != "last":
        raise InputError(f"select={config.select!r} needs a validation split; use select='last' or data that has one.")
    if config.select == "robust" and robust is None:
        raise InputError(
            "select='robust' needs an attack to validate under, which method 'standard' has not; train by another, or "
            "pass robust=RobustCheck(eps=8 / 255)."
        )
    if robust is not None:
        _check_range(data.train, robust)
    features = FeatureExtractor(model)
    for split, what in ((data.train, "training labels"), (data.validation, "validation labels")):
        if split is not None:
            with torch.no_grad():
                n_classes = features.logits(features.place(split.batch(torch.tensor([0])))).shape[1]
            check_labels(split.labels, len(split), n_classes, what)
