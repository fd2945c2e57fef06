"""What an attack on RAILS climbs: the margin between the classes' evolved candidates, in expectation over draws.

RAILS (arXiv 2107.02840) decides by candidates that evolve toward the input with random mutations. Evolution selects,
and has no gradient; the distances from the input's feature to the candidates it ends with have one. Their mean over
several draws is attacked: expectation over transformation, Athalye et al., arXiv 1707.07397 and 1802.00420.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustknn import registry, rng
from robustknn.checks import check_number, check_positive_int
from robustknn.classifiers.base import Classifier, Look
from robustknn.classifiers.rails import RAILS, Population
from robustknn.errors import InputError, brief
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective, check_gradient

_SMOOTH = 0.05
"""T of the smooth minimum over classes, as that of ASK's margin."""


@registry.objectives.register("evolved")
@dataclass(frozen=True)
class Evolved(Objective):
    """RAILS's candidates of another class nearer than those of the true one, in the mean over draws.

    loss = D_y − smin_{c≠y} D_c with D_c = Σ_l (1 − φ) E_lc + φ F_lc and the smooth minimum smin D = −T log Σ exp(−D/T),
    T = .05. E_lc is the mean over draws of the root mean square distance to the candidates of class c that would vote
    if the class held just over half of the plasma, F_lc that to the flock of class c, before it evolves; both are
    divided by their mean over classes. Candidates follow the input, and alone they lead an attack around in circles.

    All are those of the last lookup, and evolve anew for the point reached at every check of the attack, by random
    numbers of their own: not those the classifier decides by.

    Args:
        draws: populations evolved for each sample at every lookup.
        flock: φ, in [0, 1]; at 1 nothing evolves.
        seed: of these draws.
    """

    draws: int = 2
    flock: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive_int(self.draws, "draws")
        check_number(self.flock, "flock", "in [0, 1]", lambda v: 0 <= v <= 1)

    def bind(self, classifier: Classifier) -> BoundObjective:
        if not isinstance(classifier, RAILS):
            raise InputError(
                f"the evolved objective attacks RAILS, not {brief(classifier)}; use ASK or the adaptive objective for "
                "neighbors, a black-box attack (square, hop-skip-jump or boundary) for anything else."
            )
        return _Bound(self, classifier)


class _Bound(BoundObjective):
    def __init__(self, config: Evolved, classifier: RAILS) -> None:
        self.config, self.rails = config, classifier

    def check(self, x: Tensor) -> None:
        with torch.enable_grad():
            features = self.rails.stage.read(x.detach().requires_grad_(True), self.rails.layers)
        for layer, value in features.items():
            check_gradient(value, f"layer {layer!r}")

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return _Batch(self, y, target)


@dataclass
class _Means:
    """The candidates of one layer by the means of those that count (N, draws, C, D), or one draw of them (N, C, D).

    Attributes:
        vectors: the means.
        spread: the mean square distance of the candidates to them, without D.
    """

    vectors: Tensor
    spread: Tensor

    @staticmethod
    def of(rows: Tensor, present: Tensor) -> _Means:
        """The means of rows (N, C, G, D), those present (N, C, G), at least one of every class."""
        weights = (present / present.sum(2, keepdim=True)).to(rows)[..., None]
        mean = (rows * weights).sum(2)
        return _Means(mean, ((rows - mean[:, :, None]).square() * weights).sum((2, 3)))

    @staticmethod
    def joined(parts: Sequence[_Means]) -> _Means:
        """Means of consecutive inputs."""
        return _Means(torch.cat([p.vectors for p in parts]), torch.cat([p.spread for p in parts]))

    @staticmethod
    def over_draws(draws: Sequence[_Means]) -> _Means:
        """Means of several draws, side by side."""
        return _Means(torch.stack([d.vectors for d in draws], 1), torch.stack([d.spread for d in draws], 1))

    def distances(self, z: Tensor) -> Tensor:
        """The root mean square distance to each class, in the mean over draws, (N, C)."""
        squares = (z[:, None, None] - self.vectors).square().sum(3) + self.spread
        return squares.clamp_min(torch.finfo(z.dtype).tiny).sqrt().mean(1)


