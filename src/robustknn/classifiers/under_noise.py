"""Classifiers that ask another one about noisy inputs, and the noise: counted per sample and draw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from robustknn import rng
from robustknn.batching import MIN_ROWS
from robustknn.checks import Bounds, check_positive, check_positive_int
from robustknn.classifiers.base import Classifier
from robustknn.classifiers.randomized import Randomized
from robustknn.features import FeatureExtractor
from robustknn.reference import ReferenceSet
from robustknn.threat import ThreatModel

_KEYS = 1 << 20
"""Draws whose keys are held at once (8 bytes each)."""
_BYTES = 1 << 29
"""What making one batch may take; a number of the noise takes about 48 bytes on its way (64-bit, several copies)."""
_PER_NUMBER = 48


@dataclass(frozen=True)
class Draws:
    """Some draws of some samples.

    Attributes:
        rows: (B,) the sample of each, a place in the batch of samples.
        x: (B, …) the samples with noise.
        ids: (B,) int64, another for every draw: what a base classifier counts its own randomness from.
    """

    rows: Tensor
    x: Tensor
    ids: Tensor


@dataclass(frozen=True)
class GaussianNoise:
    """N(0, sigma² I) on inputs.

    Draw number t of a sample depends on the seed, the sample's id, what the draw is for, and t alone. It is added in
    float64, and the sum rounded once to the type of the input: rounding is then part of the base classifier.

    Attributes:
        sigma: the standard deviation, in the unit of the inputs.
        seed: of the draws.
        clip: (low, high), to which noisy inputs are clipped; None leaves them as they are.
        batch_size: draws at once; fewer where inputs are large.
    """

    sigma: float
    seed: int = 0
    clip: Bounds | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_positive(self.sigma, "sigma")
        check_positive_int(self.batch_size, "batch_size")
        if self.clip is not None:  # ThreatModel refuses what are no bounds
            object.__setattr__(self, "clip", ThreatModel(bounds=self.clip).bounds)

    def draws(self, x: Tensor, sample_ids: Tensor, n: int, purpose: str) -> Iterator[Draws]:
        """n draws of each sample, sample by sample.

        Args:
            x: (N, …) inputs, placed.
            sample_ids: (N,) identities, on the same device.
            purpose: draws for another purpose are independent.
        """
        size = max(MIN_ROWS, min(self.batch_size, _BYTES // (_PER_NUMBER * x[0].numel())))
        for some in torch.arange(len(x), device=x.device).split(max(1, _KEYS // n)):
            # Of one sample all keys differ: a key is a bijection of the number of its draw.
            keys = rng.bits(sample_ids[some], n, self.seed, "smoothing", purpose).flatten()
            for places in torch.arange(len(keys), device=x.device).split(size):
                rows, ids = some[places // n], keys[places]
                yield Draws(rows, self.noisy(x[rows], ids), ids)

    def noisy(self, x: Tensor, ids: Tensor) -> Tensor:
        """Inputs (B, …) with the noise of the numbers (B,) int64, one number a draw; differentiable in x."""
        return self._added(x, self._noise(x, ids))

    def crossed(self, x: Tensor, ids: Tensor) -> Tensor:
        """Inputs (N, …) with the noise of every number (D,), (N · D, …), input by input; differentiable in x."""
        return self._added(x[:, None], self._noise(x, ids)).flatten(0, 1)

    def _noise(self, x: Tensor, ids: Tensor) -> Tensor:
        return rng.normal(ids, tuple(x.shape[1:]), self.seed, "noise", dtype=torch.float64).mul_(self.sigma)

    def _added(self, x: Tensor, noise: Tensor) -> Tensor:
        moved = (noise + x).to(x.dtype)
        return moved if self.clip is None else moved.clamp(*self.clip)


Base = TypeVar("Base", bound=Classifier)


class UnderNoise(Randomized, Generic[Base]):
    """A classifier that asks another one, its `base`, about inputs under Gaussian noise.

    Attributes:
        base: who is asked.
        sigma, clip, batch_size: of the noise, see `GaussianNoise`.
    """

    attackable = "use worst-case-fast, pgd with the objective through-noise, or square"

    base: Base
    sigma: float
    clip: Bounds | None
    batch_size: int

    @property
    def noise(self) -> GaussianNoise:
        """The noise, its draws counted from the classifier's seed."""
        return GaussianNoise(self.sigma, self.seed, self.clip, self.batch_size)

    @property
    def extractor(self) -> FeatureExtractor | None:
        return self.base.extractor

    @property
    def reference_sets(self) -> tuple[ReferenceSet, ...]:
        return self.base.reference_sets

    @property
    def classes_(self) -> Any:
        """The labels of the base classifier, by class number."""
        return getattr(self.base, "classes_", None)

    def place(self, x: Any) -> Tensor:
        return self.base.place(x)
