"""The documentation's site: built without a warning, whole, its links lead somewhere, nothing comes from elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

import robustknn
from robustknn import registry

pytest.importorskip("mkdocs", reason="the site needs MkDocs: pip install 'robustknn[docs]'")

ROOT = Path(__file__).parents[1]
SOURCES = {page.relative_to(ROOT / "docs").as_posix(): page for page in sorted((ROOT / "docs").rglob("*.md"))}
SOURCES |= {"index.md": ROOT / "README.md", "contributing.md": ROOT / "CONTRIBUTING.md"}
LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "object": "data",
}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """What a page links to, what it loads, what can be linked to, and the tags and words of its article."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.tags: Counter[str] = Counter()
        self.open: list[str] = []
        self.inside: int | None = None
        self.words: list[str] = []
        self.title = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attrs}
        if "id" in known:
            self.ids.add(known["id"])
        if tag == "a" and "href" in known:
            self.links.append(known["href"])
        if tag in LOADS and LOADS[tag] in known:
            self.loads.append(known[LOADS[tag]])
        if tag == "link" and known.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(known["href"])
        if self.inside is not None:
            self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        if tag == "article":
            self.inside = len(self.open)

    def handle_endtag(self, tag: str) -> None:
        while tag in self.open and self.open.pop() != tag:
            pass
        if self.inside is not None and len(self.open) < self.inside:
            self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside is not None and "script" not in self.open and "style" not in self.open:
            self.words += data.split()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    said = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # a notice that the theme's makers print, of no page of ours
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=said)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {file.relative_to(site).as_posix(): Page(file.read_text("utf-8")) for file in sorted(site.rglob("*.html"))}


def place(source: str) -> str:
    """The page of a Markdown file."""
    return re.sub(r"(^|/)README\.md$", r"\1index.md", source).removesuffix(".md") + ".html"


def test_every_source_is_a_page_that_the_navigation_leads_to(pages: dict[str, Page]) -> None:
    for source in SOURCES:
        assert place(source) in pages, source
        assert place(source) in {unquote(link).partition("#")[0] for link in pages["index.html"].links} | {"index.html"}


def test_every_link_leads_somewhere(site: Path, pages: dict[str, Page]) -> None:
    checked = 0
    for name, page in pages.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            assert target.resolve().is_file(), f"{name}: {link}"
            checked += 1
            there = pages.get(target.resolve().relative_to(site.resolve()).as_posix())
            if parts.fragment and there is not None:
                fragment = unquote(parts.fragment)
                assert fragment in there.ids or fragment.startswith("__"), f"{name}: {link}"
    assert checked > 1000


def test_nothing_comes_from_elsewhere(site: Path, pages: dict[str, Page]) -> None:
    """What pages load lies on the site; style sheets load nothing; links to elsewhere are those of the Markdown."""
    for name, page in pages.items():
        for load in page.loads:
            assert not re.match(r"(?:[a-z]+:)?//", load), f"{name} loads {load}"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text("utf-8")
        assert not re.search(r"@import|url\(\s*['\"]?(?:[a-z]+:)?//", text), sheet
    for script in site.rglob("*.html"):
        inline = re.findall(r"<script(?![^>]*src=)[^>]*>(.*?)</script>", script.read_text("utf-8"), re.DOTALL)
        assert not any("http" in text for text in inline), script