class _Batch(BatchObjective):
    def __init__(self, bound: _Bound, y: Tensor, target: Tensor | None) -> None:
        self._bound, self._y, self._target = bound, y, target
        self._parts: list[list[tuple[float, _Means]]] | None = None  # of every layer: weights, and what they weigh
        self._lookups = 0

    def loss(self, x: Tensor) -> Tensor:
        rails = self._bound.rails
        if self._parts is None:  # nothing was looked up yet, or the attack asked for it: where the inputs are now
            self._parts = self._look_up(x.detach())
        features = rails.stage.read(x, rails.layers)
        total = torch.zeros(len(x), rails.n_classes, dtype=x.dtype, device=x.device)
        for layer, parts in zip(rails.layers, self._parts, strict=True):
            for weight, means in parts:
                distances = means.distances(features[layer])
                total = total + weight * distances / distances.detach().mean(1, keepdim=True)
        wanted = self._y if self._target is None else self._target
        own = total.gather(1, wanted[:, None])[:, 0]
        others = total.scatter(1, wanted[:, None], float("inf"))
        nearest = -_SMOOTH * torch.logsumexp(-others / _SMOOTH, 1)
        return own - nearest if self._target is None else nearest - own

    @torch.no_grad()
    def _look_up(self, x: Tensor) -> list[list[tuple[float, _Means]]]:
        config, rails = self._bound.config, self._bound.rails
        evolved = self._evolve(x) if config.flock < 1 else []
        flocks = self._flocks(x) if config.flock > 0 else []
        found = [(1 - config.flock, evolved), (config.flock, flocks)]
        return [[(weight, means[i]) for weight, means in found if means] for i in range(len(rails.layers))]

    def _flocks(self, x: Tensor) -> list[_Means]:
        """The references of each class nearest to the inputs, at every layer."""
        rails, found = self._bound.rails, []
        features = rails.stage.read(x, rails.layers)
        for voter in rails.stage.voters:
            near = voter.index.search_classes(features[voter.layer], min(rails.n_neighbors, len(rails.references)))
            rows = voter.references.rows(voter.layer, near.ids.clamp_min(0)).to(x)
            found.append(_Means.over_draws([_Means.of(rows, near.ids >= 0)]))
        return found

    def _evolve(self, x: Tensor) -> list[_Means]:
        """The candidates that draws of the objective's own end with, at every layer."""
        config, rails = self._bound.config, self._bound.rails
        fresh = rails.with_seed(rng.derive(config.seed, "evolved", self._lookups))
        self._lookups += 1
        # One id for all: a sample's draws do not depend on where in a batch it stands.
        ids = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        count = min(rails.voting // 2 + 1, rails.per_class)
        parts: list[list[list[_Means]]] = [[[] for _ in range(config.draws)] for _ in rails.layers]
        for population in fresh.evolve(x, ids, config.draws):
            parts[population.layer][population.draw].append(_nearest(population, count))
        return [_Means.over_draws([_Means.joined(rows) for rows in draws]) for draws in parts]

    def update(self, kept: Tensor | None, look: Look | None) -> None:
        if kept is not None:
            self._y = self._y[kept]
            self._target = None if self._target is None else self._target[kept]
        self._parts = None


def _nearest(population: Population, count: int) -> _Means:
    """The means of each class's `count` nearest candidates."""
    nearest = torch.argsort(population.distances, dim=2, stable=True)[:, :, :count]
    n, n_classes, _ = nearest.shape
    rows = torch.arange(n, device=nearest.device)[:, None, None]
    chosen = population.features[rows, torch.arange(n_classes, device=nearest.device)[:, None], nearest]
    return _Means.of(chosen, torch.ones_like(nearest, dtype=torch.bool))
