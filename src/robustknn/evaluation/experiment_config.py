"""An experiment as data: what the flags and the TOML file of `robustknn evaluate` say."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from datetime import date, time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from robustknn.config import radius
from robustknn.errors import InputError, brief, reason, unknown_name


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, about: ValidationInfo) -> Any:
        """True is no number, though Python takes it for 1."""
        kind = cls.model_fields[str(about.field_name)].annotation
        if isinstance(value, bool) and kind in (int, int | None):
            raise InputError(f"must be a whole number, not {value}.")
        return value


class DataConfig(_Table):
    """The data set and the part of its test split that is scored."""

    name: str = "digits"
    root: str | None = None
    protocol: Literal["standard", "published"] = "standard"
    download: bool = False
    n: int | None = Field(default=None, ge=1)
    subset: Literal["random", "first"] = "random"
    options: dict[str, Any] = Field(default_factory=dict)


class ModelConfig(_Table):
    """The network and its weights."""

    name: str = "digits-cnn"
    checkpoint: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class ReferencesConfig(_Table):
    """The references: which training samples, and how their features are made."""

    per_class: int | None = Field(default=None, ge=1)
    path: str | None = None
    pool: str | dict[str, str] = "flatten"
    normalize: bool = False


class ThreatConfig(_Table):
    """How far inputs may be moved. The first eps is that of the tables, further ones make the curve."""

    norm: Literal["linf", "l2", "l1"] = "linf"
    eps: list[float] = Field(default=[8 / 255], min_length=1)

    @field_validator("eps", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        several = value if isinstance(value, list) else [value]
        if any(isinstance(each, bool) for each in several):
            raise InputError("a radius is a number or text such as '8/255', not true or false.")
        return [radius(each) for each in several]


class ExperimentConfig(_Table):
    """Everything an evaluation is made of. Classifiers and attacks are tables with a name and options.

    The protocol of each classifier's paper and the worst case run beside the attacks named, for the report's two
    columns, unless they are turned off.
    """

    out: str | None = None
    seed: int = 0
    device: str = "auto"
    batch_size: int = Field(default=100, ge=1)
    examples: int = Field(default=24, ge=0)
    controls: int = Field(default=100, ge=0)
    fresh_draws: int = Field(default=10, ge=0)
    plugins: list[str] = Field(default_factory=list)
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    references: ReferencesConfig = Field(default_factory=ReferencesConfig)
    threat: ThreatConfig = Field(default_factory=ThreatConfig)
    classifiers: list[dict[str, Any]] = Field(default=[{"name": "knn"}], min_length=1)
    attacks: list[dict[str, Any]] = Field(default_factory=list)
    published: bool = True
    worst_case: Literal["fast", "standard", "thorough", "off"] = "fast"

    @field_validator("classifiers", "attacks", mode="before")
    @classmethod
    def _tables(cls, value: Any) -> Any:
        return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


def read_config(path: str | Path | None, changes: Mapping[str, Any]) -> ExperimentConfig:
    """The configuration of a TOML file (or the defaults), with some of its values changed.

    Args:
        path: the file, or None.
        changes: values by dotted name ("data.n"); they win over the file's.

    Raises:
        InputError: the file is missing or no TOML; a name is unknown (close matches are given) or a value wrong.
    """
    content: dict[str, Any] = {}
    if path is not None:
        try:
            content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"configuration file {str(path)!r} does not exist.") from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise InputError(f"configuration file {str(path)!r} cannot be read: {reason(error)}.") from error
    for dotted, value in changes.items():
        *tables, key = dotted.split(".")
        place = content
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise InputError(f"{table} in {path}: must be a table ([{table}]), not {brief(place)}.")
        place[key] = value
    return configured(content, "flags" if path is None else str(path))


def configured(content: Mapping[str, Any], where: str) -> ExperimentConfig:
    """The configuration of a table; InputError names what is wrong in `where`."""
    try:
        return ExperimentConfig.model_validate(content)
    except ValidationError as error:
        raise _sentence(error, where) from error


def _sentence(error: ValidationError, where: str) -> InputError:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        table: Any = ExperimentConfig
        for part in first["loc"][:-1]:
            table = table.model_fields[part].annotation
        return unknown_name(f"setting in {where}:", name, table.model_fields)
    if first["type"] == "too_short":
        return InputError(f"{name} in {where}: is empty; name at least one.")
    if first["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return InputError(f"{name} in {where}: must be a table of settings, not {brief(first['input'])}.")
    if first["type"] == "value_error":  # a check of our own, whose sentence says what to write
        return InputError(f"{name} in {where}: {first['ctx']['error']}")
    return InputError(f"{name} in {where}: {first['msg'][:1].lower()}{first['msg'][1:]}, not {brief(first['input'])}.")


def to_toml(config: ExperimentConfig) -> str:
    """The configuration as TOML that `read_config` reads back; settings that are None are left out."""
    content = config.model_dump(exclude_none=True)
    lines = [_line(k, v) for k, v in content.items() if not _is_table(v)]
    for key, value in content.items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]", *(_line(k, v) for k, v in value.items())]
        elif _is_table(value):
            for table in value:
                lines += ["", f"[[{key}]]", *(_line(k, v) for k, v in table.items())]
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any) -> str:
    bare = key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _text(key)
    return f"{bare} = {_value(value)}"


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # which TOML does not take as it is


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _value(value: Any) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{_text(str(k))} = {_value(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(v) for v in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (date, time)):
        return value.isoformat()
    return repr(value) if isinstance(value, float) else _text(value) if isinstance(value, str) else json.dumps(value)
