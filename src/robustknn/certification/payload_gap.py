"""How many references must change before the mean of stored probability vectors no longer names a class first.

With c_j the confidence of neighbor j and s_j its vector, y leads b by Σ_j u_j / Σ_j c_j, u_j = c_j (s_jy − s_jb). What
an attacker brings in has u ≥ −c, c the confidence of a certain vector, and reaches it with a certain vector of class b.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustknn.classifiers.retrieval import PayloadMean, confidence
from robustknn.classifiers.rules import TIE

SLACK = 2 * TIE
"""By how much y must lead: beyond a tie, and beyond what rounding makes of the mean."""


def largest(rule: PayloadMean, payload: Tensor, margin: Tensor, y: Tensor, insert: bool) -> Tensor:
    """The largest e for which y leads beyond a tie, (N,) int64; −1 where it does not.

    Inserted: the worst are e certain vectors of b before all others, which leave the first k − e. Modified: the e
    neighbors that speak most for y against b are removed as well, which leaves the k − e others (nothing behind the
    k-th comes in). Both are reached, so with u_j lowered by SLACK · c_j, y is safe exactly if for every b

        Σ u over those left > e c.

    Args:
        payload: (N, k, C) of the nearest references, nearest first.
        margin: (N,) by how much y leads now.
        y: (N,).
        insert: whether references are inserted, else modified.
    """
    n, k, classes = payload.shape
    s = nn.functional.normalize(payload.double(), p=1.0, dim=-1)
    sure = confidence(payload, rule.weighting, rule.top, rule.power)
    certain = torch.eye(classes, dtype=torch.float64, device=payload.device)[0]
    most = float(confidence(certain, rule.weighting, rule.top, rule.power)) * (1 + SLACK)
    mine = s.gather(2, y[:, None, None].expand(n, k, 1))
    u = sure[:, :, None] * (mine - s - SLACK)
    if not insert:
        u = u.sort(1).values
    left = torch.cat([torch.zeros_like(u[:, :1]), u.cumsum(1)], 1).flip(1)  # by e = 0..k
    lead = left - most * torch.arange(k + 1, device=u.device)[None, :, None]
    lead = lead.scatter(2, y[:, None, None].expand(n, k + 1, 1), float("inf")).amin(2)
    lead[:, 0] = margin - TIE  # where no neighbor is sure of anything they count alike, and the sums are 0
    return (lead > 0).cumprod(1).sum(1) - 1
