"""The index types of Milvus that are known here, with the settings each takes and what they are by default.

Milvus Lite accepts any text as an index type and any setting, and then searches without an index; a server refuses
some and ignores others. So both are checked here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robustknn.checks import check_whole
from robustknn.errors import InputError, brief, unknown_name

_MOST_LISTS = 65536  # what Milvus allows


@dataclass(frozen=True)
class Kind:
    """One index type.

    Attributes:
        build: the settings of its construction.
        search: the settings of a search.
        wide: the setting of a search that may not be below the number of neighbors asked for, with its default.
        lite: whether Milvus Lite builds it, rather than accepting the name and searching without an index.
    """

    build: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    wide: tuple[str, int] | None = None
    lite: bool = False


KINDS = {
    "AUTOINDEX": Kind(lite=True),
    "DISKANN": Kind((), ("search_list",), ("search_list", 100)),
    "FLAT": Kind(lite=True),
    "HNSW": Kind(("M", "efConstruction"), ("ef",), ("ef", 100), lite=True),
    "IVF_FLAT": Kind(("nlist",), ("nprobe",), lite=True),
    "IVF_PQ": Kind(("nlist", "m", "nbits"), ("nprobe",)),
    "IVF_SQ8": Kind(("nlist",), ("nprobe",), lite=True),
    "SCANN": Kind(("nlist",), ("nprobe", "reorder_k"), ("reorder_k", 200)),
}


def check_kind(name: Any, lite: bool) -> str:
    """The name of a known index type, of one that Milvus Lite has where it is to be built there."""
    if not isinstance(name, str) or name not in KINDS:
        raise unknown_name("Milvus index type", name if isinstance(name, str) else brief(name), KINDS)
    if lite and not KINDS[name].lite:
        known = ", ".join(kind for kind in KINDS if KINDS[kind].lite)
        raise InputError(
            f"Milvus Lite has no index type {name!r} (it would accept the name and search without an index); choose "
            f"one of {known}, or the address of a server as uri."
        )
    return name


def settings(given: Mapping[str, Any] | str | None, known: tuple[str, ...], what: str) -> dict[str, int]:
    """Settings by name, from a mapping or from text such as "nlist=1024 m=16"; InputError for any other name."""
    if isinstance(given, str):
        parts = [part.partition("=") for part in given.replace(";", " ").split()]
        given = {name: int(value) if value.isdecimal() else value for name, _, value in parts}
    if not isinstance(given, Mapping | None):
        raise InputError(f"{what} are a mapping such as {{'nlist': 1024}}, or text 'nlist=1024', not {brief(given)}.")
    for name in given or {}:
        if name not in known:
            raise unknown_name(f"setting among {what}:", str(name), known)
    return {name: check_whole(value, f"{name} among {what}", 1) for name, value in (given or {}).items()}


def build_settings(kind: str, given: Mapping[str, int], n: int, dim: int) -> dict[str, int]:
    """The settings to build an index over n vectors of length `dim` with: those given, else the defaults."""
    usual = {"nlist": max(1, min(_MOST_LISTS, round(4 * math.sqrt(n)))), "M": 16, "efConstruction": 200, "nbits": 8}
    usual["m"] = next(m for m in range(max(1, dim // 4), 0, -1) if dim % m == 0)
    made = {name: given.get(name, usual[name]) for name in KINDS[kind].build}
    if dim % made.get("m", 1):
        raise InputError(f"m = {made['m']} parts do not divide vectors of length {dim} evenly; choose a divisor of it.")
    return made


def search_settings(kind: str, given: Mapping[str, int], wanted: int) -> dict[str, int]:
    """The settings to search `wanted` neighbors with."""
    made = dict(given)
    if "nprobe" in KINDS[kind].search:
        made.setdefault("nprobe", 32)
    if wide := KINDS[kind].wide:
        name, usual = wide
        made[name] = max(made.get(name, usual), wanted)
    return made
