"""Auto-PGD: gradient ascent whose step follows the loss, sample by sample, and needs no tuning.

Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
arXiv 2003.01690, algorithm 1 (L∞, L2); "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers",
arXiv 2103.01208, algorithm 1 (L1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from robustknn import registry
from robustknn.attacks.base import Job, padded_rows
from robustknn.attacks.gradient import ObjectiveAttack, loss_and_gradient
from robustknn.checks import check_number, check_positive
from robustknn.classifiers.base import Request
from robustknn.objectives import BatchObjective
from robustknn.threat import ThreatModel, per_sample

FIRST_DENSITY = 0.2
"""L1: the share of coordinates that the first steps move."""


@registry.attacks.register("apgd")
@dataclass(frozen=True)
class APGD(ObjectiveAttack):
    """Auto-PGD: steps that are halved, from the best point so far, where the loss has stopped rising.

    L∞ and L2: x ← x + (1 − m)(project(x + η·steepest) − x) + m (x − x_before), η = 2 eps at first (m = 0 in the
    first step). At checkpoints `checkpoints(steps)`, η is halved and the sample goes back to its best point when the
    loss rose in less than ρ of the steps since the last one, or when η was not halved there and the best loss is
    still the same.

    L1: x ← project(x + η·sign/k) over the k coordinates of the largest gradient that are not held by the bounds, η =
    eps and k = 20 % of all at first. Every 4 % of the steps k becomes the number of coordinates in which the best
    point differs from the input, divided by 1.5. Where that number fell by more than 5 %, η is eps again and the
    sample goes back to its best point; elsewhere η is divided by 1.5, down to eps/10. No momentum.

    The best point *by the loss* guides the step; what is returned is the best *by the hard decision*, looked at every
    `check_every` steps, at checkpoints and, for the last and the best point, at the end.

    Losses by different neighbors cannot be compared. So with `refresh` neighbors are looked up at checkpoints alone,
    at the best point, where every sample then goes on: its loss there, by the new neighbors, is the best so far.
    Objectives that do not look at the neighbors skip this.

    Args:
        objective, steps, start, restarts, check_every: see `ObjectiveAttack`. A restart costs `steps` gradients, and
            one more forward pass at every checkpoint with `refresh`.
        step: the first η, as a share of eps; None is 2, for L1 it is 1.
        momentum: m; L∞ and L2 only.
        rho: ρ; L∞ and L2 only.
        refresh: look up neighbors anew at checkpoints; else once, from the clean input.
    """

    steps: int = 100
    step: float | None = None
    momentum: float = 0.25
    rho: float = 0.75
    refresh: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step is not None:
            check_positive(self.step, "step")
        check_number(self.momentum, "momentum", "in [0, 1)", lambda m: 0 <= m < 1)
        check_number(self.rho, "rho", "in [0, 1]", lambda r: 0 <= r <= 1)

    def _climb(self, job: Job, batch: BatchObjective, requests: Sequence[Request], restart: int, rows: Tensor) -> None:
        threat, x = job.threat.select(rows), self._start(job, restart, rows)
        path = self._path(threat, x, job.x[rows], *loss_and_gradient(job, batch, x, rows, restart, 0))
        marks, last_mark = path.marks(self.steps), 0
        for t in range(1, self.steps):
            path.move(threat)
            mark = t in marks
            renew = mark and self.refresh and not self.transfer
            if renew:  # the gradient is taken by the new neighbors, below
                path.take(_loss(job, batch, path.x, rows), path.gradient)
            else:
                path.take(*loss_and_gradient(job, batch, path.x, rows, restart, t))
            if mark:
                path.adapt(t - last_mark)
                last_mark = t
            if renew:
                path.x = path.best
            if not mark and t % self.check_every:
                continue
            scores, look = job.look(path.x, rows, requests if renew else ())
            fooled = job.offer(path.x, rows, scores)
            if bool(fooled.all()):
                return
            kept = None
            if bool(fooled.any()):
                kept = padded_rows((~fooled).nonzero()[:, 0])
                rows, threat, path = rows[kept], threat.select(kept), path.select(kept)
                look = None if look is None else look.select(kept)
            batch.update(kept, look if renew else None)
            if renew:
                path.renew(*loss_and_gradient(job, batch, path.x, rows, restart, t))
        path.move(threat)
        for end in (path.x, path.best):
            job.offer(end, rows, job.look(end, rows)[0])

    def _path(self, threat: ThreatModel, x: Tensor, x0: Tensor, loss: Tensor, gradient: Tensor) -> _Path:
        """A path that starts at x (n, …)."""
        ones = torch.ones(len(x), dtype=x.dtype, device=x.device)
        common = (x0, x, loss, gradient, x, loss, gradient)
        if threat.norm == "l1":
            share = 1.0 if self.step is None else self.step
            support = torch.full((len(x),), x[0].numel(), device=x.device)
            return _Sparse(*common, share * ones, share, (FIRST_DENSITY * support).long(), support)
        share = 2.0 if self.step is None else self.step
        never = torch.zeros_like(ones, dtype=torch.bool)
        return _Halving(*common, share * ones, self.momentum, self.rho, torch.zeros_like(ones), loss, never)


@torch.no_grad()
def _loss(job: Job, batch: BatchObjective, x: Tensor, rows: Tensor) -> Tensor:
    """The loss alone, (n,); counted as a look."""
    job.forward_passes[rows] += 1
    return batch.loss(x)


@dataclass
class _Path(ABC):
    """Where the samples of one climb are, and what decides their next step. Tensors count samples first.

    Attributes:
        x0: (n, …) the inputs.
        x, loss, gradient: the present points, with their losses (n,) and gradients (n, …).
        best, best_loss, best_gradient: the points of the highest loss.
        size: (n,) the steps, as shares of eps.
    """

    x0: Tensor
    x: Tensor
    loss: Tensor
    gradient: Tensor
    best: Tensor
    best_loss: Tensor
    best_gradient: Tensor
    size: Tensor

    @staticmethod
    @abstractmethod
    def marks(steps: int) -> frozenset[int]:
        """After which steps `adapt` is due."""

    @abstractmethod
    def move(self, threat: ThreatModel) -> None:
        """Take a step."""

    @abstractmethod
    def adapt(self, count: int) -> None:
        """Choose the steps to come, after `count` steps since the last time."""

    def select(self, kept: Tensor) -> Self:
        """The path of some samples."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value[kept] for name, value in own.items() if isinstance(value, Tensor)})

    def take(self, loss: Tensor, gradient: Tensor) -> None:
        """Loss and gradient of the present points, to compare with those before."""
        self.loss, self.gradient = loss, gradient
        better = loss > self.best_loss
        self.best = _where(better, self.x, self.best)
        self.best_gradient = _where(better, gradient, self.best_gradient)
        self.best_loss = torch.where(better, loss, self.best_loss)

    def renew(self, loss: Tensor, gradient: Tensor) -> None:
        """Loss and gradient of the best points, where all samples are, by another measure than before."""
        self.loss = self.best_loss = loss
        self.gradient = self.best_gradient = gradient

    def _go_back(self, which: Tensor) -> None:
        """Let some samples go on from their best points."""
        self.x = _where(which, self.best, self.x)
        self.loss = torch.where(which, self.best_loss, self.loss)
        self.gradient = _where(which, self.best_gradient, self.gradient)


