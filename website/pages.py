"""A hook of MkDocs: pages that lie outside docs/, pages that may come, and links as forges read them.

The Markdown in this repository is written for a forge. Three things differ on the site: README.md is its first page, a
file outside docs/ is no page, and some pages are written only when there is something to show.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from posixpath import relpath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OUTSIDE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
"""Pages of the site that are files of the root."""

EXPECTED = ("report.md", "results/")
"""Entries of the navigation that are left out while their file or folder is not there."""

LINK = re.compile(
    r"(?P<code>`+)(?s:.*?)(?P=code)|(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<to>[^)\s]+)\)"
)
"""A link or an image, or a span of code, which may look like one."""

FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_config(config: Any) -> Any:
    """Take into the navigation what is expected and has come; leave out the page for mistyped addresses.

    That page would name its style sheets from the root of a server, which is the site's own only sometimes.
    """
    config.theme.static_templates.discard("404.html")
    config.nav = _present(config.nav)
    return config


def _present(nav: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            kept.append({title: _present(sub) if isinstance(sub, list) else sub for title, sub in entry.items()})
        elif entry not in EXPECTED:
            kept.append(entry)
        elif entry.endswith("/"):
            pages = sorted((DOCS / entry).glob("*.md"), key=lambda page: (page.name != "README.md", page.name))
            kept += [page.relative_to(DOCS).as_posix() for page in pages]
        elif (DOCS / entry).exists():
            kept.append(entry)
    return kept


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie in the root."""
    for page, source in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    place = page.file.src_uri
    if place.startswith("api/"):
        return markdown
    return site_links(markdown, place, config.extra["source"])


def site_links(markdown: str, page: str, source: str) -> str:
    """The Markdown of `page` (its path on the site) with links to pages, to `source`, or without those to no page.

    Links in code are text and stay as they are.
    """
    parts = FENCE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(lambda m: _link(m, page, source), part) for i, part in enumerate(parts))


def _link(match: re.Match[str], page: str, source: str) -> str:
    if match["code"]:
        return match[0]
    to, _, anchor = match["to"].partition("#")
    if not to or re.match(r"[a-z]+:", to):
        return match[0]
    here = ROOT / OUTSIDE[page] if page in OUTSIDE else DOCS / page
    target = Path(os.path.normpath(here.parent / to))
    anchor = f"#{anchor}" if anchor else ""
    for known, file in OUTSIDE.items():
        if target == ROOT / file:
            return _written(match, relpath(known, Path(page).parent.as_posix()) + anchor)
    if target.is_dir() and (target / "README.md").exists():
        target /= "README.md"
    if target.is_relative_to(DOCS) and target.is_file():
        return _written(match, relpath(target.relative_to(DOCS).as_posix(), Path(page).parent.as_posix()) + anchor)
    if source:
        return _written(match, f"{source.rstrip('/')}/{target.relative_to(ROOT).as_posix()}{anchor}")
    return match["text"]


def _written(match: re.Match[str], to: str) -> str:
    return f"{match['image']}[{match['text']}]({to})"
