"""The web-scale retrieval defense: weights by hand, decisions in plain NumPy, gradients by finite differences.

Dubey et al., arXiv 1903.01612: UW, CBW-E and CBW-D.
"""

from __future__ import annotations

import gc
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import succeed
from sklearn.base import clone
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.estimator_checks import check_estimator
from small import random_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robustknn import (
    KNN,
    PGD,
    Adaptive,
    FeatureExtractor,
    InputError,
    IntegrityError,
    ReferenceSet,
    RetrievalClassifier,
    ThreatModel,
    load_classifier,
)
from robustknn.attacks import Attack
from robustknn.classifiers import PayloadMean, Votes
from robustknn.classifiers.retrieval import _PREPARED, PUBLISHED, WEIGHTINGS, confidence
from robustknn.config import to_config
from robustknn.evaluation import RunDirectory, read_summary
from robustknn.evaluation.metrics import normalized_l2
from robustknn.neighbors import FaissIndex
from robustknn.objectives import Objective
from robustknn.payload import TopPayload, TopSoftmax, check_probabilities, likeliest
from robustknn.registry import attacks, objectives

Array = np.ndarray[Any, Any]


# ----------------------------------------------------------------------------------------- the weights


def entropy_weight(s: Array) -> float:
    return abs(math.log(len(s)) + sum(v * math.log(v) for v in s if v > 0))


def gap_weight(s: Array, m: int, p: float) -> float:
    ordered = sorted(s, reverse=True)
    return sum((ordered[0] - v) ** p for v in ordered[1 : min(m, len(s) - 1) + 1])


def softmaxes(n: int, classes: int, seed: int = 0, scale: float = 3.0) -> Array:
    z = scale * np.random.default_rng(seed).normal(size=(n, classes))
    e = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


@pytest.mark.parametrize(
    ("s", "weighting", "expected"),
    [
        ([0.25, 0.25, 0.25, 0.25], "entropy", 0.0),
        ([1.0, 0.0, 0.0, 0.0], "entropy", math.log(4)),  # 0 · log 0 = 0
        ([0.5, 0.5, 0.0, 0.0], "entropy", math.log(2)),
        ([0.5, 0.25, 0.25, 0.0], "entropy", math.log(4) - 1.5 * math.log(2)),
        ([0.25, 0.25, 0.25, 0.25], "gap", 0.0),
        ([0.0, 1.0, 0.0, 0.0], "gap", 3.0),
        ([0.1, 0.2, 0.6, 0.1], "gap", 0.4**3 + 2 * 0.5**3),
        ([0.1, 0.2, 0.6, 0.1], "uniform", 1.0),
        ([0.9, 0.1], "gap", 0.8**3),
    ],
)
def test_weights_by_hand(s: list[float], weighting: str, expected: float) -> None:
    assert float(confidence(torch.tensor(s, dtype=torch.float64), weighting)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 10, 20, 21, 22, 50])
@pytest.mark.parametrize(("top", "power"), [(20, 3.0), (1, 1.0), (5, 2.5)])
def test_weights_are_the_papers_in_plain_loops(classes: int, top: int, power: float) -> None:
    s = softmaxes(9, classes)
    s[0] = 0.0
    s[0, 1] = 1.0
    held = torch.from_numpy(s)
    assert confidence(held, "entropy").numpy() == pytest.approx(np.array([entropy_weight(v) for v in s]), abs=1e-12)
    expected = np.array([gap_weight(v, top, power) for v in s])
    assert confidence(held, "gap", top, power).numpy() == pytest.approx(expected, abs=1e-12)
    single = confidence(held.float(), "gap", top, power)
    assert single.dtype == torch.float64
    assert single.numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 7, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_uniform_softmax_counts_nothing_in_any_precision(classes: int, dtype: torch.dtype) -> None:
    s = torch.zeros(1, classes, dtype=torch.float64).softmax(1).to(dtype)
    for weighting in ("entropy", "gap"):
        assert float(confidence(s, weighting)) == 0.0


