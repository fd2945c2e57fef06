"""DAEkNN's rule: several reference sets vote at each layer, and those whose neighbors are nearer count more.

Wang, Chen & Hero, "Deep Adversarially-Enhanced k-Nearest Neighbors", arXiv 2108.06797, eqs. 6, 7, 11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustknn.checks import check_choice, check_number, check_positive, check_positive_int
from robustknn.classifiers.rules import Rule, Votes, count_votes
from robustknn.errors import InputError

WEIGHTINGS = ("paper", "released", "uniform", "clean", "adversarial")


@dataclass(frozen=True)
class SetWeighted(Rule):
    """score_c = 1/L Σ_l Σ_s w_s^l p_c^l(s): the vote shares of S reference sets at L layers.

    p_c^l(s) is the share of the k votes of set s at layer l that class c gets, d_s^l the mean distance of these
    neighbors (with soft votes Σ_j w_j d_j / Σ_j w_j), and over the sets of a layer w_s^l = softmax_s(−d_s^l / T): for
    two, w_b = exp(−d_b) / (exp(−d_b) + exp(−d_a)) at T = 1, as the paper describes it. A neighbor that an approximate
    index missed votes for no class and has no distance; a set of which none was found has weight 0.

    Votes come layer by layer, at each layer set by set, the clean references first.

    Args:
        sets: S, the clean references counted.
        weighting: "paper" as above; "released" with the opposite sign, softmax_s(+d_s^l / T): the farther set counts
            more, as in the authors' released code; "uniform", "clean" (the first set alone) or "adversarial" (the
            others alone, alike); or S numbers, one a set. The last four ignore distances.
        scale: T in the unit of the feature distances (1 as published); or "mean", the mean of |d_s^l| over the sets,
            for each input and layer, so that the unit of the features does not matter.
    """

    sets: int
    weighting: str | tuple[float, ...] = "paper"
    scale: float | str = 1.0

    def __post_init__(self) -> None:
        check_positive_int(self.sets, "sets")
        if isinstance(self.weighting, (list, tuple)):
            for value in self.weighting:
                check_number(value, "a weight in weighting", "of at least 0 and finite", lambda w: 0 <= w < math.inf)
            if len(self.weighting) != self.sets or not sum(self.weighting):
                raise InputError(
                    f"weighting must have one number for each of the {self.sets} reference sets (clean first), not all "
                    f"0, not {list(self.weighting)}."
                )
            object.__setattr__(self, "weighting", tuple(float(value) for value in self.weighting))
        else:
            check_choice(self.weighting, WEIGHTINGS, "weighting")
            if self.weighting == "adversarial" and self.sets == 1:
                raise InputError("weighting='adversarial' needs another reference set than the clean one; add one.")
        if self.scale != "mean":
            check_positive(self.scale, "scale, unless it is 'mean',")

    def __call__(self, votes: Sequence[Votes], n_classes: int) -> Tensor:
        weights = self.set_weights(votes)
        shares = torch.stack([count_votes(v, n_classes) / v.n_neighbors for v in votes], 1)  # (N, L·S, C)
        scores: Tensor = (weights.flatten(1)[:, :, None] * shares).sum(1) / weights.shape[1]
        return scores

    def set_weights(self, votes: Sequence[Votes]) -> Tensor:
        """w_s^l of each input, (N, L, S), differentiable; 0 throughout a layer at which no neighbor was found."""
        means, there = zip(*(_mean_distance(v) for v in votes), strict=True)
        distances: Tensor = torch.stack(means, 1).unflatten(1, (-1, self.sets))
        found: Tensor = torch.stack(there, 1).unflatten(1, (-1, self.sets))
        if self.weighting in ("paper", "released"):
            logits = distances / self._scale(distances, found)
            logits = -logits if self.weighting == "paper" else logits
            somewhere: Tensor = found.any(2, keepdim=True)
            # A row without any would be NaN, and so would its gradient.
            return torch.where(found | ~somewhere, logits, -math.inf).softmax(2) * somewhere
        fixed = found * distances.new_tensor(self._fixed())
        shares: Tensor = fixed / fixed.sum(2, keepdim=True).clamp_min(torch.finfo(fixed.dtype).tiny)
        return shares

    def _scale(self, distances: Tensor, found: Tensor) -> float | Tensor:
        if not isinstance(self.scale, str):
            return float(self.scale)
        mean = distances.abs().sum(2, keepdim=True) / found.sum(2, keepdim=True).clamp_min(1)
        return mean.clamp_min(torch.finfo(mean.dtype).tiny)

    def _fixed(self) -> tuple[float, ...]:
        if not isinstance(self.weighting, str):
            return self.weighting
        clean, others = {"uniform": (1.0, 1.0), "clean": (1.0, 0.0), "adversarial": (0.0, 1.0)}[self.weighting]
        return (clean, *[others] * (self.sets - 1))


def _mean_distance(votes: Votes) -> tuple[Tensor, Tensor]:
    """The mean distance of the references that vote (N,), and whether there is one (N,); 0 where there is none."""
    known = torch.isfinite(votes.distances)
    weights, distances = votes.weights * known, votes.distances.masked_fill(~known, 0)
    total = weights.sum(1)
    there = total > 0
    return (weights * distances).sum(1) / torch.where(there, total, torch.ones_like(total)), there
