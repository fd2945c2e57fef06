"""The result of a run as JUnit XML, as CI systems read it: floors and the attacks' own checks as test cases."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from robustknn import store
from robustknn._version import __version__
from robustknn.evaluation import Summary
from robustknn.evaluation.summary import ClassifierSummary
from robustknn.reports.checks import signs_on
from robustknn.reports.floors import MET, Judged
from robustknn.reports.words import LONG, visible

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(summary: Summary, judged: Sequence[Judged], file: str | Path) -> Path:
    """Write one test suite a classifier: a case for every floor, and one for every attack's checks.

    A floor that is not met, or met by an attack that is not to be believed, is a failure. An attack with a sign of
    weakness is a case that is skipped, with the reason: it decides nothing by itself, and does not look passed either.
    The same run and floors give the same bytes.

    Args:
        judged: what `floors.judge` said.
        file: where to write; its folder must exist.

    Raises:
        StorageError: it cannot be written.
    """
    suites = [_suite(summary, c, [j for j in judged if j.classifier == c.name]) for c in summary.classifiers]
    whole = ElementTree.Element("testsuites", {"name": "robustknn", **_added(suites)})
    whole.extend(suites)
    ElementTree.indent(whole)
    path = Path(file)
    store.write_bytes(path, ElementTree.tostring(whole, encoding="utf-8", xml_declaration=True) + b"\n")
    return path


def _suite(summary: Summary, c: ClassifierSummary, judged: Sequence[Judged]) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", {"name": _text(c.name)})
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _figures(summary, c):
        ElementTree.SubElement(properties, "property", {"name": _text(name), "value": _text(value)})
    for j in judged:
        case = _case(suite, f"{c.name}.floors", str(j.floor), 0.0)
        if j.outcome != MET:
            failure = ElementTree.SubElement(case, "failure", {"message": _text(j.sentence), "type": j.outcome})
            failure.text = _text(j.sentence)
        else:
            ElementTree.SubElement(case, "system-out").text = _text(j.sentence)
    for a in c.attacks:
        case = _case(suite, f"{c.name}.checks", f"no sign that {a.name} is weak", a.seconds)
        signs = signs_on(summary, c.name, a.name)
        if signs:
            said = "; ".join(f"{w.code}: {w.message}" for w in signs)
            ElementTree.SubElement(case, "skipped", {"message": _text(said)})
    counts = {
        "tests": len(suite.findall("testcase")),
        "failures": len(suite.findall("testcase/failure")),
        "errors": 0,
        "skipped": len(suite.findall("testcase/skipped")),
    }
    suite.attrib |= {k: str(v) for k, v in counts.items()}
    suite.attrib["time"] = f"{sum(a.seconds for a in c.attacks):.3f}"
    return suite


def _case(suite: ElementTree.Element, classname: str, name: str, seconds: float) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite, "testcase", {"classname": _text(classname), "name": _text(name), "time": f"{seconds:.3f}"}
    )


def _figures(summary: Summary, c: ClassifierSummary) -> list[tuple[str, str]]:
    threat = summary.threat
    shares = [("clean", c.clean_accuracy), ("worst-case", c.worst_case_accuracy if c.searched else None)]
    shares += [(a.name, a.robust_accuracy) for a in c.attacks]
    return [
        ("robustknn", __version__),
        ("run", summary.run),
        ("threat", f"{threat['norm']} eps {threat['eps']:.6g}"),
        ("samples", str(c.n)),
        *((f"accuracy.{name}", "not run" if share is None else f"{share:.6f}") for name, share in shares),
    ]


def _added(suites: Sequence[ElementTree.Element]) -> dict[str, str]:
    counts = {key: str(sum(int(s.attrib[key]) for s in suites)) for key in ("tests", "failures", "errors", "skipped")}
    return counts | {"time": f"{sum(float(s.attrib['time']) for s in suites):.3f}"}


def _text(text: str) -> str:
    """A text that XML 1.0 can hold, without marks that rearrange what stands around it."""
    return _NOT_XML.sub("\ufffd", visible(text, LONG))
