"""An index from one line of text: an engine's name with settings, or the path of one that was saved."""

from __future__ import annotations

import os
from pathlib import Path

from robustknn import registry, store
from robustknn.errors import InputError, IntegrityError, brief
from robustknn.neighbors.base import NeighborIndex

_ENDING = "-index"
"""An index is saved as an artifact of the kind NAME-index, NAME being its engine's."""
_WORDS = {"true": True, "false": False, "none": None}


def make_index(spec: str, metric: str) -> NeighborIndex:
    """The index a line of text describes, empty for an engine, filled for a path.

    Args:
        spec: an engine's name (`robustknn list indexes`), optionally with settings: "ivf-flat",
            "ivf-flat:nprobe=64,nlist=4096". Or the path of a saved index; it is given its vectors by `attach`.
        metric: "l2", "cosine" or "ip"; that of a saved index must be the same.

    Raises:
        InputError: an unknown engine or setting (close matches are named), one that cannot be read, no index at the
            path, an index by another metric.
        IntegrityError: the saved index is not whole.
        MissingExtraError: the engine's library is not installed.
    """
    if spec and (Path(spec) / store.MANIFEST).is_file():
        index = load_index(Path(spec))
        if index.metric.name != metric:
            raise InputError(
                f"the index in {spec!r} searches by {index.metric.name!r}, not by {metric!r}; pass "
                f"metric={index.metric.name!r}, or build one by {metric!r}."
            )
        return index
    name, _, settings = spec.partition(":")
    if spec and name not in registry.indexes and (os.sep in spec or "/" in spec or Path(spec).exists()):
        raise InputError(
            f"{brief(spec)} holds no saved index; give a folder with a {store.MANIFEST}, or the name of an engine."
        )
    made: NeighborIndex = registry.indexes.create(name, metric=metric, **_settings(spec, settings))
    return made


def load_index(path: Path) -> NeighborIndex:
    """The saved index at a path, of whatever engine.

    Raises:
        IntegrityError: it is not whole, or of no engine known here.
    """
    kind = store.read_sealed(Path(path) / store.MANIFEST).get("kind")
    name = str(kind).removesuffix(_ENDING)
    if not str(kind).endswith(_ENDING) or name not in registry.indexes:
        raise IntegrityError(
            f"{str(path)!r} holds {brief(kind)}, which is no index of an engine known here; check the path."
        )
    loaded: NeighborIndex = registry.indexes.entry(name).build.load(Path(path))  # type: ignore[attr-defined]
    return loaded


def _settings(spec: str, text: str) -> dict[str, str | int | float | bool | None]:
    """Settings as key=value, separated by commas; numbers, true, false and none are read as such."""
    found: dict[str, str | int | float | bool | None] = {}
    for item in text.split(",") if text else []:
        key, sign, value = item.partition("=")
        key = key.strip()
        if not sign or not key.isidentifier() or key == "metric" or key in found:
            raise InputError(
                f"{brief(item)} in index {brief(spec)} is no setting; write name:key=value,key=value, each key once "
                "(the metric is an option of its own)."
            )
        found[key] = _value(value.strip())
    return found


def _value(text: str) -> str | int | float | bool | None:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
