"""Floors by which a CI decides, and the JUnit XML that it reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from command import call, refuse, succeed
from made_runs import HOSTILE, hostile_run, make_run

from robustknn.errors import InputError
from robustknn.evaluation import RunDirectory, finish, read_summary
from robustknn.reports import Floor, check_floors, judge, write_junit

# What readers of JUnit XML agree on (Jenkins, GitLab, GitHub's actions): elements with the attributes they must and
# may have, and their children in order.
SCHEMA: dict[str, tuple[set[str], set[str], list[str]]] = {
    "testsuites": ({"tests", "failures"}, {"name", "errors", "skipped", "time"}, ["testsuite"]),
    "testsuite": (
        {"name", "tests"},
        {"failures", "errors", "skipped", "time", "timestamp", "hostname", "id", "package"},
        ["properties", "testcase", "system-out", "system-err"],
    ),
    "properties": (set(), set(), ["property"]),
    "property": ({"name", "value"}, set(), []),
    "testcase": (
        {"name", "classname"},
        {"time", "assertions", "status"},
        ["skipped", "error", "failure", "system-out", "system-err"],
    ),
    "failure": (set(), {"message", "type"}, []),
    "skipped": (set(), {"message"}, []),
    "system-out": (set(), set(), []),
}


def check_junit(file: Path) -> ElementTree.Element:
    """Well-formed, of the agreed shape, and with right counts."""
    text = file.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text.encode())
    assert root.tag == "testsuites"
    for element in root.iter():
        must, may, children = SCHEMA[element.tag]
        assert must <= set(element.attrib) <= must | may
        order = [children.index(child.tag) for child in element]
        assert order == sorted(order)
    for counted in (root, *root.iter("testsuite")):
        cases = list(counted.iter("testcase"))
        assert int(counted.attrib["tests"]) == len(cases) == len({(c.get("classname"), c.get("name")) for c in cases})
        assert int(counted.attrib["failures"]) == len(list(counted.iter("failure")))
        assert int(counted.attrib["skipped"]) == len(list(counted.iter("skipped")))
        assert counted.attrib["errors"] == "0"
        assert float(counted.attrib["time"]) >= 0
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\u202a-\u202e\u2066-\u2069]", text)
    return root


def run_of(path: Path, fooled: dict[str, Any], worst: str = "", **given: Any) -> RunDirectory:
    """A run of `make_run`, one of whose attacks is the worst case."""
    attacks = {a: {"name": "pgd", "steps": 7, "transfer": a in given.get("transfer", ()), "role": ""} for a in fooled}
    if worst:
        attacks[worst]["role"] = "worst-case"
    return make_run(path, fooled, attacks=attacks, **given)


def outcomes(run: RunDirectory, *floors: str) -> list[tuple[str, str]]:
    made = [Floor.of(f) for f in floors]
    check_floors(run.header["plan"], made)
    return [(str(j.floor), j.outcome) for j in judge(read_summary(run), made)]


def test_floors_are_judged_by_the_figures(tmp_path: Path) -> None:
    # Of ten samples one is wrong without attack, a fools three, b another: .9, .6, .8 and .5 stay right.
    run = run_of(tmp_path / "r", {"a": [0, 1, 2], "b": [3]}, worst="a")
    assert outcomes(run, "clean>=0.9", "clean>=0.91", "a>=0.6", "a>=.61", "b>=0.8", "worst-case>=0.5") == [
        ("clean>=0.9", "met"),
        ("clean>=0.91", "missed"),
        ("a>=0.6", "met"),
        ("a>=0.61", "missed"),
        ("b>=0.8", "met"),
        ("worst-case>=0.5", "met"),
    ]
    assert outcomes(run, "victim:worst-case>=0.51", "published>=0") == [
        ("worst-case>=0.51", "missed"),
        ("published>=0", "not run"),
    ]


def test_a_floor_is_not_passed_by_an_attack_that_is_not_to_be_believed(tmp_path: Path) -> None:
    # The blind attack fools 8 samples that the white-box attack does not.
    run = run_of(tmp_path / "r", {"weak": [], "t": range(8)}, transfer=["t"], worst="weak")
    assert [w.attack for w in read_summary(run).warnings] == ["weak"]
    assert outcomes(run, "weak>=0.5") == [("weak>=0.5", "doubtful")]
    # All together leave .1, by the blind attack alone: those that see the neighbors are too weak.
    assert outcomes(run, "worst-case>=0.1", "worst-case>=0.2") == [
        ("worst-case>=0.1", "doubtful"),
        ("worst-case>=0.2", "missed"),
    ]
    assert outcomes(run, "t>=0.1", "clean>=0.9") == [("t>=0.1", "met"), ("clean>=0.9", "met")]


def test_a_worst_case_that_was_not_searched_meets_no_floor(tmp_path: Path) -> None:
    run = run_of(tmp_path / "r", {"a": [0]})
    assert outcomes(run, "worst-case>=0") == [("worst-case>=0", "not run")]


def test_ties_that_the_classifier_decides_wrongly_count_as_wrong_for_a_floor(tmp_path: Path) -> None:
    # 0 is fooled, 9 wrong without attack, 2 and 3 tied: .8 by the count of the attack, .6 by the decision.
    run = run_of(tmp_path / "r", {"a": [0]}, tied=[2, 3], worst="a")
    assert outcomes(run, "worst-case>=0.6", "worst-case>=0.61", "a>=0.6") == [
        ("worst-case>=0.6", "met"),
        ("worst-case>=0.61", "missed"),
        ("a>=0.6", "met"),
    ]


@pytest.mark.parametrize(
    "text", ["worst-case", "worst-case>0.2", ">=0.2", "a>=", "a>=two", "a>=1.2", "a>=-0.1", "a>=nan", "knn:>=0.5", "20"]
)
def test_what_is_no_floor_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"is no floor; write it as 'worst-case>=0\.2'"):
        Floor.of(text)


def test_a_floor_on_what_the_run_does_not_have_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path / "r", {"a": [0]})
    with pytest.raises(InputError, match=r"figure in a floor: .*'worst-cast'.*did you mean 'worst-case'"):
        outcomes(run, "worst-cast>=0.5")
    with pytest.raises(InputError, match=r"classifier in a floor: .*'dknn'"):
        outcomes(run, "dknn:clean>=0.5")


def test_the_xml_says_what_the_run_says(tmp_path: Path) -> None:
    run = run_of(tmp_path / "r", {"weak": [], "t": range(8)}, transfer=["t"], worst="weak")
    summary = read_summary(run)
    judged = judge(summary, [Floor.of(f) for f in ("clean>=0.9", "t>=0.5", "weak>=0.5")])
    root = check_junit(write_junit(summary, judged, tmp_path / "j.xml"))
    [suite] = root
    assert (suite.get("name"), suite.get("tests"), suite.get("failures"), suite.get("skipped")) == (
        "victim",
        "5",
        "2",
        "1",
    )
    cases = {c.attrib["name"]: c for c in suite.iter("testcase")}
    assert list(cases) == ["clean>=0.9", "t>=0.5", "weak>=0.5", "no sign that weak is weak", "no sign that t is weak"]
    assert cases["clean>=0.9"].findtext("system-out", "").startswith("90.0 % of 10 samples right without attack")
    failures = {name: c.find("failure") for name, c in cases.items()}
    assert {n: f.get("type") for n, f in failures.items() if f is not None} == {
        "t>=0.5": "missed",
        "weak>=0.5": "doubtful",
    }
    assert "10.0 % of 10 samples right under t, which never sees the neighbors" in failures["t>=0.5"].get("message", "")  # type: ignore[union-attr]
    skipped = cases["no sign that weak is weak"].find("skipped")
    assert skipped is not None
    assert summary.warnings[0].message in skipped.get("message", "")
    properties = {p.attrib["name"]: p.attrib["value"] for p in suite.iter("property")}
    assert properties["accuracy.clean"] == "0.900000"
    assert properties["accuracy.t"] == "0.100000"
    assert properties["samples"] == "10"
    again = write_junit(summary, judged, tmp_path / "again.xml")
    assert again.read_bytes() == (tmp_path / "j.xml").read_bytes()


def test_hostile_names_stay_text_in_the_xml(tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "r")
    summary = finish(run)
    # U+FFFE is a character that XML 1.0 cannot hold.
    floors = [Floor("", name, 0.5) for name in [*run.header["plan"]["attack_names"], "none\ufffe"]]
    judged = judge(summary, floors)
    root = check_junit(write_junit(summary, judged, tmp_path / "j.xml"))
    names = {c.get("name") for c in root.iter("testcase")}
    assert {"]]>>=0.5", "{{ 7*7 }}>=0.5", "<!-- >=0.5", "日本語クラス>=0.5"} <= names
    assert "\\x1b[31mred>=0.5" in names
    assert "none\ufffd>=0.5" in names
    assert len(names) == 2 * len(run.header["plan"]["attack_names"]) + 1
    assert len(HOSTILE) > 30


def test_the_command_exits_with_1_where_a_floor_is_not_met(tmp_path: Path) -> None:
    run = run_of(tmp_path / "r", {"a": [0, 1, 2]}, worst="a")
    folder, file = str(run.path), tmp_path / "junit.xml"
    met = succeed("report", folder, "--floor", "worst-case>=0.6", "--junit", file)
    assert "floor met: victim, worst-case>=0.6: 60.0 % of 10 samples right under every attack" in met
    assert check_junit(file).get("failures") == "0"
    missed = call("report", folder, "--floor", "worst-case>=0.7", "--floor", "clean>=0.9", "--junit", file)
    assert (missed.code, missed.err) == (1, "")
    assert "floor missed: victim, worst-case>=0.7" in missed.out
    assert check_junit(file).get("failures") == "1"
    assert "figure in a floor" in refuse("report", folder, "--floor", "nothing>=0.7")
    assert "is no floor" in refuse("report", folder, "--floor", "worst-case")
    succeed("report", folder, "--junit", file)
    assert len(list(check_junit(file).iter("testcase"))) == 1
