"""The page in a real browser: sorting, filtering and stepping through a sample show what the run's rows say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Opened, launched
from made_runs import EPS, HOSTILE, can_be_a_folder, hostile_run, make_run, real_run

from robustknn import ThreatModel
from robustknn.evaluation import Cell, RunDirectory
from robustknn.evaluation.rundir import CLEAN
from robustknn.reports import write_report
from robustknn.reports.words import LABEL, visible

Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as started:
        yield started


@pytest.fixture
def show(browser: Any) -> Iterator[Open]:
    opened: list[Opened] = []

    def open_page(run: RunDirectory, **context: Any) -> Opened:
        opened.append(Opened(browser, run.path / "report.html", **context))
        return opened[-1]

    yield open_page
    for one in opened:
        one.context.close()
        assert one.complaints == []
        assert one.network == []


N = 40


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Forty samples under two attacks; of the first two the voters and the way are kept."""
    l2 = np.random.default_rng(0).permutation(N) / 10 + 0.5
    x = torch.full((2, 1, 8, 8), 0.25)
    clean = {"position": torch.arange(2), "x": x, "ids 0": torch.tensor([[0, 1, 2], [3, 4, 5]])}
    clean |= {"labels 0": torch.tensor([[0, 0, 1], [1, 1, 2]]), "distances 0": torch.full((2, 3), 0.5)}
    clean |= {"voters 0": torch.tensor([[0, 1, 2, 6, 7], [3, 4, 5, 8, 9]])}
    clean |= {"votes 0": torch.tensor([[0, 0, 1, 0, 0], [1, 1, 2, 1, 1]])}
    attacked = clean | {"x": x + EPS, "ids 0": torch.tensor([[3, 2, 4], [3, 4, 5]])}
    attacked |= {"labels 0": torch.tensor([[1, 1, 1], [1, 1, 2]])}
    attacked |= {"voters 0": torch.tensor([[3, 2, 4, 6, 5], [3, 4, 5, 8, 9]])}
    attacked |= {"votes 0": torch.tensor([[1, 1, 1, 0, 2], [1, 1, 2, 1, 1]])}
    leads = torch.linspace(0.6, -0.4, 11, dtype=torch.float64)
    attacked |= {"path lead": torch.stack([leads, leads.abs()])}
    attacked |= {"path decision": torch.stack([(leads < 0).long(), torch.ones(11, dtype=torch.int64)])}
    voter = {"layer": "fc", "n_neighbors": 5, "metric": "l2", "references": 10, "dim": 2, "index": "E"}
    run = make_run(
        tmp_path_factory.mktemp("known") / "r",
        {"a": [0, *range(10, 25)], "b": [0, 1]},
        n=N,
        wrong=[39],
        tensors={CLEAN: clean, "a": attacked, "b": attacked},
        voters=[voter | {"exact": True, "bank": 0}],
        class_names=["ape", "bee", "cat"],
        attacks={
            "a": {"name": "pgd", "transfer": False, "role": ""},
            "b": {"name": "suite", "transfer": False, "role": "", "parts": ["first", "second"]},
        },
        columns={"a": {"l2": l2}, "b": {"winner": np.array([1, 0, *[-1] * (N - 2)])}},
    )
    images = (torch.arange(10) / 10)[:, None, None, None].expand(10, 1, 8, 8)
    run.write_gallery({"ids 0": torch.arange(10), "labels 0": torch.zeros(10, dtype=torch.int64), "images 0": images})
    write_report(run)
    return run


def whole_column(opened: Opened, place: int) -> list[str]:
    """A column over all pages of the table."""
    found = opened.column(place)
    while opened.page.locator("#page-after").is_visible() and opened.page.locator("#page-after").is_enabled():
        opened.page.click("#page-after")
        found += opened.column(place)
    return found