def test_who_is_surer_counts_more() -> None:
    t = torch.linspace(0.1, 0.9, 20, dtype=torch.float64)[:, None]
    s = torch.cat([t, (1 - t) / 4 * torch.ones(20, 4, dtype=torch.float64)], 1)
    s = s[t[:, 0] >= 0.2]
    for weighting in ("entropy", "gap"):
        assert bool((confidence(s, weighting).diff() > 0).all())


# -------------------------------------------------------------------------------------------- the rule


def votes(payload: Array, weights: Array, dtype: torch.dtype = torch.float64) -> Votes:
    w, p = torch.from_numpy(weights).to(dtype), torch.from_numpy(payload)
    return Votes(w, torch.ones_like(w), torch.zeros(w.shape, dtype=torch.int64), 3, p)


def test_scores_are_the_weighted_mean() -> None:
    payload = np.array([[[0.8, 0.1, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.0, 1.0, 0.0]]])
    weights = np.array([[1.0, 1.0, 0.0]])
    assert PayloadMean("uniform")([votes(payload, weights)], 3).numpy() == pytest.approx(
        np.array([[(0.8 + 1 / 3) / 2, (0.1 + 1 / 3) / 2, (0.1 + 1 / 3) / 2]])
    )
    for weighting in ("entropy", "gap"):  # the unsure neighbor says nothing
        assert PayloadMean(weighting)([votes(payload, weights)], 3).numpy() == pytest.approx(payload[:, 0])
    both = PayloadMean("gap")([votes(payload, np.array([[1.0, 1.0, 1.0]]))], 3).numpy()
    a, b = 2 * 0.7**3, 2.0
    assert both == pytest.approx((a * payload[:, 0] + b * payload[:, 2]) / (a + b))


