"""Soft votes against a float64 root finder, numerical gradients and their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import expit
from torch import Tensor

from robustknn.objectives.soft_votes import soft_topk


def by_root_finding(distances: Tensor, k: int, h: float, present: Tensor) -> list[float]:
    """One row: τ by Brent's method in float64, references one by one."""
    d = distances.double().numpy()[present.numpy()]
    if len(d) <= k:
        return present.double().tolist()
    reach = 800 * h + d.max() - d.min()
    tau = brentq(lambda t: expit((t - d) / h).sum() - k, d.min() - reach, d.max() + reach, xtol=1e-14, rtol=1e-15)
    weights = np.zeros(len(distances))
    weights[present.numpy()] = expit((tau - d) / h)
    return list(weights)


@given(
    st.integers(0, 10_000),
    st.integers(1, 25),
    st.integers(1, 20),
    st.floats(1e-3, 10),
    st.floats(0, 0.9),
    st.floats(-3, 3),
)
def test_weights_equal_those_of_a_root_finder(
    seed: int, g: int, k: int, h: float, missing: float, offset: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    d = torch.rand(3, g, generator=generator, dtype=torch.float64) * 4 + offset
    present = torch.rand(3, g, generator=generator) >= missing
    got = soft_topk(d, k, torch.full((3, 1), h, dtype=torch.float64), present)
    want = [by_root_finding(d[i], k, h, present[i]) for i in range(3)]
    assert got.numpy() == pytest.approx(np.array(want), abs=1e-9)
    single = soft_topk(d.float(), k, torch.full((3, 1), h), present)
    assert single.dtype == torch.float32
    assert single.numpy() == pytest.approx(np.array(want), abs=1e-5 + 2e-6 / h)


def rows(n: int = 4, g: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    present = torch.ones(n, g, dtype=torch.bool)
    present[1, ::3] = False
    return torch.rand(n, g, generator=generator, dtype=torch.float64) + 0.5, present


@pytest.mark.parametrize("h", [0.03, 0.3, 3.0])
def test_gradients_by_finite_differences(h: float) -> None:
    d, present = rows()
    width = torch.full((4, 1), h, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: soft_topk(v, 5, width, present), d.requires_grad_(True))


def test_the_threshold_follows_the_distances_as_the_implicit_function_theorem_says() -> None:
    d, _ = rows()
    h = 0.2
    jacobian = torch.autograd.functional.jacobian(
        lambda v: soft_topk(v[None], 5, torch.tensor([[h]]), torch.ones(1, 12, dtype=torch.bool))[0], d[0]
    )
    w = soft_topk(d[:1], 5, torch.tensor([[h]]), torch.ones(1, 12, dtype=torch.bool))[0]
    slope = w * (1 - w)
    want = (torch.outer(slope, slope / slope.sum()) - torch.diag(slope)) / h
    assert torch.allclose(jacobian, want, atol=1e-12)
    assert float(jacobian.sum(0).abs().max()) < 1e-12  # the sum of the votes stays k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_narrow_bandwidth_gives_the_hard_votes_and_a_wide_one_equal_votes(dtype: torch.dtype) -> None:
    d, present = rows(n=40, g=30)
    d, present = d.to(dtype), torch.ones(40, 30, dtype=torch.bool)
    hard = torch.zeros_like(d).scatter(1, d.topk(7, largest=False).indices, 1)
    narrow = soft_topk(d, 7, torch.full((40, 1), 1e-9, dtype=dtype), present)
    assert torch.allclose(narrow, hard, atol=1e-4)
    wide = soft_topk(d, 7, torch.full((40, 1), 1e5, dtype=dtype), present)
    assert torch.allclose(wide, torch.full_like(wide, 7 / 30), atol=1e-4)


def test_what_is_missing_never_votes_and_no_more_than_k_all_vote() -> None:
    d, present = rows()
    present[2], present[3] = False, False
    present[2, :3] = True
    d = torch.where(present, d, torch.full_like(d, float("inf"))).requires_grad_(True)
    w = soft_topk(d, 5, torch.full((4, 1), 0.1, dtype=torch.float64), present)
    assert bool((w[~present] == 0).all())
    assert w.sum(1).tolist() == pytest.approx([5, 5, 3, 0])
    assert w[2, :3].tolist() == [1, 1, 1]
    (gradient,) = torch.autograd.grad((w * torch.arange(12)).sum(), d)
    assert bool((gradient[~present] == 0).all())
    assert bool((gradient[2:] == 0).all())
    assert bool((gradient[:2][present[:2]] != 0).all())


def test_a_saturated_row_keeps_a_finite_gradient() -> None:
    d = torch.tensor([[1.0, 1.1, 1.2, 9.0, 9.1, 9.2]], requires_grad=True)
    w = soft_topk(d, 3, torch.full((1, 1), 0.01), torch.ones(1, 6, dtype=torch.bool))
    assert w[0].tolist() == pytest.approx([1, 1, 1, 0, 0, 0])
    (gradient,) = torch.autograd.grad((w * torch.arange(6)).sum(), d)
    assert bool(torch.isfinite(gradient).all())


def test_a_row_does_not_feel_the_others() -> None:
    d, present = rows(n=20, g=33)
    d, h = d.float(), torch.linspace(0.01, 1, 20)[:, None]
    whole = soft_topk(d, 9, h, present)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(soft_topk(d[order], 9, h[order], present[order]), whole[order])
    assert torch.equal(soft_topk(d[:7], 9, h[:7], present[:7]), whole[:7])
