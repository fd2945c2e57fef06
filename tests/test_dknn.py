"""DkNN against the paper's definition in plain loops: nonconformity, p-values, credibility, confidence, reliability.

Papernot & McDaniel, "Deep k-Nearest Neighbors", arXiv 1803.04765, section III; conformal prediction after Vovk,
Gammerman & Shafer, "Algorithmic Learning in a Random World", 2005, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from robustknn import KNN, DkNN, FeatureExtractor, InputError, NotReadyError, ReferenceSet, load_classifier
from robustknn.datasets import Split

Array = np.ndarray[Any, Any]
LAYERS = ("1", "3", "4")


# --------------------------------------------------------------------------------------------- the definition


@dataclass
class Paper:
    """The definition, one input and one class at a time, on lists of features by layer."""

    references: list[Array]
    labels: list[int]
    n_classes: int
    k: int
    metric: str = "l2"

    def distance(self, a: Array, b: Array) -> float:
        if self.metric == "l2":
            return math.sqrt(sum((u - v) ** 2 for u, v in zip(a, b, strict=True)))
        length = math.sqrt(sum(u * u for u in a)) * math.sqrt(sum(v * v for v in b))
        return 1 - sum(u * v for u, v in zip(a, b, strict=True)) / length

    def omega(self, layer: int, feature: Array) -> list[int]:
        """The labels of the k nearest references at a layer; of equally far ones the first."""
        pairs = sorted((self.distance(feature, r), i) for i, r in enumerate(self.references[layer]))
        return [self.labels[i] for _, i in pairs[: self.k]]

    def alpha(self, features: list[Array]) -> list[int]:
        """α(x, j) = Σ_l |{i ∈ Ω_l : i ≠ j}| for every class j."""
        found = [self.omega(layer, feature) for layer, feature in enumerate(features)]
        return [sum(sum(i != j for i in omega) for omega in found) for j in range(self.n_classes)]


def p_value(calibration: list[int], alpha: int, comparison: str, correction: str) -> Fraction:
    count = sum(a >= alpha if comparison == ">=" else a > alpha for a in calibration)
    if correction == "conformal":
        return Fraction(count + 1, len(calibration) + 1)
    return Fraction(count, len(calibration))


# ------------------------------------------------------------------------------------------------ the set-up


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def features_by_hand(x: Array, layers: tuple[str, ...]) -> list[list[Array]]:
    """The features of each layer of each input, without the extractor."""
    model, found = net(), []
    value = x
    for place, module in enumerate(model):
        if isinstance(module, nn.Linear):
            value = value @ module.weight.detach().numpy().T + module.bias.detach().numpy()
        else:
            value = np.tanh(value)
        if str(place) in layers:
            found.append(list(value))
    return found


def data(n: int, n_classes: int, seed: int) -> tuple[Array, Array]:
    """Overlapping clusters, a class each."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    centers = np.random.default_rng(99).normal(size=(n_classes, 4))
    return centers[y] + 0.9 * rng.normal(size=(n, 4)), y


CASES: list[tuple[int, int, int, tuple[str, ...], str]] = [
    # n, k, classes, layers, metric
    (40, 5, 3, LAYERS, "l2"),
    (40, 5, 3, ("1", "4"), "cosine"),
    (24, 24, 2, LAYERS, "l2"),  # every reference votes
    (30, 1, 3, ("3",), "l2"),
    (100, 3, 100, LAYERS, "l2"),  # one reference a class: ties everywhere
    (60, 4, 5, ("3", "1"), "cosine"),
]


