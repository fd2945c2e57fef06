"""The threat model against solvers of another kind: bisection in float64, an optimality certificate, scipy, theory."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import optimize, stats
from torch import Tensor

from robustknn import ThreatModel
from robustknn.errors import InputError
from robustknn.threat import NORMS, norm

Array = NDArray[np.float64]
thorough = settings(deadline=None, derandomize=True, max_examples=300)


# ------------------------------------------------------------------------------------ independent solvers


def length(delta: Array, which: str) -> float:
    if which == "linf":
        return float(np.abs(delta).max())
    return float(np.abs(delta).sum() if which == "l1" else math.sqrt(float((delta**2).sum())))


def solve(z: Array, x: Array, which: str, eps: float, low: float, high: float) -> Array:
    """The nearest point to z in the ball around x and the box, one sample, by bisection on the multiplier."""

    def at(multiplier: float) -> Array:
        if which == "l2":
            moved = (z - x) / (1 + multiplier)
        else:
            moved = np.sign(z - x) * np.maximum(np.abs(z - x) - multiplier, 0)
        return np.clip(moved, low - x, high - x)

    if which == "linf":
        return x + np.clip(np.clip(z - x, -eps, eps), low - x, high - x)
    if length(at(0.0), which) <= eps:
        return x + at(0.0)
    least, greatest = 0.0, 1.0
    while length(at(greatest), which) > eps and greatest < 1e300:
        greatest *= 2
    for _ in range(300):
        middle = (least + greatest) / 2
        least, greatest = (middle, greatest) if length(at(middle), which) > eps else (least, middle)
    return x + at(greatest)


def furthest(g: Array, x: Array, eps: float, low: float, high: float) -> float:
    """max ⟨g, c − x⟩ over the L1 ball and the box: a knapsack, filled by the largest |g| first. Exact."""
    room = np.where(g >= 0, high - x, x - low)
    left, total = eps, 0.0
    for i in np.argsort(-np.abs(g)):
        take = min(left, room[i])
        total, left = total + abs(g[i]) * take, left - take
    return float(total)


# -------------------------------------------------------------------------------------------- problems


@dataclass
class Problem:
    """A batch to project: points, centers, one radius each, a box (infinite for none)."""

    z: Array
    x: Array
    eps: Array
    bounds: tuple[float, float] | None

    @property
    def box(self) -> tuple[float, float]:
        return self.bounds or (-math.inf, math.inf)

    def threat(self, which: str, dtype: torch.dtype) -> ThreatModel:
        return ThreatModel(which, torch.from_numpy(self.eps).to(dtype), self.bounds)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    n, d = draw(st.integers(1, 4)), draw(st.integers(1, 50))
    bounds = draw(st.sampled_from([None, (0.0, 1.0), (-1.0, 0.125), (-4.0, -3.5)]))
    scale = draw(st.sampled_from([1e-4, 0.1, 1.0, 30.0]))
    shape = draw(st.sampled_from(["normal", "equal", "sparse", "one", "still"]))
    numbers = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    low, high = bounds or (-1.0, 1.0)
    x = numbers.uniform(low, high, (n, d))
    at_bound = numbers.random((n, d)) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    x = np.where(at_bound, np.where(numbers.random((n, d)) < 0.5, low, high), x)
    delta = scale * numbers.standard_normal((n, d))
    if shape == "equal":
        delta = scale * np.sign(delta)
    elif shape == "sparse":
        delta *= numbers.random((n, d)) < 0.2
    elif shape == "one":
        delta *= np.arange(d) == 0
    elif shape == "still":
        delta *= 0
    eps = numbers.choice([0.0, 1e-5, 0.03, 0.3, 1.0, 5.0, 100.0], n)
    if draw(st.booleans()):  # a share of what the box leaves of the movement, so that ball and box both bind
        inside = np.clip(x + delta, low, high) - x if bounds else delta
        which = draw(st.sampled_from(["l1", "l2"]))
        eps = np.array([length(row, which) for row in inside]) * numbers.uniform(0.02, 1.0, n)
    # What float32 holds exactly, so that both solvers get the same problem.
    x, eps = x.astype(np.float32).astype(np.float64), eps.astype(np.float32).astype(np.float64)
    z = (x + delta).astype(np.float32).astype(np.float64)
    return Problem(z, np.clip(x, low, high), eps, bounds)


def check_projection(problem: Problem, which: str, dtype: torch.dtype) -> None:
    threat = problem.threat(which, dtype)
    z, x = torch.from_numpy(problem.z).to(dtype), torch.from_numpy(problem.x).to(dtype)
    found = threat.project(z, x)
    assert found.dtype == dtype
    if problem.bounds is not None:
        assert bool((found >= problem.bounds[0]).all())
        assert bool((found <= problem.bounds[1]).all())
    unit = 1e-6 if dtype == torch.float32 else 1e-12
    size, d = 1 + np.abs(problem.x).max(), problem.x.shape[1]
    slack = unit * size * (d if which == "l1" else math.sqrt(d) if which == "l2" else 1)
    # Rounding the input moves the projection no further than the input.
    tolerance = slack + unit * math.sqrt(d) * (1 + np.abs(problem.z - problem.x).max())
    for i, p in enumerate(found.double().numpy()):
        z_i, x_i, eps = problem.z[i], problem.x[i], float(problem.eps[i])
        assert length(p - x_i, which) <= eps + slack
        assert np.linalg.norm(p - solve(z_i, x_i, which, eps, *problem.box)) <= tolerance
        if which == "l1":  # no allowed point lies further in the direction z − p: p is the projection
            gap = furthest(z_i - p, x_i, eps, *problem.box) - float((z_i - p) @ (p - x_i))
            assert abs(gap) <= (1 + np.linalg.norm(z_i - p)) * (tolerance + slack)
    again = threat.project(found, x)
    assert float((again - found).abs().max()) <= slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", NORMS)
def test_projection_is_the_nearest_allowed_point(which: str, dtype: torch.dtype) -> None:
    @thorough
    @given(problems())
    def check(problem: Problem) -> None:
        check_projection(problem, which, dtype)

    check()


def test_the_solver_of_these_tests_agrees_with_scipy() -> None:
    """So that the truth above does not rest on one derivation."""
    numbers = np.random.default_rng(0)
    for which in ("l2", "l1"):
        for _ in range(10):
            d, eps = 5, float(numbers.uniform(0.1, 1.5))
            x, z = numbers.uniform(0, 1, d), numbers.standard_normal(d)
            # Variables: the positive and the negative part of the movement, so that the L1 norm is smooth.
            ball = {
                "l2": lambda v, eps=eps, d=d: eps**2 - float(((v[:d] - v[d:]) ** 2).sum()),
                "l1": lambda v, eps=eps: eps - float(v.sum()),
            }[which]
            room = [(0.0, 1 - a) for a in x] + [(0.0, a) for a in x]
            best = optimize.minimize(
                lambda v, x=x, z=z, d=d: float(((x + v[:d] - v[d:] - z) ** 2).sum()),
                np.full(2 * d, 1e-3),
                method="SLSQP",
                bounds=room,
                constraints=[{"type": "ineq", "fun": ball}],
                options={"ftol": 1e-13, "maxiter": 500},
            )
            np.testing.assert_allclose(
                x + best.x[:d] - best.x[d:], solve(z, x, which, eps, 0.0, 1.0), atol=2e-6, err_msg=which
            )


@pytest.mark.parametrize("which", NORMS)
def test_no_random_allowed_point_is_nearer(which: str) -> None:
    generator = torch.Generator().manual_seed(0)
    threat = ThreatModel(which, {"linf": 0.2, "l2": 0.5, "l1": 1.0}[which])
    x = torch.rand(20, 6, generator=generator, dtype=torch.float64)
    z = x + torch.randn(20, 6, generator=generator, dtype=torch.float64)
    p = threat.project(z, x)
    best = (z - p).norm(dim=1)
    for scale in (1e-4, 1e-2, 0.3, 2.0):
        for center in (p, x):
            for _ in range(50):
                other = center + scale * torch.randn(20, 6, generator=generator, dtype=torch.float64)
                other = threat.clip(other)
                shrink = (threat.eps / threat.distance(other, x)).clamp(max=1.0)  # towards x, which is allowed
                other = x + (other - x) * shrink[:, None]
                assert bool(((z - other).norm(dim=1) >= best - 1e-12).all())


@pytest.mark.parametrize("which", NORMS)
@pytest.mark.parametrize("shape", [(7, 24), (7, 2, 3, 4), (7, 4, 6), (7, 24, 1, 1)])
def test_shapes_are_the_users_affair(which: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    x, z, g = torch.rand(7, 24, generator=generator), *torch.randn(2, 7, 24, generator=generator)
    threat, ids = ThreatModel(which, torch.linspace(0, 1, 7)), torch.arange(7)
    flat = threat.project(z, x), threat.random_start(x, ids, 3), threat.steepest(g, x), threat.distance(z, x)
    x, z, g = x.view(shape), z.view(shape), g.view(shape)
    turned = threat.project(z, x), threat.random_start(x, ids, 3), threat.steepest(g, x), threat.distance(z, x)
    for expected, found in zip(flat[:3], turned[:3], strict=True):
        assert found.shape == shape
        assert torch.equal(found.reshape(7, 24), expected)
    assert torch.equal(flat[3], turned[3])
    # Memory laid out in another way.
    if len(shape) == 4:
        last = x.contiguous(memory_format=torch.channels_last), z.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(threat.project(last[1], last[0]), turned[0])


@pytest.mark.parametrize("which", NORMS)
def test_a_sample_is_treated_alike_in_any_batch(which: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x, z = torch.rand(64, 50, generator=generator), 2 * torch.randn(64, 50, generator=generator)
    threat = ThreatModel(which, torch.linspace(0, 3, 64))
    whole, ids = threat.project(z, x), torch.arange(64)
    order = torch.randperm(64, generator=generator)
    assert torch.equal(threat.select(order).project(z[order], x[order]), whole[order])
    start, step = threat.random_start(x, ids, 0), threat.steepest(z, x)
    for part in (ids[:16], ids[20:50], ids[::3]):
        some = threat.select(part)
        assert torch.equal(some.project(z[part], x[part]), whole[part])
        assert torch.equal(some.random_start(x[part], part, 0), start[part])
        assert torch.equal(some.steepest(z[part], x[part]), step[part])
    for i in range(64):
        alone = ids[i : i + 1]
        torch.testing.assert_close(threat.select(alone).project(z[alone], x[alone]), whole[alone], rtol=0, atol=2e-7)


@pytest.mark.parametrize("which", NORMS)
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_nothing_moves_at_eps_zero(which: str, bounds: tuple[float, float] | None) -> None:
    x, z = torch.rand(5, 30), torch.randn(5, 30)
    for eps in (0.0, torch.zeros(5)):
        threat = ThreatModel(which, eps, bounds)
        assert torch.equal(threat.project(z, x), x)
        assert torch.equal(threat.random_start(x, torch.arange(5), 0), x)


@pytest.mark.parametrize("which", NORMS)
def test_what_is_allowed_stays(which: str) -> None:
    x = torch.rand(50, 30) * 0.5 + 0.25
    threat = ThreatModel(which, 1.0)
    inside = threat.random_start(x, torch.arange(50), 0)
    torch.testing.assert_close(threat.project(inside, x), inside, rtol=0, atol=1e-7)
    assert torch.equal(threat.project(x, x), x)


@pytest.mark.parametrize("which", NORMS)
def test_rounding_never_leaves_the_bounds(which: str) -> None:
    """x + (x_adv − x) is not x_adv in float32: with bounds of unlike size it can come out beyond them."""
    low, high = -1.0, 0.1
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4000, 20, generator=generator) * (high - low) + low
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.3, torch.tensor(low), x).clamp(low, high)
    for eps in (0.5, 1.1, 3.0, 20.0):
        threat = ThreatModel(which, eps, (low, high))
        far = threat.project(x + 3 * torch.randn(x.shape, generator=generator), x)
        for found in (far, threat.random_start(x, torch.arange(4000), 0)):
            assert float(found.max()) <= float(torch.tensor(high))
            assert float(found.min()) >= low


@st.composite
def far_out(draw: st.DrawFn) -> tuple[Tensor, Tensor, float, tuple[float, float] | None]:
    """Inputs of magnitudes up to 1e6 in a low precision, points to project, a radius, bounds."""
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    bounds = draw(st.sampled_from([None, (0.0, 1.0), (-1.0, 0.1)]))
    size = 1.0 if bounds else draw(st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 30.0, 1e3, 6e4, 1e5, 1e6]))
    size = min(size, 6e4) if dtype == torch.float16 else size
    eps = draw(st.sampled_from([0.0, 1e-4, 0.01, 8 / 255, 0.3, 1.0, 10.0, 1e3]))
    numbers = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    shape = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 300]))
    low, high = bounds or (-size, size)
    x = torch.from_numpy(numbers.uniform(low, high, shape)).to(dtype).clamp(low, high)
    far = draw(st.sampled_from([0.01, 1.0, 3.0])) * max(eps, 1e-3) * numbers.standard_normal(shape)
    return (x.double() + torch.from_numpy(far)).to(dtype), x, eps, bounds


@pytest.mark.parametrize("which", NORMS)
def test_rounding_never_leaves_the_ball(which: str) -> None:
    """The bound that `ThreatModel.project` states, in float64 arithmetic, in every precision and magnitude."""

    @thorough
    @given(far_out())
    def check(drawn: tuple[Tensor, Tensor, float, tuple[float, float] | None]) -> None:
        z, x, eps, bounds = drawn
        threat = ThreatModel(which, eps, bounds)
        for found in (threat.project(z, x), threat.random_start(x, torch.arange(len(x)), 0)):
            assert found.dtype == x.dtype
            assert bool(found.isfinite().all())
            assert float(norm(found.double() - x.double(), which).max()) <= eps * (1 + 1e-6)
            assert bounds is None or bool((found == threat.clip(found)).all())

    check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_moves_as_far_as_it_can(dtype: torch.dtype) -> None:
    """Rounding toward x costs no more than the spacing of the numbers: L∞ reaches the last number inside."""
    x = torch.rand(50, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    moved = ThreatModel("linf", 0.1, None).project(x + 1, x)
    every = torch.arange(1 << 15, dtype=torch.int16).view(dtype).double()  # all numbers from 0 up
    every = every[every.isfinite()]
    last = every[torch.searchsorted(every, x.double() + 0.1 * (1 + 1e-6), right=True) - 1]
    assert torch.equal(moved.double(), last)


@pytest.mark.parametrize("eps", [8 / 255, 0.1, 0.5])
def test_ordinary_pixels_move_as_the_plain_formula_says(eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 192, generator=generator)
    z = x + eps * torch.randn(200, 192, generator=generator)
    assert torch.equal(ThreatModel("linf", eps).project(z, x), (x + (z - x).clamp(-eps, eps)).clamp(0, 1))


# ----------------------------------------------------------------------------------------- random starts


def starts(which: str, d: int, n: int = 20_000, dtype: torch.dtype = torch.float32) -> Tensor:
    """Points of the unit ball around 0, (n, d)."""
    threat = ThreatModel(which, 2.0, None)
    return threat.random_start(torch.zeros(n, d, dtype=dtype), torch.arange(n), 0, "test") / 2


@pytest.mark.parametrize("d", [1, 2, 5, 40])
@pytest.mark.parametrize("which", NORMS)
def test_random_starts_are_uniform_in_the_ball(which: str, d: int) -> None:
    points = starts(which, d)
    radius = norm(points, which).double().numpy()
    assert radius.max() <= 1 + 1e-6
    # The share of the volume within radius r is r^d in any norm.
    assert radius.mean() == pytest.approx(d / (d + 1), abs=4 * math.sqrt(d / (d + 2)) / (d + 1) / math.sqrt(20_000))
    assert stats.kstest(radius**d, "uniform").pvalue > 0.001
    # Every coordinate by itself, both signs: L∞ uniform; L2 of the symmetric beta law; L1 |x| of Beta(1, d).
    law = {
        "linf": stats.uniform(-1, 2),
        "l2": stats.beta((d + 1) / 2, (d + 1) / 2, -1, 2),
        "l1": None,
    }[which]
    for i in {0, d // 2, d - 1}:
        column = points[:, i].double().numpy()
        assert abs((column > 0).mean() - 0.5) < 4 * 0.5 / math.sqrt(20_000)
        test = stats.kstest(np.abs(column), stats.beta(1, d).cdf) if law is None else stats.kstest(column, law.cdf)
        assert test.pvalue > 0.001
    if d > 1:
        correlation = np.corrcoef(points.double().numpy().T) - np.eye(d)
        assert np.abs(correlation).max() < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("which", NORMS)
def test_random_starts_are_allowed_and_counted(which: str, bounds: tuple[float, float] | None) -> None:
    x, ids = torch.rand(40, 3, 5, 5), torch.arange(40) + 100
    x.view(40, -1)[:, ::4] = 0.0
    eps = torch.linspace(0, 4, 40)
    threat = ThreatModel(which, eps, bounds)
    start = threat.random_start(x, ids, 1, "restart", 0)
    assert bool((threat.distance(start, x).double() <= eps.double() + 1e-6 * (1 + eps)).all())
    if bounds is not None:
        assert float(start.min()) >= 0
        assert float(start.max()) <= 1
    assert torch.equal(start, threat.random_start(x, ids, 1, "restart", 0))
    assert bool((start != x).flatten(1).any(1)[1:].all())
    for other in (
        threat.random_start(x, ids, 2, "restart", 0),
        threat.random_start(x, ids, 1, "restart", 1),
        threat.random_start(x, ids + 1, 1, "restart", 0),
    ):
        assert bool((start != other).flatten(1).any(1)[1:].all())
    swapped = torch.arange(39, -1, -1)
    turned = threat.select(swapped).random_start(x[swapped], ids[swapped], 1, "restart", 0)
    assert torch.equal(turned[swapped], start)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", NORMS)
def test_random_starts_are_finite_in_every_precision(which: str, dtype: torch.dtype) -> None:
    points = starts(which, 1000, 500, dtype)
    assert points.dtype == dtype
    assert bool(points.isfinite().all())
    assert float(norm(points.double(), which).max()) <= 1 + 60 * torch.finfo(dtype).eps


# --------------------------------------------------------------------------------------------- steepest


DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-6, 1.0, 1e6, 1e30, 5e37])
@pytest.mark.parametrize("which", NORMS)
def test_the_steepest_step_reaches_the_dual_norm(which: str, scale: float) -> None:
    """max ⟨g, s⟩ over ‖s‖ ≤ 1 is the dual norm of g; for L1 by moving one coordinate."""
    gradient = torch.randn(30, 40, generator=torch.Generator().manual_seed(0)) * scale
    step = ThreatModel(which, 1.0, None, l1_fraction=1e-9).steepest(gradient)
    assert bool(step.isfinite().all())
    torch.testing.assert_close(norm(step.double(), which), torch.ones(30, dtype=torch.float64), rtol=1e-5, atol=0)
    gain = (step.double() * gradient.double()).sum(1)
    torch.testing.assert_close(gain, norm(gradient.double(), DUAL[which]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.5, 1.0])
def test_the_l1_step_moves_the_largest_coordinates_alike(fraction: float) -> None:
    gradient = torch.randn(10, 100, generator=torch.Generator().manual_seed(0))
    step = ThreatModel("l1", 1.0, None, l1_fraction=fraction).steepest(gradient)
    count = round(100 * fraction)
    for g, s in zip(gradient, step, strict=True):
        largest = g.abs().argsort(descending=True)[:count]
        expected = torch.zeros(100)
        expected[largest] = g[largest].sign() / count
        torch.testing.assert_close(s, expected)


def test_the_l1_step_passes_over_coordinates_at_a_bound() -> None:
    threat = ThreatModel("l1", 1.0, (0.0, 1.0), l1_fraction=0.5)
    x = torch.tensor([[0.0, 1.0, 0.5, 0.5]]).repeat(4, 1)
    gradient = torch.tensor(
        [[-9.0, 8.0, 1.0, 2.0], [9.0, 8.0, 1.0, 2.0], [-9.0, -8.0, 0.0, 0.0], [-9.0, 8.0, 0.0, 0.0]]
    )
    expected = [[0, 0, 0.5, 0.5], [0.5, 0, 0, 0.5], [0, -1, 0, 0], [0, 0, 0, 0]]
    assert threat.steepest(gradient, x).tolist() == expected
    assert threat.steepest(gradient[:1]).tolist() == [[-0.5, 0.5, 0, 0]]  # without x nothing is passed over
    whole = ThreatModel("l1", 1.0, (0.0, 1.0), l1_fraction=1.0)
    third = float(torch.tensor(1.0) / 3)
    assert whole.steepest(gradient, x).tolist() == [[0, 0, 0.5, 0.5], [third, 0, third, third], [0, -1, 0, 0], [0] * 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", NORMS)
def test_no_gradient_no_step(which: str, dtype: torch.dtype) -> None:
    gradient = torch.zeros(3, 8, dtype=dtype)
    gradient[1] = torch.arange(8) - 3.5
    step = ThreatModel(which, 1.0, None).steepest(gradient)
    assert step.dtype == dtype
    assert not step[0].any()
    assert not step[2].any()
    assert step[1].any()


# ---------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "threat",
    [
        ThreatModel(),
        ThreatModel("l2", 3, None),
        ThreatModel("l1", 12.0, (-1, 1), l1_fraction=0.2),
        ThreatModel("l2", torch.tensor([0.1, 0.2, 1 / 3])),
        ThreatModel("l2", torch.tensor([0.1, 0.2, 1 / 3], dtype=torch.float64)),
        ThreatModel("l2", torch.tensor(0.1)),
        ThreatModel("linf", [0.1, 0.7]),  # type: ignore[arg-type]
        ThreatModel("linf", np.array([0.1, 0.7])),  # type: ignore[arg-type]
        ThreatModel("linf", np.float32(0.1), np.array([0.0, 1.0])),  # type: ignore[arg-type]
    ],
)
def test_a_threat_model_goes_through_json_and_back(threat: ThreatModel) -> None:
    config = json.loads(json.dumps(threat.to_config()))
    for made in (ThreatModel.from_config(config), ThreatModel(**config)):
        assert made == threat
        assert hash(made) == hash(threat)
        x = torch.rand(made.to_config()["eps"].__len__() if isinstance(config["eps"], list) else 2, 4)
        assert torch.equal(made.project(x + 1, x), threat.project(x + 1, x))


def test_threat_models_differ_in_what_they_say() -> None:
    said: list[dict[str, Any]] = [
        {},
        {"norm": "l2"},
        {"eps": 0.1},
        {"eps": torch.tensor([0.1])},
        {"eps": torch.tensor([0.1, 0.2])},
        {"bounds": None},
        {"bounds": (-1, 1)},
        {"l1_fraction": 0.5},
    ]
    assert len({ThreatModel(**s) for s in said}) == len(said)
    assert ThreatModel() != "linf"
    assert ThreatModel(eps=1) == ThreatModel(eps=1.0) == ThreatModel().with_eps(torch.tensor(1.0))


def test_radii_select_and_with_eps() -> None:
    eps = torch.tensor([0.0, 0.5, 2.0])
    threat = ThreatModel("l2", eps, None)
    x = torch.zeros(3, 2, 2)
    assert threat.radii(x).shape == (3, 1, 1)
    z = torch.ones(3, 2, 2) * 3
    torch.testing.assert_close(threat.distance(threat.project(z, x), x), eps)
    for index in (torch.tensor([2, 0, 2]), torch.tensor([False, True, True])):
        part = threat.select(index)
        assert torch.equal(part.radii(x[index]).flatten(), eps[index])
        assert (part.norm, part.bounds) == ("l2", None)
    one = ThreatModel("l2", 0.5)
    assert one.select(torch.tensor([1])) is one
    assert one.radii(x).shape == ()
    assert threat.with_eps(0.25).radii(x).item() == 0.25
    assert torch.equal(ThreatModel("l2", [0.0, 0.5]).select(torch.tensor([1])).radii(x[:1]).flatten(), eps[1:2])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^eps has 3 radii for 2 samples; pass one a sample\.$"):
        threat.project(z[:2], x[:2])


@pytest.mark.parametrize(("which", "expected"), [("linf", 3.0), ("l2", 3.0 * math.sqrt(12)), ("l1", 36.0)])
def test_the_diameter_joins_any_two_inputs(which: str, expected: float) -> None:
    threat, x = ThreatModel(which, 1.0, (-1, 2)), torch.zeros(5, 3, 2, 2)
    assert threat.diameter(x) == pytest.approx(expected)
    corner = torch.full_like(x, 2.0)
    assert float(threat.distance(corner, torch.full_like(x, -1.0))[0]) == pytest.approx(expected)
    with pytest.raises(InputError, match="inputs without bounds have no diameter"):
        ThreatModel(which, 1.0, None).diameter(x)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"norm": "l3"}, "norm must be one of 'linf', 'l2', 'l1', not 'l3'."),
    ({"norm": 2}, "norm must be one of 'linf', 'l2', 'l1', not 2."),
    ({"norm": None}, "norm must be one of 'linf', 'l2', 'l1', not None."),
    ({"norm": torch.zeros(2)}, "norm must be one of 'linf', 'l2', 'l1', not tensor([0., 0.])."),
    ({"eps": -0.1}, "eps must be finite and at least 0, one number or one a sample, not -0.1."),
    ({"eps": math.nan}, "eps must be finite and at least 0, one number or one a sample, not nan."),
    ({"eps": math.inf}, "eps must be finite and at least 0, one number or one a sample, not inf."),
    ({"eps": 1j}, "eps must be finite and at least 0, one number or one a sample, not 1j."),
    ({"eps": True}, "eps must be finite and at least 0, one number or one a sample, not True."),
    ({"eps": [0.1, -1]}, "eps must be finite and at least 0, one number or one a sample, not [0.1, -1]."),
    ({"eps": torch.ones(2, 2)}, "not tensor([[1., 1.], [1., 1.]])."),
    ({"eps": "8/255"}, "eps must be a tensor or an array of numbers, not str."),
    ({"eps": None}, "eps must be a tensor or an array of numbers, not NoneType."),
    *(
        ({"bounds": bounds}, f"bounds must be (low, high), finite and low < high, or None for none, not {bounds!r}.")
        for bounds in ((1, 0), (0, 0), (0,), (0, 1, 2), 5, "ab", (0, math.nan), (0, math.inf), (None, 1), ([0, 0], 1))
    ),
    ({"bounds": (torch.zeros(3), torch.ones(3))}, "not (tensor([0., 0., 0.]), tensor([1., 1., 1.]))."),
    *(({"l1_fraction": f}, f"l1_fraction must be in (0, 1], not {f!r}.") for f in (0, -1, 1.5, math.nan, "a", None)),
]


@pytest.mark.parametrize(("options", "said"), BAD)
def test_a_bad_threat_model_is_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        ThreatModel(**options)
    assert str(caught.value).endswith(said)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_setting_there_is_not_names_the_close_ones() -> None:
    with pytest.raises(InputError, match=r"^unknown setting of a threat model: 'bound'; did you mean 'bounds'\?$"):
        ThreatModel.from_config({"norm": "l2", "bound": None})
