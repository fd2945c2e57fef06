"""Weights from a file into a model: our checkpoints, safetensors, PyTorch files; nothing that runs code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustknn import store
from robustknn.errors import InputError, IntegrityError
from robustknn.models import checkpoint

PYTORCH_SUFFIXES = (".pt", ".pth", ".th")
_NESTED = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 3


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill a model with weights; it is left untouched when they do not fit.

    Args:
        model: the architecture the weights are for.
        path: a checkpoint of ours (see `robustknn.models.checkpoint.find`), a `.safetensors` file, or a `.pt`,
            `.pth` or `.th` file that holds a state dict, also one nested under "state_dict", "model" or
            "model_state_dict", or with the "module." prefix of DataParallel. PyTorch files are read with
            `weights_only=True`: code in them is never run.

    Raises:
        InputError: nothing is at `path`, or its kind is not known.
        IntegrityError: the file is truncated, altered or no checkpoint, or is of another architecture.
    """
    path = Path(path)
    state = _without_prefix(_read(path), model.state_dict())
    _check(state, model, path)
    # A plain dict, without version metadata: batch normalisation then forgives the counter that old files lack.
    model.load_state_dict(state)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".safetensors", *PYTORCH_SUFFIXES) or path.is_dir():
        if path.is_file():
            raise InputError(
                f"{str(path)!r} is no weights file; use a checkpoint folder, .safetensors, "
                f"{', '.join(PYTORCH_SUFFIXES)} (rename it if it is one of these)."
            )
        found = store.read_manifest(checkpoint.find(path), checkpoint.KIND, checkpoint.SCHEMA)
        return store.load_tensors(found.file(checkpoint.WEIGHTS))
    if not path.is_file():
        raise InputError(f"weights file {str(path)!r} does not exist.")
    if path.suffix == ".safetensors":
        return store.load_tensors(path)
    return _state_dict(_load_pytorch(path), path)


def _load_pytorch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile pickle can raise anything
        reason = str(error).split("\n", 1)[0].rstrip(".") or type(error).__name__
        raise IntegrityError(
            f"{str(path)!r} cannot be read as weights alone ({reason}); save the model's state_dict(), "
            "best as .safetensors."
        ) from error


def _state_dict(value: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a PyTorch file held."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in _NESTED if isinstance(value.get(key), Mapping)), value)
        if value and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()):
            return dict(value)
    raise IntegrityError(f"{str(path)!r} holds no state dict (names and tensors); save the model's state_dict().")


def _without_prefix(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state) and not all(key.startswith(prefix) for key in expected):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _check(state: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    expected = model.state_dict()
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    surplus = [k for k in state if k not in expected]
    reshaped = [
        f"{k} is {tuple(state[k].shape)} where the model's is {tuple(expected[k].shape)}"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    found = [f"it lacks {_few(missing)}"] if missing else []
    found += [f"it has {_few(surplus)} that the model does not"] if surplus else []
    found += [_few(reshaped)] if reshaped else []
    if found:
        raise IntegrityError(
            f"{str(path)!r} is of another architecture than this {type(model).__name__}: {'; '.join(found)}."
        )


def _few(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
