"""The inner maximum of adversarial training: a few projected steps up a loss, in the least time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustknn import rng
from robustknn.checks import Bounds, check_choice, check_number, check_positive, check_positive_int
from robustknn.features import evaluating
from robustknn.threat import NORMS, ThreatModel
from robustknn.training.methods import Batch, Method
from robustknn.training.robust import RobustCheck

STARTS = ("random", "clean", "noise")
_NOISE = 1e-3


@dataclass(frozen=True)
class PerturbedMethod(Method):
    """A method that trains on perturbed samples: projected steps of one size, the last iterate taken.

    Unlike the attacks this looks at no decision and keeps no best: training needs many examples, not the worst. The
    network is in eval mode while they are made, so that neither its running statistics nor its dropout take part.

    Args:
        norm, eps, bounds: the threat model.
        steps: gradient steps.
        step: the size of one, in the unit of the inputs; None is 2.5 eps / steps.
        start: "random" in the ball, "clean", or "noise", 0.001 times standard normal numbers.
        warmup: the share of the run over which radius and step grow from zero.
    """

    norm: str = "linf"
    eps: float = 8 / 255
    bounds: Bounds | None = (0.0, 1.0)
    steps: int = 10
    step: float | None = None
    start: str = "random"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self.norm, NORMS, "norm")
        check_choice(self.start, STARTS, "start")
        check_positive(self.eps, "eps")
        check_positive_int(self.steps, "steps")
        if self.step is not None:
            check_positive(self.step, "step")
        check_number(self.warmup, "warmup", "in [0, 1]", lambda w: 0 <= w <= 1)
        if self.bounds is not None:  # a list where it came from JSON; ThreatModel refuses what are no bounds
            object.__setattr__(self, "bounds", ThreatModel(self.norm, self.eps, self.bounds).bounds)

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]: ...

    @property
    def check(self) -> RobustCheck | None:
        return RobustCheck(self.norm, self.eps, bounds=self.bounds)

    def perturb(
        self,
        model: nn.Module,
        loss: Callable[[Tensor], Tensor],
        batch: Batch,
        *,
        of: tuple[Tensor, Tensor] | None = None,
        eps: float | None = None,
        tag: str = "inner",
    ) -> Tensor:
        """Inputs inside the ball, (B, …), whose loss is large.

        Args:
            loss: (B, …) → a scalar, summed over samples.
            of: other samples than the batch's, (x, ids).
            eps: another radius than the method's.
            tag: tells the starts of one step apart.
        """
        x, ids = (batch.x, batch.ids) if of is None else of
        grown = min(1.0, batch.share / self.warmup) if self.warmup else 1.0
        eps = self.eps if eps is None else eps
        threat = ThreatModel(self.norm, eps * grown, self.bounds)
        size = (2.5 * eps / self.steps if self.step is None else self.step) * grown
        with evaluating(model):
            moved = self._begin(threat, x, ids, batch.seed, tag, batch.step)
            for _ in range(self.steps):
                (gradient,) = torch.autograd.grad(loss(moved.requires_grad_(True)), moved)
                with torch.no_grad():
                    moved = threat.project(moved + size * threat.steepest(gradient, moved), x)
        return moved.detach()

    def fooling(
        self, model: nn.Module, batch: Batch, of: tuple[Tensor, Tensor, Tensor] | None = None, tag: str = "inner"
    ) -> Tensor:
        """Inputs inside the ball whose cross-entropy is large, of the batch or of other samples (x, y, ids)."""
        x, y, ids = (batch.x, batch.y, batch.ids) if of is None else of

        def loss(v: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model(v), y, reduction="sum")

        return self.perturb(model, loss, batch, of=(x, ids), tag=tag)

    @torch.no_grad()
    def _begin(self, threat: ThreatModel, x: Tensor, ids: Tensor, seed: int, *tags: int | str) -> Tensor:
        if self.start == "random":
            return threat.random_start(x, ids, seed, *tags)
        if self.start == "noise":
            noise = rng.normal(ids, tuple(x.shape[1:]), seed, "noise", *tags)
            return threat.project(x + _NOISE * noise.to(x), x)
        return x.clone()
