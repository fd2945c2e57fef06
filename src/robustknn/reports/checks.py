"""Which checks of its figures a run could make, and what came of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robustknn.evaluation import Summary, Warned
from robustknn.evaluation.diagnostics import ONE_STEP, UNBOUNDED
from robustknn.evaluation.plan import WORST_CASE, attacks_on, is_blind

_QUESTIONS = {
    "zero-gradient": "Does the attack's loss have a gradient to climb?",
    "one-step-beats-many": "Is the whole attack at least as strong as one single step of it?",
    "unbounded-not-broken": "Does the attack break every sample once it may change the input at will?",
    "more-eps-helps-the-defender": "Does a larger eps never help the defender?",
    "transfer-beats-white-box": "Is it at least as strong as the attacks that do not see the neighbors?",
    "approximate-disagrees": "Does an approximate index keep no more right than the same references searched exactly?",
    "black-box-only": "Could the worst case climb a gradient of the classifier?",
    "ties": "Does the classifier itself decide right what is counted as right, but for 1 % of the samples?",
}


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        ran: on how many (classifier, attack) pairs it was made.
        signs: on how many of them it gave a sign.
        reason: why it was not made on any; else "".
    """

    code: str
    question: str
    ran: int
    signs: int
    reason: str


def checks_of(plan: Mapping[str, Any], summary: Summary) -> list[Check]:
    """All checks, also those that the run had no means to make."""
    every = [(c, a) for c in plan["classifier_names"] for a in attacks_on(plan, c)]
    white_box = [pair for pair in every if not is_blind(plan, *pair)]
    pairs = len(white_box)
    controls = [c["control"] for c in plan["cells"]]
    ran = {
        "zero-gradient": pairs,
        "one-step-beats-many": controls.count(ONE_STEP),
        "unbounded-not-broken": controls.count(UNBOUNDED),
        "more-eps-helps-the-defender": pairs if len(plan["eps"]) > 1 else 0,
        "transfer-beats-white-box": pairs if len(white_box) < len(every) else 0,
        "ties": len(every) if white_box else 0,
    }
    worst = sum(plan["attacks"][a].get("role") == WORST_CASE for _, a in every)
    if worst:
        ran["black-box-only"] = worst
    through = sum(a.exact_search is not None for c in summary.classifiers for a in c.attacks)
    if through:
        ran["approximate-disagrees"] = through
    off = "the controls were switched off" if not plan["controls"] else ""
    reasons = {
        "one-step-beats-many": off or "no attack of several gradient steps was run",
        "unbounded-not-broken": off or "the inputs have no bounds, or no gradient attack was run",
        "more-eps-helps-the-defender": "one eps only was run",
        "transfer-beats-white-box": "no attack blind to the neighbors was run",
    }
    found: dict[str, set[tuple[str, str]]] = {}
    for w in summary.warnings:
        found.setdefault(w.code, set()).add((w.classifier, w.attack))
    made = []
    for code in dict.fromkeys([*ran, *found]):
        n = max(ran.get(code, 0), len(found.get(code, ())))
        reason = reasons.get(code, "") if white_box else "no attack that sees the neighbors was run"
        made.append(Check(code, _QUESTIONS.get(code, code), n, len(found.get(code, ())), "" if n else reason))
    return made


def signs_on(summary: Summary, classifier: str, attack: str) -> list[Warned]:
    """The warnings about one attack on one classifier."""
    return [w for w in summary.warnings if (w.classifier, w.attack) == (classifier, attack)]
