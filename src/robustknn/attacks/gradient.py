"""The loop of the fixed-radius gradient attacks with a step fixed beforehand: climb an objective in the threat model.

FGSM, BIM, PGD and MI-FGSM are settings of it (one file each). Kurakin et al., arXiv 1607.02533 (BIM); Madry et al.,
arXiv 1706.06083 (PGD); Dong et al., arXiv 1710.06081, eq. 6 (accumulated gradients); the momentum update is that of
APGD, Croce & Hein, arXiv 2003.01690, eq. 3. APGD itself, whose step follows the loss, is in `robustknn.attacks.apgd`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from robustknn.attacks.base import Attack, Job, padded_rows
from robustknn.checks import check_choice, check_number, check_positive, check_positive_int
from robustknn.classifiers.base import Classifier, Request
from robustknn.errors import InputError
from robustknn.objectives import ASK, BatchObjective, Objective
from robustknn.objectives.base import check_objective
from robustknn.threat import norm, per_sample

NO_GRADIENT = 1e-12
"""A gradient whose largest entry is no more than this is none: float32 underflow, or a saturated loss."""


@dataclass(frozen=True)
class ObjectiveAttack(Attack):
    """Climbs of one objective inside the threat model, from several starts; subclasses say how to climb.

    Args:
        objective: what to climb.
        steps: gradient steps a restart.
        start: "clean" starts at the input, "random" at a random point of the ball, "clean-first" at the input
            and in further restarts at random points.
        restarts: how many times to start. Samples that have succeeded do not start again.
        check_every: look at the hard decision every so many steps (and after the last).
    """

    objective: Objective = field(default_factory=ASK)
    steps: int = 40
    start: str = "clean-first"
    restarts: int = 1
    check_every: int = 10

    def __post_init__(self) -> None:
        check_objective(self.objective, "ASK()")
        for name in ("steps", "restarts", "check_every"):
            check_positive_int(getattr(self, name), name)
        check_choice(self.start, ("clean", "random", "clean-first"), "start")

    def check(self, classifier: Classifier, x: Tensor) -> None:
        self.objective.bind(classifier).check(x)

    def run(self, job: Job) -> None:
        bound = self.objective.bind(job.classifier)
        rows = torch.arange(len(job.x), device=job.x.device)
        scores, look = job.look(job.x, rows, bound.requests)
        job.begin(scores)
        for restart in range(self.restarts):
            rows = self._rows(job)
            if not len(rows):
                return
            aim = None if job.aim is None else job.aim[rows]
            clean = None if look is None else look.select(rows)
            batch = bound.start(job.x[rows], job.y[rows], aim, clean)
            self._climb(job, batch, bound.requests, restart, rows)

    def _rows(self, job: Job) -> Tensor:
        """The rows that start."""
        return padded_rows(job.standing())

    @abstractmethod
    def _climb(self, job: Job, batch: BatchObjective, requests: Sequence[Request], restart: int, rows: Tensor) -> None:
        """Climb from one start."""

    def _start(self, job: Job, restart: int, rows: Tensor) -> Tensor:
        """Where a climb starts, (n, …)."""
        x0 = job.x[rows]
        if self.start == "clean" or (self.start == "clean-first" and not restart):
            return x0
        return job.threat.select(rows).random_start(x0, job.ids[rows], job.seed, "restart", restart)


def loss_and_gradient(
    job: Job, batch: BatchObjective, x: Tensor, rows: Tensor, run: int, t: int
) -> tuple[Tensor, Tensor]:
    """The loss of each input (n,) and its gradient (n, …), counted; a gradient that is not finite counts as 0.

    Args:
        run, t: which climb and step of the attack this is; the first of all tells who has no gradient.
    """
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        loss = batch.loss(x)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
    loss = loss.detach()
    job.gradient_passes[rows] += 1
    if job.trace is not None:
        job.trace.append((run, t, float(loss.mean())))
    if run == t == 0:
        largest = gradient.reshape(len(gradient), -1).abs().amax(1)
        # Comparisons with NaN are false, so a gradient that is not finite counts as none.
        job.zero_gradient[rows] = ~(largest > NO_GRADIENT)
    return loss, torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class GradientAttack(ObjectiveAttack):
    """Steps along the steepest ascent of an objective, each projected onto the threat model.

    Args:
        objective, steps, start, restarts, check_every: see `ObjectiveAttack`.
        step: the first step, as a share of eps; None is 1 / steps.
        absolute_step: the step in the unit of the inputs instead (published settings); None uses `step`.
        schedule: "cosine" lets the step fall to `final_step`, "constant" keeps it.
        final_step: the last step of the cosine schedule, as a share of eps.
        momentum: m in x ← x + (1 − m)(project(x + step) − x) + m (x − x_before).
        accumulate: μ in g ← μ g + ∇/‖∇‖₁; the step follows g instead of the gradient ∇ unless μ is 0.
        keep: "best" keeps, by the classifier's hard decision, the first example that fools it, else the one
            nearest to that; "last" keeps the last iterate, as published attacks do.
        refresh: look up neighbors anew at every check; else once, from the clean input.
    """

    step: float | None = 0.5
    absolute_step: float | None = None
    schedule: str = "cosine"
    final_step: float = 0.005
    momentum: float = 0.25
    accumulate: float = 0.0
    keep: str = "best"
    refresh: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.schedule, ("cosine", "constant"), "schedule")
        check_choice(self.keep, ("best", "last"), "keep")
        for name in ("step", "absolute_step"):
            if getattr(self, name) is not None:
                check_positive(getattr(self, name), name)
        if not isinstance(self.momentum, Real) or not 0 <= self.momentum < 1:
            raise InputError(f"momentum must be in [0, 1), not {self.momentum!r}.")
        check_number(self.final_step, "final_step", "of at least 0 and finite", lambda v: 0 <= v < math.inf)
        check_number(self.accumulate, "accumulate", "of at least 0 and finite", lambda m: 0 <= m < math.inf)
        if self.keep == "last" and self.restarts > 1:
            raise InputError("keep='last' forgets all restarts but the last; use keep='best' with restarts.")

    def _rows(self, job: Job) -> Tensor:
        return super()._rows(job) if self.keep == "best" else torch.arange(len(job.x), device=job.x.device)

    def _climb(self, job: Job, batch: BatchObjective, requests: Sequence[Request], restart: int, rows: Tensor) -> None:
        x0, threat = job.x[rows], job.threat.select(rows)
        x = self._start(job, restart, rows)
        before, direction = x, torch.zeros_like(x)
        for t in range(self.steps):
            _, gradient = loss_and_gradient(job, batch, x, rows, restart, t)
            direction = self.accumulate * direction + unit_l1(gradient) if self.accumulate else gradient
            moved = threat.project(x + self.size(t, threat.radii(x)) * threat.steepest(direction, x), x0)
            if self.momentum:
                moved = threat.project(x + (1 - self.momentum) * (moved - x) + self.momentum * (x - before), x0)
            before, x = x, moved
            last = t == self.steps - 1
            if not last and (t + 1) % self.check_every:
                continue
            if not last and self.keep == "last" and not self.refresh:
                continue
            scores, look = job.look(x, rows, requests if self.refresh and not last else ())
            kept = None
            if self.keep == "last":
                job.settle(x, rows, scores)
            else:
                fooled = job.offer(x, rows, scores)
                if bool(fooled.all()):
                    return
                if bool(fooled.any()):
                    kept = padded_rows((~fooled).nonzero()[:, 0])
                    rows, x, x0, before, direction = rows[kept], x[kept], x0[kept], before[kept], direction[kept]
                    threat = threat.select(kept)
                    look = None if look is None else look.select(kept)
            if not last:
                batch.update(kept, look if self.refresh else None)

    def size(self, t: int, eps: Tensor) -> Tensor:
        """The step of iteration t, in the unit of the inputs."""
        share = 1 / self.steps if self.step is None else self.step
        first = share * eps if self.absolute_step is None else torch.full_like(eps, self.absolute_step)
        if self.schedule == "constant" or self.steps == 1:
            return first
        last = self.final_step * eps
        return last + (first - last) * (1 + math.cos(math.pi * t / (self.steps - 1))) / 2


def unit_l1(gradient: Tensor) -> Tensor:
    """Each sample's gradient divided by the sum of its absolute values; zero stays zero."""
    size = norm(gradient, "l1").clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / per_sample(size, gradient)
