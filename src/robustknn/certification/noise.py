"""What the two certificates of smoothing share: their parameters, and what they say of the noise."""

from __future__ import annotations

from robustknn.checks import Bounds, check_number, check_positive_int
from robustknn.classifiers.under_noise import GaussianNoise


def check_smoothing(sigma: float, n: int, alpha: float, clip: Bounds | None, batch_size: int) -> Bounds | None:
    """Refuse parameters that cannot work; the bounds of clipping as numbers."""
    check_positive_int(n, "n")
    check_number(alpha, "alpha", "above 0 and below 1", lambda v: 0 < v < 1)
    return GaussianNoise(sigma, 0, clip, batch_size).clip


def said_of_noise(sigma: float, clip: Bounds | None) -> str:
    """What a certificate says of its noise."""
    clipped = "not clipped" if clip is None else f"clipped to [{clip[0]:g}, {clip[1]:g}] as the network's first step"
    return (
        f"Noise is Gaussian with standard deviation {sigma:g}, added to the input and {clipped}; pseudo-random numbers "
        "of 52 bits stand for it."
    )
