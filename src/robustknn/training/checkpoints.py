"""Checkpoints of a training run: written after every epoch, taken up again after an interruption."""

from __future__ import annotations

import csv
import io
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustknn import store
from robustknn.batching import Samples
from robustknn.errors import InputError, IntegrityError, ResumeError
from robustknn.features import model_fingerprint
from robustknn.models import architecture, checkpoint
from robustknn.training.config import TrainConfig
from robustknn.training.methods import Method

OPTIMIZER = "optimizer.safetensors"
LOG = "epochs.csv"
_LOOKED_AT = 256


@dataclass(frozen=True)
class EpochRecord:
    """One line of a run's history.

    Attributes:
        epoch: counted from 1.
        loss: mean over the training samples, in training mode, while the weights changed.
        validation_accuracy: in [0, 1] after the epoch; None without a validation split.
        lr: the learning rate of the epoch's last step.
        seconds: wall-clock time, validation included.
        robust_accuracy: as `validation_accuracy`, under the attack of the run; None without one.
        parts: the means of the parts whose sum is the loss, by name.
    """

    epoch: int
    loss: float
    validation_accuracy: float | None
    lr: float
    seconds: float
    robust_accuracy: float | None = None
    parts: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The record as a line of the table: the parts of the loss each in a column, "loss/name"."""
        parts = {f"loss/{name}": value for name, value in self.parts.items()}
        return {**{k: v for k, v in asdict(self).items() if k != "parts"}, **parts}


def best_epoch(history: Sequence[EpochRecord], select: str = "best") -> int | None:
    """The epoch of the highest validation accuracy, of equal ones the earliest; None without validation.

    Args:
        select: "robust" for the accuracy under attack.
    """
    known = []
    for record in history:
        value = record.robust_accuracy if select == "robust" else record.validation_accuracy
        known += [] if value is None else [(value, -record.epoch)]
    return -max(known)[1] if known else None


# --------------------------------------------------------------------------------- what a run is made with


def identity(
    model: nn.Module,
    method: Method,
    config: TrainConfig,
    train: Samples,
    validation: Samples | None,
    started_from: str | None,
) -> dict[str, Any]:
    """Everything that a resumed run must have in common with the one it continues, as plain named values."""
    made = architecture(model)
    settings: dict[str, Any] = asdict(method) if is_dataclass(method) and not isinstance(method, type) else {}
    shapes = {name: [tuple(t.shape), t.dtype] for name, t in _state(model).items()}
    named = {
        "model": made.name,
        **{f"model option {k}": v for k, v in made.options.items()},
        "model structure": store.fingerprint_config({"printed": _plain(model), "shapes": _plain(shapes)})[:12],
        "method": method.name,
        **{f"method setting {k}": v for k, v in settings.items()},
        **asdict(config),
        "starting checkpoint": started_from,
        "training data": _describe(train),
        "validation data": _describe(validation),
    }
    return {name: _plain(value) for name, value in named.items()}


def _plain(value: Any) -> Any:
    """The value as JSON holds it; what JSON has no word for (infinity, objects) as it prints, without addresses."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _describe(split: Samples | None) -> str | None:
    """A split's size and a fingerprint of its labels, its ids and (evenly spaced) up to 256 of its samples."""
    if split is None:
        return None
    n = len(split)
    places = torch.arange(n) if n <= _LOOKED_AT else torch.linspace(0, n - 1, _LOOKED_AT).long()
    tensors = {"labels": split.labels, "ids": sample_ids(split), "samples": split.batch(places)}
    return f"{n} samples, {store.fingerprint_tensors(tensors)[:12]}"


def sample_ids(split: Samples) -> Tensor:
    """What counted randomness is keyed by, (n,) int64: the split's own `ids`, else the positions."""
    ids = getattr(split, "ids", None)
    return ids if isinstance(ids, Tensor) else torch.arange(len(split))


def _refuse_other(run: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name in [*new, *(name for name in old if name not in new)]:
        before, now = old.get(name), new.get(name)
        if before != now:
            raise ResumeError(
                f"{str(run)!r} was made with another {name}: {before!r}, now {now!r}; "
                "choose another folder or the same settings."
            )


# ------------------------------------------------------------------------------------------ writing


def save(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    made_with: dict[str, Any],
    history: Sequence[EpochRecord],
) -> None:
    """Write the checkpoint of the epoch just finished and the log, then delete what neither is last nor best.

    Raises:
        StorageError: the disk refused; the checkpoints before are whole.
    """
    from safetensors import SafetensorError

    epoch = history[-1].epoch
    meta = {
        "made_with": made_with,
        "epoch": epoch,
        "best_epoch": best_epoch(history, made_with["select"]),
        "history": [asdict(record) for record in history],
        "model": model_fingerprint(model),
        "torch": torch.__version__,
    }
    path = checkpoint.directory(run, epoch)
    try:
        with store.artifact(path, checkpoint.KIND, checkpoint.SCHEMA, meta) as folder:
            store.save_tensors(folder / checkpoint.WEIGHTS, _state(model))
            store.save_tensors(folder / OPTIMIZER, _flat(optimizer))
    except SafetensorError as error:  # how a full disk shows in its writer
        raise store.StorageError(f"cannot write {str(path)!r}: {error}; what was finished before is kept.") from error
    tidy(run, history, made_with["select"])


def tidy(run: Path, history: Sequence[EpochRecord], select: str = "best") -> None:
    """Bring the log up to the history and delete the checkpoints that neither are last nor best."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(history[-1].row())
    writer.writerows(record.row().values() for record in history)
    store.write_text(run / LOG, text.getvalue())
    kept = (history[-1].epoch, best_epoch(history, select))
    for epoch in checkpoint.epochs(run):
        if epoch not in kept:
            shutil.rmtree(checkpoint.directory(run, epoch), ignore_errors=True)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, each tensor in storage of its own (tied weights are written twice)."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(f"the model keeps {name!r}, which is no tensor, in its state; checkpoints hold tensors.")
        state[name] = value.detach().clone(memory_format=torch.contiguous_format)
    return state


def _flat(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    tensors = {f"{i}.{name}": v for i, values in state.items() for name, v in values.items() if isinstance(v, Tensor)}
    return {name: v.contiguous() for name, v in tensors.items()}


# ------------------------------------------------------------------------------------------ resuming


def resume(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, made_with: dict[str, Any]
) -> list[EpochRecord]:
    """Bring the model and the optimizer to where the run stopped; returns its history, empty for a new run.

    Raises:
        ResumeError: the run was made with something else, which the sentence names.
        IntegrityError: its last checkpoint is altered.
    """
    if run.exists() and not run.is_dir():
        raise InputError(f"{str(run)!r} is a file; choose a folder for the run.")
    if any(run.glob(".epoch*")):  # what a killed process left half written
        store.remove_partials(run)
    last = checkpoint.open_last(run)
    if last is None:
        return []
    _refuse_other(run, last.meta["made_with"], made_with)
    history = [EpochRecord(**record) for record in last.meta["history"]]
    if history[-1].epoch != int(last.meta["epoch"]):
        raise IntegrityError(f"{str(last.path)!r} has the history of another epoch; delete it or restore the run.")
    model.load_state_dict(store.load_tensors(last.file(checkpoint.WEIGHTS)))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in store.load_tensors(last.file(OPTIMIZER)).items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    tidy(run, history, made_with["select"])
    return history
