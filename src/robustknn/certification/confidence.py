"""What finitely many draws of noise say about their distribution, and with what confidence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROUNDING = 1e-9
"""By how much a radius is made smaller, relatively: scipy's quantile, the inverse distribution function and a handful
of float64 operations are each good to some 1e-13."""


def share_at_least(counts: Tensor, n: int, alpha: float) -> Tensor:
    """The one-sided Clopper–Pearson bound: what a probability is at least, (N,) float64.

    With p the probability of an event that happened `counts` times in n independent draws, the bound exceeds p with
    probability at most alpha (Clopper & Pearson, "The use of confidence or fiducial limits", Biometrika 26, 1934).

    Args:
        counts: (N,) int64, each in 0..n.
    """
    from scipy.stats import beta

    held = counts.cpu().double().numpy()
    bound = torch.as_tensor(beta.ppf(alpha, held, n - held + 1), dtype=torch.float64)
    return torch.where(counts.cpu() > 0, bound, 0.0).to(counts.device)  # scipy says NaN of zero


def mean_error(lengths: Tensor, n: int, alpha: float) -> Tensor:
    """How far the mean of n draws may be from the true mean, ‖ĝ − g‖, (N,) float64; farther with probability ≤ alpha.

    For independent vectors f_i of any dimension with ‖f_i‖ ≤ 1 and mean g, d_i = f_i − g has ‖d_i‖ ≤ 2 and
    E‖d_i‖² = E‖f_i‖² − ‖g‖² ≤ 1 − ‖g‖² =: v. Pinelis ("Optimum bounds for the distributions of martingales in Banach
    spaces", Annals of Probability 22, 1994, theorem 3.4; in a Hilbert space D = 1) gives
    P(‖Σ d_i‖ ≥ r) ≤ 2 exp(−(n v / a²) h(r a / (n v))) with a = 2 and h(u) = (1 + u) ln(1 + u) − u, whose inverse is at
    most √(2y) + y/3. With τ = ln(2/alpha), therefore, with probability at least 1 − alpha

        ‖ĝ − g‖ ≤ B(‖g‖) := √(2 (1 − ‖g‖²) τ / n) + 2τ / (3n).

    ‖g‖ is not known, but on that event ‖g‖ + B(‖g‖) ≥ ‖ĝ‖. B falls in ‖g‖, so B at the least length for which this
    holds is a bound. That length solves a quadratic equation: with c = ‖ĝ‖ − 2τ/(3n) and w = 2τ/n it is
    (c − √(w (1 + w − c²))) / (1 + w), or 0 where that is negative.

    Args:
        lengths: (N,) float64, ‖ĝ‖.
    """
    tau = math.log(2 / alpha)
    w, rest = 2 * tau / n, 2 * tau / (3 * n)
    c = (lengths - rest).clamp_min(0)
    least = ((c - (w * (1 + w - c * c).clamp_min(0)).sqrt()) / (1 + w)).clamp(0, 1)
    return (w * (1 - least * least)).sqrt() + rest


def inward(radii: Tensor) -> Tensor:
    """Radii made smaller by more than rounding can have made them larger, and by enough to exclude the end itself."""
    return radii * (1 - _ROUNDING)