def test_the_table_holds_every_row_and_sorts_and_filters(known: RunDirectory, show: Open) -> None:
    opened = show(known)
    page, rows = opened.page, known.rows(Cell("victim", "a", EPS))
    head = opened.head()
    assert head[:5] == ["sample", "true class", "without attack", "attacked", "outcome"]
    assert whole_column(opened, 0) == [str(100 + i) for i in range(N)]

    l2 = head.index("L2")
    page.locator("#samples-table thead button").nth(l2).click()
    ordered = np.argsort(rows["l2"], kind="stable")
    assert whole_column(opened, 0) == [str(100 + i) for i in ordered]
    page.locator("#samples-table thead button").nth(l2).click()
    assert whole_column(opened, l2) == [f"{v:.3f}" for v in sorted(rows["l2"], reverse=True)]
    assert page.locator("#samples-table th[aria-sort]").get_attribute("aria-sort") == "descending"
    page.locator("#samples-table thead button").nth(0).click()

    opened.choose("outcome", "▲ fooled")
    fooled = [i for i in range(N) if rows["success"][i] and rows["clean_correct"][i]]
    assert whole_column(opened, 0) == [str(100 + i) for i in fooled]
    assert page.inner_text("#samples-count").startswith(f"{len(fooled)} of {N} samples, 0 of them right under a")
    opened.choose("class", "bee")
    assert whole_column(opened, 0) == [str(100 + i) for i in fooled if i % 3 == 1]
    opened.choose("attack", "b")
    assert opened.column(0) == ["101"]
    opened.choose("class", "cat")
    assert page.inner_text("#samples-count") == "No sample is like this."
    opened.choose("class", "all")
    opened.choose("outcome", "○ wrong without attack")
    assert opened.column(0) == ["139"]
    opened.choose("outcome", "all")
    page.check("#pick-kept")
    assert opened.column(0) == ["100", "101"]
    found = opened.column(opened.head().index("fooled first by"))
    assert found == ["second", "first"]
    opened.choose("winner", "first")
    assert opened.column(0) == ["101"]
    opened.choose("attack", "a")
    assert page.locator("#winner").is_hidden()
    assert opened.column(0) == ["100", "101"]
    # Sample 100 is fooled by both attacks, sample 101 by the second alone.
    assert opened.column(head.index("fooled by, of 2 attacks")) == ["2", "1"]


def test_a_sample_shows_its_voters_before_and_after_and_its_way(known: RunDirectory, show: Open) -> None:
    opened = show(known)
    page = opened.page
    page.click("#samples-table tbody button >> nth=0")
    assert "Sample 100: ape ▲ fooled, taken for bee under a, eps 0.25" in page.inner_text("#one-h")
    assert page.evaluate("document.activeElement.id") == "one-h"
    strips = [
        [text.split() for text in page.locator("#one .strip").nth(side).locator("li").all_inner_texts()]
        for side in (0, 1)
    ]
    assert strips[0] == [["●", "ape", "left"], ["●", "ape", "left"], ["▲", "bee"]]
    assert strips[1] == [["▲", "bee", "new"], ["▲", "bee"], ["▲", "bee", "new"]]
    # Without attack 4 apes and a bee vote; attacked an ape, three bees and a cat, of which 3, 4 and 5 are new.
    votes = "Votes, without attack → attacked: ape 4 → 1, bee 1 → 3, cat 0 → 1. 3 of 5 voters are new under attack."
    assert page.inner_text("#one .votes") == votes
    # The lead falls from .6 by .1 a step: it is 0 at step 6 and below 0 from step 7 on.
    step = page.locator("#step")
    step.focus()
    said = []
    for _ in range(11):
        said.append(page.inner_text("#step-said"))
        page.keyboard.press("ArrowRight")
    assert said[0] == "0 % of the way: ● ape, lead 0.600"
    assert said[6] == "60 % of the way: ● ape, lead 0.000"
    assert said[7] == "70 % of the way: ▲ bee, lead −0.100"
    assert said[10] == "100 % of the way: ▲ bee, lead −0.400"
    assert page.locator("#one .stack img").nth(1).evaluate("e => getComputedStyle(e).opacity") == "1"
    page.click(".slide button >> nth=0")
    assert page.locator("#one .stack img").nth(1).evaluate("e => getComputedStyle(e).opacity") == "0"
    assert page.locator("#one svg.way .lost").get_attribute("d").count("M") == 4
    # The same sample under the other attack, then the next one.
    page.click("#one .others button:has-text('b')")
    assert "taken for bee under b" in page.inner_text("#one-h")
    page.click("#one-after")
    assert "Sample 101: bee" in page.inner_text("#one-h")
    assert page.locator("#one .change").count() == 0
    assert "0 of 5 voters are new" in page.inner_text("#one .votes")
    page.click("#one-after")
    assert "The page holds no picture and no neighbors of this sample" in page.inner_text("#one")
    page.click("#one-close")
    assert page.locator("#one").is_hidden()