@dataclass
class _Halving(_Path):
    """L∞ and L2: steps with momentum that are halved where the loss stops rising.

    Attributes:
        rises: (n,) how often the loss rose since the last checkpoint.
        earlier_best: (n,) the best loss at the last checkpoint.
        halved: (n,) bool: the step was halved there.
        before: (n, …) the points before the last step; None before the first, which is a whole one.
    """

    momentum: float
    rho: float
    rises: Tensor
    earlier_best: Tensor
    halved: Tensor
    before: Tensor | None = None

    @staticmethod
    def marks(steps: int) -> frozenset[int]:
        return frozenset(checkpoints(steps))

    def move(self, threat: ThreatModel) -> None:
        x, step = self.x, per_sample(self.size, self.x) * threat.radii(self.x)
        moved = threat.project(x + step * threat.steepest(self.gradient, x), self.x0)
        if self.momentum and self.before is not None:
            mixed = x + (1 - self.momentum) * (moved - x) + self.momentum * (x - self.before)
            moved = threat.project(mixed, self.x0)
        self.before, self.x = x, moved

    def take(self, loss: Tensor, gradient: Tensor) -> None:
        self.rises = self.rises + (loss > self.loss)
        super().take(loss, gradient)

    def renew(self, loss: Tensor, gradient: Tensor) -> None:
        super().renew(loss, gradient)
        self.earlier_best = loss

    def adapt(self, count: int) -> None:
        stuck = ~self.halved & (self.best_loss == self.earlier_best)
        halve = (self.rises < self.rho * count) | stuck
        self.size = torch.where(halve, self.size / 2, self.size)
        self._go_back(halve)
        self.halved, self.earlier_best, self.rises = halve, self.best_loss, torch.zeros_like(self.rises)


