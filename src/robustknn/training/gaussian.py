"""Training under Gaussian noise: what randomised smoothing needs of the network that it stands on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from robustknn import registry, rng
from robustknn.checks import check_positive
from robustknn.training.methods import Batch, Method


@registry.methods.register("gaussian")
@dataclass(frozen=True)
class Gaussian(Method):
    """Cross-entropy on samples with Gaussian noise, drawn anew in every step (Cohen et al., arXiv 1902.02918).

    The noise is not clipped, as it is not when the network is smoothed. Validation is on samples as they are.

    Args:
        sigma: the standard deviation of the noise, in the unit of the inputs.
    """

    name: ClassVar[str] = "gaussian"

    sigma: float = 0.25

    def __post_init__(self) -> None:
        check_positive(self.sigma, "sigma")

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        noise = rng.normal(batch.ids, tuple(batch.x.shape[1:]), batch.seed, "gaussian", batch.step)
        noisy = batch.x + self.sigma * noise.to(batch.x)
        return {"cross-entropy": nn.functional.cross_entropy(model(noisy), batch.y)}
