"""The threat model: how far an input may be moved, in which norm, and where inputs live.

Pixels are in [0, 1] and eps is in the same unit. Every routine takes and returns whole batches (N, …) and
treats each sample on its own, so a sample's result does not depend on its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from robustknn import rng
from robustknn.checks import Bounds, as_tensor, check_choice
from robustknn.errors import InputError, brief, unknown_name

NORMS = ("linf", "l2", "l1")
SLACK = 1e-6
"""How far outside the ball, as a share of eps, rounding may bring a point; float32 pixels stay below it."""


@dataclass(frozen=True, eq=False)
class ThreatModel:
    """All x' with ‖x' − x‖ ≤ eps inside the bounds.

    Args:
        norm: "linf", "l2" or "l1", over all dimensions of a sample.
        eps: the radius, one for all samples or a tensor (N,) with one each.
        bounds: least and greatest value of an input, both finite, or None (embeddings, time series).
        l1_fraction: the share of coordinates the steepest L1 step moves (at least one). The exact steepest
            step moves a single coordinate; moving the largest few per cent makes the same progress in far
            fewer steps (Tramèr & Boneh, arXiv 1904.13000, "SLIDE").

    Raises:
        InputError: unknown norm, negative or non-finite eps, empty or infinite bounds.
    """

    norm: str = "linf"
    eps: float | Tensor = 8 / 255
    bounds: Bounds | None = (0.0, 1.0)
    l1_fraction: float = 0.01

    def __post_init__(self) -> None:
        check_choice(self.norm, NORMS, "norm")
        radius = as_tensor(self.eps, "eps")
        numbers = not radius.is_complex() and radius.dtype != torch.bool
        if not (numbers and radius.ndim <= 1 and bool((torch.isfinite(radius) & (radius >= 0)).all())):
            raise InputError(f"eps must be finite and at least 0, one number or one a sample, not {brief(self.eps)}.")
        if not isinstance(self.eps, Tensor):
            object.__setattr__(self, "eps", radius if radius.ndim else float(radius))
        if self.bounds is not None:
            object.__setattr__(self, "bounds", _bounds(self.bounds))
        if not isinstance(self.l1_fraction, (int, float)) or not 0 < self.l1_fraction <= 1:
            raise InputError(f"l1_fraction must be in (0, 1], not {brief(self.l1_fraction)}.")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ThreatModel):
            return NotImplemented
        return self.to_config() == other.to_config()

    def __hash__(self) -> int:
        return hash(repr(self.to_config()))

    # --------------------------------------------------------------------------------- description

    def to_config(self) -> dict[str, Any]:
        """A JSON-able description; `ThreatModel(**config)` gives an equal one back."""
        eps = self.eps.tolist() if isinstance(self.eps, Tensor) else float(self.eps)
        bounds = None if self.bounds is None else [float(b) for b in self.bounds]
        return {"norm": self.norm, "eps": eps, "bounds": bounds, "l1_fraction": self.l1_fraction}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ThreatModel:
        """The threat model that `to_config` described; InputError names a setting there is not."""
        known = [field.name for field in fields(cls)]
        for name in config:
            if name not in known:
                raise unknown_name("setting of a threat model:", name, known)
        return cls(**config)

    def with_eps(self, eps: float | Tensor) -> ThreatModel:
        """The same threat model with another radius."""
        return replace(self, eps=eps)

    def select(self, index: Tensor) -> ThreatModel:
        """The threat model of some samples of a batch (only a per-sample eps changes)."""
        if isinstance(self.eps, Tensor) and self.eps.ndim == 1:
            return replace(self, eps=self.eps[index.to(self.eps.device)])
        return self

    def radii(self, x: Tensor) -> Tensor:
        """eps as a tensor that broadcasts over x: (N, 1, …, 1) or a scalar, in x's dtype and device."""
        eps = torch.as_tensor(self.eps, dtype=x.dtype, device=x.device)
        if eps.ndim == 1:
            if len(eps) != len(x):
                raise InputError(f"eps has {len(eps)} radii for {len(x)} samples; pass one a sample.")
            eps = per_sample(eps, x)
        return eps

    # ------------------------------------------------------------------------------------ geometry

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """‖a − b‖ in this norm, (N,)."""
        return norm(a - b, self.norm)

    def clip(self, x: Tensor) -> Tensor:
        """x moved into the bounds, coordinate by coordinate."""
        return x if self.bounds is None else x.clamp(*self.bounds)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest allowed point to `x_adv` in Euclidean distance: ball and bounds at once.

        Linf: clipping. L2 and L1: the exact projection onto the intersection of the ball with the box
        (per coordinate a clipped scaling, or a clipped soft threshold as in Croce & Hein, arXiv 2103.01208,
        Prop. 2.2, with the multiplier found from the sorted breakpoints). `x` itself must lie in the bounds.

        In every dtype and at any magnitude of x the point lies within eps · (1 + 1e-6), measured in float64.
        """
        if self.norm == "linf":
            wide = torch.promote_types(x.dtype, torch.float32)
            delta = x_adv.to(wide) - x.to(wide)
            eps = self.radii(delta)
            return self._add(x, torch.clamp(delta, min=-eps, max=eps))
        flat = (x_adv.double() - x.double()).reshape(len(x), -1)
        eps = self.radii(flat)
        cap = self._room(flat, x.reshape(len(x), -1))
        inside = torch.minimum(flat.abs(), cap)
        size = _project_l2(flat.abs(), cap, eps) if self.norm == "l2" else _project_l1(flat.abs(), cap, eps)
        outside = norm(inside, self.norm)[:, None] > eps
        return self._add(x, torch.where(outside, size, inside).copysign(flat).reshape(x.shape))

    def _room(self, delta: Tensor, x: Tensor) -> Tensor:
        """How far each coordinate of x can go in delta's direction before it meets a bound."""
        if self.bounds is None:
            return torch.full_like(delta, float("inf"))
        low, high = self.bounds
        return torch.where(delta >= 0, high - x.to(delta.dtype), x.to(delta.dtype) - low).clamp_min(0)

    def _add(self, x: Tensor, delta: Tensor) -> Tensor:
        """x + delta in x's dtype and the bounds; where rounding leaves the ball, rounded toward x.

        `delta`, in float32 or wider, lies in the ball: so does every point that goes no further in any coordinate.
        """
        moved = self.clip((x.to(delta.dtype) + delta).to(x.dtype))
        gone = moved.double() - x.double()
        left = per_sample(norm(gone, self.norm), x) > self.radii(gone) * (1 + SLACK)
        if not bool(left.any()):
            return moved
        return torch.where(left & (gone.abs() > delta.double().abs()), _next(moved, x), moved)

    def random_start(self, x: Tensor, sample_ids: Tensor, seed: int, *tags: int | str) -> Tensor:
        """A random allowed point for every sample: uniform in the ball, then moved into the bounds.

        The numbers are counted from (seed, sample id, tags), see `robustknn.rng`.
        """
        n, shape = len(x), tuple(x.shape[1:])
        d, dtype = x[0].numel(), torch.promote_types(x.dtype, torch.float32)
        ids = sample_ids.to(x.device)
        if self.norm == "linf":
            unit = 2 * rng.uniform(ids, shape, seed, "linf", *tags, dtype=dtype) - 1
        elif self.norm == "l2":
            direction = rng.normal(ids, (d,), seed, "l2", *tags, dtype=dtype)
            direction = direction / norm(direction, "l2").clamp_min(torch.finfo(dtype).tiny)[:, None]
            length = rng.uniform(ids, (1,), seed, "length", *tags, dtype=dtype) ** (1 / d)
            unit = (direction * length).view(n, *shape)
        else:
            # d + 1 exponential numbers divided by their sum are uniform on the simplex, hence the first d,
            # with random signs, uniform in the L1 ball.
            parts = -torch.log1p(-rng.uniform(ids, (d + 1,), seed, "l1", *tags, dtype=dtype))
            sign = torch.where(rng.bits(ids, d, seed, "sign", *tags) < 0, -1.0, 1.0).to(dtype)
            total = parts.sum(1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
            unit = (parts[:, :d] / total * sign).view(n, *shape)
        return self._add(x, unit * self.radii(unit))

    def steepest(self, gradient: Tensor, x: Tensor | None = None) -> Tensor:
        """The unit step that raises the loss fastest: sign (Linf), direction (L2), largest coordinates (L1).

        A zero gradient gives a zero step. For L1, coordinates of `x` that stand at a bound and would be
        pushed out of it are passed over, since the projection would only undo the step.
        """
        if self.norm == "linf":
            return gradient.sign()
        flat = gradient.reshape(len(gradient), -1)
        tiny = torch.finfo(flat.dtype).tiny
        if self.norm == "l2":
            # Scaling by the largest entry first keeps the squares of tiny gradients from underflowing.
            flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(tiny)
            return (flat / norm(flat, "l2").clamp_min(tiny)[:, None]).view_as(gradient)
        size = flat.abs()
        if x is not None and self.bounds is not None:
            size = torch.where(self._room(flat, x.reshape(len(x), -1)) > 0, size, torch.zeros_like(size))
        count = max(1, round(self.l1_fraction * flat.shape[1]))
        top = size.topk(count, dim=1)
        chosen = torch.zeros_like(flat).scatter_(1, top.indices, (top.values > 0).to(flat.dtype))
        step = chosen * flat.sign()
        return (step / step.abs().sum(1, keepdim=True).clamp_min(1.0)).view_as(gradient)

    def diameter(self, x: Tensor) -> float:
        """The least eps that reaches every allowed input from every other: the size of the box.

        Raises:
            InputError: there are no bounds.
        """
        if self.bounds is None:
            raise InputError("inputs without bounds have no diameter; give the threat model bounds.")
        side, d = float(self.bounds[1] - self.bounds[0]), x[0].numel()
        return {"linf": side, "l2": side * math.sqrt(d), "l1": side * d}[self.norm]


def check_reach(threat: ThreatModel, x: Tensor) -> None:
    """Refuse a radius beyond what there is for inputs x (N, …): most likely a pixel value in 0..255.

    Raises:
        InputError: the largest eps is above `ThreatModel.diameter`.
    """
    if threat.bounds is not None:
        largest, reach = float(torch.as_tensor(threat.eps).max()), threat.diameter(x)
        if largest > reach * (1 + 1e-6):
            raise beyond_reach(largest, reach, threat.bounds)


def beyond_reach(eps: float, reach: float, bounds: Bounds) -> InputError:
    """The error for a radius larger than what there is (see `ThreatModel.diameter`): mostly, pixels of 0..255."""
    return InputError(
        f"eps {eps:g} exceeds {reach:g}, which reaches every input within {bounds}; inputs and eps have the same unit "
        f"(for pixels of 0..255 write {eps:g}/255)."
    )


def check_threat(value: Any) -> ThreatModel:
    """The threat model itself; InputError for anything else, such as a bare radius."""
    if not isinstance(value, ThreatModel):
        raise InputError(f"threat must be a ThreatModel, such as ThreatModel('linf', 8 / 255), not {brief(value)}.")
    return value


def _bounds(value: Any) -> Bounds:
    try:
        low, high = map(float, value)
    except (TypeError, ValueError, RuntimeError):
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise InputError(f"bounds must be (low, high), finite and low < high, or None for none, not {brief(value)}.")
    return low, high


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """One value a sample (N,), shaped to broadcast over x (N, …)."""
    return values.view(-1, *[1] * (x.ndim - 1))


def norm(delta: Tensor, which: str) -> Tensor:
    """The norm of each row of a batch (N, …), (N,)."""
    flat = delta.reshape(len(delta), -1)
    if which == "linf":
        return flat.abs().amax(1)
    return flat.norm(dim=1) if which == "l2" else flat.abs().sum(1)


def _next(value: Tensor, goal: Tensor) -> Tensor:
    """The next number of the dtype toward `goal`; `torch.nextafter` does not know half precision everywhere."""
    if value.element_size() > 2:
        return torch.nextafter(value, goal)
    bits = value.view(torch.int16)  # a number and its neighbor of the same sign differ by one in their bits
    larger = (goal > value) == (bits >= 0)
    least = torch.ones_like(bits).view(value.dtype).copysign(goal)
    return torch.where(value == 0, least, torch.where(larger, bits + 1, bits - 1).view(value.dtype))


def _project_l2(size: Tensor, cap: Tensor, eps: Tensor) -> Tensor:
    """min(s·size, cap) with the one s per row whose L2 norm is eps (the caller checks there is one).

    Start with no coordinate at its cap and solve for s; those that s would push over their cap are fixed
    there and s, which can only grow, is solved again, until nothing changes.
    """
    square, cap_square, target = size**2, cap**2, eps**2
    capped = torch.zeros_like(size, dtype=torch.bool)
    while True:
        used = torch.where(capped, cap_square, 0.0).sum(1, keepdim=True)
        rest = torch.where(capped, 0.0, square).sum(1, keepdim=True)
        scale = ((target - used).clamp_min(0) / rest.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        over = capped | (scale * size > cap)
        if bool((over == capped).all()):
            return torch.where(capped, cap, scale * size)
        capped = over


def _project_l1(size: Tensor, cap: Tensor, eps: Tensor) -> Tensor:
    """min(max(size − t, 0), cap) with the one t ≥ 0 per row whose sum is eps (the caller checks there is one).

    The sum is piecewise linear in t: each coordinate starts to fall at t = size − cap (slope −1) and ends at
    t = size. Sorting the 2D breakpoints downward from the largest gives the sum at each, then the piece.
    """
    start = (size - cap).clamp_min(0)  # below this t the coordinate stays at its cap
    points, order = torch.cat([size, start], 1).sort(dim=1, descending=True)
    slope = torch.where(order < size.shape[1], 1.0, -1.0).to(torch.float64).cumsum(1)
    gap = points[:, :-1] - points[:, 1:]
    total = torch.cat([torch.zeros_like(points[:, :1]), (slope[:, :-1] * gap).cumsum(1)], 1)
    target = eps.expand(len(size), 1)
    piece = ((total < target).sum(1, keepdim=True) - 1).clamp_min(0)  # the last breakpoint that is not enough
    slope_here = slope.gather(1, piece).clamp_min(1.0)
    threshold = points.gather(1, piece) - (target - total.gather(1, piece)) / slope_here
    return torch.minimum((size - threshold).clamp_min(0), cap)
