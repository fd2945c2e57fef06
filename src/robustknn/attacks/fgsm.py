"""The fast gradient sign method (Goodfellow, Shlens & Szegedy, arXiv 1412.6572)."""

from __future__ import annotations

from dataclasses import dataclass

from robustknn import registry
from robustknn.attacks.gradient import GradientAttack


@registry.attacks.register("fgsm")
@dataclass(frozen=True)
class FGSM(GradientAttack):
    """One step of length eps from the clean input. See `GradientAttack` for the parameters."""

    steps: int = 1
    step: float = 1.0
    schedule: str = "constant"
    momentum: float = 0.0
    start: str = "clean"
    keep: str = "last"
    refresh: bool = False
