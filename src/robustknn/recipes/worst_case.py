"""The per-sample worst case: one number to trust, without parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from robustknn import registry
from robustknn.attacks import APGD, PGD, Attack, Close, EachTarget, Square, Suite
from robustknn.attacks.minimum_norm import MinimumNorm
from robustknn.checks import check_choice
from robustknn.objectives import ASK, AdvKNN, NeighborHinge, Objective
from robustknn.objectives.adaptive import Adaptive
from robustknn.objectives.evolved import Evolved
from robustknn.objectives.knn_stage import KNNStage
from robustknn.objectives.rank_pair import RankPair
from robustknn.objectives.through_noise import ThroughNoise
from robustknn.objectives.through_transform import ThroughTransform
from robustknn.recipes.attacks import pgd_transfer

STRENGTHS = ("fast", "standard", "thorough")


@registry.attacks.register("worst-case")
@dataclass(frozen=True)
class WorstCase(Suite):
    """Every kind of attack, cheapest first; only samples that still stand go on to the next.

    "fast": transfer, ASK, adaptive (of a network the margin of its scores), for RAILS its kNN stage and its evolved
    candidates, for transformed inputs BPDA with EOT, for smoothed classifiers the adaptive one in expectation over
    their noise, a few queries of Square. "standard" adds the adaptive one's second form, other objectives
    (instance-wise ASK, rank-paired margin, Sitawarin & Wagner 2, AdvKNN), random restarts, the three nearest wrong
    classes as targets, long climbs of samples that are close to falling (`Close`), and more queries on the decision
    alone. "thorough" adds long climbs of all that stand, more restarts, up to nine targets, a minimum-norm run and a
    long black-box run.

    Args:
        strength: "fast", "standard" or "thorough".
    """

    role: ClassVar[str] = "worst-case"

    strength: str = "standard"

    def __post_init__(self) -> None:
        check_choice(self.strength, STRENGTHS, "strength")

    def members(self) -> dict[str, Attack]:
        return dict(_members(self.strength))


@registry.attacks.register("worst-case-fast")
def worst_case_fast() -> WorstCase:
    """The worst case over the few attacks that find most, in minutes."""
    return WorstCase("fast")


@registry.attacks.register("worst-case-thorough")
def worst_case_thorough() -> WorstCase:
    """The worst case with restarts, every target and long black-box runs."""
    return WorstCase("thorough")


def _short(objective: Objective, restarts: int = 1, start: str = "clean-first") -> APGD:
    """Ten gradients a start: on nearest neighbors many short climbs find more than a long one."""
    return APGD(objective=objective, steps=10, restarts=restarts, start=start)


@cache
def _members(strength: str) -> dict[str, Attack]:
    # Guides from an approximate index are those that the deployed classifier would find itself.
    ask, adaptive = ASK(allow_approximate=True), Adaptive(allow_approximate=True)
    fast: dict[str, Attack] = {
        "transfer": pgd_transfer(steps=20, keep="best", check_every=5),
        "ask": PGD(objective=ask, steps=20),
        "adaptive": PGD(objective=adaptive),
        "knn-stage": PGD(objective=KNNStage(ask)),
        "evolved": PGD(objective=Evolved(), steps=20, check_every=2),
        "through-transform": PGD(objective=ThroughTransform()),
        "through-noise": PGD(objective=ThroughNoise(adaptive)),
        "square": Square(queries=8, feedback="labels"),
    }
    if strength == "fast":
        return fast
    rival = Adaptive(loss="rival", allow_approximate=True)
    # More rivals and a smoother maximum look farther ahead, which pays where little is left to gain.
    all_rivals = Adaptive(smooth=0.2, max_classes=9, allow_approximate=True)
    wide = PGD(objective=all_rivals, start="random", restarts=3, check_every=3)
    instance_wise = ASK(kind="instance-wise", loss="cross-entropy", allow_approximate=True)
    standard: dict[str, Attack] = {
        **fast,
        "adaptive-climb": _short(adaptive),
        "adaptive-rival": APGD(objective=rival),
        "ask-instance-wise": _short(instance_wise),
        "rank-pair": _short(RankPair(allow_approximate=True)),
        "sitawarin-wagner-2": _short(NeighborHinge(allow_approximate=True), restarts=2),
        # Its heads are a stand-in either way: those of 5,000 references take minutes where those of all take an hour.
        "advknn": _short(AdvKNN(max_references=5000)),
        "ask-restarts": _short(ask, restarts=3, start="random"),
        "adaptive-restarts": _short(adaptive, restarts=5, start="random"),
        "knn-stage-restarts": PGD(objective=KNNStage(ask), start="random", restarts=3),
        "evolved-restarts": PGD(objective=Evolved(), steps=20, check_every=2, start="random", restarts=2),
        "through-noise-ask": PGD(objective=ThroughNoise(ask)),
        "through-noise-restarts": PGD(objective=ThroughNoise(adaptive), start="random", restarts=3),
        "ask-targets": EachTarget(_short(ask), targets=3),
        "adaptive-targets": EachTarget(_short(adaptive), targets=3),
        "adaptive-wide-close": Close(wide),
        "adaptive-close": Close(APGD(objective=adaptive)),
        "ask-close": Close(APGD(objective=ask)),
        "square-labels": Square(queries=100, feedback="labels"),
    }
    if strength == "standard":
        return standard
    return {
        **standard,
        # From random points: from the input the samples that are close have climbed already.
        "apgd": APGD(objective=ask, start="random"),
        "adaptive-apgd": APGD(objective=adaptive, start="random"),
        "adaptive-wide": wide,
        "adaptive-rival-restarts": _short(rival, restarts=20, start="random"),
        "ask-more-restarts": _short(ask, restarts=20, start="random"),
        "adaptive-more-restarts": _short(adaptive, restarts=20, start="random"),
        "ask-all-targets": EachTarget(_short(ask, restarts=3), targets=9),
        "adaptive-all-targets": EachTarget(_short(adaptive, restarts=3), targets=9),
        "minimum-norm": MinimumNorm(objective=ask, targets=9, restarts=3),
        "square-scores": Square(queries=1000),
    }
