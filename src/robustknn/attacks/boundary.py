"""The boundary of a decision on a segment: bisection, and examples put just behind it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustknn.attacks.base import Job
from robustknn.classifiers.rules import TIE
from robustknn.threat import per_sample


def held_distances(job: Job, rows: Tensor) -> Tensor:
    """How far the success that the job holds for each row is from its input, (n,); infinite where there is none."""
    threat = job.threat.select(rows)
    distance = threat.distance(job.best[rows].double(), job.x[rows].double())
    return torch.where(job.margin[rows] < -TIE, distance, torch.full_like(distance, math.inf))


def bisect(job: Job, rows: Tensor, goal: Tensor, halvings: int) -> Tensor:
    """The nearest point that succeeds between the inputs and `goal`, found by halving; the job is offered all.

    Args:
        goal: (n, …) points that succeed, inside the bounds.

    Returns:
        (n, …); the goal itself where no other point did.
    """
    scores, _ = job.look(goal, rows)
    job.offer_nearest(goal, rows, scores)
    share = _bisected(job, rows, goal, halvings, offer=True)
    return _between(job.x[rows], goal, share)


def tighten(job: Job, rows: Tensor, halvings: int, overshoot: float) -> None:
    """Put the examples that the job holds just behind the boundary, on the way from the input.

    A point found on the boundary wins by the last bit; `overshoot` beyond it, as a share of its distance, an
    independent computation agrees. Where that point does not succeed the one held stays.

    Args:
        rows: (n,); those without a success are left alone.
    """
    x, goal, threat = job.x[rows], job.best[rows], job.threat.select(rows)
    held = job.margin[rows] < -TIE
    share = _bisected(job, rows, goal, halvings, offer=False) * (1 + overshoot)
    pushed = threat.project(_between(x, goal, share), x)
    scores, _ = job.look(pushed, rows)
    good = held & (job.lead(scores, rows) < -TIE)
    job.settle(pushed[good], rows[good], scores[good])


def _bisected(job: Job, rows: Tensor, goal: Tensor, halvings: int, offer: bool) -> Tensor:
    """The share of the way from the input to `goal` at which it succeeds, (n,) float64."""
    high = torch.ones(len(rows), dtype=torch.float64, device=goal.device)
    low = torch.zeros_like(high)
    for _ in range(halvings):
        middle = (low + high) / 2
        x = _between(job.x[rows], goal, middle)
        scores, _ = job.look(x, rows)
        wins = job.offer_nearest(x, rows, scores) if offer else job.lead(scores, rows) < -TIE
        low, high = torch.where(wins, low, middle), torch.where(wins, middle, high)
    return high


def _between(x: Tensor, goal: Tensor, share: Tensor) -> Tensor:
    moved: Tensor = x.double() + per_sample(share, x) * (goal.double() - x.double())
    return moved.to(x.dtype)
