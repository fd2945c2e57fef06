"""Square: random search over square patches, for classifiers of which nothing is known but the answers.

Andriushchenko, Croce, Flammarion & Hein, "Square Attack: a query-efficient black-box adversarial attack via random
search", arXiv 1912.00049; the L1 form follows Croce & Hein, arXiv 2103.01208, section 3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustknn import registry, rng
from robustknn.attacks.base import Attack, Job, padded_rows
from robustknn.checks import check_choice, check_number, check_positive_int
from robustknn.threat import ThreatModel, per_sample

HALVINGS = (10, 50, 200, 1000, 2000, 4000, 6000, 8000)
"""The steps, of 10,000, at which the side of the squares shrinks (section 5 of the paper)."""


@registry.attacks.register("square")
@dataclass(frozen=True)
class Square(Attack):
    """Random patches of the largest allowed change, kept where the answers get worse for the defender.

    An input (C, H, W) is changed in squares, all channels at once with a sign each; an input of one dimension, or
    (C, L), in runs of neighboring coordinates; any other shape counts as one long vector.

    Args:
        queries: looks at the classifier a sample, in all: the first on the clean input, the others shared by the
            restarts. A sample that is fooled asks no more.
        p_init: the share of an input that the first squares cover. It is halved at steps 10, 50, 200, 1000, 2000,
            4000, 6000 and 8000 of 10,000, scaled to the queries there are.
        restarts: how many times to start anew.
        feedback: "scores" follows the classifier's scores (vote shares, probabilities), "labels" knows its
            decisions alone.
        accept: "equal" moves on to a proposal that is as good as what is held, "better" to a better one alone, as
            published. Votes are counts: most single squares change none of them.
    """

    queries: int = 1000
    p_init: float = 0.8
    restarts: int = 1
    feedback: str = "scores"
    accept: str = "equal"

    def __post_init__(self) -> None:
        check_positive_int(self.queries, "queries")
        check_positive_int(self.restarts, "restarts")
        check_number(self.p_init, "p_init", "in (0, 1]", lambda v: 0 < v <= 1)
        check_choice(self.feedback, ("scores", "labels"), "feedback")
        check_choice(self.accept, ("equal", "better"), "accept")

    def covered(self, step: int, steps: int) -> float:
        """p, the share of an input that a square covers at a step of so many."""
        return float(self.p_init / 2 ** sum(step * 10_000 >= at * steps for at in HALVINGS))

    def run(self, job: Job) -> None:
        rows = torch.arange(len(job.x), device=job.x.device)
        job.begin(job.look(job.x, rows)[0])
        left = self.queries - 1
        for restart in range(self.restarts):
            share = left // self.restarts + (restart < left % self.restarts)
            rows = padded_rows(job.standing())
            if share and len(rows):
                self._search(job, rows, restart, share)

    def _search(self, job: Job, rows: Tensor, restart: int, queries: int) -> None:
        canvas = _Canvas(job.x[rows], job.ids[rows], job.threat.select(rows), job.seed, restart)
        held = x = canvas.start()
        best = torch.full((len(rows),), float("inf"), dtype=torch.float64, device=x.device)
        for step in range(queries):
            scores, _ = job.look(x, rows)
            lead = job.lead(scores, rows) if self.feedback == "scores" else torch.zeros_like(best)
            taken = lead <= best if self.accept == "equal" else lead < best
            held = torch.where(per_sample(taken, x), x, held)
            best = torch.where(taken, lead, best)
            fooled = job.offer(x, rows, scores)
            if bool(fooled.any()):
                kept = padded_rows((~fooled).nonzero()[:, 0])
                if not len(kept):
                    return
                rows, held, best = rows[kept], held[kept], best[kept]
                canvas.select(kept)
            if step < queries - 1:
                x = canvas.propose(held, step, self.covered(step, queries - 1))


class _Canvas:
    """The inputs as images (N, C, H, W), and what is drawn on them."""

    def __init__(self, x: Tensor, ids: Tensor, threat: ThreatModel, seed: int, restart: int) -> None:
        self.x, self.ids, self.threat, self.seed, self.restart = x, ids, threat, seed, restart
        shape = tuple(x.shape[1:])
        if len(shape) == 2:
            shape = (shape[0], 1, shape[1])
        elif len(shape) != 3:
            shape = (1, 1, x[0].numel())
        self.shape = shape

    def select(self, kept: Tensor) -> None:
        """Go on with some of the samples."""
        self.x, self.ids, self.threat = self.x[kept], self.ids[kept], self.threat.select(kept)

    def start(self) -> Tensor:
        """The first proposal: stripes of one column each for L∞, a grid of bumps otherwise."""
        channels, height, width = self.shape
        if self.threat.norm == "linf":
            delta = self._signs("stripes", channels, 1, width).expand(-1, -1, height, -1)
        else:
            tile = (max(1, height // 5), max(1, width // 5))
            counts = (height // tile[0], width // tile[1])
            size = (tile[0] * counts[0], tile[1] * counts[1])
            signs = self._signs("grid", channels, *counts)
            tiles = signs.repeat_interleave(tile[0], 2).repeat_interleave(tile[1], 3)
            painted = tiles * _bump(tile, self.threat.norm).to(tiles).repeat(counts)
            top, left = (height - size[0]) // 2, (width - size[1]) // 2
            delta = painted.new_zeros(len(self.x), *self.shape)
            delta[:, :, top : top + size[0], left : left + size[1]] = painted
        return self._moved(delta)

    def propose(self, held: Tensor, step: int, covered: float) -> Tensor:
        """What is held, with one square drawn anew."""
        if self.threat.norm == "linf":
            return self._square(held, step, covered)
        return self._bump(held, step, covered)

    def _square(self, held: Tensor, step: int, covered: float) -> Tensor:
        """All of a square to one corner of the ball, eq. 2 of the paper; what changes nothing goes to the other."""
        inside = self._window(self._side(covered, 1), "square", step)[0][:, None]
        signs = self._signs("signs", self.shape[0], 1, 1, step)
        eps = self.threat.radii(held)
        twice = 2 * eps * (inside * signs).view_as(held)
        moved, other = (self.threat.project(held + way * twice, self.x) for way in (1, -1))
        same = ((moved - held).abs() <= 1e-3 * eps).flatten(1).all(1)  # but for rounding
        return torch.where(per_sample(same, held), other, moved)

    def _bump(self, held: Tensor, step: int, covered: float) -> Tensor:
        """The change within one window is taken away and spent on a bump in another, algorithm 3 of the paper."""
        norm, power = self.threat.norm, 2.0 if self.threat.norm == "l2" else 1.0
        delta = (held - self.x).view(-1, *self.shape)
        side = self._side(covered, 3)
        first, bump = self._window(side, "to", step)
        second, _ = self._window(side, "from", step)
        first, second = first[:, None], second[:, None]
        signs = self._signs("signs", self.shape[0], 1, 1, step)
        eps = self.threat.radii(delta)
        unspent = (eps**power - _size(delta, norm, (1, 2, 3)) ** power).clamp_min(0) / self.shape[0]
        within = _size(delta * (first | second), norm, (2, 3)) ** power
        new = bump[:, None] * signs + delta * first / _positive(_size(delta * first, norm, (2, 3)))
        new = new / _positive(_size(new, norm, (2, 3))) * (unspent + within) ** (1 / power)
        return self._moved(torch.where(first, new, delta.masked_fill(second, 0)))

    def _moved(self, delta: Tensor) -> Tensor:
        """The inputs moved by a change scaled to the radius."""
        scale = self.threat.radii(delta) / _positive(_size(delta, self.threat.norm, (1, 2, 3)))
        return self.threat.project(self.x + (delta * scale).view_as(self.x), self.x)

    def _side(self, covered: float, least: int) -> tuple[int, int]:
        """Height and width of a window that covers a share of the input: an odd side where a bump has to fit in."""
        _, height, width = self.shape
        side = round(covered * width) if height == 1 else round(math.sqrt(covered * height * width))
        side = max(side, least)
        side += least > 1 and side % 2 == 0
        return (1, min(side, width)) if height == 1 else (min(side, height, width),) * 2

    def _window(self, side: tuple[int, int], *tags: int | str) -> tuple[Tensor, Tensor]:
        """A window of each sample at a random place: where it is (N, H, W), and the bump that fills it."""
        _, height, width = self.shape
        place = rng.uniform(self.ids, (3,), self.seed, "window", self.restart, *tags, dtype=torch.float64)
        axes = []
        for extent, length, where in ((height, side[0], place[:, 0]), (width, side[1], place[:, 1])):
            first = (where * (extent - length + 1)).long()
            axes.append(torch.arange(extent, device=first.device) - first[:, None])
        rows, columns = axes[0][:, :, None], axes[1][:, None, :]
        inside = (rows >= 0) & (rows < side[0]) & (columns >= 0) & (columns < side[1])
        bump = _bump(side, self.threat.norm).to(self.x)
        placed = bump[rows.clamp(0, side[0] - 1), columns.clamp(0, side[1] - 1)]
        if side[0] == side[1]:
            turned = bump.T[rows.clamp(0, side[0] - 1), columns.clamp(0, side[1] - 1)]
            placed = torch.where((place[:, 2] < 0.5)[:, None, None], turned, placed)
        return inside, placed * inside

    def _signs(self, what: str, channels: int, height: int, width: int, *tags: int | str) -> Tensor:
        """Random signs (N, channels, height, width)."""
        bits = rng.bits(self.ids, channels * height * width, self.seed, "square", what, self.restart, *tags)
        return torch.where(bits < 0, -1.0, 1.0).to(self.x).view(-1, channels, height, width)


def _bump(side: tuple[int, int], norm: str) -> Tensor:
    """Two pyramids of opposite sign that fill a window, of norm 1 (section 4.3 of the paper).

    A pyramid is Σ 1/j² over the j from its ring, counted from the center, to the last one.
    """
    height, width = side
    if height * width == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    across = 1 if height == 1 else 0
    halves = [side[across] // 2, side[across] - side[across] // 2]
    parts = []
    for sign, length in zip((1.0, -1.0), halves, strict=True):
        extent = (height, length) if across else (length, width)
        rings = [(torch.arange(n) - n // 2).abs() for n in extent]
        ring = torch.maximum(rings[0][:, None], rings[1][None, :])
        sums = (1.0 / torch.arange(1, int(ring.max()) + 2, dtype=torch.float64) ** 2).flip(0).cumsum(0).flip(0)
        pyramid = sums[ring]
        parts.append(sign * pyramid / _size(pyramid, norm, (0, 1)))
    bump = torch.cat(parts, across)
    return bump / _size(bump, norm, (0, 1))


def _size(delta: Tensor, norm: str, over: tuple[int, ...]) -> Tensor:
    """The norm over some dimensions, which stay with length 1."""
    if norm == "linf":
        return delta.abs().amax(over, keepdim=True)
    if norm == "l1":
        return delta.abs().sum(over, keepdim=True)
    return delta.square().sum(over, keepdim=True).sqrt()


def _positive(size: Tensor) -> Tensor:
    return size.clamp_min(torch.finfo(size.dtype).tiny)
