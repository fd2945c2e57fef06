"""The least perturbation that fools the classifier: direction and norm decoupled, any norm, any objective.

Rony et al., arXiv 1811.09600 (DDN: a radius that shrinks on success and grows on failure); Pintor et al., arXiv
2102.12827 (FMN: the first radius from the gradient, rates that fall, norms other than L2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustknn import registry
from robustknn.attacks.base import Job
from robustknn.attacks.boundary import bisect, held_distances, tighten
from robustknn.attacks.gradient import ObjectiveAttack, loss_and_gradient
from robustknn.attacks.starts import check_starts, start_images, start_requests
from robustknn.attacks.targets import class_requests, ranked_classes, wrong_classes
from robustknn.checks import check_number, check_positive, check_positive_int, check_whole
from robustknn.classifiers.base import Classifier, Look, Request
from robustknn.errors import InputError
from robustknn.objectives import BatchObjective
from robustknn.threat import ThreatModel, norm, per_sample

GROWTH = 0.5
"""By what share of itself the radius grows while a run has not succeeded yet."""
STARTS = 8
"""How many references are started from where that is left to the attack."""
_DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}


@registry.attacks.register("minimum-norm")
@dataclass(frozen=True)
class MinimumNorm(ObjectiveAttack):
    """The nearest example that fools the classifier, inside the threat model's ball.

    Every step climbs the objective by a share of the sample's own radius, along the gradient until the run has
    succeeded and in the norm's steepest direction from then on, and projects onto the ball of that radius; a look at
    the hard decision shrinks or grows it, never beyond the nearest success. At the end the segment from the input to
    that success is bisected, and the example is put just behind the boundary.

    With `threat.diameter(x)` as eps it finds the least norm; a smaller eps caps it, and a sample whose least norm is
    larger keeps the example nearest to success.

    Args:
        objective, steps, start: see `ObjectiveAttack`; `steps` are those of the first run.
        restarts: how many times to start; the further ones from random points of the ball found so far.
        check_every: look at the hard decision and the neighbors every so many steps, and after the last.
        step, final_step: the step as a share of the radius, falling by a cosine.
        rate, final_rate: by what share of itself the radius shrinks on success and grows on failure, falling alike.
        targets: further runs, each toward one of so many wrong classes, the nearest to the input first. An attack that
            is given targets has no such runs.
        starts: further runs, each from the boundary on the way to one of so many near references of other classes,
            which must be at hand as inputs (`keep_images=True`). None takes 8 where they are, else none.
        further_steps: gradient steps of each further run.
        bisections: halvings of a segment.
        overshoot: how far behind the boundary the example is put, as a share of its distance, so that the decision
            holds where it is computed otherwise.
    """

    steps: int = 50
    check_every: int = 1
    step: float = 1.0
    final_step: float = 0.01
    rate: float = 0.2
    final_rate: float = 0.01
    targets: int = 0
    starts: int | None = 0
    further_steps: int = 30
    bisections: int = 10
    overshoot: float = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("step", "final_step"):
            check_positive(getattr(self, name), name)
        for name in ("rate", "final_rate"):
            check_number(getattr(self, name), name, "in (0, 1)", lambda v: 0 < v < 1)
        check_whole(self.targets, "targets", 0)
        if self.starts is not None:
            check_whole(self.starts, "starts", 0)
        for name in ("further_steps", "bisections"):
            check_positive_int(getattr(self, name), name)
        check_number(self.overshoot, "overshoot", "in [0, 1]", lambda v: 0 <= v <= 1)

    def check(self, classifier: Classifier, x: Tensor) -> None:
        super().check(classifier, x)
        if self.starts:
            check_starts(classifier, x)

    def run(self, job: Job) -> None:
        bound = self.objective.bind(job.classifier)
        starts = self._starts(job.classifier, job.x[:1])
        requests = [*bound.requests]
        requests += class_requests(job.classifier) if self.targets else ()
        requests += start_requests(job.classifier) if starts else ()
        everyone = torch.arange(len(job.x), device=job.x.device)
        scores, look = job.look(job.x, everyone, requests)
        job.begin(scores)
        rows = self._rows(job)
        if not len(rows):
            return
        clean = None if look is None else look.select(rows)
        runs = self._runs(job, rows, clean, scores[rows], starts)
        for run, (aim, start) in enumerate(runs):
            batch = bound.start(job.x[rows], job.y[rows], aim, clean)
            if start is not None:
                batch.update(None, job.look(start, rows, bound.requests)[1])
            self._climb(job, batch, bound.requests, run, rows, start)
        tighten(job, rows, self.bisections, self.overshoot)

    # ---------------------------------------------------------------------------------------- runs

    def _runs(
        self, job: Job, rows: Tensor, clean: Look | None, scores: Tensor, starts: int
    ) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """The class that each run aims at (n,), or None for any; and where it starts (n, …), or None for the inputs."""
        aim = None if job.aim is None else job.aim[rows]
        yield aim, self._start(job, 0, rows) if self.start == "random" else None
        if aim is None and self.targets:
            nearest = wrong_classes(job.classifier, clean, scores, job.y[rows])
            yield from ((near, None) for near in nearest[:, : self.targets].unbind(1))
        if starts and clean is not None:
            for image in start_images(job, rows, clean, aim, starts)[0].unbind(1):
                point = bisect(job, rows, image, self.bisections)
                there, _ = job.look(point, rows)
                yield ranked_classes(-there, job.y[rows])[:, 0] if aim is None else aim, point
        for restart in range(1, self.restarts):
            yield aim, self._start(job, restart, rows)

    def _start(self, job: Job, restart: int, rows: Tensor) -> Tensor:
        if restart and self.start != "clean":
            ball = job.threat.select(rows).with_eps(_cap(job, rows))
            return ball.random_start(job.x[rows], job.ids[rows], job.seed, "restart", restart)
        return super()._start(job, restart, rows)

    def _starts(self, classifier: Classifier, x: Tensor) -> int:
        """How many references are started from."""
        if self.starts is not None:
            return self.starts
        try:
            check_starts(classifier, x)
        except InputError:
            return 0
        return STARTS

    # ---------------------------------------------------------------------------------------- loop

    def _climb(
        self,
        job: Job,
        batch: BatchObjective,
        requests: Sequence[Request],
        restart: int,
        rows: Tensor,
        start: Tensor | None = None,
    ) -> None:
        """One run from the inputs or from `start`; the job holds the nearest success it meets."""
        x0, threat, steps = job.x[rows], job.threat.select(rows), self.further_steps if restart else self.steps
        x = x0 if start is None else start
        radius = threat.distance(x.double(), x0.double())
        won = torch.full_like(rows, start is not None, dtype=torch.bool)
        for t in range(steps):
            loss, gradient = loss_and_gradient(job, batch, x, rows, restart, t)
            if t == 0 and start is None:
                radius = first_radius(loss, gradient, threat)
            radius = torch.minimum(radius, _cap(job, rows))
            share, rate = _fall(self.step, self.final_step, t, steps), _fall(self.rate, self.final_rate, t, steps)
            unit = torch.where(per_sample(won, x), threat.steepest(gradient, x).double(), _along(gradient, threat))
            moved = x.double() + per_sample(share * radius, x) * unit
            x = threat.with_eps(radius).project(moved, x0).to(x0.dtype)
            last = t == steps - 1
            if not last and (t + 1) % self.check_every:
                continue
            scores, look = job.look(x, rows, () if last else requests)
            wins = job.offer_nearest(x, rows, scores)
            won = won | wins
            shrunk = torch.minimum(radius, threat.distance(x.double(), x0.double())) * (1 - rate)
            radius = torch.where(wins, shrunk, radius * torch.where(won, 1 + rate, 1 + GROWTH))
            if not last:
                batch.update(None, look)


def first_radius(loss: Tensor, gradient: Tensor, threat: ThreatModel) -> Tensor:
    """Where the loss, were it linear and zero on the boundary, would meet it (N,): |loss| / ‖gradient‖*.

    ‖·‖* is the dual norm (FMN, section 2.2). Infinite where there is no such place.
    """
    radius = loss.double().abs() / norm(gradient.double(), _DUAL[threat.norm])
    return torch.where((radius > 0) & radius.isfinite(), radius, torch.full_like(radius, math.inf))


def _cap(job: Job, rows: Tensor) -> Tensor:
    """The largest radius worth a look (n,): eps, or the distance of the nearest success."""
    eps = job.threat.select(rows).radii(job.x[rows].double()).reshape(-1)
    return torch.minimum(eps, held_distances(job, rows))


def _along(gradient: Tensor, threat: ThreatModel) -> Tensor:
    """The gradient itself at unit length.

    The steepest step of L1 moves few coordinates, from bound to bound and back where the radius has outgrown them.
    """
    wide = gradient.double()
    return wide / per_sample(norm(wide, threat.norm).clamp_min(torch.finfo(torch.float64).tiny), wide)


def _fall(first: float, last: float, t: int, steps: int) -> float:
    """A value that falls from `first` to `last` by a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * t / max(steps - 1, 1))) / 2
