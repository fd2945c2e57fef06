"""How far an input must move at all: the thorough form of the minimum-norm attack (the fast one is its default)."""

from __future__ import annotations

from typing import Any

from robustknn import registry
from robustknn.attacks import MinimumNorm
from robustknn.objectives import Adaptive, Objective


@registry.attacks.register("minimum-norm-thorough")
def minimum_norm_thorough(objective: Objective | None = None, **options: Any) -> MinimumNorm:
    """Minimum norm by soft votes, toward every near class, from near references where they are at hand, and anew."""
    settings: dict[str, Any] = {"targets": 9, "starts": None, "restarts": 2}
    return MinimumNorm(Adaptive() if objective is None else objective, **{**settings, **options})
