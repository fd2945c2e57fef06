"""The named generator of the search benchmarks: a mixture of Gaussians in a subspace, with noise in all directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COMPONENTS, LATENT, SPREAD, NOISE, CLASSES = 100, 32, 0.5, 0.1, 10
NAME = (
    f"mixture of {COMPONENTS} Gaussians (centers N(0, 1), deviation {SPREAD}) in a random {LATENT}-dimensional "
    f"subspace, with isotropic noise of deviation {NOISE}; label = component mod {CLASSES}"
)
_BLOCK = 65_536
_QUERIES = 2**40


@dataclass(frozen=True)
class Mixture:
    """Vectors (n, dim) and labels (n,) in blocks, each of which depends on the seed and its own number alone."""

    dim: int
    seed: int = 0

    def rows(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Rows `start`… of the endless sequence, (count, dim) float32 and (count,) int64."""
        parts = []
        for number in range(start // _BLOCK, (start + count - 1) // _BLOCK + 1):
            first = number * _BLOCK
            low, high = max(start - first, 0), min(start + count - first, _BLOCK)
            vectors, labels = self._block(number)
            parts.append((vectors[low:high], labels[low:high]))
        return torch.cat([v for v, _ in parts]), torch.cat([y for _, y in parts])

    def queries(self, count: int) -> Tensor:
        """Further draws of the same mixture, (count, dim)."""
        return self.rows(_QUERIES * _BLOCK, count)[0]

    def _block(self, number: int) -> tuple[Tensor, Tensor]:
        latent = min(LATENT, self.dim)
        shared = torch.Generator().manual_seed(self.seed)
        centers = torch.randn(COMPONENTS, latent, generator=shared)
        basis = torch.linalg.qr(torch.randn(self.dim, latent, generator=shared)).Q.T
        own = torch.Generator().manual_seed((self.seed + 1) * 2**42 + number)
        component = torch.randint(COMPONENTS, (_BLOCK,), generator=own)
        hidden = centers[component] + SPREAD * torch.randn(_BLOCK, latent, generator=own)
        vectors = torch.randn(_BLOCK, self.dim, generator=own).mul_(NOISE).addmm_(hidden, basis)
        return vectors, component % CLASSES
