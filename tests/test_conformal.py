"""Prediction sets against the definition in fractions, and their coverage against what was promised, by simulation."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from small import random_classifier

from robustknn import DkNN, InputError, NotReadyError, ReferenceSet, load_classifier
from robustknn.classifiers.conformal import cutoff, needed

DECIMALS = (0.1, 0.5, 0.7, 0.8, 0.9, 0.95)


def by_hand(calibration: list[int], alpha: int, coverage: float) -> bool:
    """Whether the p-value of the input counted among the calibration samples exceeds 1 − coverage (Vovk et al.)."""
    p = Fraction(sum(a >= alpha for a in calibration) + 1, len(calibration) + 1)
    return p > 1 - Fraction(str(coverage))


@pytest.mark.parametrize("per_class", [False, True])
def test_the_sets_are_those_of_the_definition(per_class: bool) -> None:
    dknn, x, _ = random_classifier(k=7)
    generator = torch.Generator().manual_seed(1)
    calm = torch.rand(130, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (130,), generator=generator)
    own = dknn.nonconformity(calm).gather(1, y[:, None])[:, 0].tolist()
    alpha = dknn.nonconformity(x)
    dknn.calibrate(calm, y)
    sizes = []
    for coverage in DECIMALS:
        found = dknn.predict_set(x, coverage, per_class)
        assert found.dtype == torch.bool
        for row, column in np.ndindex(*alpha.shape):
            held = [a for a, label in zip(own, y.tolist(), strict=True) if not per_class or label == column]
            assert bool(found[row, column]) == by_hand(held, int(alpha[row, column]), coverage)
        sizes.append(int(found.sum()))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_without_ties_the_coverage_is_exact() -> None:
    """P(the new one ≤ the cutoff) = ⌈(n + 1) · coverage⌉ / (n + 1), whatever the distribution."""
    random, runs = np.random.default_rng(0), 4000
    for n, coverage in ((9, 0.9), (20, 0.9), (19, 0.95), (50, 0.7)):
        draws = torch.from_numpy(random.exponential(size=(runs, n + 1)))
        covered = sum(int(d[-1] <= cutoff(d[:-1].sort().values, coverage)) for d in draws)
        expected = np.ceil((n + 1) * Fraction(str(coverage))) / (n + 1)
        low, high = stats.binom.ppf([1e-4, 1 - 1e-4], runs, float(expected))
        assert low <= covered <= high


def simulated(per_class: bool, coverage: float, n: int, runs: int) -> tuple[np.ndarray, np.ndarray]:
    """(runs, m) whether the sets of m new samples hold their label, and these labels; each run draws all anew."""
    dknn, _, _ = random_classifier(k=5, n_classes=3)
    random = np.random.default_rng(2)
    covered, labels = [], []
    for _ in range(runs):
        x = torch.from_numpy(random.random((n + 10, 6)))
        # Classes of unequal difficulty and frequency: class 2 is drawn from everywhere.
        y = torch.from_numpy(np.where(random.random(n + 10) < 0.3, 2, (x[:, 0] > 0.5).numpy()))
        dknn.calibrate(x[:n], y[:n])
        inside = dknn.predict_set(x[n:], coverage, per_class)
        covered.append(inside.gather(1, y[n:, None])[:, 0].numpy())
        labels.append(y[n:].numpy())
    return np.array(covered), np.array(labels)


def test_exchangeable_data_are_covered_with_ties() -> None:
    """One new sample a run is a Bernoulli trial of its own; 75-NN votes are few whole numbers, so ties abound."""
    for coverage in (0.5, 0.9):
        covered, _ = simulated(False, coverage, 30, 400)
        assert covered[:, 0].sum() >= stats.binom.ppf(1e-3, 400, coverage)
        assert covered.mean() < 1


def test_per_class_every_class_is_covered() -> None:
    covered, labels = simulated(True, 0.8, 60, 150)
    for c in range(3):
        first = [row[at == c][0] for row, at in zip(covered, labels, strict=True) if (at == c).any()]
        assert np.sum(first) >= stats.binom.ppf(1e-3, len(first), 0.8)


def test_what_all_share_leaves_nothing_out() -> None:
    assert int(cutoff(torch.full((9,), 3), 0.9)) == 3
    dknn, x, _ = random_classifier()
    calm = x[:1].expand(30, -1)
    dknn.calibrate(calm, dknn.predict(calm))
    assert bool(dknn.predict_set(x[:1]).any())


@pytest.mark.parametrize(
    ("coverage", "n"), [(0.5, 1), (0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99), (0.7, 3), (1 / 3, 1)]
)
def test_how_many_samples_a_coverage_needs(coverage: float, n: int) -> None:
    assert needed(coverage) == n
    assert cutoff(torch.arange(n), coverage) == n - 1
    if n > 1:
        with pytest.raises(InputError, match=f"needs at least {n} calibration samples, there are {n - 1}"):
            cutoff(torch.arange(n - 1), coverage)


def test_refusals() -> None:
    dknn, x, y = random_classifier()
    with pytest.raises(NotReadyError, match=r"call calibrate\(x, y\)"):
        dknn.predict_set(x)
    dknn.calibrate(x, y)
    for wrong in (0, 1, -0.1, 1.5, float("nan"), "0.9", None, True):
        with pytest.raises(InputError, match="coverage must be a number above 0 and below 1"):
            dknn.predict_set(x, wrong)
    with pytest.raises(InputError, match=r"a coverage of 0\.95 needs at least 19 calibration samples, there are 12"):
        dknn.predict_set(x, 0.95)
    with pytest.raises(
        InputError, match=r"a coverage of 0\.9 needs at least 9 calibration samples of class 0, there are 3"
    ):
        dknn.predict_set(x, 0.9, per_class=True)
    dknn.set_params(n_neighbors=3)
    with pytest.raises(NotReadyError, match="again after changing"):
        dknn.predict_set(x)


def test_arrays_and_labels_of_any_kind() -> None:
    random = np.random.default_rng(0)
    X = random.normal(size=(120, 3))
    y = np.where(X[:, 0] > 0, "up", "down")
    dknn = DkNN(n_neighbors=5).fit(X[:80], y[:80]).calibrate(X[80:110], y[80:110])
    inside = dknn.predict_set(X[110:], 0.9, per_class=True)
    assert isinstance(inside, np.ndarray)
    assert inside.shape == (10, 2)
    assert dknn.classes_.tolist() == ["down", "up"]
    assert inside[np.arange(10), (y[110:] == "up").astype(int)].mean() >= 0.8


def test_sets_survive_saving(tmp_path: Path) -> None:
    dknn, x, _ = random_classifier()
    generator = torch.Generator().manual_seed(0)
    calm, y = torch.rand(60, 6, generator=generator, dtype=torch.float64), torch.arange(60) % 4
    dknn.calibrate(calm, y)
    dknn.save(tmp_path / "dknn")
    loaded = load_classifier(tmp_path / "dknn", dknn.references_.features)
    assert isinstance(loaded, DkNN)
    for per_class in (False, True):
        assert torch.equal(loaded.predict_set(x, 0.8, per_class), dknn.predict_set(x, 0.8, per_class))
    assert isinstance(loaded.references_, ReferenceSet)
