"""What an attack on a smoothed classifier climbs: its base's objective on noisy inputs, in expectation over the noise.

Salman et al., "Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers", arXiv 1906.04584,
section 2.2, for a network; here for neighbors too.
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
from robustknn.objectives.adaptive import Adaptive
from robustknn.objectives.base import BatchObjective, BoundObjective, Objective, check_objective


@registry.objectives.register("through-noise")
@dataclass(frozen=True)
class ThroughNoise(Objective):
    """The mean of an objective on the base classifier, over draws of noise on the input.

    The draws are the attack's own and not those that decide, the same for all samples. Noise moves the neighbors, so
    it is drawn anew, and they are looked up at the noisy inputs, every `look_every` gradients; in between both stay,
    and the climb is on one function.

    Args:
        objective: what is climbed on the base, such as Adaptive() or ASK().
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

    def bind(self, classifier: Classifier) -> BoundObjective:
        if not isinstance(classifier, UnderNoise):
            raise InputError(
                f"the through-noise objective attacks a smoothed classifier, not {brief(classifier)}; use its own "
                f"objective ({brief(self.objective)})."
            )
        return _Bound(self, classifier)


class _Bound(BoundObjective):
    def __init__(self, config: ThroughNoise, classifier: UnderNoise[Classifier]) -> None:
        self.config, self.classifier = config, classifier
        self.inner = config.objective.bind(classifier.base)

    def check(self, x: Tensor) -> None:
        self.inner.check(x)

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return _Batch(self, x, y, target)

    @torch.no_grad()
    def look(self, x: Tensor) -> Look | None:
        """What the base says of noisy inputs; None where it has no voters."""
        base = self.classifier.base
        return base.look(x, self.inner.requests) if isinstance(base, VoterClassifier) else None


class _Batch(BatchObjective):
    def __init__(self, bound: _Bound, x: Tensor, y: Tensor, target: Tensor | None) -> None:
        self._bound, self._looks, self._since = bound, 0, 0
        draws = bound.config.draws
        target = None if target is None else target.repeat_interleave(draws)
        noisy = self._noisy(x)
        self._inner = bound.inner.start(noisy, y.repeat_interleave(draws), target, bound.look(noisy))

    def loss(self, x: Tensor) -> Tensor:
        config = self._bound.config
        if self._since == config.look_every:
            self._since, self._looks = 0, self._looks + 1
            self._inner.update(None, self._bound.look(self._noisy(x.detach())))
        self._since += 1
        return self._inner.loss(self._noisy(x)).view(len(x), config.draws).mean(1)

    def update(self, kept: Tensor | None, look: Look | None) -> None:
        if kept is not None:
            draws = self._bound.config.draws
            self._inner.update((kept[:, None] * draws + torch.arange(draws, device=kept.device)).flatten(), None)

    def _noisy(self, x: Tensor) -> Tensor:
        """Every draw of each input, (N · draws, …); the same draws for all, so that their batch does not matter."""
        config, noise = self._bound.config, self._bound.classifier.noise
        own = GaussianNoise(noise.sigma, rng.derive(config.seed, "through-noise", self._looks), noise.clip)
        numbers = torch.arange(config.draws, device=x.device).repeat(len(x))
        return own.noisy(x.repeat_interleave(config.draws, 0), numbers)
