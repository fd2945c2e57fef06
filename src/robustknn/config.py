"""Parts as plain data and back: what manifests hash, pages print and TOML files say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from robustknn.errors import InputError, brief
from robustknn.registry import Registry, attacks, objectives


def to_config(part: Any, registry: Registry[Any]) -> dict[str, Any]:
    """A frozen dataclass (an attack, an objective) as JSON-able data: its registered name and its parameters.

    A class nobody registered is named `module:class`; such a description identifies it but cannot rebuild it.
    """
    if not is_dataclass(part) or isinstance(part, type):
        raise InputError(f"{brief(part)} is no frozen dataclass, so it cannot be described; make it one.")
    name = registry.name_of(type(part)) or f"{type(part).__module__}:{type(part).__qualname__}"
    config: dict[str, Any] = {"name": name}
    for field in fields(part):
        config[field.name] = _plain(getattr(part, field.name))
    return config


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return to_config(value, attacks if attacks.name_of(type(value)) else objectives)
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if callable(fingerprint := getattr(value, "fingerprint", None)):  # a classifier: said, not to be made again
        return {"type": type(value).__name__, "fingerprint": fingerprint()}
    raise InputError(f"a parameter of type {type(value).__name__} cannot be written down; use numbers and text.")


def from_config(config: Mapping[str, Any] | str, registry: Registry[Any]) -> Any:
    """The part that a configuration describes: a registered name, or a table with `name` and options.

    Raises:
        InputError: no name, an unknown name or option (close matches are named), a value that cannot work.
    """
    options: dict[str, Any] = dict(config) if isinstance(config, Mapping) else {"name": config}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"a part of kind {registry.kind} needs a name, e.g. name = 'ask'; got {brief(config)}.")
    for option, kind in (("objective", objectives), ("attack", attacks)):
        if isinstance(options.get(option), (str, Mapping)):
            options[option] = from_config(options[option], kind)
    pairs = options.get("attacks")
    if isinstance(pairs, (list, tuple)) and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        options["attacks"] = tuple((title, from_config(part, attacks)) for title, part in pairs)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return registry.create(name, **options)


def radius(value: Any) -> Any:
    """A radius as people write it: a number, or text such as "8/255"; anything else is left to who checks it."""
    if not isinstance(value, str):
        return value
    upper, slash, lower = value.partition("/")
    try:
        return float(upper) / float(lower) if slash else float(upper)
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"{value!r} is not a number; write 0.03 or 8/255.") from error