def test_links_to_files_outside_the_docs_are_text_or_lead_to_the_source() -> None:
    pages = hook("pages")
    line = "See [the record](../../benchmarks/results/on_disk.json), [a page](../data.md#data) and `[x](y)`."
    assert pages.site_links(line, "scale/README.md", "") == "See the record, [a page](../data.md#data) and `[x](y)`."
    there = pages.site_links(line, "scale/README.md", "https://forge.example/r/blob/main/")
    assert "(https://forge.example/r/blob/main/benchmarks/results/on_disk.json)" in there
    assert (
        pages.site_links("[a](docs/data.md) [b](CONTRIBUTING.md)", "index.md", "")
        == "[a](data.md) [b](contributing.md)"
    )
    assert (
        pages.site_links("[a](../../README.md#five-minutes)", "tutorials/x.md", "") == "[a](../index.md#five-minutes)"
    )
    assert pages.site_links("[../data.md](../data.md)", "scale/README.md", "") == "[Data](../data.md)"
    assert pages.site_links("[a](nowhere.md)", "scale/README.md", "") == "[a](nowhere.md)"  # MkDocs warns of it
    fenced = "```\n[a](../../nowhere)\n```\n"
    assert pages.site_links(fenced, "scale/README.md", "") == fenced


def hook(name: str) -> ModuleType:
    """A module of website/, which is no package."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(f"website_{name}", ROOT / "website" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_that_are_expected_come_into_the_navigation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = hook("pages")
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    nav = [{"Results": ["measured.md", "results/"]}, {"Tutorials": ["report.md"]}]
    assert pages._present(nav) == [{"Results": ["measured.md"]}, {"Tutorials": []}]
    (tmp_path / "results").mkdir()
    for name in ("README.md", "a.md", "B.md", "figure.svg"):
        (tmp_path / "results" / name).touch()
    (tmp_path / "report.md").touch()
    results = ["measured.md", "results/README.md", "results/B.md", "results/a.md"]
    assert pages._present(nav) == [{"Results": results}, {"Tutorials": ["report.md"]}]


@pytest.mark.parametrize("source", SOURCES)
def test_the_site_reads_the_markdown_as_a_forge_does(source: str, pages: dict[str, Page]) -> None:
    """As many tables, rows, list items, headings, code blocks and quotes as CommonMark with tables has."""
    html = MarkdownIt("commonmark").enable("table").render(SOURCES[source].read_text("utf-8"))
    forge, here = Page(f"<article>{html}</article>"), pages[place(source)]
    for tag in ("table", "tr", "td", "li", "ol", "ul", "h1", "h2", "h3", "h4", "pre", "blockquote"):
        assert here.tags[tag] == forge.tags[tag], tag
    assert "".join(here.words).count("|") == "".join(forge.words).count("|")


def test_every_public_name_has_its_place(pages: dict[str, Page]) -> None:
    front = pages["api/index.html"]
    for name in robustknn.__all__:
        if name == "__version__":
            continue
        home = robustknn._HOME_OF[name]
        page = home.removeprefix("robustknn.")
        assert f"{page}.html#{home}.{name}" in front.links, name
        assert f"{home}.{name}" in pages[f"api/{page}.html"].ids, name
    packages = [p.name for p in (ROOT / "src" / "robustknn").iterdir() if (p / "__init__.py").is_file()]
    for package in sorted(set(packages) - {"cli"}):
        module: Any = __import__(f"robustknn.{package}", fromlist=["x"])
        for name in module.__all__:
            assert f"robustknn.{package}.{name}" in pages[f"api/{package}.html"].ids, (package, name)


def test_every_registered_name_has_its_row(pages: dict[str, Page]) -> None:
    words = set(pages["api/registered.html"].words)
    ours = [
        [entry.name for entry in kind if entry.build.__module__.startswith("robustknn.")]  # other tests load plugins
        for kind in registry.ALL.values()
    ]
    for name in chain.from_iterable(ours):
        assert name in words, name
    assert pages["api/registered.html"].tags["tr"] == sum(1 + len(names) for names in ours)


def test_every_page_is_found_by_the_search(site: Path, pages: dict[str, Page]) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    found = {doc["location"].partition("#")[0] for doc in index["docs"]}
    assert found >= set(pages)


def test_the_citation_is_of_this_version() -> None:
    import yaml

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["version"] == robustknn.__version__
    assert cited["license"] == "Apache-2.0"
