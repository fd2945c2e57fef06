"""The momentum iterative fast gradient sign method (Dong et al., arXiv 1710.06081, CVPR 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from robustknn import registry
from robustknn.attacks.gradient import GradientAttack


@registry.attacks.register("mi-fgsm")
@dataclass(frozen=True)
class MIFGSM(GradientAttack):
    """Steps of eps / steps along gradients that are accumulated at unit L1 length, from the clean input, last iterate.

    g ← μ g + ∇/‖∇‖₁ with μ = `accumulate` (eq. 6), x ← project(x + step · steepest(g)): sign(g) for L∞ (eq. 7),
    g/‖g‖₂ for L2 (eq. 9), the largest coordinates for L1. See `GradientAttack` for the parameters.
    """

    steps: int = 10
    step: float | None = None
    schedule: str = "constant"
    momentum: float = 0.0
    accumulate: float = 1.0
    start: str = "clean"
    keep: str = "last"
    refresh: bool = False
