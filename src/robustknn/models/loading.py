"""Models by name: the registered ones, and a user's own by `module:function`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from robustknn import registry
from robustknn.errors import InputError, RobustKNNError
from robustknn.models.weights import load_weights


@dataclass(frozen=True)
class Architecture:
    """What a model was made as: a registered name or a reference, and every option."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


def create(name: str, **options: Any) -> nn.Module:
    """A registered model with fresh weights (see `robustknn.training.initialise` for reproducible ones).

    Raises:
        InputError: unknown name or option (close matches are named), or a value the model refuses.
    """
    made = registry.models.create(name, **options)
    return _remember(made, name, _with_defaults(registry.models.entry(name).build, options))


def load_model(name_or_reference: str, checkpoint: str | Path | None = None, **options: Any) -> nn.Module:
    """A model by name, with weights when a checkpoint is given.

    Args:
        name_or_reference: a registered name, or `module:function` for a user's own function, class or module.
        checkpoint: what `load_weights` reads.
        options: what the model's factory takes.

    Raises:
        InputError: unknown name or option, a reference that does not lead to a model, no such checkpoint.
        IntegrityError: the checkpoint is not whole, or of another architecture.
    """
    made = _own(name_or_reference, options) if ":" in name_or_reference else create(name_or_reference, **options)
    if checkpoint is not None:
        load_weights(made, checkpoint)
    return made


def architecture(model: nn.Module) -> Architecture:
    """What a model was made as; for one made without `create` or `load_model`, its class."""
    known = vars(model).get("_architecture")
    return known if isinstance(known, Architecture) else Architecture(type(model).__qualname__)


def _own(reference: str, options: dict[str, Any]) -> nn.Module:
    factory = registry.load_object(reference, "model")
    if isinstance(factory, nn.Module):
        if options:
            raise InputError(f"{reference!r} is a finished model and takes no options ({', '.join(options)}).")
        return _remember(factory, reference, {})
    if not callable(factory):
        raise InputError(f"{reference!r} is a {type(factory).__name__}; name a function or class that makes a model.")
    try:
        made = factory(**options)
    except RobustKNNError:
        raise
    except Exception as error:
        raise InputError(f"model {reference!r} could not be made: {type(error).__name__}: {error}") from error
    return _remember(made, reference, _with_defaults(factory, options))


def _with_defaults(factory: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options a factory was called with, those left to their defaults included."""
    bound = inspect.signature(factory).bind(**options)
    bound.apply_defaults()
    return dict(bound.arguments)


def _remember(made: Any, name: str, options: dict[str, Any]) -> nn.Module:
    """The model, with its architecture noted on it."""
    if not isinstance(made, nn.Module):
        raise InputError(f"model {name!r} gave a {type(made).__name__}, not a torch.nn.Module.")
    vars(made)["_architecture"] = Architecture(name, options)
    return made
