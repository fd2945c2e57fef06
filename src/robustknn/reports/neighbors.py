"""Samples beside their nearest references, without attack and under it: what the report shows of the neighbors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustknn.classifiers import REJECTED
from robustknn.evaluation import RunDirectory, Summary, metrics
from robustknn.evaluation.rundir import CLEAN, Cell
from robustknn.evaluation.summary import AttackSummary, ClassifierSummary
from robustknn.reports.pictures import LARGE, SMALL, Pen, Picture
from robustknn.reports.words import distance

FOOLED, STOOD, TIED, WRONG = "fooled", "stood", "tied", "wrong"
_ORDER = (FOOLED, STOOD, TIED, WRONG)


class Budget:
    """How many bytes of pictures a page may still hold, and how much was left out."""

    def __init__(self, total: int) -> None:
        self.total, self.left, self.refused = total, total, 0

    def take(self, size: int) -> bool:
        """Whether `size` bytes are to be had; once refused, nothing more is given."""
        if self.refused or size > self.left:
            self.refused += 1
            return False
        self.left -= size
        return True


@dataclass(frozen=True)
class Reference:
    """One near reference; `role` is "true", "taken" (the class the attacked sample is taken for) or "other"."""

    id: int
    label: str
    distance: str
    role: str
    picture: Picture | None


@dataclass(frozen=True)
class Row:
    """The nearest references of one voter, without attack and under it."""

    layer: str
    note: str
    clean: list[Reference]
    attacked: list[Reference]

    @property
    def size(self) -> int:
        """Bytes of its pictures."""
        return sum(r.picture.size for r in [*self.clean, *self.attacked] if r.picture)


@dataclass(frozen=True)
class Shown:
    """One sample.

    Attributes:
        number: its place in the data set.
        outcome: "fooled", "stood", "tied" (a tie counts for the defender) or "wrong" (without any attack).
        label, before, after: the true class, and the decisions without attack and under it.
        change: the perturbation, None where there is none; `amplified` times as strong as in the pictures, ±`scale`
            from end to end.
        moved: the L2 and L-infinity distances, as text.
    """

    number: int
    outcome: str
    label: str
    before: str
    after: str
    clean: Picture | None
    attacked: Picture | None
    change: Picture | None
    amplified: str
    scale: str
    moved: tuple[str, str]
    rows: list[Row]

    @property
    def size(self) -> int:
        """Bytes of its pictures."""
        own = [self.clean, self.attacked, self.change]
        return sum(p.size for p in own if p) + sum(r.size for r in self.rows)


@dataclass
class Gallery:
    """What is shown of one classifier.

    Attributes:
        kept: how many examples the run holds of it; `wanted` of them were to be shown.
        pictures: whether the references have pictures.
        kind: what the inputs are (see `pictures.kind_of`), `reduced` whether they are larger than they are drawn.
    """

    classifier: str
    attack: str
    kept: int
    wanted: int
    pictures: bool
    kind: str
    reduced: bool
    span: tuple[str, str]
    samples: list[Shown]


def strongest(classifier: ClassifierSummary) -> AttackSummary | None:
    """The attack that leaves the least accuracy, None where none was run; of several the first that sees neighbors."""
    return min(classifier.attacks, key=lambda a: (a.robust_accuracy, a.transfer), default=None)


def galleries(run: RunDirectory, summary: Summary, samples: int, budget: Budget) -> list[Gallery]:
    """The galleries of all classifiers under their strongest attack, at most `samples` samples each.

    The budget is spent one sample of every classifier at a time, so that none takes it all.
    """
    books = [
        _Book(run, Cell(c.name, best.name, best.eps), samples)
        for c in summary.classifiers
        if (best := strongest(c)) is not None
    ]
    made = [book.gallery() for book in books]
    for turn in zip_longest(*(book.views() for book in books)):
        if budget.refused:
            break
        for gallery, view in zip(made, turn, strict=True):
            if view is not None and budget.take(view.size):
                gallery.samples.append(view)
    return made


class _Book:
    """The examples of one cell, beside the same samples without attack."""

    def __init__(self, run: RunDirectory, cell: Cell, samples: int) -> None:
        self.run, self.cell, self.samples = run, cell, samples
        self.plan: dict[str, Any] = run.header["plan"]
        self.before, self.after = run.tensors(Cell(cell.classifier, CLEAN)), run.tensors(cell)
        self.clean_rows, self.rows = run.rows(Cell(cell.classifier, CLEAN)), run.rows(cell)
        self.tied = metrics.tied(self.rows)
        self.voters: list[dict[str, Any]] = self.plan["classifiers"][cell.classifier]["voters"]

    @property
    def kept(self) -> int:
        return len(self.after["position"]) if self.before and self.after else 0

    @cached_property
    def references(self) -> dict[str, Tensor]:
        return self.run.gallery()

    @cached_property
    def pen(self) -> Pen:
        x = self.after["x"]
        return Pen.of(tuple(x.shape[1:]), self.plan["threat"]["bounds"], [self.before["x"], x])

    def gallery(self) -> Gallery:
        wanted = min(self.samples, self.kept)
        kind, reduced, span = "other", False, ("", "")
        if self.kept:
            kind, shape = self.pen.kind, self.after["x"].shape[1:]
            reduced = kind == "image" and max(shape) > SMALL
            span = (f"{self.pen.low:.4g}", f"{self.pen.high:.4g}")
        pictures = any(f"images {v['bank']}" in self.references for v in self.voters)
        return Gallery(self.cell.classifier, self.cell.attack, self.kept, wanted, pictures, kind, reduced, span, [])

    def views(self) -> Iterator[Shown]:
        for place in self._chosen():
            yield self._view(place)

    def _chosen(self) -> list[int]:
        """Places of the samples to show: the fooled ones first, but some of those that stood where there are any."""
        outcomes = [self._outcome(self._row(place)) for place in range(self.kept)]
        fooled = [p for p, o in enumerate(outcomes) if o == FOOLED]
        others = sorted((p for p, o in enumerate(outcomes) if o != FOOLED), key=lambda p: _ORDER.index(outcomes[p]))
        room = max(self.samples - len(fooled), min(len(others), self.samples // 3))
        return (fooled[: self.samples - room] + others)[: self.samples]

    def _row(self, place: int) -> int:
        """Where the rows hold the sample that is kept at `place`."""
        return int(np.searchsorted(self.rows["position"], int(self.after["position"][place])))

    def _outcome(self, row: int) -> str:
        if not self.rows["clean_correct"][row]:
            return WRONG
        if self.rows["success"][row]:
            return FOOLED
        return TIED if self.tied[row] else STOOD

    def _view(self, place: int) -> Shown:
        row, rows = self._row(place), self.rows
        before, after = self.before["x"][place], self.after["x"][place]
        delta = after.double() - before.double()
        scale = float(self.plan["threat"]["eps"]) if self.plan["threat"]["norm"] == "linf" else float(delta.abs().max())
        pen, taken = self.pen, int(rows["prediction"][row])
        return Shown(
            number=int(rows["sample_id"][row]),
            outcome=self._outcome(row),
            label=self._class(rows["label"][row]),
            before=self._class(self.clean_rows["prediction"][row]),
            after=self._class(taken),
            clean=pen.draw(before, LARGE),
            attacked=pen.draw(after, LARGE),
            change=pen.change(delta, scale) if bool(delta.any()) else None,
            amplified=f"{(pen.high - pen.low) / (2 * scale):.3g}" if scale > 0 else "1",
            scale=distance(scale),
            moved=(distance(float(rows["l2"][row])), distance(float(rows["linf"][row]))),
            rows=[self._voter(i, place, int(rows["label"][row]), taken) for i in range(len(self.voters))],
        )

    def _class(self, number: Any) -> str:
        names = self.plan["class_names"]
        if int(number) == REJECTED:
            return "rejected"
        named = names is not None and 0 <= int(number) < len(names)
        return str(names[int(number)] if named else int(number))

    def _voter(self, index: int, place: int, label: int, taken: int) -> Row:
        voter = self.voters[index]
        several = len({v["bank"] for v in self.voters}) > 1
        clean = self._strip(self.before, index, place, label, taken)
        attacked = self._strip(self.after, index, place, label, taken)
        shown = max(len(clean), len(attacked))
        note = f"{shown} nearest" if shown >= voter["n_neighbors"] else f"{shown} nearest of the {voter['n_neighbors']}"
        made = f" ({voter['attacked']})" if voter.get("attacked") else ""
        note += " that vote" + (f", reference set {voter['bank'] + 1}{made}" if several else "")
        return Row(str(voter["layer"]), note, clean, attacked)

    def _strip(self, kept: Mapping[str, Tensor], index: int, place: int, label: int, taken: int) -> list[Reference]:
        if f"ids {index}" not in kept:
            return []
        bank = self.voters[index]["bank"]
        strip = []
        for id_, far, of in zip(
            *(kept[f"{what} {index}"][place].tolist() for what in ("ids", "distances", "labels")), strict=True
        ):
            if id_ >= 0:  # -1 is a neighbor that an approximate index did not find
                role = "true" if of == label else "taken" if of == taken else "other"
                strip.append(Reference(id_, self._class(of), distance(far), role, self._picture(bank, id_)))
        return strip

    def _picture(self, bank: int, id_: int) -> Picture | None:
        if f"images {bank}" not in self.references:
            return None
        ids: NDArray[np.int64] = self.references[f"ids {bank}"].numpy()
        place = int(np.searchsorted(ids, id_))
        if place >= len(ids) or ids[place] != id_:
            return None
        return self.pen.draw(self.references[f"images {bank}"][place], SMALL)