def test_the_static_page_marks_the_same_voters_and_way(known: RunDirectory, show: Open) -> None:
    opened = show(known, java_script_enabled=False)
    page = opened.page
    assert page.locator("#explorer").is_hidden()
    assert "rows.parquet beside this page holds the same rows" in page.inner_text("#samples")
    first = page.locator("details.sample").nth(0)
    assert first.locator(".strip").nth(0).locator(".change").all_inner_texts() == ["left", "left"]
    assert first.locator(".strip").nth(1).locator(".change").all_inner_texts() == ["new", "new"]
    assert "ape 4 → 1, bee 1 → 3, cat 0 → 1. 3 of 5 voters are new" in first.inner_text()
    said = "lead 0.60 at the sample, −0.40 at the example, below zero from 70 % of the way on"
    assert said in first.locator("figcaption").last.inner_text()
    assert "Decided: ape from 0 %, bee from 70 %." in first.inner_text()
    for heading in ("Verdict", "Results", "Figures", "Neighbors", "What was run"):
        assert page.locator(f"text={heading}").first.is_visible()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    path = tmp_path_factory.mktemp("real") / "r"
    run = real_run(path, (1, 8, 8), dknn=True, attacks=["ask", "pgd-transfer"], eps=[0.1])
    write_report(run)
    return run


def test_switching_shows_the_rows_of_that_cell(real: RunDirectory, show: Open) -> None:
    opened = show(real)
    page = opened.page
    page.check("#pick-kept")
    cells = [c for c in real.cells if c.attack != CLEAN and not c.control]
    assert len(cells) == 8
    for cell in cells:
        opened.choose("classifier", cell.classifier)
        page.select_option("#pick-attack", value=str(_place(page, "#pick-attack", cell.attack)))
        opened.choose("eps", f"{cell.eps:g}")
        page.uncheck("#pick-kept")
        rows, clean = real.rows(cell), real.rows(Cell(cell.classifier, CLEAN))
        head = opened.head()
        for title, values in (("lead before", clean["margin"]), ("lead attacked", rows["margin"]), ("L2", rows["l2"])):
            shown = [float(t.replace("−", "-")) for t in opened.column(head.index(title))]
            assert shown == pytest.approx(values.tolist(), abs=6e-4)
        assert opened.column(head.index("attacked")) == [str(p) for p in rows["prediction"]]
        assert ("credibility attacked" in head) == (cell.classifier == "dknn")
        # Of every kept sample, as many layers as voters, each with its references.
        page.check("#pick-kept")
        voters = real.header["plan"]["classifiers"][cell.classifier]["voters"]
        kept = real.tensors(cell)
        for place in range(4):
            page.locator("#samples-table tbody button").nth(place).click()
            assert page.locator("#one h4").count() == len(voters)
            for v in range(len(voters)):
                images = page.locator("#one .strips").nth(v).locator(".strip").nth(1).locator("img")
                alts = images.evaluate_all("all => all.map(e => e.alt)")
                assert [alt.split()[1] for alt in alts] == [str(i) for i in kept[f"ids {v}"][place].tolist()]


@pytest.mark.parametrize(
    "given",
    [
        {"shape": (24,), "threat": ThreatModel("l2", 0.5, bounds=None)},
        {"shape": (2, 3, 4, 5)},
        {"shape": (3, 150, 120), "keep_images": False},
        {"shape": (5,), "n_classes": 100, "examples": 0},
    ],
    ids=["vector", "not drawn", "no reference images", "no examples"],
)
def test_runs_of_other_shapes_are_shown_too(given: dict[str, Any], tmp_path: Path, show: Open) -> None:
    run = real_run(tmp_path / "r", **given)
    write_report(run)
    opened = show(run)
    page = opened.page
    rows = run.rows(next(c for c in run.cells if c.attack == "ask"))
    assert opened.column(opened.head().index("attacked")) == [str(p) for p in rows["prediction"]]
    page.locator("#samples-table tbody button").nth(0).click()
    kept = given.get("examples", 4) > 0
    assert page.locator("#one .strip").count() == 2 * kept
    assert page.locator("#one svg.way").count() == kept
    assert page.locator("#one .trio").count() == (kept and given["shape"] != (2, 3, 4, 5))


