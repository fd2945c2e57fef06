"""Signs that an accuracy under attack says more about the attack, or the counting, than about the classifier.

After Athalye, Carlini & Wagner, arXiv 1802.00420, section 3.1, and the flags of AutoAttack (Croce & Hein,
arXiv 2003.01690), for classifiers that decide by neighbors.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from robustknn.evaluation import metrics
from robustknn.evaluation.plan import WORST_CASE, attacks_on, is_blind
from robustknn.evaluation.rundir import Cell

ONE_STEP, UNBOUNDED = "one-step", "unbounded"
ZERO_GRADIENT_SHARE = 0.1
UNBOUNDED_ACCURACY = 0.01
SIGNIFICANCE = 0.05
TIED_SHARE = 0.01
Every = Mapping[Cell, dict[str, NDArray[Any]]]


class Warned(BaseModel):
    """One sign of a wrong figure.

    Attributes:
        code: "zero-gradient", "transfer-beats-white-box", "one-step-beats-many", "unbounded-not-broken",
            "more-eps-helps-the-defender", "ties", "approximate-disagrees" or "black-box-only".
        classifier, attack: what it is about.
        message: what was seen and what to do, one or two sentences.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    code: str
    classifier: str
    attack: str
    message: str


def warnings_of(plan: Mapping[str, Any], rows: Every) -> list[Warned]:
    """All warnings of a run, classifier by classifier."""
    found: list[Warned] = []
    main = float(plan["threat"]["eps"])
    for classifier in plan["classifier_names"]:
        every = attacks_on(plan, classifier)
        transfer = [name for name in every if is_blind(plan, classifier, name)]
        for attack in every:
            found += _ties(Cell(classifier, attack, main), rows)
            found += _approximate(Cell(classifier, attack, main), rows)
            if plan["attacks"][attack].get("role") == WORST_CASE:
                found += _black_box(Cell(classifier, attack, main), rows)
        for attack in (name for name in every if name not in transfer):
            cell = Cell(classifier, attack, main)
            found += _zero_gradient(cell, rows)
            found += _one_step(cell, rows)
            found += _unbounded(cell, rows)
            found += _rising(cell, rows)
            found += _transfer(cell, transfer, rows)
    return found


def _zero_gradient(cell: Cell, rows: Every) -> list[Warned]:
    here = rows[cell]
    correct = here["clean_correct"].astype(bool)
    share = metrics.share(here["zero_gradient"][correct])
    if share <= ZERO_GRADIENT_SHARE:
        return []
    return [
        _warn(
            "zero-gradient",
            cell,
            f"{_percent(share)} of the correct samples gave a first gradient of exactly zero: the loss saturates and "
            "the accuracy under this attack overstates robustness. Use a scale-free objective such as 'ask'.",
        )
    ]


def _one_step(cell: Cell, rows: Every) -> list[Warned]:
    control = Cell(cell.classifier, cell.attack, cell.eps, ONE_STEP)
    if control not in rows:
        return []
    one = rows[control]
    many = _same_samples(rows[cell], one)
    fooled_by_one, fooled_by_many = ~_resisted(one), ~_resisted(many)
    if metrics.mcnemar(fooled_by_one, fooled_by_many) >= SIGNIFICANCE:
        return []
    return [
        _warn(
            "one-step-beats-many",
            cell,
            f"one step fools {_percent(metrics.share(fooled_by_one))} where the whole attack fools "
            f"{_percent(metrics.share(fooled_by_many))} of the same samples: its steps do not optimise. "
            "Change the step schedule or the objective.",
        )
    ]


def _unbounded(cell: Cell, rows: Every) -> list[Warned]:
    controls = [c for c in rows if (c.classifier, c.attack, c.control) == (cell.classifier, cell.attack, UNBOUNDED)]
    if not controls:
        return []
    left = metrics.share(_resisted(rows[controls[0]]))
    if left <= UNBOUNDED_ACCURACY:
        return []
    return [
        _warn(
            "unbounded-not-broken",
            cell,
            f"with every input allowed (eps {controls[0].eps:g}) {_percent(left)} of the samples still stand, where "
            "none can: the attack gets stuck. Use more steps or restarts, or a scale-free objective such as 'ask'.",
        )
    ]


