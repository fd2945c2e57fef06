"""Numbers as people write them: 50e9, 1.3M, 1_000_000, 64GB; and as they are read."""

from __future__ import annotations

import math
import re

from robustknn.errors import InputError

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_SIZES = {"": 1.0, "b": 1.0} | {
    f"{prefix}{unit}": (1000.0 if unit == "b" else 1024.0) ** power
    for power, prefix in enumerate("kmgtp", 1)
    for unit in ("b", "ib")
}
_NUMBER = re.compile(r"([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(e[+]?[0-9]+)?\s*([a-z]*)")


def count(text: str | float, what: str) -> int:
    """A number of things: 50e9, 1.3M, 100k, 2B, 1_000_000.

    Raises:
        InputError: no such number, none at all, or not a whole one.
    """
    value = _value(text, what, _COUNTS, "write it as 1000000, 1_000_000, 1e6, 1M, 100k or 50B")
    if value < 1 or not math.isclose(value, round(value), rel_tol=1e-12):
        raise InputError(f"{what} must be a whole number of at least 1, not {text}.")
    return round(value)


def size(text: str | float, what: str) -> float:
    """A number of bytes: 64GB, 2TB, 512GiB, or the plain number.

    Raises:
        InputError: no such size, or none at all.
    """
    value = _value(text, what, _SIZES, "write it as 64GB, 512GiB or 2TB")
    if value <= 0:
        raise InputError(f"{what} must be above 0, not {text}.")
    return value


def _value(text: str | float, what: str, units: dict[str, float], how: str) -> float:
    if isinstance(text, (int, float)):
        text = repr(float(text))
    found = _NUMBER.fullmatch(str(text).strip().lower())
    if not found or found[3] not in units:
        raise InputError(f"{what} {text!r} is not understood; {how}.")
    value = float(found[1].replace("_", "") + (found[2] or "")) * units[found[3]]
    if not math.isfinite(value):
        raise InputError(f"{what} {text!r} is too large; {how}.")
    return value


def said(value: float, unit: str) -> str:
    """A figure for people: "1.3 TB", "4.2 ms", "12 days", "1,200", "$3.4k"."""
    if unit == "bytes":
        return _scaled(value, 1000, ("B", "kB", "MB", "GB", "TB", "PB", "EB"))
    if unit == "$":
        return "$" + _scaled(value, 1000, ("", "k", "M", "B")).replace(" ", "")
    if unit == "s":
        return _time(value)
    return _digits(value)


def _scaled(value: float, step: float, names: tuple[str, ...]) -> str:
    place = 0
    while place < len(names) - 1 and float(_plain(value)) >= step:
        value, place = value / step, place + 1
    return f"{_digits(value)} {names[place]}".strip()


def _time(seconds: float) -> str:
    for unit, length in (("years", 365 * 86400.0), ("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= (2 if unit in ("years", "days") else 1) * length:
            return f"{_digits(seconds / length)} {unit}"
    if not seconds:
        return "0 s"
    return f"{_digits(seconds * 1e3)} ms" if seconds >= 1e-3 else f"{_digits(seconds * 1e6)} µs"


def _digits(value: float) -> str:
    """Two significant digits, three from 100 on, and whole numbers beyond."""
    return f"{float(_plain(value)):,.0f}" if value >= 100 else _plain(value)


def _plain(value: float) -> str:
    if value >= 1000:
        return f"{float(f'{value:.3g}'):.0f}"
    return f"{float(f'{value:.3g}' if value >= 100 else f'{value:.2g}'):g}"
