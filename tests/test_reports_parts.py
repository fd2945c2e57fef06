"""The parts of a report: words, pictures, charts and the list of checks."""

from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from robustknn.evaluation.summary import AttackSummary, ClassifierSummary, CurvePoint, Summary
from robustknn.reports import words
from robustknn.reports.checks import checks_of
from robustknn.reports.figures import accuracy_chart, credibility_chart
from robustknn.reports.neighbors import Budget
from robustknn.reports.pictures import Pen, kind_of
from robustknn.reports.svg import inline

# ------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("automobile", "automobile"),
        ("a\u202eb", "a\\u202eb"),
        ("a\u2066b\u2069", "a\\u2066b\\u2069"),
        ("two\nlines\t", "two\\nlines\\t"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x00", "\\x00"),
        ("\ud800", "\\ud800"),
        ("\u2028", "\\u2028"),
        ("日本", "日本"),
        ("עברית", "עברית"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("é́́́́", "é\u0301\u0301\u0301\\u0301"),
        (7, "7"),
        ("", ""),
    ],
)
def test_visible_leaves_nothing_that_hides(text: object, shown: str) -> None:
    assert words.visible(text) == shown


def test_a_long_name_is_cut_in_the_middle_and_says_so() -> None:
    shown = words.visible("a" * 5000 + "b" * 5000, 30)
    assert shown == "a" * 20 + "…" + "b" * 10 + " (10000 characters)"


def test_a_name_in_html_is_escaped_and_isolated() -> None:
    assert str(words.name("<b>&\"'")) == "<bdi>&lt;b&gt;&amp;&#34;&#39;</bdi>"


@pytest.mark.parametrize(
    ("eps", "bounds", "shown"),
    [
        (8 / 255, (0, 1), "8/255"),
        (0.15, (0, 1), "0.15"),
        (0.2, (0, 1), "0.2"),  # 51/255, but nobody means that
        (8 / 255, None, "0.03137"),
        (8 / 255, (-1, 1), "0.03137"),
        (0.0, (0, 1), "0"),
        (1234.5, None, "1234"),
    ],
)
def test_radius(eps: float, bounds: tuple[float, float] | None, shown: str) -> None:
    assert words.radius(eps, bounds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.92311, "0.923"), (0.0, "0.000"), (3e-5, "3.00e-05"), (123456.0, "1.23e+05"), (None, "–"), (float("nan"), "–")],
)
def test_distance(value: float | None, shown: str) -> None:
    assert words.distance(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(0.0, "0.0"), (0.01, "<0.1"), (18.84, "18.8"), (1234.0, "1,234.0")])
def test_number(value: float, shown: str) -> None:
    assert words.number(value) == shown


@pytest.mark.parametrize(
    ("n", "noun", "shown"), [(1, "image", "1 image"), (1500, "image", "1,500 images"), (2, "series", "2 series")]
)
def test_plural(n: int, noun: str, shown: str) -> None:
    assert words.plural(n, noun) == shown


@pytest.mark.parametrize(
    ("norm", "sentence"),
    [
        ("linf", "With every pixel allowed to change by at most 8/255 (L-infinity)"),
        ("l2", "With any change of at most 8/255 in length (L2) allowed"),
        ("l1", "With changes allowed that add up to at most 8/255 over all pixels (L1)"),
    ],
)
def test_allowance(norm: str, sentence: str) -> None:
    said = words.allowance({"norm": norm, "eps": 8 / 255, "bounds": [0.0, 1.0]}, "pixel")
    assert said.striptags() == sentence


# --------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((1, 8, 8), "image"),
        ((3, 32, 32), "image"),
        ((28, 28, 3), "image"),
        ((28, 28), "image"),
        ((28, 28, 1), "image"),
        ((64, 5, 5), "image"),
        ((1, 28, 5), "image"),
        ((24,), "vector"),
        ((1,), "vector"),
        ((1, 100), "series"),
        ((12, 1000), "series"),
        ((1, 1, 64), "series"),
        ((3, 4, 16, 16), "other"),
    ],
)
def test_kind_of_input(shape: tuple[int, ...], kind: str) -> None:
    assert kind_of(shape) == kind


