"""What an attack on a smoothed classifier climbs: an objective on its base's noisy inputs, over draws of the noise.

For a network: Salman et al., "Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers", arXiv
1906.04584, section 2.2, the loss of the mean softmax. For neighbors the mean of the losses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustknn import registry, rng
from robustknn.checks import check_positive_int
from robustknn.classifiers.base import Classifier, Look, VoterClassifier
from robustknn.classifiers.under_noise import GaussianNoise, UnderNoise
from robustknn.errors import InputError, brief
from robustknn.features import FeatureExtractor
from robustknn.objectives.adaptive import Adaptive
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective, SelfRenewing, check_objective
from robustknn.objectives.class_scores import ClassScores, ScoresBatch


@registry.objectives.register("through-noise")
@dataclass(frozen=True)
class ThroughNoise(Objective):
    """An objective on the base classifier, over draws of noise on the input.

    Of neighbors the mean of the objective over the draws; of class scores the objective of the draws' mean softmax (the
    mean of losses is another, weaker climb there). The draws are the attack's own and not those that decide, the same
    for all samples. Noise moves the neighbors, so it is drawn anew, and they are looked up at the noisy inputs, every
    `look_every` gradients; in between both stay, and the climb is on one function. Losses from before and after do not
    compare: climb it with PGD rather than with APGD, which compares them.

    A gradient pass of an attack is `draws` of the base, and a look at the base's neighbors is not counted; memory grows
    with `draws` too, so give large inputs a smaller `batch_size`.

    Args:
        objective: what is climbed on the base, such as Adaptive() or ASK(). Of a base that is a network Adaptive() is
            the margin of its class scores.
        draws: a step.
        look_every: gradients between two looks for neighbors, with new noise.
        seed: of the noise.
    """

    objective: Objective = field(default_factory=Adaptive)
    draws: int = 8
    look_every: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_objective(self.objective, "Adaptive()")
        check_positive_int(self.draws, "draws")
        check_positive_int(self.look_every, "look_every")

    @property
    def transfer(self) -> bool:  # type: ignore[override]
        return self.objective.transfer

    def bind(self, classifier: Classifier) -> BoundObjective:
        if not isinstance(classifier, UnderNoise):
            raise InputError(
                f"the through-noise objective attacks a smoothed classifier, not {brief(classifier)}; use its own "
                f"objective ({brief(self.objective)}) for neighbors, a black-box attack (square, hop-skip-jump or "
                "boundary) for anything else."
            )
        return _Bound(self, classifier)


class _Bound(BoundObjective):
    def __init__(self, config: ThroughNoise, classifier: UnderNoise[Classifier]) -> None:
        self.config, self.noise, self.base = config, classifier.noise, classifier.base
        self.climbed = config.objective.on(self.base)
        self.inner = self.climbed.bind(self.base)

    def check(self, x: Tensor) -> None:
        self.inner.check(x)

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        extractor = self.base.extractor
        if isinstance(self.climbed, ClassScores) and extractor is not None:
            return _OfScores(self, self.climbed, extractor, y, target)
        return _OfNeighbors(self, x, y, target)

    @torch.no_grad()
    def look(self, x: Tensor) -> Look | None:
        """What the base says of noisy inputs; None where it has no voters."""
        return self.base.look(x, self.inner.requests) if isinstance(self.base, VoterClassifier) else None


class _Batch(SelfRenewing):
    """An inner objective on inputs under noise, every draw of each a row."""

    _inner: BatchObjective

    def __init__(self, bound: _Bound) -> None:
        super().__init__(bound.config.look_every)
        self._bound, self._draws, self._changes = bound, bound.config.draws, 0

    def renew(self, x: Tensor) -> None:
        self._changes += 1

    def noisy(self, x: Tensor) -> Tensor:
        """Every draw of each input, (N · draws, …); the same draws for all, so that their batch does not matter."""
        config, noise = self._bound.config, self._bound.noise
        own = GaussianNoise(noise.sigma, rng.derive(config.seed, "through-noise", self._changes), noise.clip)
        return own.crossed(x, torch.arange(self._draws, device=x.device))


class _OfNeighbors(_Batch):
    def __init__(self, bound: _Bound, x: Tensor, y: Tensor, target: Tensor | None) -> None:
        super().__init__(bound)
        target = None if target is None else target.repeat_interleave(self._draws)
        noisy = self.noisy(x)
        self._inner = bound.inner.start(noisy, y.repeat_interleave(self._draws), target, bound.look(noisy))

    def renew(self, x: Tensor) -> None:
        super().renew(x)
        self._inner.update(None, self._bound.look(self.noisy(x)))

    def current(self, x: Tensor) -> Tensor:
        return self._inner.loss(self.noisy(x)).view(-1, self._draws).mean(1)

    def update(self, kept: Tensor | None, look: Look | None) -> None:
        if kept is not None:
            rows = kept[:, None] * self._draws + torch.arange(self._draws, device=kept.device)
            self._inner.update(rows.flatten(), None)


class _OfScores(_Batch):
    def __init__(
        self, bound: _Bound, climbed: ClassScores, extractor: FeatureExtractor, y: Tensor, target: Tensor | None
    ) -> None:
        super().__init__(bound)

        def log_means(noisy: Tensor) -> Tensor:
            logs = extractor.logits(noisy).log_softmax(1)
            return logs.view(len(noisy) // self._draws, self._draws, -1).logsumexp(1)

        self._inner = ScoresBatch(climbed, log_means, y, target)

    def current(self, x: Tensor) -> Tensor:
        return self._inner.loss(self.noisy(x))

    def update(self, kept: Tensor | None, look: Look | None) -> None:
        self._inner.update(kept, None)