@pytest.mark.parametrize("comparison", [">=", ">"])
@pytest.mark.parametrize("correction", ["paper", "conformal"])
@pytest.mark.parametrize(("n", "k", "n_classes", "layers", "metric"), CASES)
def test_dknn_is_the_papers_definition(
    n: int, k: int, n_classes: int, layers: tuple[str, ...], metric: str, correction: str, comparison: str
) -> None:
    (x, y), (held_x, held_y), (queries, truth) = data(n, n_classes, 1), data(23, n_classes, 2), data(17, n_classes, 3)
    references = ReferenceSet.build(FeatureExtractor(net(), LAYERS), (x, y))
    ours = DkNN(references, k, metric=metric, layers=layers, comparison=comparison, correction=correction)
    ours.calibrate(held_x, held_y)

    paper = Paper([np.asarray(f) for f in features_by_hand(x, layers)], y.tolist(), n_classes, k, metric)
    by_hand = [paper.alpha([f[i] for f in features_by_hand(queries, layers)]) for i in range(len(queries))]
    held = [paper.alpha([f[i] for f in features_by_hand(held_x, layers)])[held_y[i]] for i in range(len(held_x))]

    assert ours.nonconformity(queries).tolist() == by_hand
    assert ours.calibration_.tolist() == sorted(held)
    p = [[p_value(held, a, comparison, correction) for a in row] for row in by_hand]
    assert np.allclose(ours.p_values(queries), np.array(p, dtype=float), atol=1e-15)
    ranked = [sorted(row, reverse=True) for row in p]
    assert np.allclose(ours.credibility(queries), [float(row[0]) for row in ranked], atol=1e-15)
    assert np.allclose(ours.confidence(queries), [float(1 - row[1]) for row in ranked], atol=1e-15)
    # The largest p-value; of those tied the least α; of those tied the smallest class.
    predicted = [min(range(n_classes), key=lambda j: (-p[i][j], by_hand[i][j], j)) for i in range(len(queries))]
    assert ours.predict(queries).tolist() == predicted
    if n_classes == 100:
        assert sum(row.count(min(row)) > 1 for row in by_hand) > 3  # such ties there were
    shares = 1 - np.array(by_hand) / (k * len(layers))
    assert np.allclose(ours.predict_proba(queries), shares / shares.sum(1, keepdims=True))

    for bins in (4, 10, 23):
        table = ours.reliability_table(queries, truth, bins)
        assert [(b.low, b.high) for b in table] == [(b / bins, (b + 1) / bins) for b in range(bins)]
        for place, row in enumerate(table):
            inside = [i for i in range(len(queries)) if min(bins - 1, math.floor(ranked[i][0] * bins)) == place]
            assert row.count == len(inside)
            if inside:
                assert row.accuracy == pytest.approx(np.mean([predicted[i] == truth[i] for i in inside]))
            else:
                assert row.accuracy is None


