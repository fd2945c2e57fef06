"""Tables of the docs that were written by hand say what the committed records say."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reproduce import daeknn_forms, defenses, many_classes

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "defenses"


def record(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / "reproduce" / f"{name}.json").read_text(encoding="utf-8"))


def text(page: str) -> str:
    """A page without emphasis."""
    return (DOCS / page).read_text(encoding="utf-8").replace("**", "")


def test_the_table_of_defenses_is_that_of_its_record() -> None:
    made = defenses.table(record("defenses")["rows"]).splitlines()
    page = text("README.md")
    assert len(made) > 20
    assert "\n".join(made) in page


@pytest.mark.parametrize(
    ("shown", "name"),
    [
        ("adversarial", "adversarial"),
        ("TRADES", "TRADES"),
        ("ASK-Def, both at the radius", "ASK-Def (both at the radius)"),
        ("adversarial at half the radius", "adversarial at half the radius"),
        ("ASK-Def as published", "ASK-Def (CE at half the radius, as published)"),
    ],
)
def test_the_table_of_ask_def_is_a_part_of_it(shown: str, name: str) -> None:
    lines = defenses.table(record("defenses")["rows"]).splitlines()
    (row,) = [line for line in lines if line.startswith(f"| {name} | 15-NN |")]
    assert row.replace(f"| {name} |", f"| {shown} |") in text("ask-def.md")


def cells(page: str, *starts: str) -> list[str]:
    """The cells of the one line of a table that begins with these, without them."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text(page).splitlines() if line[:1] == "|"]
    (found,) = [line[len(starts) :] for line in lines if tuple(line[: len(starts)]) == starts]
    return found


def test_the_table_of_detection() -> None:
    rows = record("detection")["rows"].values()
    shares = (0.01, 0.05, 0.1)

    def mean(values: list[float], places: int = 1) -> str:
        shown = f"{statistics.mean(values):.{places}f}"
        return shown.removeprefix("0") if places == 3 else shown

    def detected(name: str, place: int) -> str:
        points = [run[name]["points"][place] for run in rows]
        assert {p[0] for p in points} == {shares[place]}
        return mean([100 * p[1] for p in points])

    lines = text("detection.md").splitlines()
    for shown, name in (("PGD on the network", "pgd-transfer"), ("ASK (knows", "ask")):
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f"| {shown}")]
        for line, score in zip(lines[at : at + 2], ("credibility", "distance"), strict=True):
            key = f"{name}, {score}"
            wanted = [mean([run[key]["auc"] for run in rows], 3), *(detected(key, place) for place in range(3))]
            assert [c.strip() for c in line.strip("|").split("|")][2:] == wanted, key
    (at,) = [i for i, line in enumerate(lines) if line.startswith("| `credible` at that share")]
    for line, score in zip(lines[at : at + 2], ("credibility", "distance"), strict=True):
        keys = [f"credible at {100 * share:g} %, {score}" for share in shares]
        wanted = [detected(key, place) for place, key in enumerate(keys)]
        assert [c.strip() for c in line.strip("|").split("|")][3:] == wanted
    (at,) = [i for i, line in enumerate(lines) if line.startswith("| none: clean inputs rejected")]
    for line, score in zip(lines[at : at + 2], ("credibility", "distance"), strict=True):
        clean = [mean([100 * run[f"ask, {score}"]["points"][place][2] for run in rows]) for place in range(3)]
        assert [c.strip() for c in line.strip("|").split("|")][3:] == clean


@pytest.mark.parametrize(
    ("shown", "name"),
    [
        ("noisy labels", "noisy"),
        ("filtered, preliminary network of 25 epochs", "filtered after 25 epochs"),
        ("filtered, preliminary network of 5 epochs", "filtered after 5 epochs"),
        ("the right ones of the noisy labels (an oracle)", "right ones"),
        ("clean labels", "clean"),
    ],
)
def test_the_table_of_the_label_filter(shown: str, name: str) -> None:
    found = [run[name]["right"] for run in record("label_filter")["rows"].values()]
    spread = f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}"
    assert cells("label-filter.md", shown) == [v.replace("0.", ".") for v in (*(f"{v:.3f}" for v in found), spread)]


