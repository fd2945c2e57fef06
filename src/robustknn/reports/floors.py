"""Floors: conditions on the figures of a run, such as `worst-case>=0.2`, by which a CI decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustknn.errors import InputError, brief, unknown_name
from robustknn.evaluation import Summary, metrics
from robustknn.evaluation.summary import AttackSummary, ClassifierSummary
from robustknn.reports.checks import signs_on
from robustknn.reports.neighbors import strongest

CLEAN, WORST, PUBLISHED = "clean", "worst-case", "published"
MET, MISSED, DOUBTFUL, NOT_RUN = "met", "missed", "doubtful", "not run"
_ROUNDING = 1e-9  # 0.3 - 0.1 is not to miss a floor of 0.2
_FORM = "write it as 'worst-case>=0.2' or 'CLASSIFIER:clean>=0.9', in quotes, with a share from 0 to 1"


@dataclass(frozen=True)
class Floor:
    """The least that a figure may be.

    Attributes:
        classifier: whose, "" for every classifier of the run.
        measure: "clean", "worst-case", "published", or the name of an attack of the run.
        least: a share in [0, 1].
    """

    classifier: str
    measure: str
    least: float

    def __str__(self) -> str:
        return f"{self.measure}>={self.least:g}"

    @classmethod
    def of(cls, text: str) -> Floor:
        """Read from "MEASURE>=SHARE" or "CLASSIFIER:MEASURE>=SHARE".

        Raises:
            InputError: another form, or a share outside [0, 1].
        """
        named, sign, number = text.partition(">=")
        classifier, _, measure = named.strip().rpartition(":")
        try:
            least = float(number)
        except ValueError:
            least = math.nan
        if not sign or not measure or not 0 <= least <= 1:
            raise InputError(f"{brief(text)} is no floor; {_FORM}.")
        return cls(classifier, measure, least)


@dataclass(frozen=True)
class Judged:
    """What came of a floor for one classifier.

    Attributes:
        outcome: MET; MISSED; DOUBTFUL (the figure is high enough, but what it rests on is not to be believed);
            NOT_RUN (the run does not have the figure of this classifier). All but MET fail.
        figure: what was measured, a share; None where the outcome is NOT_RUN.
        sentence: what was measured, and why it is not met.
    """

    floor: Floor
    classifier: str
    outcome: str
    figure: float | None
    sentence: str


def check_floors(plan: Mapping[str, Any], floors: Sequence[Floor]) -> None:
    """InputError for a floor on a classifier or attack that the run does not have."""
    classifiers, figures = plan["classifier_names"], [CLEAN, WORST, PUBLISHED, *plan["attack_names"]]
    for floor in floors:
        if floor.classifier and floor.classifier not in classifiers:
            raise unknown_name("classifier in a floor:", floor.classifier, classifiers)
        if floor.measure not in figures:
            raise unknown_name("figure in a floor:", floor.measure, figures)


def judge(summary: Summary, floors: Sequence[Floor]) -> list[Judged]:
    """Every floor on every classifier that it is for; `check_floors` says whether the run has what they are about."""
    return [
        _judge(summary, c, floor) for c in summary.classifiers for floor in floors if floor.classifier in ("", c.name)
    ]


def _judge(summary: Summary, c: ClassifierSummary, floor: Floor) -> Judged:
    if floor.measure == CLEAN:
        return _judged(floor, c, c.clean_accuracy, "right without attack", "")
    if floor.measure == WORST:
        best = strongest(c)
        if not c.searched or best is None:
            sentence = "no worst-case attack was run; evaluate with --worst-case fast, standard or thorough"
            return Judged(floor, c.name, NOT_RUN, None, sentence)
        figure, doubt = _believed(summary, c, best, c.worst_case_accuracy)
        if best.transfer:
            doubt = f"the strongest attack, {best.name}, never sees the neighbors, so those that do are too weak"
        return _judged(floor, c, figure, "right under every attack", doubt)
    found = next((a for a in c.attacks if floor.measure in (a.role, a.name)), None)
    if found is None:
        return Judged(floor, c.name, NOT_RUN, None, f"{floor.measure} was not run on it")
    figure, doubt = _believed(summary, c, found, found.robust_accuracy)
    blind = ", which never sees the neighbors" if found.transfer else ""
    return _judged(floor, c, figure, f"right under {found.name}{blind}", doubt)


def _believed(summary: Summary, c: ClassifierSummary, attack: AttackSummary, accuracy: float) -> tuple[float, str]:
    """The figure that an attack supports, and what speaks against it ("" for nothing).

    Ties that the classifier itself decides wrongly are no fault of the attack: they are counted as wrong.
    """
    codes = {w.code for w in signs_on(summary, c.name, attack.name)}
    ties = attack.tied if "ties" in codes else 0.0
    weak = ", ".join(sorted(codes - {"ties"}))
    return max(accuracy - ties, 0.0), f"a check gave a sign against {attack.name} ({weak})" if weak else ""


def _judged(floor: Floor, c: ClassifierSummary, figure: float, what: str, doubt: str) -> Judged:
    interval = metrics.wilson(round(figure * c.n), c.n)
    measured = (
        f"{100 * figure:.1f} % of {c.n} samples {what}, floor {100 * floor.least:g} % "
        f"(95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f} %)"
    )
    if figure < floor.least - _ROUNDING:
        return Judged(floor, c.name, MISSED, figure, measured)
    if doubt:
        return Judged(floor, c.name, DOUBTFUL, figure, f"{measured}; {doubt}: the truth may be lower")
    return Judged(floor, c.name, MET, figure, measured)