@dataclass
class _Sparse(_Path):
    """L1: steps over few coordinates, as many as the best point suggests.

    Attributes:
        first: the first step, as a share of eps.
        count: (n,) int64: how many coordinates a step moves, at least one in any case.
        support: (n,) int64: in how many coordinates the best point differed from the input the last time.
    """

    first: float
    count: Tensor
    support: Tensor

    @staticmethod
    def marks(steps: int) -> frozenset[int]:
        every = -(-4 * steps // 100)
        return frozenset(range(every, steps, every))

    def move(self, threat: ThreatModel) -> None:
        step = per_sample(self.size, self.x) * threat.radii(self.x)
        self.x = threat.project(self.x + step * sparse_step(self.gradient, self.x, threat, self.count), self.x0)

    def adapt(self, count: int) -> None:
        moved = (self.best - self.x0).reshape(len(self.x), -1).abs()
        # A coordinate that went and came back is left a rounding away from where it was.
        support = (moved > 1e-6 * moved.amax(1, keepdim=True)).sum(1)
        sparser = 100 * support < 95 * self.support
        smaller = (self.size / 1.5).clamp_min(self.first / 10)
        self.size = torch.where(sparser, torch.full_like(smaller, self.first), smaller)
        self._go_back(sparser)
        self.support, self.count = support, support * 2 // 3


def checkpoints(steps: int) -> tuple[int, ...]:
    """After which steps APGD looks at its progress: ⌈p·steps⌉, p = .22, .41, .57, … (gaps less .03 each, from .06).

    In whole hundredths: .22 + .19 is not .41 in floating point, and the ceiling would feel it.
    """
    share, gap, marks = 22, 22, []
    while share < 100:
        marks.append(-(-share * steps // 100))
        gap = max(gap - 3, 6)
        share += gap
    return tuple(dict.fromkeys(marks))


def sparse_step(gradient: Tensor, x: Tensor, threat: ThreatModel, count: Tensor) -> Tensor:
    """A step of L1 length 1 along the signs of the largest coordinates of each gradient (n, …).

    Coordinates that the bounds hold are passed over; of equal ones at the threshold all are taken.

    Args:
        count: (n,) int64: how many coordinates to take, at least one in any case.
    """
    signs = gradient.sign()
    size = torch.where(threat.clip(x + signs) != x, gradient.abs(), torch.zeros_like(x)).reshape(len(x), -1)
    last = count.clamp(1, size.shape[1])[:, None] - 1
    least = size.sort(dim=1, descending=True).values.gather(1, last)
    taken = ((size >= least) & (size > 0)).to(gradient.dtype)
    return signs * (taken / taken.sum(1, keepdim=True).clamp_min(1)).view_as(x)


def _where(which: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The samples of a that are chosen, else those of b."""
    return torch.where(per_sample(which, a), a, b)
