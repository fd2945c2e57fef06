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
            pages = sorted((DOCS / entry).rglob("*.md"), key=lambda page: (page.name != "README.md", page))
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
    to, _, anchor = (match["to"] or "").partition("#")
    if not to or re.match(r"[a-z]+:", to):
        return match[0]
    here = ROOT / OUTSIDE[page] if page in OUTSIDE else DOCS / page
    target = Path(os.path.normpath(here.parent / to))
    if target.is_dir() and (target / "README.md").exists():
        target /= "README.md"
    anchor = f"#{anchor}" if anchor else ""
    place = _place(target)
    if place is not None:
        text = _title(target) if match["text"] == to and target.suffix == ".md" else match["text"]
        return f"{match['image']}[{text}]({relpath(place, Path(page).parent.as_posix())}{anchor})"
    if target.is_relative_to(DOCS) or not target.exists():
        return match[0]  # for MkDocs to warn of
    written = f"[{match['text']}]({source.rstrip('/')}/{target.relative_to(ROOT).as_posix()}{anchor})"
    return written if source else match["text"]


def _place(target: Path) -> str | None:
    """Where a file of the repository is on the site, None for nowhere."""
    known = {ROOT / file: page for page, file in OUTSIDE.items()}
    if target in known:
        return known[target]
    return target.relative_to(DOCS).as_posix() if target.is_relative_to(DOCS) and target.is_file() else None


def _title(page: Path) -> str:
    """What a link is called whose text is a file's name, which means something in a folder only."""
    return page.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")