def test_what_the_label_filter_keeps_and_loses() -> None:
    page = re.sub(r"\s+", " ", text("label-filter.md"))
    rows = record("label_filter")["rows"].values()
    for epochs, pattern in (
        (5, r"of 5 epochs keeps {} of the 389 wrong labels and loses {}"),
        (25, "of 25 keeps {} and loses {}"),
    ):
        runs = [run[f"filtered after {epochs} epochs"] for run in rows]
        told = [[str(run[key]) for run in runs] for key in ("wrong labels kept", "right labels lost")]
        assert pattern.format(*(f"{a}, {b} and {c}" for a, b, c in told)) in page


def test_the_tables_of_retrieval() -> None:
    rows = record("retrieval")["rows"]

    def means(name: str) -> list[str]:
        return [f"{statistics.mean(v):.3f}".removeprefix("0") for v in zip(*rows[name], strict=True)]

    assert cells("retrieval.md", "the network itself") == means("network")
    for where, k in (("seen", 15), ("seen", 50), ("unseen", 5), ("unseen", 15), ("unseen", 50), ("unseen", 100)):
        each = [means(f"{where}, K = {k}, {weighting}") for weighting in ("UW", "CBW-E", "CBW-D")]
        shown = [" / ".join(values) for values in zip(*each, strict=True)]
        label = f"{where}, K = {k}" + (", UW / CBW-E / CBW-D" if (where, k) == ("seen", 15) else "")
        assert cells("retrieval.md", label)[: len(shown)] == shown
    for where in ("seen", "unseen"):
        each = [means(f"{where}, K = 1, {weighting}") for weighting in ("UW", "CBW-E", "CBW-D")]
        assert cells("retrieval.md", f"{where}, K = 1") == [*each[0][:3], min(v[3] for v in each)]
    for shown, name in (
        ("relu3, average, PCA 32", "relu3 average 32"),
        ("relu2, average, PCA 32", "relu2 average 32"),
        ("relu2, R-MAC, PCA 32", "relu2 rmac 32"),
        ("relu2, R-MAC, 64 bits", "relu2 rmac-bits 64"),
        ("relu3, R-MAC, 64 bits", "relu3 rmac-bits 64"),
    ):
        assert cells("retrieval.md", shown) == means(f"unseen, K = 15, CBW-D, {name}")


def test_the_largest_numbers_of_a_payload_are_enough() -> None:
    """What docs/defenses/retrieval.md says: no accuracy changes by more than .003."""
    rows = record("retrieval")["rows"]
    whole = rows["unseen, K = 15, CBW-D"]
    for top in (1, 2, 5, 10):
        few = rows[f"unseen, K = 15, CBW-D, the {top} largest"]
        for a, b in zip(zip(*few, strict=True), list(zip(*whole, strict=True))[:3], strict=True):
            assert abs(statistics.mean(a) - statistics.mean(b)) <= 0.003


def test_the_table_of_rails() -> None:
    held = record("rails")
    (rows,) = held["rows"].values()
    assert (held["settings"]["samples"], held["settings"]["population"], held["settings"]["draws"]) == (60, 500, 2)
    for shown, name in (
        ("none", "none"),
        ("PGD on the network, 40 steps (the paper's kind of attack, which took 10)", "PGD on the network"),
        ("`ASK` on the kNN stage, 40 steps", "ASK on the kNN stage"),
        ("`ASK` on 15 neighbors, 100 steps, last iterate", "ASK on 15 neighbors, last iterate"),
        ("`Evolved`, 20 steps", "evolved"),
        ("`Evolved`, 20 steps, random start", "evolved, random start"),
        ("of each sample's examples the one that fools most of two other draws", "worst of these"),
    ):
        figures = [f"{rows[name][column]:.3f}".removeprefix("0") for column in ("network", "stage", "rails")]
        assert cells("rails.md", shown) == figures, name