def test_a_credibility_on_the_edge_of_a_bin_belongs_to_the_upper_one() -> None:
    # 100 calibration samples of nonconformity 0 or 1; credibility is exactly the share of ones, say 29 of 100.
    x, y = np.array([[0.0], [10.0]]), np.array([0, 1])
    for ones in range(101):
        ours = DkNN(n_neighbors=2).fit(x, y)  # both references vote: α = 1 for every input and class
        ours.calibrate(np.zeros((100, 1)), np.zeros(100, dtype=int))
        ours._calibration = torch.tensor([0] * (100 - ones) + [1] * ones)
        assert ours.credibility([[5.0]])[0] == ones / 100
        for bins in (100, 10, 7):
            counts = [row.count for row in ours.reliability_table([[5.0]], [0], bins)]
            assert counts.index(1) == min(bins - 1, ones * bins // 100)


@pytest.mark.parametrize("k", [1, 6, 40])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_one_layer_votes_as_knn_does(k: int, metric: str) -> None:
    (x, y), (queries, _) = data(40, 3, 1), data(30, 3, 2)
    references = ReferenceSet.build(FeatureExtractor(net(), ["3"]), (x, y))
    knn, dknn = KNN(references, k, metric=metric), DkNN(references, k, metric=metric)
    assert np.array_equal(knn.predict(queries), dknn.predict(queries))
    assert np.array_equal(knn.predict_proba(queries), dknn.predict_proba(queries))
    for ours, theirs in zip(dknn.kneighbors(queries)["3"], knn.kneighbors(queries), strict=True):
        assert np.array_equal(ours, theirs)
    assert np.array_equal(dknn.kneighbors(queries, 1, return_distance=False)["3"], knn.kneighbors(queries, 1)[1])
    tensors = torch.from_numpy(queries)
    assert torch.equal(dknn.kneighbors(tensors)["3"][1], knn.kneighbors(tensors)[1])


# -------------------------------------------------------------------------------------------- what p-values promise


def leave_one_out(correction: str, seed: int, m: int = 20) -> list[float]:
    """The p-value of the true label of each of m exchangeable samples, calibrated on the others."""
    references = ReferenceSet.build(FeatureExtractor(net(), LAYERS), data(30, 3, 1))
    ours = DkNN(references, 4, correction=correction)
    x, y = data(m, 3, seed)
    found = []
    for i in range(m):
        rest = np.arange(m) != i
        found.append(float(ours.calibrate(x[rest], y[rest]).p_values(x[i : i + 1])[0, y[i]]))
    return found


def test_conformal_p_values_are_valid() -> None:
    """Of m exchangeable samples at most t·m have a p-value ≤ t, each calibrated on the others: this holds for every
    set of samples, so P(p ≤ t) ≤ t follows without drawing at random."""
    for seed in range(10):
        p = leave_one_out("conformal", seed)
        for t in np.linspace(0, 1, 81):
            assert sum(value <= t + 1e-12 for value in p) <= t * len(p) + 1e-9


def test_the_papers_p_values_are_not_quite() -> None:
    """Without the sample itself the most nonconforming one has p = 0, which validity forbids."""
    assert any(min(leave_one_out("paper", seed)) == 0 for seed in range(10))


def test_p_values_of_fresh_draws_stay_below_the_diagonal() -> None:
    references = ReferenceSet.build(FeatureExtractor(net(), LAYERS), data(30, 3, 1))
    ours = DkNN(references, 4, correction="conformal")
    x, y = data(3000, 3, 50)
    order = np.random.default_rng(0).permutation(3000)
    x, y, p = x[order], y[order], []
    for draw in range(60):  # 10 to calibrate, 40 to test
        start = 50 * draw
        ours.calibrate(x[start : start + 10], y[start : start + 10])
        values = ours.p_values(x[start + 10 : start + 50])
        p.append(values[np.arange(40), y[start + 10 : start + 50]])
    flat = np.concatenate(p)
    for t in (0.1, 0.2, 0.5, 0.8):
        # The rate given a calibration is spread by about t(1 − t)/12 (a beta distribution), over 60 of them; then
        # come 2,400 samples.
        spread = np.sqrt(t * (1 - t) * (1 / (12 * 60) + 1 / 2400))
        assert (flat <= t + 1e-12).mean() <= t + 4 * spread


# ------------------------------------------------------------------------------------------------ calibration


def calibrated_by(source: Callable[[Array, Array], tuple[Any, ...]]) -> list[int]:
    x, y = data(23, 3, 2)
    references = ReferenceSet.build(FeatureExtractor(net(), LAYERS), data(40, 3, 1))
    ours = DkNN(references, 5, batch_size=7)
    assert ours.calibrate(*source(x, y)) is ours
    return ours.calibration_.tolist()


@pytest.mark.parametrize(
    "source",
    [
        lambda x, y: (x, y),
        lambda x, y: (torch.from_numpy(x), torch.from_numpy(y)),
        lambda x, y: (x, y.tolist()),
        lambda x, y: ((x, y),),
        lambda x, y: (TensorDataset(torch.from_numpy(x), torch.from_numpy(y)),),
        lambda x, y: (DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=4),),
        lambda x, y: (DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), 5, shuffle=True),),
        lambda x, y: (Split(torch.from_numpy(x), y, "test"),),
    ],
    ids=["arrays", "tensors", "list", "pair", "dataset", "loader", "shuffled", "split"],
)
def test_calibration_takes_anything_that_holds_samples(source: Callable[[Array, Array], tuple[Any, ...]]) -> None:
    x, y = data(23, 3, 2)
    x = x.astype(np.float32).astype(np.float64)  # a split hands out float32
    found = calibrated_by(lambda *_: source(x, y))
    assert found == calibrated_by(lambda *_: (x, y))
    assert len(set(found)) > 3


