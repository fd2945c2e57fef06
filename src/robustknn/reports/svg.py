"""A figure's SVG file as an element of the page: no style sheet or style attribute of its own, its ids its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from markupsafe import Markup

_LONG_NUMBER = re.compile(r"(-?\d+\.\d\d)\d+")
_URL = re.compile(r"url\(#([^)]+)\)")
_DROPPED = ("font-family", "font")  # the page's own font is used


def inline(file: bytes, prefix: str, title: str) -> Markup:
    """The SVG element for the page.

    The page's policy allows no style attributes, so they become presentation attributes, which the page's style
    sheet can also recolor for the dark scheme.

    Args:
        file: what matplotlib wrote.
        prefix: put before all ids, which are unique in a file and not in a page.
        title: what a screen reader says of the figure.
    """
    root = ElementTree.fromstring(file)
    for parent in root.iter():
        for child in list(parent):
            if _local(child.tag) in ("style", "metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.text, element.tail = _stripped(element.text), _stripped(element.tail)
        element.attrib = dict(_attributes(element.attrib, prefix))
    used = {m for e in root.iter() for v in e.attrib.values() for m in _URL.findall(v)}
    used |= {e.attrib["href"][1:] for e in root.iter() if "href" in e.attrib}
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
    root.attrib = {
        "viewBox": root.get("viewBox", ""),
        "class": "chart",
        "role": "img",
        "aria-labelledby": f"{prefix}title",
    }
    heading = ElementTree.Element("title", {"id": f"{prefix}title"})
    heading.text = title
    root.insert(0, heading)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _local(tag: str) -> str:
    return tag.rsplit("}", 1)[-1]


def _stripped(text: str | None) -> str | None:
    return (text.strip() or None) if text else None


def _attributes(attributes: dict[str, str], prefix: str) -> Iterator[tuple[str, str]]:
    for full, value in attributes.items():
        key = _local(full)
        if key == "style":
            for name, _, setting in (part.partition(":") for part in value.split(";")):
                if name.strip() not in _DROPPED:
                    yield name.strip(), _URL.sub(rf"url(#{prefix}\1)", setting.strip())
        elif key == "id":
            yield key, prefix + value
        elif key == "href":
            yield key, f"#{prefix}{value.removeprefix('#')}"
        elif not (key == "transform" and value.startswith("rotate(-0 ")):
            short = _LONG_NUMBER.sub(r"\1", " ".join(value.split()))
            yield key, _URL.sub(rf"url(#{prefix}\1)", short)
