"""The per-sample worst case: one number to trust, without parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from robustknn import registry
from robustknn.attacks import PGD, Attack, EachTarget, Suite
from robustknn.checks import check_choice
from robustknn.recipes.attacks import ask_instance_wise, pgd_transfer

STRENGTHS = ("fast", "standard", "thorough")


@registry.attacks.register("worst-case")
@dataclass(frozen=True)
class WorstCase(Suite):
    """Every kind of attack, cheapest first; only samples that still stand go on to the next.

    Args:
        strength: "fast", "standard" or "thorough".
    """

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


@cache
def _members(strength: str) -> dict[str, Attack]:
    fast: dict[str, Attack] = {
        "pgd-transfer": pgd_transfer(steps=20, keep="best"),
        "ask": PGD(),
    }
    if strength == "fast":
        return fast
    return {
        **fast,
        "ask-instance-wise": ask_instance_wise(),
        "ask-restarts": PGD(start="random", restarts=4),
        "ask-targets": EachTarget(PGD(), targets=3),
    }
