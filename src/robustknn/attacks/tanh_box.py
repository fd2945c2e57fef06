"""The smallest example that fools: an objective weighed against distance in tanh space, the weight searched.

Carlini & Wagner, "Towards Evaluating the Robustness of Neural Networks", arXiv 1608.04644, section VI; the same
optimizer on nearest neighbors: Sitawarin & Wagner, arXiv 1903.08333 and 2003.06559.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from robustknn import registry, rng
from robustknn.attacks.base import Attack, Job, padded_rows
from robustknn.attacks.boundary import tighten
from robustknn.attacks.gradient import loss_and_gradient
from robustknn.attacks.starts import check_starts, start_images, start_requests
from robustknn.checks import check_choice, check_number, check_positive, check_positive_int, check_whole
from robustknn.classifiers.base import Classifier, Look
from robustknn.errors import InputError
from robustknn.objectives import BatchObjective, BoundObjective, Objective
from robustknn.objectives.base import check_objective
from robustknn.objectives.hinge import Narrowing, NeighborHinge
from robustknn.threat import ThreatModel, per_sample

SHRINK = 0.999999
"""Inputs at a bound would lie at infinity in tanh space."""
PROGRESS = 1e-4
"""A tenth of the steps that lowers what is minimized by no larger a share ends a search early."""
OVERSHOOT = 2e-4
"""How far behind the boundary an example is put, as a share of its distance."""


@registry.attacks.register("tanh-box")
@dataclass(frozen=True)
class TanhBox(Attack):
    """Minimum-norm attack: minimize distance − c · objective over all inputs in the bounds, and search c.

    The distance is ‖δ‖² (L2), max |δ| (L∞) or Σ |δ| (L1); x' = tanh(z) scaled to the bounds needs no projection
    (without bounds z is x' itself). Each search runs `steps` steps from its start. After a search whose end does not
    fool the classifier a sample's c is multiplied by `rise`; after one whose end does it is divided by `fall`, until
    one fails; from then on it is put half-way between the two known sides.

    Of all examples that fool the hard decision, looked at every `check_every` steps, the one nearest to the input in
    the threat's norm is kept, if it lies in the threat's ball; for a study of distances give eps the box's diameter.

    Args:
        objective: what to climb.
        optimizer: "rmsprop" or "adam".
        lr: their learning rate, in tanh space.
        final_lr: its last value, to which it falls by a cosine, as a share of lr; 1 keeps it constant.
        steps: gradient steps a search.
        search_steps: searches, each with its c.
        c0: the first c.
        rise, fall: see above.
        refresh_every: look up neighbors anew every so many steps, and at the start of every search; 0 keeps those
            of the clean input.
        check_every: look at the hard decision every so many steps, and after the last.
        starts: further starts, from the so many nearest references that the classifier gives another class (their
            kept images, or the references themselves where features are inputs).
        noise: the standard deviation of Gaussian noise on every start, in tanh space.
        narrow: an objective that can asks for less after each success (S&W 2's dynamic m).
        hard_box: keep every coordinate within eps of the input: tanh spans 2 eps around it, and what leaves the bounds
            is cut to them. With L∞ this is the threat model itself.
        penalty: weigh the distance in; without it c means nothing, and `hard_box` is what holds.
        peak: for L∞, every coordinate that has gone at least this share of the farthest is pushed back, where max |δ|
            itself (peak = 1, as published) would push back one at a time.
        slack: distances up to this cost nothing (for L2: max(0, ‖δ‖² − slack²)).
        ceiling: objective values above this are not asked for: 0 or a confidence for margins such as C&W's; None
            has no such end.
        bisections: halvings, at the end, of the segment from the input to the example held, which is then put just
            behind the boundary; 0 leaves it where it was found.
        abort_early: end a sample's search when a tenth of the steps has brought no progress.
    """

    objective: Objective = field(default_factory=NeighborHinge)
    optimizer: str = "rmsprop"
    lr: float = 0.1
    final_lr: float = 0.05
    steps: int = 40
    search_steps: int = 5
    c0: float = 0.3
    rise: float = 10.0
    fall: float = 2.0
    refresh_every: int = 5
    check_every: int = 5
    starts: int = 0
    noise: float = 0.0
    narrow: bool = True
    hard_box: bool = False
    penalty: bool = True
    slack: float = 0.0
    peak: float = 0.9
    ceiling: float | None = None
    bisections: int = 10
    abort_early: bool = False

    def __post_init__(self) -> None:
        check_objective(self.objective, "NeighborHinge()")
        check_choice(self.optimizer, tuple(_OPTIMIZERS), "optimizer")
        for name in ("steps", "search_steps", "check_every"):
            check_positive_int(getattr(self, name), name)
        for name in ("refresh_every", "starts", "bisections"):
            check_whole(getattr(self, name), name, 0)
        for name in ("lr", "final_lr", "c0"):
            check_positive(getattr(self, name), name)
        for name in ("rise", "fall"):
            check_number(getattr(self, name), name, "above 1 and finite", lambda v: 1 < v < math.inf)
        for name in ("noise", "slack"):
            check_number(getattr(self, name), name, "of at least 0 and finite", lambda v: 0 <= v < math.inf)
        check_number(self.peak, "peak", "in (0, 1]", lambda v: 0 < v <= 1)
        if self.ceiling is not None:
            check_number(self.ceiling, "ceiling", "that is finite", math.isfinite)
        if not self.penalty and not self.hard_box:
            raise InputError("without penalty nothing holds the example near its input; pass hard_box=True with it.")

    def check(self, classifier: Classifier, x: Tensor) -> None:
        self.objective.bind(classifier).check(x)
        if self.starts:
            check_starts(classifier, x)

    def rate(self, t: int) -> float:
        """The learning rate of step t of a search."""
        fallen = (1 + math.cos(math.pi * t / max(1, self.steps - 1))) / 2
        return self.lr * (self.final_lr + (1 - self.final_lr) * fallen)

    def run(self, job: Job) -> None:
        bound = self.objective.bind(job.classifier)
        rows = torch.arange(len(job.x), device=job.x.device)
        wanted = (*bound.requests, *(start_requests(job.classifier) if self.starts else ()))
        scores, look = job.look(job.x, rows, wanted)
        job.begin(scores)
        reach = job.threat.radii(job.x).reshape(-1).expand(len(rows)) > 0
        rows = job.standing()
        rows = padded_rows(rows[reach[rows]])
        if not len(rows):
            return
        clean = None if look is None else look.select(rows)
        _Start(self, job, bound, rows, clean, job.x[rows], 0).search()
        if self.starts:
            self._start_elsewhere(job, bound, rows, cast(Look, clean))
        if self.bisections:
            tighten(job, rows, self.bisections, OVERSHOOT)

    def _start_elsewhere(self, job: Job, bound: BoundObjective, rows: Tensor, clean: Look) -> None:
        aim = None if job.aim is None else job.aim[rows]
        images, known = start_images(job, rows, clean, aim, self.starts)
        for place in range(self.starts):
            which = padded_rows(known[:, place].nonzero()[:, 0])
            if len(which):
                x = images[which, place]
                _Start(self, job, bound, rows[which], clean.select(which), x, place + 1).search()


class _Start:
    """The searches of some samples from one start each."""

    def __init__(
        self, attack: TanhBox, job: Job, bound: BoundObjective, rows: Tensor, clean: Look | None, x: Tensor, place: int
    ) -> None:
        self.attack, self.job, self.bound, self.rows, self.clean, self.place = attack, job, bound, rows, clean, place
        self.box = _Box.around(job.x[rows], job.threat.select(rows), attack.hard_box)
        self.z = self.box.enter(x)
        self.moved = place > 0 or attack.noise > 0
        self.c = torch.full((len(rows),), attack.c0, dtype=torch.float64, device=rows.device)
        self.lower, self.upper = torch.zeros_like(self.c), torch.full_like(self.c, math.inf)
        self.share = torch.ones_like(self.c)

    def search(self) -> None:
        """All searches, each with the c that the ones before suggest."""
        attack = self.attack
        for number in range(attack.search_steps):
            fooled = self._climb(number)
            self.upper = torch.where(fooled, torch.minimum(self.upper, self.c), self.upper)
            self.lower = torch.where(fooled, self.lower, torch.maximum(self.lower, self.c))
            between = torch.where(self.lower == 0, self.c / attack.fall, (self.lower + self.upper) / 2)
            self.c = torch.where(self.upper.isinf(), self.c * attack.rise, between)
            left = (attack.search_steps - 1 - number) / attack.search_steps
            self.share = torch.where(fooled, torch.full_like(self.share, left), self.share)

    def _climb(self, number: int) -> Tensor:
        """One search; returns which samples were fooled when last looked at, (n,) bool."""
        attack, job, rows, c = self.attack, self.job, self.rows, self.c
        batch = self.bound.start(job.x[rows], job.y[rows], None if job.aim is None else job.aim[rows], self.clean)
        if attack.narrow and isinstance(batch, Narrowing):
            batch.narrow(self.share)
        z, box = self._begin(number, batch), self.box
        fooled, at = torch.zeros_like(rows, dtype=torch.bool), torch.arange(len(rows), device=rows.device)
        step = _OPTIMIZERS[attack.optimizer](z)
        before = torch.full_like(c, math.inf)
        tenth = max(1, attack.steps // 10)
        for t in range(attack.steps):
            gradient, value = self._gradient(batch, box, z, rows, c, (number, t))
            z = z - attack.rate(t) * step(gradient)
            last = t == attack.steps - 1
            renew = not last and attack.refresh_every > 0 and (t + 1) % attack.refresh_every == 0
            judge = not last and attack.abort_early and (t + 1) % tenth == 0
            if not (last or renew or judge or (t + 1) % attack.check_every == 0):
                continue
            fooled[at], look = self._offer(box.leave(z), rows, renew)
            kept = None
            if judge:
                going = before.isinf() | (value < before - PROGRESS * before.abs())
                kept, before = padded_rows(going.nonzero()[:, 0]), value
                if not len(kept):
                    return fooled
                rows, at, z, c, before, box = rows[kept], at[kept], z[kept], c[kept], before[kept], box.select(kept)
                step.keep(kept)
                look = None if look is None else look.select(kept)
            if not last:
                batch.update(kept, look if renew else None)
        return fooled

    def _begin(self, number: int, batch: BatchObjective) -> Tensor:
        """Where a search starts, in tanh space; looked at when it is not the input itself."""
        attack, job, rows = self.attack, self.job, self.rows
        if not self.moved:
            return self.z
        shape = tuple(self.z.shape[1:])
        tags = ("tanh-box", self.place, number)
        noise = rng.normal(job.ids[rows], shape, job.seed, *tags, dtype=self.z.dtype) if attack.noise else 0.0
        z = self.z + attack.noise * noise
        _, look = self._offer(self.box.leave(z), rows, attack.refresh_every > 0)
        batch.update(None, look if attack.refresh_every else None)
        return z

    def _offer(self, x: Tensor, rows: Tensor, renew: bool) -> tuple[Tensor, Look | None]:
        """Look at x; returns who is fooled, (n,) bool, and the look."""
        job, threat = self.job, self.job.threat.select(rows)
        if self.attack.hard_box and threat.norm == "linf":
            x = threat.project(x, job.x[rows])  # the box up to rounding
        scores, look = job.look(x, rows, self.bound.requests if renew else ())
        return job.offer_nearest(x, rows, scores), look

    def _gradient(
        self, batch: BatchObjective, box: _Box, z: Tensor, rows: Tensor, c: Tensor, when: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The gradient, by z, of what is minimized, and its value (n,)."""
        attack, job = self.attack, self.job
        x, (number, t) = box.leave(z), when
        loss, climb = loss_and_gradient(job, batch, x, rows, self.place * attack.search_steps + number, t)
        loss, climb = loss.double(), climb.to(z.dtype)
        if attack.ceiling is not None:
            climb = climb * per_sample(loss < attack.ceiling, z)
            loss = loss.clamp_max(attack.ceiling)
        value, gradient = -c * loss, -per_sample(c.to(z.dtype), z) * climb
        if attack.penalty:
            far, away = _distance((x - job.x[rows]).to(z.dtype), job.threat.norm, attack.slack, attack.peak)
            value, gradient = value + far.double(), gradient + away
        return gradient * box.slope(z), value


def _distance(delta: Tensor, norm: str, slack: float, peak: float) -> tuple[Tensor, Tensor]:
    """What is paid for a perturbation (n, …) beyond `slack`, (n,), and its gradient: ‖δ‖², max |δ| or Σ |δ|."""
    flat = delta.flatten(1)
    if norm == "l2":
        size, gradient, free = flat.square().sum(1), 2 * flat, slack**2
    elif norm == "l1":
        size, gradient, free = flat.abs().sum(1), flat.sign(), slack
    else:
        size, free = flat.abs().amax(1), slack
        gradient = flat.sign() * (flat.abs() >= peak * size[:, None])
    beyond = size > free
    return (size - free).clamp_min(0), (gradient * beyond[:, None]).view_as(delta)


@dataclass
class _Box:
    """The change of variables x = center + half · tanh(z), in float32 or wider; without bounds z is x.

    Attributes:
        dtype: of x.
        center, half: (n, …); None without bounds.
        bounds: x is cut to these afterwards; None where the box lies in them.
    """

    dtype: torch.dtype
    center: Tensor | None
    half: Tensor | None
    bounds: tuple[float, float] | None = None

    @classmethod
    def around(cls, x: Tensor, threat: ThreatModel, hard: bool) -> _Box:
        """The bounds, or with `hard` what is no farther than eps from x, cut to the bounds.

        Bounds do not make the hard box smaller: a black pixel would begin at its edge, where tanh has no slope.
        """
        dtype, x = x.dtype, _wide(x)
        if hard:
            return cls(dtype, x, threat.radii(x).expand_as(x), threat.bounds)
        if threat.bounds is None:
            return cls(dtype, None, None)
        low, high = threat.bounds
        return cls(dtype, torch.full_like(x, (low + high) / 2), torch.full_like(x, (high - low) / 2))

    def select(self, index: Tensor) -> _Box:
        """The box of some samples."""
        if self.center is None or self.half is None:
            return self
        return _Box(self.dtype, self.center[index], self.half[index], self.bounds)

    def enter(self, x: Tensor) -> Tensor:
        """z of x, moved into the box first."""
        x = _wide(x)
        if self.center is None or self.half is None:
            return x
        return torch.atanh(SHRINK * ((x - self.center) / self.half).nan_to_num().clamp(-1, 1))

    def leave(self, z: Tensor) -> Tensor:
        """x of z, detached; rounding does not lead out of the box."""
        if self.center is None or self.half is None:
            return z.detach().to(self.dtype)
        x = self.center + self.half * torch.tanh(z)
        x = torch.minimum(torch.maximum(x, self.center - self.half), self.center + self.half).detach()
        return (x if self.bounds is None else x.clamp(*self.bounds)).to(self.dtype)

    def slope(self, z: Tensor) -> Tensor:
        """dx/dz, elementwise."""
        return torch.ones_like(z) if self.half is None else self.half * (1 - torch.tanh(z).square())


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSprop:
    """RMSprop with a decay of .99 (Hinton, lecture 6e): every coordinate's step by its own recent gradients."""

    def __init__(self, like: Tensor) -> None:
        self.square = torch.zeros_like(like)

    def __call__(self, gradient: Tensor) -> Tensor:
        self.square = 0.99 * self.square + 0.01 * gradient.square()
        return gradient / (self.square.sqrt() + 1e-8)

    def keep(self, kept: Tensor) -> None:
        self.square = self.square[kept]


class _Adam:
    """Adam with β = (.9, .999) (Kingma & Ba, arXiv 1412.6980)."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.square, self.t = torch.zeros_like(like), torch.zeros_like(like), 0

    def __call__(self, gradient: Tensor) -> Tensor:
        self.t += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient.square()
        mean, square = self.mean / (1 - 0.9**self.t), self.square / (1 - 0.999**self.t)
        return mean / (square.sqrt() + 1e-8)

    def keep(self, kept: Tensor) -> None:
        self.mean, self.square = self.mean[kept], self.square[kept]


_OPTIMIZERS: dict[str, type[_RMSprop] | type[_Adam]] = {"rmsprop": _RMSprop, "adam": _Adam}