def decode(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("shape", [(1, 8, 8), (8, 8), (3, 9, 7), (9, 7, 3)])
def test_an_image_is_drawn_pixel_by_pixel(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    picture = Pen.of(shape, (-1.0, 1.0), []).draw(x, 112)
    assert picture is not None
    assert picture.pixelated
    wanted = (x.numpy().astype(np.float64) + 1) / 2 * 255
    wanted = wanted.transpose(1, 2, 0) if shape == (3, 9, 7) else wanted.squeeze()
    assert np.abs(decode(picture.uri).astype(np.float64) - wanted).max() <= 0.5
    assert (picture.height, picture.width) == wanted.shape[:2]


def test_many_channels_are_shown_by_their_mean() -> None:
    x = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    picture = Pen.of((2, 8, 8), (0.0, 1.0), []).draw(x, 112)
    assert picture is not None
    assert np.unique(decode(picture.uri)).tolist() == [128]


def test_a_large_image_is_reduced_in_proportion() -> None:
    picture = Pen.of((3, 224, 112), (0.0, 1.0), []).draw(torch.full((3, 224, 112), 0.2), 56)
    assert picture is not None
    assert (picture.height, picture.width, picture.pixelated) == (56, 28, False)
    assert np.unique(decode(picture.uri)).tolist() == [51]


def test_no_change_is_middle_gray_and_eps_is_black_and_white() -> None:
    delta = torch.tensor([[0.0, 0.1, -0.1, 0.05]]).expand(1, 4, 4)
    picture = Pen.of((1, 4, 4), (0.0, 1.0), []).change(delta, 0.1)
    assert picture is not None
    assert decode(picture.uri)[0].tolist() == [128, 255, 0, 191]


def test_without_bounds_the_scale_is_the_range_of_the_values() -> None:
    pen = Pen.of((3,), None, [torch.tensor([-2.0, 1.0]), torch.tensor([6.0])])
    assert (pen.low, pen.high) == (-2.0, 6.0)
    assert Pen.of((3,), None, [torch.zeros(3)]).high == 1.0  # a constant has no range


def test_bars_stand_on_zero() -> None:
    picture = Pen.of((2,), (-1.0, 1.0), []).draw(torch.tensor([1.0, -0.5]), 112)
    assert picture is not None
    assert picture.bars
    bars = [(float(y), -float(h)) for y, h in re.findall(r"M[\d.]+ ([\d.]+)h[\d.]+v(-[\d.]+)", picture.path)]
    # The plot is 64 high and zero is in the middle: up to the top, and down by a quarter.
    assert bars == [(32.0, 32.0), (48.0, 16.0)]


@pytest.mark.parametrize(("shape", "lines"), [((1, 100), 1), ((3, 1000), 3), ((12, 1000), 4), ((100,), 1)])
def test_series_are_lines(shape: tuple[int, ...], lines: int) -> None:
    x = torch.linspace(0, 1, shape[-1]).expand(shape)
    picture = Pen.of(shape, (0.0, 1.0), []).draw(x, 112)
    assert picture is not None
    assert not picture.bars
    assert picture.path.count("M") == lines
    assert picture.path.startswith("M1.0 63.0L")  # from the bottom left …
    assert picture.path.endswith("L111.0 1.0")  # … to the top right
    assert picture.path.count("L") <= 4 * 224


def test_what_has_no_form_is_not_drawn() -> None:
    assert Pen.of((2, 3, 4, 5), None, []).draw(torch.zeros(2, 3, 4, 5), 112) is None


def test_a_budget_gives_until_it_refuses_once() -> None:
    budget = Budget(100)
    assert [budget.take(n) for n in (60, 40, 1, 0)] == [True, True, False, False]
    assert budget.refused == 2


# ----------------------------------------------------------------------------------------------- charts


def attack(name: str, accuracies: dict[float, float], **other: object) -> AttackSummary:
    curve = [
        CurvePoint(eps=e, n=100, robust_accuracy=a, robust_accuracy_interval=(a - 0.05, a + 0.05))
        for e, a in accuracies.items()
    ]
    main = curve[-1]
    numbers: dict[str, object] = dict.fromkeys(AttackSummary.model_fields, 0.0)
    numbers |= {"parts": [], "rejection": [], "searches": "", "exact_search": None, "fresh_accuracy": None}
    return AttackSummary.model_validate(
        numbers
        | {"name": name, "transfer": False, "role": "", "eps": main.eps, "n": 100, "curve": curve}
        | {"robust_accuracy": main.robust_accuracy, "robust_accuracy_interval": main.robust_accuracy_interval}
        | other
    )


def classifier(*attacks: AttackSummary, name: str = "knn") -> ClassifierSummary:
    return ClassifierSummary(
        name=name,
        n=100,
        clean_accuracy=0.9,
        clean_accuracy_interval=(0.85, 0.95),
        mean_credibility=0.7,
        fresh_accuracy=None,
        worst_case_accuracy=0.1,
        worst_case_accuracy_interval=(0.05, 0.15),
        published_accuracy=None,
        published_attack={"name": "pgd-transfer"},
        searched=False,
        approximation=None,
        attacks=list(attacks),
    )


def line_points(svg: bytes, color: str) -> list[tuple[float, float]]:
    """The corners of the longest line of a color."""
    paths = [e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("path") and "id" not in e.attrib]
    lines = [e.get("d", "") for e in paths if f"stroke: {color}" in e.get("style", "")]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", max(lines, key=len))]


def test_the_line_of_an_attack_goes_through_its_accuracies() -> None:
    chart = accuracy_chart(classifier(attack("a", {0.1: 0.6, 0.2: 0.4, 0.4: 0.0})), "c", "L2")
    points = np.array(line_points(chart.svg, "#0072b2"))
    accuracy = np.array([0.9, 0.6, 0.4, 0.0])
    assert points.shape == (4, 2)
    # Straight axes: places on the page are linear in eps and in accuracy, whatever the margins are.
    np.testing.assert_allclose(
        np.diff(points[:, 0]) / np.diff([0, 0.1, 0.2, 0.4]), [np.ptp(points[:, 0]) / 0.4] * 3, 1e-4
    )
    np.testing.assert_allclose(np.diff(points[:, 1]) / np.diff(accuracy), [-np.ptp(points[:, 1]) / 0.9] * 3, 1e-4)


def test_an_eps_of_zero_is_not_drawn_twice() -> None:
    chart = accuracy_chart(classifier(attack("a", {0.0: 0.9, 0.1: 0.5})), "c", "L2")
    assert len(line_points(chart.svg, "#0072b2")) == 2


def test_every_attack_has_its_own_color_marker_and_dashes() -> None:
    chart = accuracy_chart(classifier(*(attack(f"a{i}", {0.1: i / 10}) for i in range(12))), "c", "L2")
    root = ElementTree.fromstring(chart.svg)
    looks = set()
    for group in root.iter("{http://www.w3.org/2000/svg}g"):
        if group.get("id", "").startswith("line2d_"):
            uses = [e for e in group.iter() if e.tag.endswith("use")]
            paths = group.findall("{http://www.w3.org/2000/svg}path")
            if len(uses) == 2 and paths:
                style = dict(p.split(": ", 1) for p in paths[0].get("style", "").split("; "))
                marker = uses[0].get("{http://www.w3.org/1999/xlink}href")
                looks.add((style["stroke"], style.get("stroke-dasharray", ""), marker))
    assert len(looks) == 12
    assert len({color for color, _, _ in looks}) == 6


def test_the_histogram_has_the_shares_of_the_bins() -> None:
    clean, attacked = np.array([0.99, 1.0, 1.0, 0.51]), np.array([0.01, 0.02, 0.51, 0.0])
    chart = credibility_chart(classifier(), attack("a", {0.1: 0.5}, mean_credibility=0.135), clean, attacked, "c")
    heights = {}
    for what, color in (("clean", "fill: #c3c8cf"), ("attacked", "stroke: #d55e00")):
        paths = [e for e in ElementTree.fromstring(chart.svg).iter() if color in e.get("style", "")]
        corners = re.findall(r"[ML] ([\d.]+) ([\d.]+)", max((e.get("d", "") for e in paths), key=len))
        y = np.array([float(c[1]) for c in corners])
        heights[what] = np.unique(np.round(y.max() - y, 2))
    # 75 % and 25 % of four samples in both: the same two heights, in the proportion 3 to 1, over nothing.
    for found in heights.values():
        np.testing.assert_allclose(found / found.max(), [0, 1 / 3, 1], atol=1e-3)
    assert chart.caption == "Mean 0.700 without attack, 0.135 attacked, 0.000 where the attack fooled the classifier."


def test_a_chart_has_the_same_bytes_each_time_and_ignores_the_users_style() -> None:
    import matplotlib

    made = accuracy_chart(classifier(attack("a", {0.1: 0.5})), "c", "L2")
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path"}):
        again = accuracy_chart(classifier(attack("a", {0.1: 0.5})), "c", "L2")
        assert matplotlib.rcParams["font.size"] == 30
    assert (made.svg, made.png) == (again.svg, again.png)


HOSTILE_NAMES = ["$x^2$ $", "</text><script>alert(1)</script>", "\x00\x1b", "\u202ega", "a" * 5000, "日本", "", "%d{0}"]


def test_names_in_charts_are_text() -> None:
    attacks = [attack(name, {0.1: 0.5}) for name in HOSTILE_NAMES]
    chart = accuracy_chart(classifier(*attacks, name="$\\frac$"), "c", "L2")
    root = ElementTree.fromstring(chart.svg)
    texts = {"".join(e.itertext()) for e in root.iter() if e.tag.endswith("text")}
    assert {words.visible(n, 32) for n in HOSTILE_NAMES if n} <= texts
    assert "$\\frac$" in texts
    assert not any(e.tag.endswith("script") for e in root.iter())
    width, height = Image.open(io.BytesIO(chart.png)).size
    assert width == 900
    assert height < 2 * width


def test_an_inline_chart_has_no_style_and_ids_of_its_own() -> None:
    chart = accuracy_chart(classifier(attack("a", {0.1: 0.5}), attack("b", {0.1: 0.4})), "c", "L2")
    one, two = (inline(chart.svg, prefix, "a <title>") for prefix in ("one-", "two-"))
    root = ElementTree.fromstring(str(one))
    assert root.tag == "svg"
    assert root[0].text == "a <title>"
    assert not [e for e in root.iter() if "style" in e.attrib or e.tag in ("style", "metadata", "script")]
    assert "http" not in one
    ids = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', one)) | {root.attrib["aria-labelledby"]}
    assert used == set(ids)
    assert not {e.get("id") for e in ElementTree.fromstring(str(two)).iter()} & set(ids)
    assert {"a", "b", "all attacks together"} <= {e.text for e in root.iter("text")}


# ----------------------------------------------------------------------------------------------- checks


def plan(transfers: dict[str, bool], eps: list[float], controls: int = 100, bounded: bool = True) -> dict[str, object]:
    cells = []
    for name, transfer in transfers.items():
        kinds = [""] if transfer or not controls else ["", "one-step"] + (["unbounded"] if bounded else [])
        cells += [{"classifier": "knn", "attack": name, "control": kind} for kind in kinds]
    return {
        "attack_names": list(transfers),
        "attacks": {n: {"transfer": t} for n, t in transfers.items()},
        "classifier_names": ["knn"],
        "eps": eps,
        "cells": cells,
        "controls": controls,
    }


@pytest.mark.parametrize(
    ("given", "ran", "reason"),
    [
        (plan({"a": False, "b": False, "t": True}, [0.1, 0.2]), (2, 2, 2, 2, 2, 3), None),
        (plan({"a": False, "t": True}, [0.1]), (1, 1, 1, 0, 1, 2), "one eps only was run"),
        (plan({"a": False}, [0.1, 0.2]), (1, 1, 1, 1, 0, 1), "no attack blind to the neighbors was run"),
        (plan({"a": False, "t": True}, [0.1, 0.2], controls=0), (1, 0, 0, 1, 1, 2), "the controls were switched off"),
        (plan({"a": False, "t": True}, [0.1, 0.2], bounded=False), (1, 1, 0, 1, 1, 2), "the inputs have no bounds"),
        (plan({"t": True}, [0.1, 0.2]), (0, 0, 0, 0, 0, 0), "no attack that sees the neighbors was run"),
    ],
)
def test_checks_say_which_of_them_ran(given: dict[str, object], ran: tuple[int, ...], reason: str | None) -> None:
    warning = {"code": "of-tomorrow", "classifier": "knn", "attack": "a", "message": "…"}
    summary = Summary.model_validate(
        {
            "run": "key",
            "threat": {},
            "seed": 0,
            "samples": 1,
            "fresh_draws": 0,
            "classifiers": [],
            "warnings": [warning],
            "environment": {},
        }
    )
    checks = checks_of(given, summary)
    assert tuple(c.ran for c in checks[:-1]) == ran
    assert (checks[-1].code, checks[-1].signs) == ("of-tomorrow", 1)  # a check of a later version is not lost
    missing = [c.reason for c in checks if not c.ran]
    assert all(missing)
    assert bool(missing) == (reason is not None)
    assert not reason or any(m.startswith(reason) for m in missing)


@pytest.mark.parametrize(
    ("one", "other", "expected"), [("black", "white", 21.0), ("white", "#777777", 4.478), ("#0072b2", "#0072b2", 1.0)]
)
def test_contrast_is_that_of_wcag(one: str, other: str, expected: float) -> None:
    """#777777 on white is the textbook's 4.48."""
    pytest.importorskip("matplotlib")
    from robustknn.reports.figures import contrast

    assert contrast(one, other) == contrast(other, one) == pytest.approx(expected, abs=1e-3)


def test_no_title_of_a_narrow_matrix_runs_out_of_the_figure() -> None:
    """As in AdvKNN's Table 3: three columns beside long names at the width of a column."""
    pytest.importorskip("matplotlib")
    from robustknn.reproduce.figures import matrix_chart

    names = ["clean", "FGSM, DkNNB + CL", "BIM, DkNNB + CL"]
    chart = matrix_chart("m", {name: {"DNN": 99.2, "kNN": 75.0, "DkNN": 51.3} for name in names}, 9250)
    pixels = np.asarray(Image.open(io.BytesIO(chart.png)).convert("L"))
    assert int(pixels[:45, -6:].min()) > 200  # nothing dark at the end of the title's line


def test_the_transfer_chart_writes_every_accuracy() -> None:
    from robustknn.evaluation import Transferability
    from robustknn.reports.figures import transfer_chart

    matrix = Transferability(("clean", "knn"), ("knn", "net"), ((0.991, 0.5), (0.123, 1.0)), 1200)
    chart = transfer_chart(matrix)
    shown = chart.svg.decode()
    for text in ("99.1", "50.0", "12.3", "100.0", "clean", "net", "right, % of 1,200 samples"):
        assert text in shown
    assert chart.svg == transfer_chart(matrix).svg
