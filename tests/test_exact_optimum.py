"""Minimum-norm attacks against the exact optimum in input space, and that optimum against closed forms and a grid."""

from __future__ import annotations

from functools import cache

import exact
import numpy as np
import pytest
import torch
from exact import Box
from torch import Tensor, nn

from robustknn import KNN, FeatureExtractor, ReferenceSet, ThreatModel, registry
from robustknn.attacks import Attack, MinimumNorm
from robustknn.datasets import load

FAR = 20.0
"""A radius that reaches every reference."""


def classifier_of(references: Tensor, labels: Tensor, k: int = 1) -> KNN:
    return KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (references, labels)), k)


def mixture(dim: int, n: int, m: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """References and inputs of classes with two overlapping Gaussian lumps each, in the unit box."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(2 * classes, dim, generator=generator, dtype=torch.float64)
    lumps = torch.arange(n + m) % (2 * classes)
    noise = torch.randn(n + m, dim, generator=generator, dtype=torch.float64)
    points, labels = (centers[lumps] + 0.12 * noise).clamp(0, 1), lumps % classes
    return points[:n], labels[:n], points[n:], labels[n:]


def digits(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source = load("digits", protocol="published")
    references = source.train.batch(torch.arange(len(source.train))).flatten(1).double()
    return (
        references,
        source.train.labels,
        source.test.batch(torch.arange(n)).flatten(1).double(),
        source.test.labels[:n],
    )


@cache
def solved(case: str, bounds: Box, n: int) -> tuple[KNN, Tensor, Tensor, Tensor]:
    """A 1-NN classifier, the inputs it gets right, their labels, and the proved optimum of each."""
    references, labels, x, y = digits(n) if case == "digits" else mixture(int(case), 120, n, seed=int(case))
    classifier = classifier_of(references, labels)
    right = classifier.labels(x) == y
    x, y = x[right], y[right]
    found = [exact.one_nn(x[i].numpy(), int(y[i]), references.numpy(), labels.numpy(), bounds) for i in range(len(x))]
    lower, upper = np.array(found).T
    assert (upper / lower - 1).max() < 1e-8  # the bound and a move that reaches it: the optimum
    return classifier, x, y, torch.from_numpy(lower)


def ratios(attack: Attack, classifier: KNN, x: Tensor, y: Tensor, bounds: Box, optimum: Tensor) -> Tensor:
    """The norm found, in units of the optimum (N,)."""
    result = attack(classifier, x, y, ThreatModel("l2", FAR, bounds=bounds))
    assert bool(result.success.all())
    assert torch.equal(classifier.labels(result.x_adv) != y, result.success)
    return (result.x_adv - x).norm(dim=1) / optimum


CASES = [("2", None), ("2", (0.0, 1.0)), ("8", None), ("32", (0.0, 1.0)), ("64", None), ("digits", (0.0, 1.0))]


@pytest.mark.parametrize(
    ("case", "bounds", "objective"),
    [*((*case, "ask") for case in CASES), *((*case, "adaptive") for case in CASES if case[1] is not None)],
)
def test_the_best_attack_reaches_the_optimum_of_1nn_and_never_beats_it(case: str, bounds: Box, objective: str) -> None:
    classifier, x, y, optimum = solved(case, bounds, 60)
    attack = registry.attacks.create("minimum-norm-thorough", objective=registry.objectives.create(objective))
    ratio = ratios(attack, classifier, x, y, bounds, optimum)
    print(f"{case} {bounds} {objective}: n {len(ratio)}, least {ratio.min():.6f}", end=", ")  # shown by pytest -rP
    print(f"median {ratio.median():.4f}, .95 quantile {ratio.quantile(0.95):.4f}")
    assert float(ratio.min()) >= 1 - 1e-6
    assert float(ratio.median()) <= 1.01
    assert float((ratio <= 1.05).double().mean()) >= 0.95


@pytest.mark.parametrize(("case", "bounds"), [("2", None), ("64", None), ("digits", (0.0, 1.0))])
def test_the_fast_attack_is_near_the_optimum_of_1nn(case: str, bounds: Box) -> None:
    classifier, x, y, optimum = solved(case, bounds, 60)
    ratio = ratios(MinimumNorm(), classifier, x, y, bounds, optimum)
    assert float(ratio.min()) >= 1 - 1e-6
    assert float(ratio.median()) <= 1.01


@pytest.mark.parametrize(
    ("k", "dim"),
    [(3, 2), pytest.param(3, 4, marks=pytest.mark.slow), pytest.param(5, 2, marks=pytest.mark.slow), (5, 3)],
)
def test_exhaustive_search_over_cells_bounds_the_attack_for_k_above_1(k: int, dim: int) -> None:
    found = []
    for seed in range(10):
        references, labels, x, y = mixture(dim, 14, 6, classes=2 + seed % 2, seed=seed)
        classifier = classifier_of(references, labels, k)
        right = classifier.labels(x) == y
        x, y = x[right], y[right]
        pairs = [exact.knn(x[i].numpy(), int(y[i]), references.numpy(), labels.numpy(), k) for i in range(len(x))]
        lower, upper = np.array(pairs).reshape(-1, 2).T
        assert np.all(upper <= lower * (1 + 1e-8) + 1e-12)
        # An input on which classes are tied needs no move to speak of; it has no ratio.
        some = lower > 1e-6
        kept = torch.from_numpy(some)
        attack = registry.attacks.create("minimum-norm-thorough")
        found.append(ratios(attack, classifier, x[kept], y[kept], None, torch.from_numpy(lower[some])))
    ratio = torch.cat(found)
    print(f"k {k}, d {dim}: n {len(ratio)}, least {ratio.min():.6f}", end=", ")
    print(f"median {ratio.median():.4f}, .95 quantile {ratio.quantile(0.95):.4f}")
    assert float(ratio.min()) >= 1 - 1e-6
    assert float(ratio.median()) <= 1.01
    assert float((ratio <= 1.05).double().mean()) >= 0.9


# ------------------------------------------------------------------------------------------ the solver


def test_the_least_move_over_one_plane_and_into_a_corner() -> None:
    bound, delta = exact.least_move(np.array([[3.0, 4.0]]), np.array([10.0]))
    assert (bound, list(delta)) == (pytest.approx(2.0), pytest.approx([1.2, 1.6]))  # type: ignore[arg-type]
    bound, delta = exact.least_move(np.eye(2), np.array([1.0, 2.0]))
    assert (bound, list(delta)) == (pytest.approx(5**0.5), pytest.approx([1.0, 2.0]))  # type: ignore[arg-type]
    bound, delta = exact.least_move(np.array([[1.0], [-1.0]]), np.array([1.0, 1.0]))  # x ≥ 1 and x ≤ −1
    assert (bound, delta) == (np.inf, None)
    assert exact.least_move(np.eye(2), np.array([-1.0, 0.0]))[0] == 0


def test_the_optimum_equals_a_fine_grid_in_the_plane() -> None:
    references, labels, x, y = mixture(2, 14, 8, classes=3, seed=3)
    grid = np.stack(np.meshgrid(*[np.linspace(-0.5, 1.5, 801)] * 2), -1).reshape(-1, 2)
    for k in (1, 3):
        classifier = classifier_of(references, labels, k)
        decided = classifier.scores(torch.from_numpy(grid)).numpy()
        for i in (classifier.labels(x) == y).nonzero()[:, 0].tolist():
            own = decided[:, y[i]]
            wins = np.delete(decided, int(y[i]), 1).max(1) > own + 1e-6
            nearest = np.linalg.norm(grid[wins] - x[i].numpy(), axis=1).min()
            args = (x[i].numpy(), int(y[i]), references.numpy(), labels.numpy())
            lower, upper = exact.one_nn(*args) if k == 1 else exact.knn(*args, k)
            assert lower <= nearest + 1e-12
            assert nearest <= upper + 2 * 0.0025  # the grid's spacing
            if k == 1:
                assert exact.knn(*args, 1) == pytest.approx((lower, upper))


def test_bounds_only_lengthen_the_least_move() -> None:
    free, boxed = solved("2", None, 60)[3], solved("2", (0.0, 1.0), 60)[3]
    assert bool((boxed >= free * (1 - 1e-9)).all())
    assert float(boxed.max()) > float(free.max()) or bool((boxed > free * 1.001).any())