def test_the_tables_of_choices_are_those_of_their_record() -> None:
    rows = record("choices")["rows"]
    order = ("clean", "identity", "1", "1/4", "1/16", "1/64")
    for shown, name in (("3 bits", "BitDepth"), ("JPEG, quality 75", "JPEG"), ("total variation", "TotalVariation")):
        found = rows["transformations"]
        wanted = [found[row if row == "clean" else f"{row}, PGD, 40 steps"].get(name) for row in order]
        wanted.append(found["square, 600 queries"][name])
        assert cells("transformations.md", shown) == ["" if v is None else f"{v:.3f}"[1:] for v in wanted]
    bits = {
        "no attack": "no attack",
        "examples of R-MAC and PCA without bits": "examples without bits",
        "adaptive, straight through": "adaptive, straight through",
        "… tanh(u)": "adaptive, tanh(u)",
        r"… u/(1 + \|u\|)": "adaptive, u/(1 + |u|)",
        r"… u/(¼ + \|u\|), the default": "adaptive, u/(1/4 + |u|)",
        r"… u/(1/16 + \|u\|)": "adaptive, u/(1/16 + |u|)",
    }
    for shown, name in bits.items():
        (line,) = [x for x in text("retrieval.md").splitlines() if x.startswith(f"| {shown} |")]
        wanted = [
            " ".join(f"{rows['bits'][name][f'{layer}, seed {seed}']:.3f}"[1:] for seed in (0, 1))
            for layer in ("relu2", "relu3", "relu3:input")
        ]
        assert line.endswith(f" | {' | '.join(wanted)} |")
    labels = [rows["labels"][f"seed {seed}"] for seed in range(3)]
    for epochs in (5, 25):
        lost = [", ".join(f"{s[f'kept wrong, {epochs} epochs, k = {k}']:.0f}" for s in labels) for k in (10, 20, 50)]
        assert cells("label-filter.md", str(epochs)) == lost
    said = text("label-filter.md")
    for k in (5, 10, 20, 50, 80):
        mean = statistics.mean(s[f"accuracy, 25 epochs, k = {k}"] for s in labels)
        assert f"{mean:.3f}"[1:] + (" (k = 5)" if k == 5 else f" ({k})") in said


def test_the_table_of_many_classes() -> None:
    """All of CBW-D's lines, and what is said of all three weightings."""
    rows = record("many_classes")["rows"]
    made = [line for line in many_classes.table(rows).splitlines() if line.startswith("| CBW-D")]
    assert len(made) == 9
    assert "\n".join(made) in text("retrieval.md")
    most = {name: max(seed["differ"] for seed in found) for name, found in rows.items()}
    assert all(value <= 0.001 for name, value in most.items() if name.endswith(("M = 5", "M = 20", "whole")))
    assert max(most.values()) > 0.001


@pytest.mark.parametrize(
    ("data", "epochs"), [("cifar10", {"adversarial": 5, "longer": 12}), ("mnist", {"adversarial": 10, "longer": 24})]
)
def test_the_tables_of_ask_def_on_images(data: str, epochs: dict[str, int]) -> None:
    held = json.loads((ROOT / "docs" / "results" / "data" / f"ask-defense.{data}.cpu.json").read_text(encoding="utf-8"))
    found = {(row["row"], row["column"]): row for row in held["rows"]}
    passes = "adversarial, as many gradient passes as ASK-Def"
    short, long = epochs["adversarial"], epochs["longer"]
    shown = {
        f"adversarial, {short} epochs": "adversarial",
        f"ASK-Def, {short} epochs": "ASK-Def",
        f"adversarial, {long} epochs: as many gradient passes as ASK-Def's {short}": passes,
    }
    for line, row in shown.items():
        wanted = []
        for column in ("clean", "ASK-Atk", "adaptive worst case"):
            value = found[row, column]
            spread = f" ± {value['sd']:.1f}" if len(value["seeds"]) > 1 else ""
            wanted.append(f"{value['mean']:.1f}{spread}")
        assert cells("ask-def.md", line) == wanted


def test_the_table_of_forms_of_daeknn_is_that_of_its_record() -> None:
    made = daeknn_forms.table(record("daeknn_forms")["rows"])
    assert len(made.splitlines()) == 11
    assert made in text("daeknn.md")
