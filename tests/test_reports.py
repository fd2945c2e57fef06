"""The report page: its figures are the run's, it is whole and self-contained, and hostile names are inert in it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from made_runs import HOSTILE, PUBLISHED, can_be_a_folder, hostile_run, make_run, real_run, shown_run
from PIL import Image

from robustknn import ThreatModel, reports, store
from robustknn.errors import InputError, IntegrityError
from robustknn.evaluation import RunDirectory, finish, read_summary
from robustknn.evaluation.rundir import CLEAN
from robustknn.reports import write_report
from robustknn.reports.words import visible

VOID = {"br", "img", "meta", "link", "input", "hr", "path"}
DATA = re.compile(r'<script type="application/json" id="samples-data">(.*?)</script>', re.S)
SCRIPT = re.compile(r"<script>(.*?)</script>", re.S)
TAGS = re.findall(
    r"\w+",
    "html head meta title style body header nav main section article aside footer h1 h2 h3 h4 h5 p a b strong code pre "
    "span bdi br ul ol li dl dt dd div details summary table caption thead tbody tr th td figure figcaption img "
    "svg g path defs pattern rect use text clippath noscript script label select input button",
)


class Page(HTMLParser):
    """A page taken apart: tags with attributes, texts, and every place where the tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.wrong: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        self.wrong += [f"<{t}> never closed" for t in self._open]
        self.text = re.sub(r"\s+", " ", "".join(self.texts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if len({k for k, _ in attrs}) != len(attrs):
            self.wrong.append(f"<{tag}> repeats an attribute")
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.wrong.append(f"</{tag}> closes something else")

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("style", "script"):
            self.texts.append(data)

    def all(self, *tags: str) -> Iterator[dict[str, str]]:
        return (attributes for tag, attributes in self.tags if tag in tags)

    def rows(self, caption: str) -> list[list[str]]:
        """The cells of the body of the table with this caption."""
        table = next(t for t in re.findall(r"<table.*?</table>", self.html, re.S) if caption in t)
        rows = re.findall(r"<tr.*?</tr>", table.split("</thead>")[1], re.S)
        return [[Page(c).text.strip() for c in re.findall(r"<t[hd].*?</t[hd]>", r, re.S)] for r in rows]


def check_page(html: str) -> Page:
    """Everything that is true of every page."""
    page = Page(html)
    assert page.wrong == []
    assert html.startswith("<!DOCTYPE html>")
    assert {tag for tag, _ in page.tags} <= set(TAGS)
    names = {name for _, attributes in page.tags for name in attributes}
    assert not [n for n in names if n.startswith("on") or n in ("style", "srcdoc", "srcset", "action")]
    # Nothing is loaded: pictures are in the page, links stay in it, and no attribute names an address.
    assert all(a["src"].startswith("data:image/png;base64,") for a in page.all("img"))
    links = [a["href"] for _, a in page.tags if "href" in a]
    assert all(link.startswith("#") for link in links)
    assert not [
        v for _, a in page.tags for v in a.values() if re.search(r"(https?:)?//", v) and not v.startswith("data:")
    ]
    css = re.search(r"<style>(.*?)</style>", html, re.S)
    assert css is not None
    assert not re.search(r"url\(|@import", css[1])
    # The policy lets in exactly this style sheet and pictures from the page itself.
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(css[1].encode()).digest()).decode()
    allowed = ["default-src 'none'", "img-src data:", f"style-src 'sha256-{digest}'"]
    # One script at most, the policy names it, and what it works on can end no element.
    scripts = SCRIPT.findall(html)
    assert list(page.all("script")) == ([{"type": "application/json", "id": "samples-data"}, {}] if scripts else [])
    assert len(scripts) <= 1
    for script in scripts:
        allowed.append(f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'")
        [content] = DATA.findall(html)
        assert not set("<>&\u2028\u2029") & set(content)
        json.loads(content)
    assert policy.split("; ") == [*allowed, "base-uri 'none'", "form-action 'none'"]
    # Whoever cannot see it or has no mouse.
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {link[1:] for link in links} | {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    targets |= set(re.findall(r'"url\(#([^)]+)\)"', html))
    assert targets <= set(ids)
    assert all(a.get("alt") for a in page.all("img"))
    assert all("scope" in a for a in page.all("th"))
    assert html.count("<table") == html.count("<caption")
    assert all(a.get("tabindex") == "0" for a in page.all("div") if a.get("class") == "scroll")
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    return page


def report(run: RunDirectory | Path, **options: Any) -> Page:
    return check_page(write_report(run, **options).read_text())


def test_the_page_opens_with_the_known_verdict(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", {"a": [0, 1, 2], "b": [2, 3]})
    page = report(run)
    assert (
        "victim is right on 90.0 % of 10 samples. With every value allowed to change by at most 0.25 (L-infinity), "
        "60.0 % stay right under the strongest attack run here, a, and 50.0 % under both attacks."
    ) in page.text
    assert "50.0 % right under every attack" in page.text
    assert "40.0 % fooled" in page.text
    assert "10.0 % wrong without attack" in page.text
    widths = [float(a["width"]) for a in page.all("rect") if a.get("height") == "22"]
    assert widths == [1000, 900, 500]  # all, right without attack, right under every attack
    assert page.text.index("victim is right on") < page.text.index("None of the checks") < page.text.index("Results")


def test_the_table_has_the_known_figures(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "r", {"a": [0, 1, 2], "b": [2, 3]}, transfer=["b"], credibility=0.2))
    # Wilson's 95 % interval of 6, 7 and 5 of 10 is (.313, .832), (.397, .892) and (.237, .763); 2·.9·.6/1.5 = .72.
    assert page.rows("In brackets the 95 % interval") == [
        ["victim 10 samples"],
        ["a", "90.0", "60.0", "[31.3, 83.2]", "33.3", "72.0", "0.750", "0.250", "7.0", "1.2"],
        ["b blind to the neighbors", "90.0", "70.0", "[39.7, 89.2]", "22.2", "78.8", "0.750", "0.250", "7.0", "1.2"],
        ["worst case of all attacks", "90.0", "50.0", "[23.7, 76.3]", ""],
    ]
    assert page.rows("were right without attack and wrong under it") == [
        # Wilson's interval of 9 of 10 is (.596, .982); 1 of 10 is at credibility .2, and 4 and 3 of 10 when attacked.
        ["victim clean accuracy 90.0 % [59.6, 98.2], mean credibility 0.920"],
        ["a", "0.750", "0.250", "0.680", "0.200", "2.0", "0.0", "0.0", "–"],
        ["b", "0.750", "0.250", "0.760", "0.200", "2.0", "0.0", "0.0", "–"],
    ]


def test_the_parts_of_an_attack_and_credibility_as_a_detector(tmp_path: Path) -> None:
    rejection = [{"share": 0.05, "threshold": 0.3}, {"share": 0.01, "threshold": 0.1}]
    page = report(
        make_run(
            tmp_path / "r",
            {"a": [0, 1, 2], "b": [2, 3]},
            credibility=0.2,
            classifiers={"victim": {"type": "DkNN", "n_classes": 3, "voters": [], "rejection": rejection} | PUBLISHED},
            attacks={
                "a": {"name": "suite", "transfer": False, "role": "", "parts": ["second <b>", "first"]},
                "b": {"name": "pgd", "transfer": False, "role": ""},
            },
            columns={"a": {"winner": np.array([1, 1, 0, *[-1] * 7]), "success_8bit": np.arange(10) % 2 == 0}},
        )
    )
    assert page.rows("They run from top to bottom") == [["second <b>", "10.0"], ["first", "20.0"]]
    # a fools 0, 1, 2, and 9 is wrong without attack: of 0, 1, 2 and 9, two survive rounding.
    assert page.rows("were right without attack and wrong under it")[1][-1] == "50.0"
    assert page.rows("Inputs below a threshold are rejected") == [
        # Credibility is .2 where the decision is wrong, else 1: the first threshold rejects every wrong decision.
        ["a", "5.0", "0.300", "10.0", "100.0", "90.0"],
        ["a", "1.0", "0.100", "0.0", "0.0", "60.0"],
        ["b", "5.0", "0.300", "10.0", "100.0", "90.0"],
        ["b", "1.0", "0.100", "0.0", "0.0", "70.0"],
    ]
    assert "Mean 0.920 without attack, 0.680 attacked, 0.200 where the attack fooled" in page.text
    # One of ten clean samples, and all that are fooled, have a credibility of .2.
    assert "a, AUC 0.95" in page.text
    assert "b, AUC 0.95" in page.text
    assert (tmp_path / "r" / "figures" / "detection-1-victim.png").is_file()


def test_a_randomized_classifier_is_shown_in_fresh_draws_too(tmp_path: Path) -> None:
    columns = {"clean": {"fresh": np.linspace(0.8, 1, 10)}, "a": {"fresh": np.linspace(0, 0.6, 10)}}
    page = report(make_run(tmp_path / "r", {"a": [0, 1, 2]}, columns=columns, fresh_draws=7))
    assert page.rows("over 7 fresh draws of each sample")[1:] == [["none", "90.0", "90.0"], ["a", "60.0", "30.0"]]
    assert "Randomized classifiers" not in report(make_run(tmp_path / "s", {"a": [0]})).text


@pytest.mark.parametrize(
    ("fooled", "transfer", "said"),
    [
        ({"a": [0, 1]}, [], "No check gave a sign that a is held back."),
        ({"t": [0, 1]}, ["t"], "No attack that sees the neighbors was run: this says little"),
        ({"a": [0], "t": [0, 1]}, ["t"], "The strongest attack, t, does not even see the neighbors"),
        ({}, [], "No attack was run, so nothing is known of its robustness."),
    ],
)
def test_the_verdict_says_what_it_rests_on(
    tmp_path: Path, fooled: dict[str, list[int]], transfer: list[str], said: str
) -> None:
    page = report(make_run(tmp_path / "r", fooled, transfer=transfer))
    assert said in page.text
    assert ("doubtful" in page.html.split("</style>")[1]) == (said[:8] != "No check")


def test_warnings_stand_below_the_verdict_with_their_message(tmp_path: Path) -> None:
    # The blind attack fools 8 samples that the white-box attack does not: McNemar's p is 2^-8.
    run = make_run(tmp_path / "r", {"a": [], "t": list(range(8))}, transfer=["t"])
    [warning] = read_summary(run).warnings
    page = report(run)
    verdict, figures = page.text.index("Verdict"), page.text.index("Results")
    assert "1 sign that an accuracy is overstated" in page.text[verdict:figures]
    assert warning.message in page.text[verdict:figures]
    assert page.rows("The checks for gradient masking")[-2][1:] == ["1", "▲ 1 sign"]
    assert "▲ a" in [row[0] for row in page.rows("In brackets")]
    assert "None of the checks" not in page.text


def test_ties_that_the_classifier_decides_wrongly_are_named(tmp_path: Path) -> None:
    # Of ten samples 0 is fooled and 9 wrong without attack; 2 and 3 are tied, and count as right.
    run = make_run(tmp_path / "r", {"a": [0]}, tied=[2, 3])
    [warning] = read_summary(run).warnings
    assert warning.code == "ties"
    assert warning.message.startswith("20.0 % of the samples end in a tie that the classifier decides wrongly")
    assert "the accuracy is 60.0 %" in warning.message
    page = report(run)
    assert "80.0 % stay right" in page.text
    assert "Of these, 20.0 % end in a tie that victim itself decides wrongly." in page.text
    assert page.rows("The checks for gradient masking")[-1][1:] == ["1", "▲ 1 sign"]
    assert page.rows("were right without attack and wrong under it")[1][-2] == "20.0"


# ------------------------------------------------------------------------------------------- neighbors


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_neighbors_are_the_runs_own(tmp_path: Path) -> None:
    page = report(shown_run(tmp_path / "r", class_names=["ape", "bee", "cat"]), samples=3)
    samples = re.findall(r'<details class="sample".*?</details>', page.html, re.S)
    titles = [Page(re.search(r"<summary>.*?</summary>", s, re.S)[0]).text.strip() for s in samples]  # type: ignore[index]
    # The fooled come first, and one that stood is shown too.
    assert titles == [
        "▲ fooled sample 101: bee, taken for cat",
        "▲ fooled sample 102: cat, taken for ape",
        "● stood sample 100: ape",
    ]
    strips = [re.findall(r'<li class="(\w+)">.*?</li>', part, re.S) for part in samples[0].split("<ol")[1:]]
    assert strips == [["true", "true", "taken"], ["taken", "true", "true"]]
    assert [t.split("<")[0] for t in re.findall(r"<bdi>(bee|cat|ape)", samples[0].split("<ol")[1])] == [
        "bee",
        "bee",
        "cat",
    ]
    assert len(re.findall("<li", samples[1])) == 4  # id -1 is a neighbor that was not found

    found = re.findall(r'<img [^>]*src="([^"]+)"[^>]*alt="([^"]+)"', samples[0])
    assert [alt for _, alt in found[:4]] == [
        "sample 101 without attack",
        "sample 101 attacked",
        "the change, amplified",
        "reference 3 at distance 3.500",
    ]
    clean, attacked, change, reference = (pixels(uri).astype(int) for uri, _ in found[:4])
    assert np.unique(clean).tolist() == [round(0.4 * 255)]
    assert np.unique(attacked[0]).tolist() == [round(0.65 * 255)]
    assert np.unique(change[0]).tolist() == [255]
    assert np.unique(change[1:]).tolist() == [128]
    assert np.unique(reference).tolist() == [round(0.6 * 255)]
    assert "the change, amplified 2 times" in page.text
    assert "black −0.250, white +0.250" in page.text


def test_an_unmoved_sample_shows_no_change(tmp_path: Path) -> None:
    page = report(shown_run(tmp_path / "r"))
    last = re.findall(r'<details class="sample".*?</details>', page.html, re.S)[-1]
    assert "sample 103" in last
    assert "not moved" in last
    assert "the change" not in last


def gallery_of(page: Page) -> str:
    """The HTML of all samples beside their neighbors."""
    return "".join(re.findall(r'<details class="sample".*?</details>', page.html, re.S))


def test_pictures_over_the_budget_are_left_out_and_the_page_says_so(tmp_path: Path) -> None:
    run = shown_run(tmp_path / "r")
    whole = report(run)
    spent = len(gallery_of(whole).encode())  # markup too: around small pictures there is more of it than of them
    page = report(run, image_budget=spent // 2)
    assert 0 < len(gallery_of(page).encode()) <= spent // 2
    assert re.search(r"[1-3] samples? left out: the samples of this page, with their pictures, may take", page.text)
    assert "left out" not in report(run, image_budget=spent).text
    none = report(run, image_budget=0)
    assert not list(none.all("img"))
    assert "4 samples left out" in none.text
    assert "left out" not in whole.text


def test_references_without_images_are_shown_by_class_and_distance(tmp_path: Path) -> None:
    page = report(shown_run(tmp_path / "r", images=False))
    assert "The references were kept without their inputs" in page.text
    assert len(list(page.all("img"))) == 3 * 3 + 2  # samples, and no reference; one sample was not moved
    assert page.html.count('<span class="far">3.500</span>') == 2


def test_a_tie_counts_for_the_defender(tmp_path: Path) -> None:
    run = shown_run(tmp_path / "r")
    [path] = (run.path / "cells" / "victim" / "a@0.25").glob("*.json")
    content = store.read_sealed(path)
    content["columns"]["success"][1], content["columns"]["robust"][1] = False, True  # the prediction stays another
    content["columns"]["margin"][1] = 0.0
    store.write_sealed(path, content, pretty=False)
    run = RunDirectory(run.path)
    finish(run)
    page = report(run)
    assert "● tied, counts as right sample 101: 1, taken for 2" in page.text
    assert "75.0 % stay right" in page.text


# ---------------------------------------------------------------------------------- runs of all shapes


SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "gray": ({"shape": (1, 8, 8), "dknn": True, "attacks": ["ask", "pgd-transfer"], "eps": [0.1]}, "every pixel"),
    "color": ({"shape": (3, 12, 12)}, "every pixel"),
    "large": ({"shape": (3, 150, 120)}, "Large images are reduced"),
    "vector": ({"shape": (24,), "threat": ThreatModel("l2", 0.5, bounds=None)}, "at most 0.5 in length"),
    "series": ({"shape": (1, 64), "threat": ThreatModel("l1", 3.0)}, "over all values"),
    "no drawing": ({"shape": (2, 3, 4, 5)}, "Inputs of this shape are not drawn."),
    "no reference images": ({"shape": (1, 8, 8), "keep_images": False}, "kept without their inputs"),
    "no examples": ({"shape": (1, 8, 8), "examples": 0}, "This run kept no example of knn"),
    "two classes": ({"shape": (5,), "n_classes": 2}, "2 classes"),
    "hundred classes": ({"shape": (5,), "n_classes": 100}, "100 classes"),
    "no attack": ({"shape": (5,), "attacks": []}, "No attack was run"),
    "blind attack": ({"shape": (5,), "attacks": ["fgsm-transfer"]}, "No check for gradient masking was made"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_runs_of_all_shapes(case: str, tmp_path: Path) -> None:
    given, said = SHAPES[case]
    run = real_run(tmp_path / "r", **given)
    page = report(run)
    assert said in page.text
    summary = read_summary(run)
    cells = [c for row in page.rows("In brackets") for c in row]
    for c in summary.classifiers:
        assert f"{c.name} is right on {100 * c.clean_accuracy:.1f} % of 6" in page.text
        for a in c.attacks:
            assert f"{100 * a.robust_accuracy:.1f}" in cells
            assert f"{a.mean_l2:.3f}" in cells
    files = sorted(f.name for f in (run.path / "figures").iterdir())
    credible = sum(len(c.attacks) for c in summary.classifiers if c.mean_credibility is not None)
    detectors = sum(any(a.attack_success_rate for a in c.attacks) for c in summary.classifiers if c.mean_credibility)
    assert len(files) == 2 * (len(summary.classifiers) + credible + detectors)
    assert (credible > 0) == (case == "gray")
    for file in files:
        if file.endswith(".svg"):
            assert ElementTree.parse(run.path / "figures" / file).getroot().tag.endswith("svg")
        else:
            Image.open(run.path / "figures" / file).verify()


def test_the_same_run_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    run = real_run(tmp_path / "r", (1, 8, 8), dknn=True)
    shutil.copytree(run.path, tmp_path / "elsewhere")
    made = []
    for path in (run.path, tmp_path / "elsewhere"):
        write_report(path)
        files = [path / "report.html", *sorted((path / "figures").iterdir())]
        made.append({f.name: f.read_bytes() for f in files})
    assert len(made[0]) == 1 + 2 * 4
    assert made[0] == made[1]


def test_a_page_of_a_thousand_images_stays_small(tmp_path: Path) -> None:
    n, kept, k = 1000, 300, 8
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 400, (kept, k), generator=g)
    tensors = {"position": torch.arange(kept), "x": torch.rand(kept, 3, 32, 32, generator=g)}
    for v in range(4):
        tensors |= {f"ids {v}": ids, f"labels {v}": ids % 3, f"distances {v}": ids.float()}
        tensors |= {f"voters {v}": ids, f"votes {v}": ids % 3}
    tensors |= {"path lead": torch.rand(kept, 11, generator=g), "path decision": torch.zeros(kept, 11).long()}
    voter = {"n_neighbors": k, "metric": "l2", "references": 400, "dim": 2, "index": "E", "exact": True, "bank": 0}
    attacks = [f"a{i}" for i in range(6)]
    run = make_run(
        tmp_path / "r",
        {a: range(i) for i, a in enumerate(attacks)},
        n=n,
        tensors={CLEAN: tensors} | dict.fromkeys(attacks, tensors),
        voters=[voter | {"layer": f"l{v}"} for v in range(4)],
        credibility=0.1,
    )
    images = torch.rand(400, 3, 32, 32, generator=g)
    run.write_gallery({"ids 0": torch.arange(400), "labels 0": torch.arange(400) % 3, "images 0": images})
    page = report(run)
    assert len(page.html.encode()) < 5_000_000
    [held] = data_of(page)["classifiers"]
    assert [len(cell["outcome"]) for cell in held["cells"]] == [n] * 6
    shown = [len(cell["shown"]) for cell in held["cells"]]
    assert (
        f"pictures are here for {sum(shown):,} pairs of a sample and an attack of the 1,800 that the run" in page.text
    )
    # Each attack has as many samples as any other, but for the last one.
    assert max(shown) - min(shown) <= 1
    assert min(shown) > 50


def data_of(page: Page) -> Any:
    """What the page's script works on."""
    return json.loads(DATA.findall(page.html)[0])


def test_rows_that_do_not_fit_are_left_out_and_the_page_says_so(tmp_path: Path) -> None:
    n = 60_000
    page = report(make_run(tmp_path / "r", {"a": range(0, n, 7)}, n=n))
    [held] = data_of(page)["classifiers"]
    m = len(held["samples"]["id"])
    assert held["samples"]["id"] == [100 + i for i in range(m)]
    assert 10_000 < m < n
    assert f"the table holds the first {m:,} of 60,000 samples" in page.text
    assert len(page.html.encode()) < 5_000_000
    assert held["cells"][0]["outcome"][:10] == "fssssssfsw"


# ---------------------------------------------------------------------------------------------- errors


def test_a_folder_without_a_run_or_summary_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run; pass the folder of a finished evaluation"):
        write_report(tmp_path)
    run = make_run(tmp_path / "r", {"a": [0]})
    (run.path / "summary.json").unlink()
    with pytest.raises(InputError, match="holds no summary yet"):
        write_report(run)
    with pytest.raises(InputError, match="must be at least 0"):
        write_report(run, samples=-1)
    assert not (run.path / "report.html").exists()


def test_a_summary_of_another_run_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", {"a": [0]})
    summary = store.read_sealed(run.path / "summary.json")
    store.write_sealed(run.path / "summary.json", {**summary, "run": "0" * 64})
    with pytest.raises(IntegrityError, match="is of another run"):
        write_report(run)


@pytest.mark.parametrize("file", ["run.json", "summary.json", "cells/victim/a@0.25/00000000-00000009.json"])
def test_an_altered_file_is_refused(tmp_path: Path, file: str) -> None:
    run = make_run(tmp_path / "r", {"a": [0]})
    path = run.path / file
    path.write_text(path.read_text().replace("0", "1", 1))
    with pytest.raises(IntegrityError, match="altered"):
        write_report(run.path)


# --------------------------------------------------------------------------------------- hostile names


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(hostile_run(tmp_path_factory.mktemp("hostile") / "r"))


@pytest.mark.parametrize("place", range(len(HOSTILE)))
def test_hostile_names_are_inert_text(hostile_page: Page, place: int) -> None:
    name = HOSTILE[place]
    texts = {t.strip() for t in hostile_page.texts}
    whole = visible(name, 20_000)
    assert whole.strip() in texts  # told of the run
    assert visible(name, 16).strip() in texts  # a class
    assert visible(name, 48).strip() in texts  # a layer
    if can_be_a_folder(name):
        assert visible(f"nested.{name}", 48).strip() in texts  # a parameter of an attack


def test_hostile_names_make_no_element(hostile_page: Page) -> None:
    # check_page let the page through already: known tags, no handlers, no addresses, all tags balanced.
    assert not [c for c in hostile_page.html if c != "\n" and ord(c) < 32]
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f]", hostile_page.html)
    assert visible(" ".join(HOSTILE), 20_000) in hostile_page.texts
    assert "</title><script>'\"&</script>\\u202e" in hostile_page.texts  # the classifier, here …
    assert any(t.startswith("Robustness report: </title>") for t in hostile_page.texts)  # … and in the title


def test_the_script_sets_text_as_text_alone() -> None:
    source = (Path(reports.__file__).parent / "templates" / "report.js").read_text()
    forbidden = "innerHTML|outerHTML|insertAdjacent|document.write|eval\\(|Function\\(|fetch|XMLHttp|WebSocket|import"
    assert re.findall(forbidden, source) == []
    assert "</" not in source
