"""The verdict on each classifier: a sentence with its numbers, and what to hold against them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from robustknn.evaluation import Summary
from robustknn.evaluation.summary import AttackSummary, ClassifierSummary
from robustknn.reports.checks import signs_on
from robustknn.reports.neighbors import strongest
from robustknn.reports.words import allowance, name, percent, plural


@dataclass(frozen=True)
class Verdict:
    """What the page opens with for one classifier.

    Attributes:
        sentence, rests: the verdict, and which attack it rests on.
        doubtful: a check gave a sign on that attack, or no attack saw the neighbors: the truth may be lower.
        held, fooled, wrong: shares of the samples, which add up to 1: right under every attack; right until some
            attack; wrong without any.
    """

    classifier: str
    sentence: Markup
    rests: Markup
    doubtful: bool
    held: float
    fooled: float
    wrong: float


def verdicts_of(plan: Mapping[str, Any], summary: Summary, noun: str, unit: str) -> list[Verdict]:
    """One verdict a classifier. `noun` is what a sample is ("image"), `unit` what it is made of ("pixel")."""
    return [_verdict(plan, summary, c, noun, unit) for c in summary.classifiers]


def _verdict(plan: Mapping[str, Any], summary: Summary, c: ClassifierSummary, noun: str, unit: str) -> Verdict:
    best = strongest(c)
    sentence = Markup("{} is right on {}\u00a0% of {}.").format(
        name(c.name), percent(c.clean_accuracy), plural(c.n, noun)
    )
    if best is None:
        sentence += " No attack was run, so nothing is known of its robustness."
        rests, doubtful = Markup(""), True
    else:
        sentence += Markup(" {}, {}\u00a0% stay right under the strongest attack run here, {}{}.").format(
            allowance(plan["threat"], unit), percent(best.robust_accuracy), name(best.name), _together(c)
        )
        rests, doubtful = _rests(summary, c, best)
    fooled = max(c.clean_accuracy - c.worst_case_accuracy, 0.0)
    return Verdict(c.name, sentence, rests, doubtful, c.worst_case_accuracy, fooled, 1 - c.clean_accuracy)


def _together(c: ClassifierSummary) -> str:
    if len(c.attacks) < 2:
        return ""
    every = "both attacks" if len(c.attacks) == 2 else f"every one of the {len(c.attacks)} attacks"
    return f", and {percent(c.worst_case_accuracy)}\u00a0% under {every}"


def _rests(summary: Summary, c: ClassifierSummary, best: AttackSummary) -> tuple[Markup, bool]:
    if all(a.transfer for a in c.attacks):
        return Markup(
            "No attack that sees the neighbors was run: this says little about robustness, and the truth may be far "
            "lower. Run a white-box attack such as <code>ask</code>."
        ), True
    if best.transfer:
        return Markup(
            "The strongest attack, {}, does not even see the neighbors: those that do are not at their strength, and "
            "the truth is likely lower."
        ).format(name(best.name)), True
    codes = {w.code for w in signs_on(summary, c.name, best.name)}
    if codes == {"ties"}:
        return Markup("Of these, {}\u00a0% end in a tie that {} itself decides wrongly.").format(
            percent(best.tied), name(c.name)
        ), True
    if codes:
        return Markup("A check gave a sign that {} is not at its strength; the truth may be lower.").format(
            name(best.name)
        ), True
    return Markup("No check gave a sign that {} is held back.").format(name(best.name)), False
