"""A step between what a layer gives and the vectors that are compared: differentiable, hashed, saved without pickle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from robustknn import store
from robustknn.errors import InputError, IntegrityError, brief

KIND, SCHEMA = "transform", 1
TENSORS = "tensors.safetensors"
_KINDS: dict[str, type[Transform]] = {}


class Transform(ABC):
    """Values of a layer (N, …) → values (N, …), sample by sample.

    A subclass names its `kind` and says what it consists of: tensors, and settings that JSON holds.
    """

    kind: ClassVar[str]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _KINDS[cls.kind] = cls

    @abstractmethod
    def __call__(self, value: Tensor) -> Tensor:
        """The transformed values, differentiable when gradients are on."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What was learned, by name."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The other parameters, as JSON."""

    @classmethod
    @abstractmethod
    def of(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """The transform that consists of these."""

    def then(self, other: Transform) -> Chain:
        """This and another one after it."""
        first = self.parts if isinstance(self, Chain) else (self,)
        return Chain((*first, *(other.parts if isinstance(other, Chain) else (other,))))

    def describe(self) -> dict[str, Any]:
        """Kind, settings and a sha256 of the tensors, as JSON: what identifies it."""
        return {"kind": self.kind, "settings": self.settings(), "sha256": store.fingerprint_tensors(self.tensors())}

    def to(self, device: torch.device | str) -> Transform:
        """A copy on a device."""
        return type(self).of({k: v.to(device) for k, v in self.tensors().items()}, self.settings())

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write it as an artifact directory: a safetensors file and a sealed manifest."""
        with store.artifact(Path(path), KIND, SCHEMA, self.describe(), overwrite) as folder:
            store.save_tensors(folder / TENSORS, self.tensors())


@dataclass(frozen=True, eq=False)
class Chain(Transform):
    """Several transforms, one after the other."""

    kind: ClassVar[str] = "chain"
    parts: tuple[Transform, ...]

    def __call__(self, value: Tensor) -> Tensor:
        for part in self.parts:
            value = part(value)
        return value

    def tensors(self) -> dict[str, Tensor]:
        return {f"{place}.{k}": v for place, part in enumerate(self.parts) for k, v in part.tensors().items()}

    def settings(self) -> dict[str, Any]:
        return {"parts": [{"kind": part.kind, "settings": part.settings()} for part in self.parts]}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        made = []
        for place, part in enumerate(settings["parts"]):
            own = {k.removeprefix(f"{place}."): v for k, v in tensors.items() if k.startswith(f"{place}.")}
            made.append(restored(part, own))
        return cls(tuple(made))


def check_transform(value: Any) -> Transform:
    """The value itself; InputError for anything but a transform."""
    if not isinstance(value, Transform):
        raise InputError(f"a transform is made of Projection, RegionalMax or Signs, not {brief(value)}.")
    return value


def restored(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Transform:
    """The transform of a description and its tensors.

    Raises:
        IntegrityError: an unknown kind, or tensors that are not those described.
    """
    kind = described["kind"]
    if kind not in _KINDS:
        raise IntegrityError(f"a transform of kind {brief(kind)} is unknown to this version; make it again.")
    try:
        made = _KINDS[kind].of(tensors, described["settings"])
    except (KeyError, TypeError, InputError) as error:
        raise IntegrityError(f"a transform of kind {kind!r} lacks a part ({error}); make it again.") from error
    if described.get("sha256", made.describe()["sha256"]) != made.describe()["sha256"]:
        raise IntegrityError(f"the numbers of a transform of kind {kind!r} are not those described; make it again.")
    return made


def load_transform(path: str | Path) -> Transform:
    """Read what `Transform.save` wrote.

    Raises:
        IntegrityError: a file is missing, truncated or altered, or of another kind.
    """
    manifest = store.read_manifest(Path(path), KIND, SCHEMA)
    return restored(manifest.meta, store.load_tensors(manifest.file(TENSORS)))
