"""Numbers, names and the threat model as the report writes them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

NAME, LABEL, LONG = 48, 16, 20_000
"""How many characters of a name are written: in tables, under a thumbnail, where the text itself is the matter."""

_JOINERS = "\u200c\u200d"  # several scripts cannot be written without them
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_MARKS = {"Mn", "Me"}
_MOST_MARKS = 3


def visible(text: object, limit: int = NAME) -> str:
    """A text as one line that cannot rearrange what stands around it.

    Control characters, marks of writing direction and lone surrogates become their escapes, as do piles of
    combining marks; what is longer than `limit` is cut in the middle, and where there is room its length is said.
    """
    whole = str(text)
    parts, marks = [], 0
    for character in whole:
        category = unicodedata.category(character)
        marks = marks + 1 if category in _MARKS else 0
        hidden = category in _INVISIBLE and character not in _JOINERS
        parts.append(_escape(character) if hidden or marks > _MOST_MARKS else character)
    shown = "".join(parts)
    if len(shown) <= limit:
        return shown
    tail = limit // 3
    said = f" ({len(whole)} characters)" if limit > LABEL else ""
    return f"{shown[: limit - tail]}…{shown[-tail:]}{said}"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def name(text: object, limit: int = NAME) -> Markup:
    """A name in HTML: escaped, and of its own writing direction."""
    return Markup("<bdi>{}</bdi>").format(visible(text, limit))


def percent(share: float | None) -> str:
    """A share in [0, 1] in per cent with one decimal, without the sign; a dash for none."""
    return "–" if share is None else f"{100 * share:.1f}"


def distance(value: float | None) -> str:
    """A distance, with three decimals where that says something."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def number(value: float) -> str:
    """A mean of counts, or seconds, with one decimal."""
    return "<0.1" if 0 < value < 0.05 else f"{value:,.1f}"


def plural(n: int, noun: str) -> str:
    """'1 image', '500 images'; 'series' stays as it is."""
    return f"{n:,} {noun if n == 1 or noun.endswith('s') else noun + 's'}"


def radius(eps: float, bounds: Any) -> str:
    """An eps: as n/255 where the inputs are in [0, 1] and that is what was meant."""
    rounded = f"{eps:.4g}"
    steps = round(eps * 255)
    if list(bounds or ()) == [0, 1] and 0 < steps < 255 and float(rounded) != eps and abs(eps * 255 - steps) < 1e-4:
        return f"{steps}/255"
    return rounded


NORMS = {"linf": "L-infinity", "l2": "L2", "l1": "L1"}


def norm(threat: Mapping[str, Any]) -> str:
    """The norm's name."""
    return NORMS.get(threat["norm"], visible(threat["norm"]))


_ALLOWANCES = {
    "linf": "With every {unit} allowed to change by at most {eps} ({norm})",
    "l2": "With any change of at most {eps} in length ({norm}) allowed",
    "l1": "With changes allowed that add up to at most {eps} over all {unit}s ({norm})",
}


def allowance(threat: Mapping[str, Any], unit: str) -> Markup:
    """What the attacker may do, as the beginning of a sentence; `unit` is what an input is made of ("pixel")."""
    named = Markup('<span class="whole">{}</span>').format(norm(threat))
    sentence = Markup(_ALLOWANCES.get(threat["norm"], "Within eps {eps} ({norm})"))
    return sentence.format(unit=unit, eps=radius(float(threat["eps"]), threat["bounds"]), norm=named)