def test_where_no_neighbor_is_sure_all_count_alike_and_nothing_is_not_a_number() -> None:
    payload = np.full((1, 3, 4), 0.25)
    payload[0, 2] = [0.7, 0.1, 0.1, 0.1]
    for weighting in WEIGHTINGS:
        unsure = votes(payload, np.array([[1.0, 1.0, 0.0]]))
        assert PayloadMean(weighting)([unsure], 4).numpy() == pytest.approx(np.full((1, 4), 0.25))
        none = votes(payload, np.zeros((1, 3)))
        assert PayloadMean(weighting)([none], 4).tolist() == [[0.0] * 4]
        w = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
        scores = PayloadMean(weighting)([Votes(w, w, unsure.labels, 3, unsure.payload)], 4)
        (gradient,) = torch.autograd.grad(scores[0, 0], w)
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_gradient_in_the_votes_by_finite_differences(weighting: str) -> None:
    payload = torch.from_numpy(softmaxes(24, 5).reshape(4, 6, 5))
    w = torch.rand(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    labels = torch.zeros(4, 6, dtype=torch.int64)

    def scores(w: Tensor) -> Tensor:
        return PayloadMean(weighting)([Votes(w, w, labels, 3, payload)], 5)

    assert torch.autograd.gradcheck(scores, w.requires_grad_())


def test_what_is_kept_for_a_payload_is_each_rule_s_own_and_goes_with_it() -> None:
    held = votes(softmaxes(12, 4, 5).reshape(2, 6, 4), np.ones((2, 6)))
    rules = [PayloadMean(w, 2, p) for w in WEIGHTINGS for p in (1.0, 3.0)]
    alone = [rule([votes(softmaxes(12, 4, 5).reshape(2, 6, 4), np.ones((2, 6)))], 4) for rule in rules]
    for _ in range(2):
        for rule, expected in zip(rules, alone, strict=True):
            assert torch.equal(rule([held], 4), expected)
    kept = len(_PREPARED)
    del held
    gc.collect()
    assert len(_PREPARED) == kept - 1


def test_several_voters_are_averaged_and_no_payload_is_refused() -> None:
    first = votes(softmaxes(6, 4, 1).reshape(2, 3, 4), np.ones((2, 3)))
    second = votes(softmaxes(6, 4, 2).reshape(2, 3, 4), np.ones((2, 3)))
    rule = PayloadMean("entropy")
    assert torch.allclose(rule([first, second], 4), (rule([first], 4) + rule([second], 4)) / 2)
    bare = Votes(first.weights, first.distances, first.labels, 3)
    with pytest.raises(InputError, match="build them with payload='softmax'"):
        rule([bare], 4)


# -------------------------------------------------------------------------------------- the classifier


def data(n: int = 60, seed: int = 0) -> Tensor:
    return torch.rand(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sharp_net(seed: int = 0) -> nn.Sequential:
    """The small random network with scores far apart, so that softmax vectors differ in how sure they are."""
    net = random_net(seed)
    with torch.no_grad():
        net[4].weight *= 12
    return net


def references(n: int = 60, layers: tuple[str, ...] = ("3",), seed: int = 0, **options: Any) -> ReferenceSet:
    options = {"payload": "softmax", **options}
    return ReferenceSet.build(FeatureExtractor(sharp_net(seed), layers), (data(n), torch.arange(n) % 4), **options)


def by_hand(x: Tensor, k: int, weighting: str, top: int, power: float, metric: str, n: int = 60) -> Array:
    """The class probabilities of each input, one input and one neighbor at a time."""
    net = sharp_net().double()
    with torch.no_grad():
        held, asked = net[:4](data(n)).numpy(), net[:4](x).numpy()
        s = net(data(n)).softmax(1).numpy()
    search = NearestNeighbors(n_neighbors=k, algorithm="brute", metric={"l2": "euclidean"}.get(metric, metric)).fit(
        held
    )
    result = []
    for near in search.kneighbors(asked, return_distance=False):
        weights = {
            "uniform": [1.0] * k,
            "entropy": [entropy_weight(s[j]) for j in near],
            "gap": [gap_weight(s[j], top, power) for j in near],
        }[weighting]
        result.append(sum(w * s[j] for w, j in zip(weights, near, strict=True)) / sum(weights))
    return np.array(result)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(
    ("weighting", "top", "power"), [("uniform", 20, 3), ("entropy", 20, 3), ("gap", 20, 3), ("gap", 2, 1.5)]
)
@pytest.mark.parametrize("k", [1, 7, 60])
def test_decisions_are_the_papers(k: int, weighting: str, top: int, power: float, metric: str) -> None:
    ours = RetrievalClassifier(references(), k, weighting=weighting, top=top, power=power, metric=metric)
    x = data(23, 5)
    expected = by_hand(x, k, weighting, top, power, metric)
    assert ours.scores(x).numpy() == pytest.approx(expected, abs=1e-9)
    assert ours.predict_proba(x.numpy()) == pytest.approx(expected, abs=1e-9)
    assert ours.predict_proba(x).sum(1).numpy() == pytest.approx(np.ones(23))
    assert ours.predict(x.numpy()).tolist() == expected.argmax(1).tolist()
    distances, ids = ours.kneighbors(x, 3)
    assert torch.equal(ids, KNN(references(), 3, metric=metric).kneighbors(x, return_distance=False))
    assert distances.shape == (23, 3)


def test_one_hot_vectors_make_it_a_knn() -> None:
    held = references()
    hot = ReferenceSet.from_vectors(
        held.vectors("3")[0],
        held.labels,
        features=held.features,
        payload=nn.functional.one_hot(held.labels, 4).double(),
    )
    x = data(23, 5)
    for weighting in WEIGHTINGS:
        assert torch.allclose(RetrievalClassifier(hot, 7, weighting=weighting).scores(x), KNN(held, 7).scores(x))


def test_the_papers_names_are_known_and_are_the_same_classifier() -> None:
    held, x = references(), data(9, 5)
    prints = set()
    for name, ours in PUBLISHED.items():
        first, second = RetrievalClassifier(held, 7, weighting=name), RetrievalClassifier(held, 7, weighting=ours)
        assert torch.equal(first.scores(x), second.scores(x))
        assert first.fingerprint() == second.fingerprint()
        assert first.get_params()["weighting"] == name
        prints.add(first.fingerprint())
    assert len(prints) == 3
    for other in ({"top": 5}, {"power": 2}, {"n_neighbors": 8}):
        prints.add(RetrievalClassifier(held, **{"n_neighbors": 7, "weighting": "gap", **other}).fingerprint())
    assert len(prints) == 6


# ------------------------------------------------------------------------------------------- attacks


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("targeted", [False, True])
def test_the_adaptive_gradient_by_finite_differences(weighting: str, metric: str, targeted: bool) -> None:
    victim = RetrievalClassifier(references(), 5, weighting=weighting, metric=metric)
    x = data(6, 7)
    y = victim.labels(x)
    bound = Adaptive(floor=0.1, smooth=1e-9).bind(victim)  # a hard maximum: its temperature is held fixed
    look = victim.look(x, bound.requests)
    batch = bound.start(x, y, (y + 1) % 4 if targeted else None, look)
    moved = (x + 0.01 * data(6, 8)).requires_grad_()
    assert torch.autograd.gradcheck(batch.loss, moved, atol=1e-6)
    (gradient,) = torch.autograd.grad(batch.loss(moved).sum(), moved)
    assert float(gradient.abs().amax(1).min()) > 0


def test_the_adaptive_loss_is_the_margin_of_the_hard_scores_where_votes_are_hard() -> None:
    """With a narrow bandwidth and a hard maximum the loss is that of the decision itself."""
    victim = RetrievalClassifier(references(), 5, weighting="entropy")
    x = data(20, 9)
    y = victim.labels(x)
    bound = Adaptive(floor=1e-7, reach=1e-7, smooth=1e-4).bind(victim)
    loss = bound.start(x, y, None, victim.look(x, bound.requests)).loss(x)
    scores = victim.scores(x)
    others = scores.scatter(1, y[:, None], float("-inf")).amax(1)
    expected = others - scores.gather(1, y[:, None])[:, 0]
    assert loss.detach().numpy() == pytest.approx(expected.numpy(), abs=1e-3)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_adaptive_attack_beats_the_transferred_one(weighting: str) -> None:
    victim = RetrievalClassifier(references(200), 9, weighting=weighting)
    x = data(60, 3)
    y, threat = victim.labels(x), ThreatModel("linf", 0.08)
    adaptive = PGD(Adaptive(), steps=30)(victim, x, y, threat)
    transfer = attacks.create("pgd-transfer", steps=30)(victim, x, y, threat)
    assert int(adaptive.success.sum()) > int(transfer.success.sum()) > 0
    assert torch.equal(victim.labels(adaptive.x_adv) != y, adaptive.success)


# ------------------------------------------------------------------------------ data without labels


def lacking(**options: Any) -> ReferenceSet:
    """Unlabelled references; the network calls none of them class 1."""
    net = sharp_net()
    x = data(120)
    with torch.no_grad():
        x = x[net(x).argmax(1) != 1]
    return ReferenceSet.build(FeatureExtractor(net, ["1", "3"]), x, payload="softmax", labels="payload", **options)


def test_any_images_can_be_the_database() -> None:
    x, net = data(40), sharp_net()
    features = FeatureExtractor(net, ["3"])
    with torch.no_grad():
        said = net(x).softmax(1)
    for given in (
        x,
        x.numpy(),
        (x, None),
        (x, torch.full((40,), 77)),
        DataLoader(TensorDataset(x), 7),
        TensorDataset(x),
    ):
        held = ReferenceSet.build(features, given, payload="softmax", labels="payload", batch_size=9)
        assert torch.equal(held.labels, said.argmax(1))
        assert held.n_classes == 4
        assert not held.labelled
        assert torch.allclose(held.stored_payload, said)
    plain = DataLoader(list(x), 7)  # inputs alone, no tuples
    assert torch.equal(ReferenceSet.build(features, plain, payload="softmax", labels="payload").labels, said.argmax(1))
    vectors = held.vectors("3")[0]
    assert torch.equal(ReferenceSet.from_vectors(vectors, payload=said, features=features).labels, said.argmax(1))


def test_a_class_that_is_no_label_can_be_predicted_and_attacked(tmp_path: Path) -> None:
    held = lacking()
    assert held.n_classes == 4
    assert int((held.labels == 1).sum()) == 0
    victim = RetrievalClassifier(held, 5, layer="3")
    assert victim.n_classes == 4
    x, y = data(11, 3), torch.arange(11) % 4
    assert victim.scores(x).shape == (11, 4)
    assert float(victim.scores(x)[:, 1].min()) > 0
    held.save(tmp_path / "set")
    again = ReferenceSet.load(tmp_path / "set", held.features)
    assert again.fingerprint() == held.fingerprint()
    assert (again.n_classes, again.labelled, again.labels.tolist()) == (4, False, held.labels.tolist())
    for name in (
        "adaptive",
        "ask",
        "rank-pair",
        "soft-count",
        "neighbor-hinge",
        "feature-target",
        "class-mean",
    ):
        climbed: Objective = objectives.create(name)
        attack: Attack = PGD(climbed, steps=3)
        result = attack(victim, x, y, ThreatModel("linf", 0.1))
        assert torch.equal(result.success, victim.lead(victim.scores(result.x_adv), y) < -1e-6), name
        aimed = attack(victim, x, y, ThreatModel("linf", 0.1), targets=(y + 1) % 4)
        assert bool(torch.isfinite(aimed.x_adv).all()), name


def test_labels_by_payload_need_a_payload() -> None:
    features = FeatureExtractor(sharp_net(), ["3"])
    with pytest.raises(InputError, match="references without labels need class probabilities"):
        ReferenceSet.build(features, data(), labels="payload")
    with pytest.raises(InputError, match="n_classes = 7, but the payload has 4 classes; leave it out"):
        ReferenceSet.build(features, data(), labels="payload", payload="softmax", n_classes=7)
    with pytest.raises(InputError, match="labels must be one of 'data', 'payload'"):
        ReferenceSet.build(features, data(), labels="none", payload="softmax")
    with pytest.raises(InputError, match="class 1 of 3 has no reference"):  # labels that are given are still checked
        ReferenceSet.build(features, (data(4), [0, 2, 2, 0]), payload="softmax")
    with pytest.raises(InputError, match="must yield"):
        ReferenceSet.build(
            features, DataLoader([{"x": row} for row in data(4)], 2), labels="payload", payload="softmax"
        )


# ------------------------------------------------------------------------------- the M largest numbers


def decode(values: Array, classes: Array, n_classes: int, tail: str) -> Array:
    """One row at a time."""
    rows = []
    for v, c in zip(values.astype(float), classes, strict=True):
        rest = max(0.0, 1 - v.sum()) if tail == "spread" else 0.0
        others = n_classes - len(v)
        row = np.full(n_classes, rest / others if others else 0.0)
        row[c] = v
        rows.append(row / row.sum())
    return np.array(rows)


@pytest.mark.parametrize("tail", ["spread", "drop"])
@pytest.mark.parametrize(("classes", "top"), [(4, 2), (30, 20), (30, 1), (10, 10), (5, 20), (1000, 20)])
def test_the_largest_numbers_and_the_tail(classes: int, top: int, tail: str) -> None:
    s = softmaxes(13, classes)
    held = TopPayload.encode(torch.from_numpy(s), top, tail)
    kept = min(top, classes)
    assert held.values.dtype == torch.float16
    assert held.shape == (13, classes)
    order = np.argsort(-s, 1, kind="stable")[:, :kept]
    assert np.array_equal(held.classes.numpy(), order)
    values = np.take_along_axis(s, order, 1).astype(np.float16)
    assert np.array_equal(held.values.numpy(), values)
    ids = torch.tensor([[3, -1], [12, 0]])
    rows = held.rows(ids)
    assert rows.shape == (2, 2, classes)
    expected = decode(values, order, classes, tail)
    assert rows.numpy() == pytest.approx(expected[[[3, 0], [12, 0]]], abs=1e-6)
    assert rows.sum(-1).numpy() == pytest.approx(np.ones((2, 2)), abs=1e-6)
    assert check_probabilities(held) == classes
    assert torch.equal(likeliest(held), torch.from_numpy(s.argmax(1)))
    if kept == classes:  # nothing is lost but digits
        assert held.rows(torch.arange(13)).numpy() == pytest.approx(s, abs=1e-3)


def test_a_tail_that_is_even_loses_nothing() -> None:
    s = torch.full((1, 50), 0.5 / 45, dtype=torch.float64)
    s[0, :5] = torch.tensor([0.25, 0.125, 0.0625, 0.03125, 0.03125])
    assert torch.allclose(TopPayload.encode(s, 5).rows(torch.tensor([0])).double(), s, atol=1e-7)


def test_the_more_is_kept_the_less_scores_and_decisions_change() -> None:
    x = data(200, 6)
    whole = RetrievalClassifier(references(200), 20)
    cut = [RetrievalClassifier(references(200, payload=TopSoftmax(top)), 20) for top in (1, 2, 3, 4)]
    errors = [float((c.scores(x) - whole.scores(x)).abs().mean()) for c in cut]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 1e-3 < errors[0]
    assert float((cut[3].labels(x) == whole.labels(x)).double().mean()) >= 0.99


@pytest.mark.parametrize("tail", ["spread", "drop"])
def test_what_is_cut_is_saved_searched_and_attacked(tail: str, tmp_path: Path) -> None:
    held = references(payload=TopSoftmax(2, tail), batch_size=7)
    assert isinstance(held.stored_payload, TopPayload)
    whole = TopPayload.encode(references().stored_payload, 2, tail)
    assert torch.equal(held.stored_payload.values, whole.values)
    victim = RetrievalClassifier(held, 5)
    x = data(9, 4)
    victim.save(tmp_path / "c")
    again = load_classifier(tmp_path / "c", sharp_net())
    assert again.fingerprint() == victim.fingerprint()
    assert torch.equal(again.scores(x), victim.scores(x))
    assert victim.to("cpu").fingerprint() == again.fingerprint()
    other = references(payload=TopSoftmax(2, "drop" if tail == "spread" else "spread"))
    assert other.fingerprint() != held.fingerprint()
    y = victim.labels(x)
    result = PGD(Adaptive(), steps=10)(victim, x, y, ThreatModel("linf", 0.2))
    assert int(result.success.sum()) > 0
    moved = x.clone().requires_grad_()
    bound = Adaptive(floor=0.1, smooth=1e-9).bind(victim)
    batch = bound.start(x, y, None, victim.look(x, bound.requests))
    assert torch.autograd.gradcheck(batch.loss, moved, atol=1e-6)


def test_bad_cuts() -> None:
    for bad in ({"top": 0}, {"top": 1.5}, {"tail": "even"}):
        with pytest.raises(InputError):
            TopSoftmax(**bad)
        with pytest.raises(InputError):
            TopPayload.encode(torch.ones(2, 3), **bad)
    with pytest.raises(InputError, match=r"have shape \(n, C\)"):
        TopPayload.encode(torch.ones(3))
    with pytest.raises(InputError, match="model that returns class scores"):
        TopSoftmax(2)({"a": 1})


# --------------------------------------------------------------------------------- the face, the disk


def test_scikit_learns_checks_pass() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(RetrievalClassifier(n_neighbors=5), on_fail=None, on_skip=None)
    assert len(results) > 40
    for result in results:
        reason = str(result["exception"])
        missing = result["status"] == "skipped" and ("is not installed" in reason or "SCIPY_ARRAY_API" in reason)
        assert result["status"] == "passed" or missing, (result["check_name"], reason)


def test_fit_on_raw_inputs_is_knn_and_through_a_network_the_defense() -> None:
    x, y = data(80).numpy(), np.array(["a", "b", "c", "d"])[np.arange(80) % 4]
    raw = RetrievalClassifier(n_neighbors=5).fit(x, y)
    assert raw.predict(x).tolist() == KNN(n_neighbors=5).fit(x, y).predict(x).tolist()
    features = FeatureExtractor(sharp_net(), ["3"])
    through = RetrievalClassifier(n_neighbors=5, features=features).fit(data(60).numpy(), y[:60])
    asked = data(9, 5)
    assert torch.equal(through.predict_proba(asked), RetrievalClassifier(references(), 5).predict_proba(asked))
    assert set(through.predict(asked.numpy())) <= {"a", "b", "c", "d"}
    twin = clone(through)
    assert twin.get_params() == through.get_params()
    with pytest.raises(InputError, match="have 4 classes, the references' labels 2"):
        RetrievalClassifier(n_neighbors=5, features=features).fit(data(60).numpy(), y[:60] == "a")


def test_it_is_saved_whole_and_only_with_its_model(tmp_path: Path) -> None:
    held = references(layers=("1", "3"))
    ours = RetrievalClassifier(held, 7, weighting="CBW-D", top=2, power=2, metric="cosine", layer="1")
    ours.save(tmp_path / "c")
    again = RetrievalClassifier.load(tmp_path / "c", sharp_net())
    x = data(9, 5)
    assert isinstance(again, RetrievalClassifier)
    assert torch.allclose(again.scores(x), ours.scores(x), atol=1e-12)
    assert again.fingerprint() == ours.fingerprint()
    assert (again.weighting, again.top, again.power, again.layer) == ("gap", 2, 2.0, "1")
    with pytest.raises(IntegrityError, match="made with another model"):
        RetrievalClassifier.load(tmp_path / "c", sharp_net(1))
    with pytest.raises(IntegrityError, match="holds a RetrievalClassifier, not a KNN"):
        KNN.load(tmp_path / "c", sharp_net())
    assert "weighting='CBW-D'" in repr(ours)


def test_it_searches_with_an_index_of_ones_own() -> None:
    faiss = pytest.importorskip("faiss")
    held = references()
    vectors = held.vectors("3")[0].float()
    single = ReferenceSet.build(
        FeatureExtractor(sharp_net().float(), ["3"]), (data(60).float(), torch.arange(60) % 4), payload="softmax"
    )
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(single.vectors("3")[0].numpy())
    x = data(9, 5).float()
    ours = RetrievalClassifier(single, 5, index=FaissIndex.wrap(index))
    assert torch.allclose(ours.scores(x), RetrievalClassifier(single, 5).scores(x), atol=1e-6)


# ----------------------------------------------------------------------------------------- bad input


def test_references_without_probabilities_are_refused() -> None:
    with pytest.raises(InputError, match="carry no class probabilities; build them with payload='softmax'"):
        RetrievalClassifier(references(payload=None), 5)
    with pytest.raises(InputError, match="payload of reference 0 is no probability vector"):
        RetrievalClassifier(references(payload=lambda output: output), 5)


@pytest.mark.parametrize(
    ("bad", "place"),
    [([1.5, -0.5, 0.0, 0.0], 3), ([0.2, 0.2, 0.2, 0.2], 0), ([math.nan, 0.5, 0.5, 0.0], 59), ([0.0] * 4, 7)],
)
def test_a_vector_that_is_no_probability_is_named(bad: list[float], place: int) -> None:
    held = references()
    payload = held.stored_payload.clone()
    payload[place] = torch.tensor(bad, dtype=torch.float64)
    broken = ReferenceSet.from_vectors(held.vectors("3")[0], held.labels, features=held.features, payload=payload)
    with pytest.raises(InputError, match=f"payload of reference {place} is no probability vector"):
        RetrievalClassifier(broken, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_neighbors": 61}, "n_neighbors = 61 exceeds the 60 references"),
        ({"n_neighbors": 0}, "n_neighbors must be a whole number of at least 1"),
        ({"weighting": "CBW"}, "weighting must be one of 'uniform', 'entropy', 'gap', 'UW', 'CBW-E', 'CBW-D'"),
        ({"top": 0}, "top must be a whole number of at least 1"),
        ({"power": 0}, "power must be a number above 0"),
        ({"power": math.nan}, "power must be a number above 0"),
        ({"metric": "l1"}, "metric must be one of"),
        ({"layer": "2x"}, "unknown reference layer '2x'"),
    ],
)
def test_bad_parameters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        RetrievalClassifier(references(), **{"n_neighbors": 5, **options})
    assert message in str(refused.value)


def test_several_layers_and_none_chosen() -> None:
    with pytest.raises(InputError, match=r"choose one \(layer=, --layer\)"):
        RetrievalClassifier(references(layers=("1", "3")), 5)


def test_half_precision_payload_works_and_other_shapes_do_not() -> None:
    held, x = references(), data(9, 5)
    half = references(payload=lambda output: output.softmax(1).half())
    assert torch.allclose(RetrievalClassifier(half, 5).scores(x), RetrievalClassifier(held, 5).scores(x), atol=1e-3)
    with pytest.raises(InputError, match="class probabilities are floating point"):
        check_probabilities(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(InputError, match="class probabilities are floating point"):
        check_probabilities(torch.ones(3))
    assert to_config(Adaptive(), objectives)["name"] == "adaptive"


# ------------------------------------------------------------------------- the command line, the page


def test_the_command_line_evaluates_it(tmp_path: Path) -> None:
    succeed("train", "--epochs", 3, "--lr", 2e-3, "--batch-size", 64, "--out", tmp_path / "m")
    few = ["--n", 30, "--references-per-class", 20, "--threads", 1, "--eps", 0.2, "--out", tmp_path / "r"]
    options = ["-c", "retrieval", "-c", "knn", "-k", 9, "-a", "adaptive", "--attack-option", "steps=5"]
    succeed("evaluate", "--checkpoint", tmp_path / "m", *few, *options)
    found = {c.name: c for c in read_summary(RunDirectory(tmp_path / "r")).classifiers}
    assert set(found) == {"retrieval", "knn"}
    assert found["retrieval"].clean_accuracy > 0.8
    assert found["retrieval"].attacks[0].robust_accuracy < found["retrieval"].clean_accuracy


def test_the_page_s_python_runs_as_printed() -> None:
    page = (Path(__file__).parents[1] / "docs" / "defenses" / "retrieval.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    here: dict[str, Any] = {}
    with torch.random.fork_rng():
        for block in blocks:
            exec(compile(block, "retrieval.md", "exec"), here)
    found = here["matrix"]
    rows = dict(zip(found.sources, found.accuracy, strict=True))
    column = found.targets.index("retrieval")
    clean, black, gray, white = (rows[name][column] for name in ("clean", "another network", "network", "retrieval"))
    assert clean > 0.9
    assert min(black, gray) > white + 0.05
    assert 0.1 < here["dissimilarity"] <= 0.15 + 1e-6
    assert here["changed"] < 0.05
    assert here["bits"](here["x"])["relu2"].shape == (200, 32)


def test_the_relative_size_of_a_perturbation_by_hand() -> None:
    x = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    moved = torch.tensor([[[3.0, 5.0]], [[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 1.0]]])
    for pair in ((x, moved), (x.numpy(), moved.numpy())):
        assert normalized_l2(*pair).tolist() == pytest.approx([0.2, 0.0, 0.0, math.inf])
    with pytest.raises(InputError, match="pass pairs"):
        normalized_l2(x, moved[:2])
