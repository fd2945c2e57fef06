"""The samples of one classifier under one attack, as the run kept them: decisions, voters before and after, the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustknn.classifiers import REJECTED
from robustknn.evaluation import RunDirectory, metrics
from robustknn.evaluation.rundir import CLEAN, Cell
from robustknn.reports.pictures import SMALL, Pen, Picture

FOOLED, STOOD, TIED, WRONG = "fooled", "stood", "tied", "wrong"
ENTERED, LEFT = "new", "left"
_MISSING = -1


def outcomes_of(rows: Mapping[str, NDArray[Any]]) -> NDArray[np.str_]:
    """FOOLED, STOOD, TIED (a tie counts for the defender) or WRONG (without any attack), for every row."""
    correct, success = rows["clean_correct"].astype(bool), rows["success"].astype(bool)
    return np.select([~correct, success, metrics.tied(rows)], [WRONG, FOOLED, TIED], STOOD)


@dataclass(frozen=True)
class Near:
    """One of the nearest references of a voter.

    Attributes:
        role: "true", "taken" (votes for the class the attacked sample is taken for) or "other".
        change: "new" (votes under attack alone), "left" (votes without attack alone), "" (both, or not known).
    """

    id: int
    label: int
    distance: float
    role: str
    change: str


@dataclass(frozen=True)
class Voters:
    """One voter's references, without attack and under it.

    Attributes:
        shown: how many of the k that vote are in `clean` and `attacked`.
        made: which reference set they are of, where there are several; else "".
        votes: (class, votes without attack, votes attacked), the most first; () where the run kept no votes.
        entered: how many references vote under attack alone; None where it is not known.
    """

    layer: str
    k: int
    shown: int
    bank: int
    made: str
    clean: list[Near]
    attacked: list[Near]
    votes: tuple[tuple[int, int, int], ...]
    entered: int | None


@dataclass(frozen=True)
class Way:
    """The hard decision along the straight line from a sample to its example.

    Attributes:
        leads: of the true class; below 0 another one leads.
        decisions: class numbers.
    """

    leads: tuple[float, ...]
    decisions: tuple[int, ...]

    @property
    def lost(self) -> int | None:
        """The first point from which on another class leads to the end, None where it does not lead there."""
        if self.leads[-1] >= 0:
            return None
        back = [i for i, (a, b) in enumerate(pairwise(self.leads)) if a >= 0 > b]
        return back[-1] + 1 if back else 0


class Book:
    """The examples of one cell, beside the same samples without attack."""

    def __init__(self, run: RunDirectory, cell: Cell, references: Mapping[str, Tensor]) -> None:
        self.cell, self.references = cell, references  # those with pictures, see RunDirectory.gallery
        self.plan: dict[str, Any] = run.header["plan"]
        clean = Cell(cell.classifier, CLEAN)
        self.before, self.after = run.tensors(clean), run.tensors(cell)
        self.clean_rows, self.rows = run.rows(clean), run.rows(cell)
        self.outcomes = outcomes_of(self.rows)
        self.voters: list[dict[str, Any]] = self.plan["classifiers"][cell.classifier]["voters"]

    @property
    def kept(self) -> int:
        """How many examples there are."""
        return len(self.after["position"]) if self.before and self.after else 0

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Where the rows hold the samples that are kept, (kept,)."""
        if not self.kept:
            return np.zeros(0, dtype=np.int64)
        found: NDArray[np.int64] = np.searchsorted(self.rows["position"], self.after["position"].numpy())
        return found

    @cached_property
    def pen(self) -> Pen:
        """One scale for samples and references."""
        x = self.after["x"]
        return Pen.of(tuple(x.shape[1:]), self.plan["threat"]["bounds"], [self.before["x"], x])

    def scale(self, place: int) -> float:
        """The largest change that the picture of a change tells apart: eps, or what the sample was moved."""
        if self.plan["threat"]["norm"] == "linf":
            return float(self.cell.eps)
        return float(self.delta(place).abs().max())

    def delta(self, place: int) -> Tensor:
        """By what a kept sample was changed."""
        return self.after["x"][place].double() - self.before["x"][place].double()

    def class_name(self, number: Any) -> str:
        """A class as the run calls it."""
        return class_name(self.plan, number)

    def way(self, place: int) -> Way | None:
        """The decision on the way to a kept sample's example; None where the run did not keep it."""
        if "path lead" not in self.after:
            return None
        leads, decisions = (self.after[f"path {what}"][place].tolist() for what in ("lead", "decision"))
        return Way(tuple(round(lead, 6) for lead in leads), tuple(decisions))  # a tie to rounding is a tie

    def voters_of(self, place: int) -> list[Voters]:
        """What the voters of a kept sample are, without attack and under it."""
        return [self._voters(i, place) for i in range(len(self.voters))]

    def picture(self, bank: int, id_: int, view: bool = False) -> Picture | None:
        """A reference's picture, None where it was kept without its input; `view`: it may be lossy."""
        if f"images {bank}" not in self.references:
            return None
        ids: NDArray[np.int64] = self.references[f"ids {bank}"].numpy()
        place = int(np.searchsorted(ids, id_))
        if place >= len(ids) or ids[place] != id_:
            return None
        return self.pen.draw(self.references[f"images {bank}"][place], SMALL, view)

    # ----------------------------------------------------------------------------------- voters

    def _voters(self, index: int, place: int) -> Voters:
        voter = self.voters[index]
        before, after = (_voting(kept, index, place, voter["n_neighbors"]) for kept in (self.before, self.after))
        known = before is not None and after is not None
        clean = self._near(self.before, index, place, after if known else None, LEFT)
        attacked = self._near(self.after, index, place, before if known else None, ENTERED)
        return Voters(
            layer=str(voter["layer"]),
            k=int(voter["n_neighbors"]),
            shown=max(len(clean), len(attacked)),
            bank=int(voter["bank"]),
            made=self._made(voter),
            clean=clean,
            attacked=attacked,
            votes=_tally(before, after) if before is not None and after is not None else (),
            entered=len(after.keys() - before.keys()) if before is not None and after is not None else None,
        )

    def _made(self, voter: Mapping[str, Any]) -> str:
        if len({v["bank"] for v in self.voters}) < 2:
            return ""
        return f"reference set {voter['bank'] + 1}" + (f" ({voter['attacked']})" if voter.get("attacked") else "")

    def _near(
        self, kept: Mapping[str, Tensor], index: int, place: int, others: dict[int, int] | None, changed: str
    ) -> list[Near]:
        if f"ids {index}" not in kept:
            return []
        row = self.places[place]
        label, taken = int(self.rows["label"][row]), int(self.rows["prediction"][row])
        every = zip(*(kept[f"{what} {index}"][place].tolist() for what in ("ids", "distances", "labels")), strict=True)
        return [
            Near(
                id_,
                of,
                far,
                "true" if of == label else "taken" if of == taken else "other",
                changed if others is not None and id_ not in others else "",
            )
            for id_, far, of in every
            if id_ != _MISSING  # a neighbor that an approximate index did not find
        ]


def class_name(plan: Mapping[str, Any], number: Any) -> str:
    """A class as the run calls it."""
    names = plan["class_names"]
    if int(number) == REJECTED:
        return "rejected"
    named = names is not None and 0 <= int(number) < len(names)
    return str(names[int(number)] if named else int(number))


def _voting(kept: Mapping[str, Tensor], index: int, place: int, k: int) -> dict[int, int] | None:
    """{id: class} of the references that vote; None where the run kept fewer than those."""
    names = (f"voters {index}", f"votes {index}")
    if names[0] not in kept:  # runs of before kept those alone that are shown
        names = (f"ids {index}", f"labels {index}")
        if names[0] not in kept or kept[names[0]].shape[1] < k:
            return None
    ids, labels = (kept[name][place].tolist() for name in names)
    return {i: of for i, of in zip(ids, labels, strict=True) if i != _MISSING}


def _tally(before: Mapping[int, int], after: Mapping[int, int]) -> tuple[tuple[int, int, int], ...]:
    first, last = Counter(before.values()), Counter(after.values())
    every = sorted({*first, *last}, key=lambda of: (-max(first[of], last[of]), -first[of], of))
    return tuple((of, first[of], last[of]) for of in every)
