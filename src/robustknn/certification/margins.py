"""How far a point among unit vectors is from another majority of its k nearest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_POSITIVES = 100
_APART = 1e-4


def unit_margins(z: Tensor, references: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Labels (N,) and margins (N,) float64 around points z (N, D) float64."""
    r = nn.functional.normalize(references.double(), dim=1)
    a, b = k // 2 + 1, k - k // 2
    decided, margins = [], []
    for s in z @ r.T:
        near = torch.argsort(s, descending=True, stable=True)
        counts = torch.bincount(labels[near[:k]], minlength=int(labels.max()) + 1)
        y = int(counts.argmax())
        decided.append(y)
        own = near[labels[near] == y][: max(_POSITIVES, a)]
        other = near[labels[near] != y]
        if len(own) < a or len(other) < b:
            margins.append(0.0 if len(own) < a else float("inf"))
            continue
        gaps = (2 - 2 * r[own] @ r[other].T).clamp_min(0).sqrt()
        m = torch.where(gaps > _APART, (s[own][:, None] - s[other]) / gaps, 0.0)
        m = torch.minimum(m * (1 - 1e-7), m)
        margins.append(float(m.topk(a, dim=0).values[-1].kthvalue(b).values))
    return torch.tensor(decided), torch.tensor(margins, dtype=torch.float64)
