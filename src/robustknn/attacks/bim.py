"""The basic iterative method (Kurakin, Goodfellow & Bengio, arXiv 1607.02533)."""

from __future__ import annotations

from dataclasses import dataclass

from robustknn import registry
from robustknn.attacks.gradient import GradientAttack


@registry.attacks.register("bim")
@dataclass(frozen=True)
class BIM(GradientAttack):
    """Equal steps from the clean input, no momentum, last iterate. See `GradientAttack` for the parameters."""

    steps: int = 10
    step: float = 0.1
    schedule: str = "constant"
    momentum: float = 0.0
    start: str = "clean"
    keep: str = "last"
    refresh: bool = False
