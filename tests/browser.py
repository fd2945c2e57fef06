"""Pages in a headless Chromium, for tests that click; without one they are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chromium

SERIOUS = ("serious", "critical")


@contextmanager
def launched() -> Iterator[Any]:
    """A browser with a profile of its own, closed afterwards."""
    program = chromium.program()
    if program is None:
        pytest.skip(f"{chromium.MISSING} to test the page by clicks")
    pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install '.[dev]'")
    with chromium.launched(program) as browser:
        yield browser


class Opened:
    """A page from the disk, and everything it asked for, complained of or popped up."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | context)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.on("console", lambda m: self.complaints.append(m.text))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("dialog", lambda d: (self.complaints.append(f"dialog {d.message}"), d.dismiss()))
        self.page.goto(path.as_uri())

    @property
    def network(self) -> list[str]:
        """What was loaded beside the page itself and pictures that are in it."""
        return [url for url in self.requests[1:] if not url.startswith("data:")]

    def column(self, place: int) -> list[str]:
        """The texts of a column of the table of samples, as it stands."""
        cells = self.page.locator(f"#samples-table tbody tr > :nth-child({place + 1})")
        return [" ".join(text.split()).removesuffix(" ▣ with neighbors") for text in cells.all_inner_texts()]

    def head(self) -> list[str]:
        """The names of the columns."""
        return [text.strip(" ▲▼") for text in self.page.locator("#samples-table thead button").all_inner_texts()]

    def choose(self, which: str, label: str) -> None:
        """Choose from one of the lists above the table."""
        self.page.select_option(f"#pick-{which}", label=label)

    def findings(self) -> list[str]:
        """What axe-core finds that is serious or critical."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install '.[dev]'")
        found = axe.Axe().run(self.page).response["violations"]
        return [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in SERIOUS]
