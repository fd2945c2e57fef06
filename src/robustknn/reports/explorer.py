"""What the page's script works on: rows of all samples, and pictures, neighbors and the way of those that were kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustknn.classifiers import REJECTED
from robustknn.evaluation import RunDirectory, Summary
from robustknn.evaluation.plan import attacks_on
from robustknn.evaluation.rundir import CLEAN, Cell
from robustknn.evaluation.summary import ClassifierSummary
from robustknn.reports.checks import signs_on
from robustknn.reports.examples import Book, Near, class_name, outcomes_of
from robustknn.reports.neighbors import Budget, amplified, note_of, strongest
from robustknn.reports.pictures import LARGE, Picture
from robustknn.reports.words import LABEL, distance, radius, visible

ROWS_BUDGET, DETAIL_BUDGET = 1_500_000, 800_000
"""Bytes: of the rows where there is room, and of neighbors and leads."""
_UNSAFE = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def inert(content: Any) -> str:
    """JSON that may stand inside a `<script>` element: nothing in it can end the element or open another."""
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.translate(_UNSAFE)


@dataclass
class Explorer:
    """The script's data, and what did not fit.

    Attributes:
        content: as JSON; no name in it is longer than what the page shows, none has characters that rearrange text.
        samples: how many samples of each classifier have rows (the first), `of` how many.
        left_out: the radii of whose rows nothing is in it.
        details: how many pairs of a kept sample and an attack have neighbors and pictures in it, `details_of` of how
            many.
    """

    content: dict[str, Any]
    samples: int = 0
    of: int = 0
    left_out: list[float] = field(default_factory=list)
    details: int = 0
    details_of: int = 0

    @property
    def json(self) -> str:
        """The data for the page."""
        return inert(self.content)


def explorer(run: RunDirectory, summary: Summary, room: int, pictures: int) -> Explorer:
    """All rows as far as they fit, those at the eps of the tables first; then the kept samples, as far as they fit.

    Classifiers on which no attack was run are not in it; at least one was attacked.

    Args:
        room: how many bytes all of it may have.
        pictures: how many of them may be pictures.
    """
    plan = run.header["plan"]
    classes = max(*(int(c["n_classes"]) for c in plan["classifiers"].values()), len(plan["class_names"] or ()))
    made = Explorer(
        {
            "classes": [visible(class_name(plan, i), LABEL) for i in range(classes)],
            "rejected": class_name(plan, REJECTED),
            "classifiers": [],
            "pictures": [],
        }
    )
    attacked = [c for c in summary.classifiers if c.attacks]
    cells = {c.name: _cells(plan, c) for c in attacked}
    made.samples = made.of = summary.samples
    spent = _shrink(run, cells, made, min(ROWS_BUDGET, room - DETAIL_BUDGET))
    for c in attacked:
        made.content["classifiers"].append(_classifier(run, summary, c, cells[c.name], made.samples))
    _fill(run, cells, made, Budget(max(0, min(pictures, room - spent - DETAIL_BUDGET))))
    return made


def _cells(plan: Mapping[str, Any], c: ClassifierSummary) -> list[Cell]:
    """The cells of a classifier: first those of the tables, the strongest attack foremost."""
    best, main = strongest(c), float(plan["threat"]["eps"])
    names = sorted(attacks_on(plan, c.name), key=lambda n: best is None or n != best.name)
    radii = sorted(plan["eps"], key=lambda e: (e != main, e))
    return [Cell(c.name, name, float(eps)) for eps in radii for name in names]


def _shrink(run: RunDirectory, cells: dict[str, list[Cell]], made: Explorer, budget: int) -> int:
    """Leave out radii other than that of the tables; where that is not enough, all but the first samples.

    Returns:
        How many bytes the rows have.
    """
    sizes = {cell: len(inert(_row_columns(run, cell))) for every in cells.values() for cell in every}
    clean = sum(len(inert(_clean_columns(run, name))) for name in cells)
    radii = list(dict.fromkeys(cell.eps for cell in sizes))
    while sum(sizes.values()) + clean > budget and len(radii) > 1:
        made.left_out.append(radii.pop())
        sizes = {cell: size for cell, size in sizes.items() if cell.eps in radii}
    for name, every in cells.items():
        cells[name] = [cell for cell in every if cell in sizes]
    total = sum(sizes.values()) + clean
    if total > budget:
        made.samples = max(1, made.samples * max(budget, 0) // total)
    return min(total, max(budget, 0))


# ---------------------------------------------------------------------------------------------- rows


def _classifier(run: RunDirectory, summary: Summary, c: ClassifierSummary, cells: list[Cell], n: int) -> dict[str, Any]:
    plan = run.header["plan"]
    blind = {a.name: a.transfer for a in c.attacks}
    attacks = list(dict.fromkeys(cell.attack for cell in cells))
    radii = sorted({cell.eps for cell in cells})
    return {
        "name": visible(c.name),
        "layers": [visible(v["layer"]) for v in plan["classifiers"][c.name]["voters"]],
        "attacks": [
            {
                "name": visible(name),
                "blind": blind.get(name, False),
                "flagged": bool(signs_on(summary, c.name, name)),
                "parts": [visible(p) for p in plan["attacks"][name].get("parts", [])],
            }
            for name in attacks
        ],
        "radii": [radius(eps, plan["threat"]["bounds"]) for eps in radii],
        "start": [0, radii.index(cells[0].eps)],
        "samples": _clean_columns(run, c.name, n),
        "cells": [
            {
                "attack": attacks.index(cell.attack),
                "eps": radii.index(cell.eps),
                **_row_columns(run, cell, n),
                "shown": {},
            }
            for cell in cells
        ],
        "shown": {},
    }


def _clean_columns(run: RunDirectory, classifier: str, n: int | None = None) -> dict[str, Any]:
    rows = run.rows(Cell(classifier, CLEAN))
    first = rows["position"] < (np.inf if n is None else n)
    return {
        "id": rows["sample_id"][first].tolist(),
        "label": rows["label"][first].tolist(),
        "decision": rows["prediction"][first].tolist(),
        "lead": _short(rows["margin"][first]),
        "credibility": _short(rows["credibility"][first]) if "credibility" in rows else None,
    }


def _row_columns(run: RunDirectory, cell: Cell, n: int | None = None) -> dict[str, Any]:
    rows = run.rows(cell)
    first = rows["position"] < (np.inf if n is None else n)
    columns: dict[str, Any] = {
        "outcome": "".join(o[0] for o in outcomes_of(rows)[first]),  # f, s, t, w
        "decision": rows["prediction"][first].tolist(),
        "lead": _short(rows["margin"][first]),
        "l2": _short(rows["l2"][first]),
        "linf": _short(rows["linf"][first]),
    }
    if "credibility" in rows:
        columns["credibility"] = _short(rows["credibility"][first])
    if "winner" in rows:
        columns["winner"] = [int(w) for w in rows["winner"][first]]
    return columns


def _short(values: NDArray[Any]) -> list[float | int | None]:
    """Numbers with the digits that the page shows; null where there is none."""
    return [_number(float(v)) for v in values]


def _number(value: float) -> float | int | None:
    if not np.isfinite(value):
        return None
    short = round(value, 3) if 1e-3 <= abs(value) < 1e4 else float(f"{value:.3g}")
    return int(short) if short == int(short) and abs(short) < 1e4 else short


# -------------------------------------------------------------------------------------- kept samples


def _fill(run: RunDirectory, cells: Mapping[str, list[Cell]], made: Explorer, pictures: Budget) -> None:
    """One sample of every classifier under every attack at a time, so that what does not fit are each one's last."""
    album = _Album(made.content["pictures"], pictures)
    references = run.gallery()
    turns: list[Iterator[list[bool]]] = []
    for every, content in zip(cells.values(), made.content["classifiers"], strict=True):
        books = [Book(run, cell, references) for cell in every]
        made.details_of += sum(book.kept for book in books)
        turns.append(_put_all(books, content, album, Budget(DETAIL_BUDGET // len(cells))))
    for turn in zip_longest(*turns, fillvalue=[]):
        made.details += sum(sum(put) for put in turn)
    made.content["references"] = {f"{bank} {id_}": number for (bank, id_), number in album.references.items()}


def _put_all(books: list[Book], content: dict[str, Any], album: _Album, texts: Budget) -> Iterator[list[bool]]:
    """Kept samples one by one: for each attack whether the sample fitted."""
    rows = len(content["samples"]["id"])
    for place in range(max((book.kept for book in books), default=0)):
        yield [
            int(book.places[place]) < rows and _put(book, place, content, cell, album, texts)
            for book, cell in zip(books, content["cells"], strict=True)
            if place < book.kept
        ]


def _put(book: Book, place: int, content: dict[str, Any], cell: dict[str, Any], album: _Album, texts: Budget) -> bool:
    if texts.refused or album.budget.refused:
        return False
    row = str(book.places[place])
    pen, delta, scale, way = book.pen, book.delta(place), book.scale(place), book.way(place)
    voters = book.voters_of(place)
    attacked: dict[str, Any] = {
        "voters": [
            {
                "near": [[*_near(r), int(bool(r.change))] for r in v.attacked],
                "left": [i for i, r in enumerate(v.clean) if r.change],
                "votes": v.votes,
                "entered": v.entered,
            }
            for v in voters
        ],
        "way": None if way is None else [_short(np.array(way.leads)), way.decisions],
        "change": [amplified(pen.high - pen.low, scale), distance(scale)],
    }
    clean = {
        "voters": [
            {"note": visible(note_of(v), 120), "bank": v.bank, "k": v.k, "near": [*map(_near, v.clean)]} for v in voters
        ]
    }
    fresh = row not in content["shown"]
    drawings = [pen.draw(book.after["x"][place], LARGE, view=True)]
    drawings.append(pen.change(delta, scale, view=True) if bool(delta.any()) else None)
    if fresh:
        drawings.append(pen.draw(book.before["x"][place], LARGE, view=True))
    needed = {(v.bank, r.id) for v in voters for r in [*v.clean, *v.attacked]}
    if not texts.take(len(inert(attacked)) + fresh * len(inert(clean))):
        return False
    numbers = album.take(book, drawings, needed)
    if numbers is None:
        return False
    cell["shown"][row] = attacked | {"pictures": numbers[:2]}
    if fresh:
        content["shown"][row] = clean | {"picture": numbers[2]}
    return True


def _near(reference: Near) -> list[Any]:
    return [reference.id, reference.label, distance(reference.distance)]


class _Album:
    """The pictures of the script's data: those of references once, by bank and id."""

    def __init__(self, pictures: list[Any], budget: Budget) -> None:
        self.pictures, self.budget = pictures, budget
        self.references: dict[tuple[int, int], int] = {}

    def take(self, book: Book, drawings: list[Picture | None], needed: set[tuple[int, int]]) -> list[int | None] | None:
        """The numbers of these pictures, with those of the references; None where they do not fit."""
        fresh = {
            key: drawn
            for key in sorted(needed - self.references.keys())
            if (drawn := book.picture(*key, view=True)) is not None
        }
        if not self.budget.take(sum(p.size for p in [*drawings, *fresh.values()] if p is not None)):
            return None
        self.references |= {key: self._add(drawn) for key, drawn in fresh.items()}
        return [None if p is None else self._add(p) for p in drawings]

    def _add(self, p: Picture) -> int:
        """An address; in a list of its own where it was reduced; of a plot path, whether of bars, width and height."""
        plot = [p.path, int(p.bars), p.width, p.height]
        self.pictures.append(plot if p.path else p.uri if p.pixelated else [p.uri])
        return len(self.pictures) - 1
