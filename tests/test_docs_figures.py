"""Tables of the docs that were written by hand say what the committed records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reproduce import defenses

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