@pytest.mark.parametrize("labels", [np.array(["cat", "ant", "bee"]), np.array([7, 2, 1000])], ids=["text", "gaps"])
def test_calibration_and_reliability_take_the_labels_that_fit_saw(labels: Array) -> None:
    (x, y), (held_x, held_y) = data(40, 3, 1), data(23, 3, 2)
    codes = np.argsort(np.argsort(labels))
    plain = DkNN(n_neighbors=5).fit(x, codes[y]).calibrate(held_x, codes[held_y])
    ours = DkNN(n_neighbors=5).fit(x, labels[y]).calibrate(held_x, labels[held_y])
    assert torch.equal(ours.calibration_, plain.calibration_)
    assert ours.reliability_table(x, labels[y]) == plain.reliability_table(x, codes[y])
    if labels.dtype.kind == "i":  # a loader yields the same numbers, not the places in classes_
        loader = DataLoader(TensorDataset(torch.from_numpy(held_x), torch.from_numpy(labels[held_y])), batch_size=4)
        assert torch.equal(DkNN(n_neighbors=5).fit(x, labels[y]).calibrate(loader).calibration_, plain.calibration_)
    stranger = labels[held_y].copy()
    stranger[4] = {"U": "elk", "i": 8}[labels.dtype.kind]
    with pytest.raises(InputError, match=r"y holds the label .*, a class that the references lack"):
        ours.calibrate(held_x, stranger)
    with pytest.raises(InputError, match=r"y has shape \(23, 1\)"):
        ours.calibrate(held_x, labels[held_y][:, None])


@pytest.mark.parametrize("change", [{"correction": "papre"}, {"comparison": "=>"}])
def test_a_parameter_that_became_wrong_after_calibration_is_refused(change: dict[str, str]) -> None:
    ours, (x, y) = small(), data(9, 3, 3)
    ours.calibrate(x, y).set_params(**change)
    for use in (
        ours.p_values,
        ours.credibility,
        ours.confidence,
        lambda x: ours.details(ours.look(torch.from_numpy(x))),
    ):
        with pytest.raises(InputError, match=f"{next(iter(change))} must be one of"):
            use(x)
    with pytest.raises(InputError, match="must be one of"):
        ours.fingerprint()


def small() -> DkNN:
    return DkNN(ReferenceSet.build(FeatureExtractor(net(), LAYERS), data(40, 3, 1)), 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((3, 4)), [0, 1]), "2 labels for 3 samples"),
        ((np.zeros((3, 4)), [0, 1, 3]), "label 3, outside 0..2"),
        ((np.zeros((0, 4)), np.zeros(0, int)), "there is no calibration sample"),
        ((np.zeros((3, 5)), [0, 1, 2]), r"cannot run on inputs of shape \(3, 5\)"),
        ((np.full((3, 4), np.inf), [0, 1, 2]), "NaN or infinite"),
        ((np.zeros((3, 4)),), "cannot take batches from ndarray"),
    ],
)
def test_calibration_data_that_cannot_work_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small().calibrate(*arguments)


def test_without_calibration_there_is_a_decision_and_no_credibility() -> None:
    ours, (queries, truth) = small(), data(9, 3, 3)
    assert not ours.is_calibrated
    assert ours.predict(queries).shape == (9,)
    look = ours.look(torch.from_numpy(queries))
    assert ours.details(look) == {}
    for call in (ours.p_values, ours.credibility, ours.confidence, lambda x: ours.reliability_table(x, truth)):
        with pytest.raises(NotReadyError, match="call calibrate") as caught:
            call(queries)
        assert "\n" not in str(caught.value)
    ours.calibrate(*data(23, 3, 2))
    details = ours.details(look)
    assert np.array_equal(details["credibility"].numpy(), ours.credibility(queries))
    assert np.array_equal(details["confidence"].numpy(), ours.confidence(queries))
    tensors = torch.from_numpy(queries)
    for call in (ours.p_values, ours.credibility, ours.confidence, ours.nonconformity):
        assert np.array_equal(call(tensors).numpy(), call(queries))
    with pytest.raises(InputError, match="bins must be a whole number"):
        ours.reliability_table(queries, truth, 0)