def _rising(cell: Cell, rows: Every) -> list[Warned]:
    curve = sorted(
        (c for c in rows if (c.classifier, c.attack, c.control) == (cell.classifier, cell.attack, "")),
        key=lambda c: c.eps,
    )
    for small, large in pairwise(curve):
        fooled_small, fooled_large = (~rows[c]["robust"].astype(bool) for c in (small, large))
        if metrics.mcnemar(fooled_small, fooled_large) < SIGNIFICANCE:
            return [
                _warn(
                    "more-eps-helps-the-defender",
                    cell,
                    f"eps {small.eps:g} fools {_percent(metrics.share(fooled_small))} and the larger eps {large.eps:g} "
                    f"only {_percent(metrics.share(fooled_large))}: the larger ball holds the smaller, so the attack "
                    "is not at its strength. Use more steps or restarts.",
                )
            ]
    return []


def _transfer(cell: Cell, transfer: list[str], rows: Every) -> list[Warned]:
    """An attack blind to the neighbors that fools samples this one does not, more often than the reverse."""
    fooled = ~rows[cell]["robust"].astype(bool)
    for blind in transfer:
        by_blind = ~rows[Cell(cell.classifier, blind, cell.eps)]["robust"].astype(bool)
        if metrics.mcnemar(by_blind, fooled) < SIGNIFICANCE:
            return [
                _warn(
                    "transfer-beats-white-box",
                    cell,
                    f"{blind!r}, blind to the neighbors, leaves {_percent(1 - metrics.share(by_blind))} right and this "
                    f"attack, which sees them, {_percent(1 - metrics.share(fooled))}: it is too weak to be "
                    "trusted, by its objective or its search.",
                )
            ]
    return []


def _ties(cell: Cell, rows: Every) -> list[Warned]:
    here = rows[cell]
    tied = metrics.tied(here)
    share = metrics.share(tied)
    if share <= TIED_SHARE:
        return []
    left = metrics.share(here["robust"].astype(bool) & ~tied)
    return [
        _warn(
            "ties",
            cell,
            f"{_percent(share)} of the samples end in a tie that the classifier decides wrongly; they count as right "
            f"here, because an attack must win strictly. Counted by the decision, the accuracy is {_percent(left)}. "
            "An odd number of votes has no ties between two classes.",
        )
    ]


def _approximate(cell: Cell, rows: Every) -> list[Warned]:
    """Samples that stand though the same attack breaks the exact twin, more often than the reverse."""
    here = rows[cell]
    if "twin_robust" not in here:
        return []
    stands, twin = here["robust"].astype(bool), here["twin_robust"].astype(bool)
    if metrics.mcnemar(stands, twin) >= SIGNIFICANCE:
        return []
    return [
        _warn(
            "approximate-disagrees",
            cell,
            f"{_percent(metrics.share(stands))} stay right with the approximate index and "
            f"{_percent(metrics.share(twin))} when the same references are searched exactly, under one attack: "
            "neighbors that are missed may be taken for robustness here. Report the exact figure, raise the index's "
            "recall, or attack through the index itself, with an objective that has allow_approximate=True.",
        )
    ]


def _black_box(cell: Cell, rows: Every) -> list[Warned]:
    """A worst case of which no part could climb a gradient."""
    here = rows[cell]
    tried = here["clean_correct"].astype(bool)
    if not tried.any() or here["gradient_passes"][tried].any():
        return []
    queries = round(float(here["forward_passes"][tried].max()))
    return [
        _warn(
            "black-box-only",
            cell,
            f"no part of it that climbs a gradient works on this classifier; what stands has stood {queries:,} queries "
            "at most, and is no worst case. Run 'hop-skip-jump' with thousands of queries, or give encoder and index "
            "as a kNN of this library, which a gradient attack can see.",
        )
    ]


def _resisted(rows: dict[str, NDArray[Any]]) -> metrics.Bools:
    """Which samples the attack itself failed on: judged where it searched, which may be an exact twin."""
    found: metrics.Bools = rows.get("twin_robust", rows["robust"]).astype(bool)
    return found


def _same_samples(many: dict[str, NDArray[Any]], few: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    chosen = np.isin(many["position"], few["position"])
    return {k: v[chosen] for k, v in many.items()}


def _warn(code: str, cell: Cell, message: str) -> Warned:
    return Warned(code=code, classifier=cell.classifier, attack=cell.attack, message=message)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