def _place(page: Any, select: str, name: str) -> int:
    texts = page.locator(f"{select} option").all_inner_texts()
    [place] = [i for i, t in enumerate(texts) if t.replace("▲ ", "").split(" (")[0] == name]
    return place


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_everyone_can_read_and_use_it(real: RunDirectory, show: Open, scheme: str, width: int) -> None:
    opened = show(real, color_scheme=scheme, viewport={"width": width, "height": 800})
    page = opened.page
    page.locator("#samples-table tbody button").nth(0).click()
    assert opened.findings() == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_keyboard_alone_leads_from_the_verdict_to_a_samples_neighbors(known: RunDirectory, show: Open) -> None:
    page = show(known).page
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('href')") == "#samples":
            break
    page.keyboard.press("Enter")
    focused = []
    for _ in range(60):
        page.keyboard.press("Tab")
        focused.append(page.evaluate("document.activeElement.id || document.activeElement.innerText"))
        if focused[-1].startswith("101"):
            break
    assert [f for f in focused if f.startswith("pick-")] == [
        f"pick-{w}" for w in ("classifier", "attack", "eps", "class", "outcome", "kept")
    ]
    page.keyboard.press("Enter")
    assert "Sample 101: bee" in page.inner_text("#one-h")
    assert page.evaluate("document.activeElement.id") == "one-h"
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "step":
            break
    page.keyboard.press("End")
    assert page.inner_text("#step-said").startswith("100 % of the way")


def test_hostile_names_stay_text_with_scripts_on(tmp_path: Path, show: Open) -> None:
    run = hostile_run(tmp_path / "r")
    write_report(run)
    opened = show(run)
    page = opened.page
    allowed = {"OPTION", "BDI", "BUTTON", "SPAN", "DIV", "LI", "OL", "UL", "P", "H3", "H4", "STRONG", "TH", "TR", "TD"}
    allowed |= {"LABEL", "SELECT", "INPUT", "TABLE", "CAPTION", "THEAD", "TBODY", "BR", "FIGURE", "FIGCAPTION", "CODE"}
    allowed |= {"svg", "path", "text"}
    tags = set(page.evaluate("[...document.querySelectorAll('#explorer *')].map(e => e.tagName)"))
    assert tags <= allowed
    assert set(page.evaluate("[...document.querySelectorAll('#pick-class option')].map(e => e.textContent)")) == {
        "all",
        visible(HOSTILE[0], LABEL),
    }
    attacks = page.evaluate("[...document.querySelectorAll('#pick-attack option')].map(e => e.textContent)")
    assert set(attacks) == {visible(h) for h in HOSTILE if can_be_a_folder(h)}
    page.locator("#samples-table tbody button").nth(0).click()
    shown = set(page.locator("#one bdi").all_text_contents())
    # Voter i shows a reference of class i; every layer and every attack has a hostile name.
    assert {visible(h, LABEL) for h in HOSTILE} <= shown
    assert {visible(h) for h in HOSTILE} <= shown
    assert set(page.evaluate("[...document.querySelectorAll('#explorer *')].map(e => e.tagName)")) <= allowed
    assert (
        page.evaluate(
            "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
            ".filter(n => n.startsWith('on') || n === 'srcdoc')"
        )
        == []
    )


def test_nothing_runs_but_the_pages_own_script(known: RunDirectory, browser: Any, tmp_path: Path) -> None:
    html = (known.path / "report.html").read_text()
    altered = html.replace('"use strict";', '"use strict";window.altered = true;', 1)
    injected = altered.replace(
        "</main>", "<img src=x onerror='window.handled = true'><script>window.run = 1</script></main>"
    )
    (tmp_path / "p.html").write_text(injected)
    opened = Opened(browser, tmp_path / "p.html")
    assert opened.page.evaluate("[window.altered, window.handled, window.run]") == [None, None, None]
    assert opened.page.locator("#explorer").is_hidden()
    assert any("Content Security Policy" in text for text in opened.complaints)
    opened.context.close()