@pytest.mark.parametrize(
    "change",
    [{"n_neighbors": 6}, {"metric": "cosine"}, {"layers": ["1"]}, {"references": None}],
    ids=lambda change: next(iter(change)),
)
def test_a_calibration_holds_only_for_what_it_was_made_with(change: dict[str, Any]) -> None:
    ours, (queries, _) = small().calibrate(*data(23, 3, 2)), data(9, 3, 3)
    before, print_before = ours.credibility(queries), ours.fingerprint()
    old = {name: getattr(ours, name) for name in change}
    if "references" in change:
        change = {"references": ReferenceSet.build(FeatureExtractor(net(), LAYERS), data(40, 3, 8))}
    ours.set_params(**change)
    assert not ours.is_calibrated
    with pytest.raises(NotReadyError, match="again after changing references or parameters"):
        ours.credibility(queries)
    ours.predict(queries)
    ours.set_params(**old)  # it was not thrown away
    assert np.array_equal(ours.credibility(queries), before)
    assert ours.fingerprint() == print_before
    for other in ({"batch_size": 3}, {"comparison": ">"}, {"correction": "conformal"}):
        assert ours.set_params(**other).is_calibrated  # these do not change nonconformity


def test_fitting_again_needs_calibrating_again() -> None:
    (x, y), (held_x, held_y) = data(40, 3, 1), data(23, 3, 2)
    ours = DkNN(n_neighbors=5).fit(x, y).calibrate(held_x, held_y)
    ours.fit(x + 5, y)
    with pytest.raises(NotReadyError, match="call calibrate"):
        ours.credibility(held_x)


@pytest.mark.parametrize("mapped", [False, True])
def test_calibration_is_saved_with_the_classifier(tmp_path: Path, mapped: bool) -> None:
    ours, (queries, _) = small().calibrate(*data(23, 3, 2)), data(9, 3, 3)
    ours.set_params(comparison=">", correction="conformal", layers=["4", "1"])
    ours.calibrate(*data(23, 3, 2))
    ours.save(tmp_path / "saved")
    loaded = DkNN.load(tmp_path / "saved", net(), mapped)
    assert torch.equal(loaded.calibration_, ours.calibration_)
    assert np.array_equal(loaded.predict(queries), ours.predict(queries))
    assert np.array_equal(loaded.p_values(queries), ours.p_values(queries))
    assert loaded.fingerprint() == ours.fingerprint()
    ours.set_params(n_neighbors=3)
    ours.save(tmp_path / "stale")  # a calibration that no longer holds is not taken along
    stale = load_classifier(tmp_path / "stale", net())
    assert isinstance(stale, DkNN)
    assert not stale.is_calibrated
    assert stale.fingerprint() == ours.fingerprint()


def test_one_class_has_nothing_to_confuse_it_with() -> None:
    ours = DkNN(n_neighbors=2).fit([[0.0], [1.0]], ["only", "only"]).calibrate([[0.5]], ["only"])
    assert ours.predict([[3.0]]).tolist() == ["only"]
    assert ours.credibility([[3.0]]).tolist() == [1.0]
    assert ours.confidence([[3.0]]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"comparison": "<"}, "comparison must be one of '>=', '>'"),
        ({"correction": "bonferroni"}, "correction must be one of"),
        ({"layers": ["1", "2"]}, "unknown reference layer '2'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    references = small().references
    with pytest.raises(InputError, match=message):
        DkNN(references, 5, **settings)


def test_a_layer_may_be_given_as_one_name() -> None:
    ours = DkNN(small().references, 5, layers="3")  # type: ignore[arg-type]
    assert [voter.layer for voter in ours.voters] == ["3"]
