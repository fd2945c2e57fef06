"""The exact least move of 1-NN against a plain solver, between the bisector bound and every attack."""

from __future__ import annotations

import exact
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from test_bisectors import raw_knn, rounded, scene, still_decided, tries
from torch import nn

from robustknn import KNN, FeatureExtractor, InputError, ReferenceSet, ThreatModel
from robustknn.attacks import MinimumNorm
from robustknn.certification import FeatureBisector, FeatureExact, InputCertificate
from robustknn.certification.exact_qp import Box, Outer, least_move

BOXES = [None, (0.0, 1.0)]


@pytest.mark.parametrize("bounds", BOXES)
@pytest.mark.parametrize(("n", "dim", "classes"), [(6, 1, 2), (30, 2, 3), (60, 5, 3), (200, 20, 4), (40, 60, 2)])
def test_the_least_move_of_raw_inputs(n: int, dim: int, classes: int, bounds: tuple[float, float] | None) -> None:
    vectors, labels, x = scene(dim, n, dim, classes)
    x[:4, : dim // 2] = 0  # on a wall of the box
    found = InputCertificate(bounds=bounds)(raw_knn(vectors, labels, 1), x)
    assert found.upper is not None
    for i, y in enumerate(found.labels.tolist()):
        lower, upper = exact.one_nn(x[i].numpy(), y, vectors.numpy(), labels.numpy(), bounds)
        assert float(found.radius[i]) == pytest.approx(rounded(lower), rel=1e-7, abs=1e-9)
        assert float(found.upper[i]) == pytest.approx(upper, rel=1e-6, abs=1e-9)
        assert float(found.radius[i]) <= lower * (1 + 1e-12)


def test_the_least_move_by_cosine() -> None:
    """Along the boundary of a cone: the angle to it, by a fine search over the plane."""
    vectors, labels, x = scene(1, 12, 2, 3)
    vectors, x = vectors - 0.5, x - 0.5
    found = FeatureExact()(raw_knn(vectors, labels, 1, "cosine"), x)
    turns = np.linspace(-np.pi, np.pi, 200_001)
    unit = (vectors / vectors.norm(dim=1, keepdim=True)).numpy()
    for i, y in enumerate(found.labels.tolist()):
        start, length = np.arctan2(*x[i].flip(0).tolist()), float(x[i].norm())
        directions = np.stack([np.cos(start + turns), np.sin(start + turns)], 1)
        wrong = labels.numpy()[(directions @ unit.T).argmax(1)] != y
        least = np.abs(turns[wrong]).min()
        expected = length * (np.sin(least) if least < np.pi / 2 else 1.0)
        assert float(found.radius[i]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def surrounded(seed: int) -> tuple[KNN, torch.Tensor, torch.Tensor]:
    """A cluster of one class inside a shell of another, so that cells have many walls; queries, and the references."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    vectors[30:] *= 3 / vectors[30:].norm(dim=1, keepdim=True)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64) / 2
    return raw_knn(vectors, (torch.arange(60) >= 30).long(), 1), x, vectors


def test_between_the_bisector_bound_and_every_attack() -> None:
    knn, x, _ = surrounded(7)
    bound, found = FeatureBisector()(knn, x), FeatureExact()(knn, x)
    assert found.upper is not None
    assert bool((bound.radius <= found.radius).all())
    assert bool((bound.radius < found.radius * 0.999).any())
    torch.testing.assert_close(found.upper, found.radius, rtol=1e-5, atol=1e-9)
    attacked = MinimumNorm(steps=30)(knn, x, found.labels, ThreatModel("l2", 5.0, bounds=None))
    assert bool(attacked.success.any())
    assert bool((attacked.l2 >= found.radius)[attacked.success].all())


def test_a_move_of_the_length_told_succeeds_and_a_shorter_one_never() -> None:
    vectors, labels, x = scene(9, 50, 3, 3)
    knn = raw_knn(vectors, labels, 1)
    found = FeatureExact()(knn, x)
    assert found.upper is not None
    assert bool((found.radius > 0).all())
    for shift, holds in ((found.radius, True), (found.upper * 1.2, False)):
        moves = tries(x, shift, vectors, 0)
        kept = still_decided(knn, (x + moves).flatten(0, 1), found.labels.repeat(len(moves))).view(len(moves), -1)
        assert bool(kept.all()) is holds


def test_few_programs_prove_less_and_never_more() -> None:
    knn, x, _ = surrounded(2)
    few, every = FeatureExact(programs=1)(knn, x), FeatureExact()(knn, x)
    assert bool((few.radius <= every.radius * (1 + 1e-9)).all())
    assert bool((few.radius < every.radius * 0.999).any())
    assert few.upper is not None
    assert bool((few.upper >= every.radius).all())


def test_copies_of_a_reference_under_two_labels() -> None:
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [9.0, 9.0]], dtype=torch.float64)
    knn = raw_knn(vectors, torch.tensor([0, 0, 1, 1]), 1)
    found = FeatureExact()(knn, torch.tensor([[0.2, 0.0], [1.0, 0.0]], dtype=torch.float64))
    assert float(found.radius[0]) == pytest.approx(0.3, rel=1e-5)  # where the copies are the nearest, it is a tie
    assert float(found.radius[1]) <= 0


def test_one_class_alone_is_safe_at_any_distance() -> None:
    vectors = torch.rand(5, 2, dtype=torch.float64)
    found = FeatureExact()(raw_knn(vectors, torch.zeros(5, dtype=torch.int64), 1), torch.rand(2, 2).double())
    assert bool(found.radius.isinf().all())


@pytest.mark.parametrize("boxed", [False, True])
def test_a_program_against_a_general_solver(boxed: bool) -> None:
    generator = np.random.default_rng(0)
    solved = 0
    for trial in range(15):
        x, n, p = generator.random(4), generator.random(4), generator.random((12, 4))
        keys = ((x - p) ** 2).sum(1)
        inner = Outer(n[None], ((x - n) ** 2).sum(keepdims=True))
        box = Box(-x, 1 - x) if boxed else None
        cell = least_move(inner, [Outer(p[:3], keys[:3]), Outer(p, keys)], n - x, 1e-14, box=box)
        rows, offsets = 2 * (p - n), keys - float(inner.keys[0])
        plain = minimize(
            lambda d: 0.5 * d @ d,
            n - x,
            jac=lambda d: d,
            constraints={"type": "ineq", "fun": lambda d, A=rows, b=offsets: b - A @ d, "jac": lambda d, A=rows: -A},
            bounds=list(zip(-x, 1 - x, strict=True)) if boxed else None,
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert plain.success, trial
        assert cell.lower == pytest.approx(float(np.linalg.norm(plain.x)), rel=1e-5, abs=1e-6)
        assert cell.lower <= cell.upper
        assert cell.upper == pytest.approx(cell.lower, rel=1e-5, abs=1e-6)
        assert cell.move is not None
        assert (rows @ cell.move <= offsets + 1e-12).all()
        assert not boxed or ((x + cell.move >= -1e-12) & (x + cell.move <= 1 + 1e-12)).all()
        solved += cell.lower > 0
    assert solved > 5


def test_bounds_are_refused_where_they_are_not_used() -> None:
    vectors, labels, x = scene(0, 20, 3, 2)
    with pytest.raises(InputError, match="bounds are used for one neighbor and L2 alone"):
        InputCertificate(bounds=(0.0, 1.0))(raw_knn(vectors, labels, 3), x)


def test_features_that_are_not_the_input_are_refused() -> None:
    x, y = torch.rand(20, 4), torch.arange(20) % 2
    for features in (
        FeatureExtractor(nn.Linear(4, 4)),
        FeatureExtractor(nn.Identity(), normalize=True),
        FeatureExtractor(nn.Identity(), center={"(output)": torch.ones(4)}),
    ):
        with pytest.raises(InputError, match="its features are not the input itself"):
            InputCertificate()(KNN(ReferenceSet.build(features, (x, y)), 1), x[:2])


def test_flattened_images_are_raw_inputs() -> None:
    x, y = torch.rand(20, 1, 4, 4), torch.arange(20) % 2
    flat = KNN(ReferenceSet.build(FeatureExtractor(nn.Flatten()), (x, y)), 1)
    found = InputCertificate()(flat, x[:3])
    assert found.unit == "L2 of the input"
    assert torch.equal(found.radius, FeatureExact()(flat, x[:3]).radius)
