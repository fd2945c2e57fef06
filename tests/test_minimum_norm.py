"""The minimum-norm attack: closed forms, what it keeps, and how far the digits must move."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from small import LAYERS, digits, digits_references, random_classifier
from torch import Tensor, nn

from robustknn import KNN, DkNN, FeatureExtractor, InputError, ReferenceSet, ThreatModel, registry
from robustknn.attacks import PGD, AttackResult, MinimumNorm
from robustknn.attacks.minimum_norm import first_radius
from robustknn.classifiers import TIE, margin
from robustknn.config import to_config
from robustknn.datasets import load
from robustknn.models import DigitsCNN
from robustknn.objectives import ASK, CrossEntropy
from robustknn.threat import norm
from robustknn.training import TrainConfig, initialise, train

QUICK: dict[str, Any] = {"steps": 12, "further_steps": 6}


@pytest.fixture(scope="module")
def victim() -> dict[str, Any]:
    source, model = digits()
    references = digits_references(source, model)
    test = source.test.first(48)
    return {
        "model": model,
        "references": references,
        "x": test.batch(torch.arange(48)),
        "y": test.labels,
        "knn": KNN(references, 15, layer="relu3"),
        "dknn": DkNN(references, 15),
        "cosine": KNN(references, 15, layer="relu3", metric="cosine"),
        "k = 1": KNN(references, 1, layer="relu3"),
        "k = 75": KNN(references, 75, layer="relu3"),
    }


def everywhere(norm: str, x: Tensor) -> ThreatModel:
    threat = ThreatModel(norm)
    return threat.with_eps(threat.diameter(x))


def two_points(dtype: torch.dtype = torch.float64) -> tuple[KNN, Tensor, Tensor]:
    """One reference a class: the boundary is their bisector, x₁ = 1."""
    references = torch.tensor([[0.0, 0.0], [2.0, 0.0]], dtype=dtype)
    classifier = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (references, torch.tensor([0, 1]))), 1)
    return classifier, torch.tensor([[0.25, 0.5], [-1.0, 3.0], [0.9, 0.0]], dtype=dtype), torch.zeros(3).long()


# ------------------------------------------------------------------------------------------ closed forms


def test_the_reference_a_start_aims_at_is_an_example_itself() -> None:
    """Its cell may be smaller than the last halving of the way to it."""
    places = torch.tensor([0.0, 0.25, 0.5, 0.8999, 0.9, 0.9001, 1.0])[:, None]
    features = FeatureExtractor(nn.Identity())
    classifier = KNN(ReferenceSet.build(features, (places, (places[:, 0] == 0.9).long()), keep_images=True), 1)
    x = torch.tensor([[0.1]])
    result = MinimumNorm(starts=1)(classifier, x, torch.tensor([0]), ThreatModel("l2", 1.0))
    assert result.success.tolist() == [True]
    assert float(result.x_adv) == pytest.approx(0.9, abs=6e-5)


@pytest.mark.parametrize("which", ["linf", "l2", "l1"])
def test_one_reference_a_class_has_its_bisector_as_the_boundary(which: str) -> None:
    classifier, x, y = two_points()
    result = MinimumNorm()(classifier, x, y, ThreatModel(which, 50.0, bounds=None))
    assert bool(result.success.all())
    ratio = norm(result.x_adv - x, which) / (1 - x[:, 0])  # in every norm the least move is along the first axis
    assert float(ratio.min()) > 1
    assert float(ratio.max()) < 1.005


def test_the_first_radius_is_where_a_linear_loss_is_zero() -> None:
    gradient = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1.0, 0.0]])
    loss = torch.tensor([-10.0, -1.0, 0.0])
    for which, dual in (("l2", 5.0), ("linf", 7.0), ("l1", 4.0)):
        radius = first_radius(loss, gradient, ThreatModel(which, 1.0))
        assert radius.tolist() == [pytest.approx(10 / dual), math.inf, math.inf]


def test_the_example_lies_behind_the_boundary_by_the_overshoot() -> None:
    classifier, x, y = two_points()
    threat = ThreatModel("l2", 50.0, bounds=None)
    for overshoot in (2e-4, 1e-2):
        attack = MinimumNorm(bisections=30, overshoot=overshoot)
        moved = attack(classifier, x, y, threat).x_adv
        crossing = (1 - x[:, 0]) / (moved - x)[:, 0]  # the share of the way at which the bisector is crossed
        assert (1 / crossing).tolist() == pytest.approx([1 + overshoot] * 3, rel=1e-6)


# --------------------------------------------------------------------------------- what every attack keeps


@pytest.mark.parametrize("which", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", ["knn", "dknn", "cosine", "k = 1", "k = 75"])
def test_everything_is_fooled_and_success_is_the_hard_decision(victim: dict[str, Any], name: str, which: str) -> None:
    classifier, x, y = victim[name], victim["x"], victim["y"]
    threat = everywhere(which, x)
    result = MinimumNorm()(classifier, x, y, threat)
    assert result.x_adv.dtype == torch.float32
    assert bool(result.success.all())
    assert torch.equal(result.success, margin(classifier.scores(result.x_adv), y) < -TIE)
    assert torch.equal(result.labels, classifier.labels(result.x_adv))
    assert float(result.x_adv.min()) >= 0
    assert float(result.x_adv.max()) <= 1
    assert int(result.gradient_passes.max()) <= 60
    # half of what PGD needs at one radius for all is enough for half of them
    distance = threat.distance(result.x_adv, x)
    fixed = PGD()(classifier, x, y, threat.with_eps(float(distance.median())))
    assert float(fixed.success.double().mean()) <= 0.6


@pytest.mark.parametrize("which", ["linf", "l2", "l1"])
def test_a_small_radius_caps_the_norm(victim: dict[str, Any], which: str) -> None:
    classifier, x, y = victim["dknn"], victim["x"], victim["y"]
    free = MinimumNorm(**QUICK)(classifier, x, y, everywhere(which, x))
    least = norm(free.x_adv - x, which)
    eps = float(least.median())
    capped = MinimumNorm(**QUICK)(classifier, x, y, ThreatModel(which, eps))
    assert float(norm(capped.x_adv.double() - x.double(), which).max()) <= eps * (1 + 1e-6)
    assert torch.equal(capped.success, margin(classifier.scores(capped.x_adv), y) < -TIE)
    assert 0.2 < float(capped.success.double().mean()) < 0.9
    # the example of a sample that stands is nearer to success than the input
    standing = ~capped.success
    clean = margin(classifier.scores(x), y)
    assert bool((capped.margin[standing] <= clean[standing]).all())
    assert bool((capped.margin[standing] < clean[standing]).any())
    none = MinimumNorm(**QUICK, targets=2, starts=1, restarts=2)(classifier, x, y, ThreatModel(which, 0.0))
    assert torch.equal(none.x_adv, x)


@pytest.mark.parametrize("size", [1, 7, 9])
@pytest.mark.parametrize("which", ["linf", "l2", "l1"])
def test_batch_size_and_order_change_no_bit(victim: dict[str, Any], which: str, size: int) -> None:
    attack = MinimumNorm(steps=8, further_steps=4, targets=2, starts=2, restarts=2, check_every=2)
    x, y, ids = victim["x"][:9], victim["y"][:9], torch.arange(100, 109)
    threat = everywhere(which, x)
    whole = attack(victim["dknn"], x, y, threat, sample_ids=ids, seed=1, batch_size=64)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    parts = attack(victim["dknn"], x[order], y[order], threat, sample_ids=ids[order], seed=1, batch_size=size)
    for name in ("x_adv", "success", "margin", "gradient_passes", "forward_passes"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)[order]), name


def test_each_sample_has_its_own_radius(victim: dict[str, Any]) -> None:
    x, y = victim["x"][:20], victim["y"][:20]
    eps = torch.linspace(0, 1.5, 20)
    result = MinimumNorm(**QUICK)(victim["knn"], x, y, ThreatModel("l2", eps))
    assert bool(((result.x_adv - x).flatten(1).norm(dim=1) <= eps + 1e-6).all())
    assert 0 < int(result.success.sum()) < 20


def test_what_is_wrong_already_is_at_distance_zero(victim: dict[str, Any]) -> None:
    x, y, classifier = victim["x"], victim["y"].clone(), victim["knn"]
    y[:10] = (classifier.labels(x[:10]) + 1) % 10
    result = MinimumNorm(**QUICK)(classifier, x, y, everywhere("l2", x))
    assert torch.equal(result.x_adv[:10], x[:10])
    assert bool(result.success[:10].all())
    assert int(result.gradient_passes[:10].sum()) == 0
    assert bool((result.l2[10:] > 0).all())


@pytest.mark.parametrize("which", ["linf", "l2", "l1"])
def test_targets_are_reached_strictly_and_cost_more(victim: dict[str, Any], which: str) -> None:
    x, y, classifier = victim["x"], victim["y"], victim["knn"]
    target = (y + 1) % 10
    attack = MinimumNorm(starts=2, targets=3, further_steps=20)
    threat = everywhere(which, x)
    result = attack(classifier, x, y, threat, targets=target)
    scores = classifier.scores(result.x_adv)
    assert torch.equal(result.success, margin(scores, target) > TIE)
    assert float(result.success.double().mean()) > 0.95
    free = attack(classifier, x, y, threat)
    cost, least = threat.distance(result.x_adv, x), threat.distance(free.x_adv, x)
    assert float(cost[result.success].median()) > float(least.median())
    assert int(result.gradient_passes.max()) == 50 + 2 * 20  # it knows its class: no runs toward others
    assert int(free.gradient_passes.max()) == 50 + (3 + 2) * 20


def test_more_runs_never_end_farther_away(victim: dict[str, Any]) -> None:
    x, y, threat = victim["x"], victim["y"], everywhere("l2", victim["x"])
    one = MinimumNorm(bisections=1, overshoot=0.0)(victim["knn"], x, y, threat)
    for more in ({"targets": 3}, {"starts": 2}, {"restarts": 3}):
        result = MinimumNorm(bisections=1, overshoot=0.0, **more)(victim["knn"], x, y, threat)  # type: ignore[arg-type]
        # a bisection of one halving leaves the nearest success met, which further runs can only lower
        assert bool((result.l2 <= one.l2 + 1e-7).all())
        assert bool((result.l2 < one.l2 * 0.999).any()), more


def test_restarts_depend_on_the_seed_and_on_nothing_else(victim: dict[str, Any]) -> None:
    x, y, threat = victim["x"][:16], victim["y"][:16], everywhere("l2", victim["x"])
    attack = MinimumNorm(**QUICK, restarts=3)

    def run(seed: int) -> AttackResult:
        return attack(victim["knn"], x, y, threat, seed=seed)

    first = run(0)
    torch.rand(7)  # torch's own generator plays no part
    assert torch.equal(first.x_adv, run(0).x_adv)
    assert not torch.equal(first.x_adv, run(1).x_adv)


def test_passes_are_counted(victim: dict[str, Any]) -> None:
    x, y, threat = victim["x"], victim["y"], everywhere("l2", victim["x"])
    right = victim["knn"].labels(x) == y
    result = MinimumNorm(steps=10, check_every=4, bisections=5)(victim["knn"], x, y, threat, trace=True)
    assert bool((result.gradient_passes[right] == 10).all())
    assert bool(
        (result.forward_passes[right] == 1 + 3 + 5 + 1).all()
    )  # clean, steps 4, 8, 10, halvings, the last point
    assert [t[:2] for t in result.trace] == [(0, t) for t in range(10)]
    more = MinimumNorm(steps=10, further_steps=3, targets=2, restarts=2)(victim["knn"], x, y, threat)
    assert bool((more.gradient_passes[right] == 10 + 3 * 3).all())


# --------------------------------------------------------------------------------------- odd classifiers


@pytest.mark.parametrize(("which", "thorough"), [*itertools.product(["linf", "l2", "l1"], [False, True])])
def test_inputs_without_bounds(which: str, thorough: bool) -> None:
    classifier, x, y = random_classifier()
    x, y = x[:6], y[:6]
    attack = MinimumNorm(**QUICK, **({"targets": 3, "restarts": 2} if thorough else {}))
    result = attack(classifier, 3 * x - 1, y, ThreatModel(which, 1e6, bounds=None))
    right = result.clean_labels == y
    assert bool(result.success.all())
    assert torch.equal(norm(result.x_adv - result.x, which) == 0, ~right)
    assert float(norm(result.x_adv - result.x, which).max()) < 30  # a radius of 10⁶ leads nobody away


def test_two_classes_and_a_class_with_one_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(40, 3, generator=generator)
    threat = ThreatModel("l2", 2.0)
    for k, labels in ((3, (points[:, 0] > 0.5).long()), (1, torch.tensor([1] + [0] * 39))):
        classifier = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (points, labels)), k)
        right = classifier.labels(points) == labels
        result = registry.attacks.create("minimum-norm-thorough", **QUICK)(
            classifier, points[right], labels[right], threat
        )
        assert bool(result.success.all())
    # the bisectors of the one reference of class 1 with its neighbors bound what must be moved
    lone = points[:1]
    expected = torch.cdist(points[1:], lone)[:, 0] / 2
    assert len(result.l2) == 40
    assert bool((result.l2[1:] >= expected * 0.999).all())


def test_a_function_of_the_network_alone_can_be_the_objective(victim: dict[str, Any]) -> None:
    x, y = victim["x"], victim["y"]
    result = MinimumNorm(CrossEntropy())(victim["knn"], x, y, everywhere("l2", x))
    assert float(result.success.double().mean()) > 0.95
    assert MinimumNorm(CrossEntropy()).transfer
    assert not MinimumNorm().transfer


def test_starts_need_references_as_inputs(victim: dict[str, Any]) -> None:
    source, model = digits()
    bare = ReferenceSet.build(FeatureExtractor(model, LAYERS), source.train)
    x, y = victim["x"][:16], victim["y"][:16]
    classifier, threat = KNN(bare, 15, layer="relu3"), everywhere("l2", x)
    with pytest.raises(InputError, match="keep_images=True, or use starts=0"):
        MinimumNorm(starts=2)(classifier, x, y, threat)
    without = MinimumNorm(**QUICK, starts=None)(classifier, x, y, threat)
    assert torch.equal(without.x_adv, MinimumNorm(**QUICK)(classifier, x, y, threat).x_adv)
    known = MinimumNorm(**QUICK, starts=None)(victim["knn"], x, y, threat)
    assert int(known.gradient_passes.max()) == 12 + 8 * 6


BAD: list[tuple[dict[str, Any], str]] = [
    ({"objective": "ask"}, "must be an Objective"),
    ({"steps": 0}, "steps"),
    ({"further_steps": 0}, "further_steps"),
    ({"check_every": 0}, "check_every"),
    ({"restarts": 0}, "restarts"),
    ({"targets": -1}, "targets must be a whole number of at least 0"),
    ({"starts": 1.5}, "starts must be a whole number"),
    ({"bisections": 0}, "bisections"),
    ({"step": 0.0}, "step must be a number above 0"),
    ({"final_step": -1.0}, "final_step must be a number above 0"),
    ({"rate": 1.0}, r"rate must be a number in \(0, 1\)"),
    ({"final_rate": 0.0}, "final_rate"),
    ({"overshoot": 2.0}, "overshoot"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MinimumNorm(**options)


@pytest.mark.slow
def test_the_digits_15nn_falls_within_the_norms_stated() -> None:
    """The pinned victim of test_pinned_victim.py: medians over 100 test images, mean of five training seeds."""
    source = load("digits", protocol="published")
    medians: dict[str, list[float]] = {"minimum-norm": [], "minimum-norm-thorough": []}
    x, y = source.test.batch(torch.arange(100)), source.test.labels[:100]
    for seed in range(5):
        model = initialise(DigitsCNN, seed)
        train(model, source, TrainConfig(epochs=25, batch_size=64, lr=2e-3, seed=seed))
        references = ReferenceSet.build(FeatureExtractor(model, "relu3"), source.train, keep_images=True)
        classifier = KNN(references, 15)
        right = classifier.labels(x) == y
        for name, found in medians.items():
            attack: Any = registry.attacks.create(name)
            result = attack(classifier, x[right], y[right], everywhere("l2", x), seed=seed)
            assert bool(result.success.all())
            assert int(result.gradient_passes.max()) <= (60 if name == "minimum-norm" else 1000)
            found.append(float(result.l2.median()))
    for name, values in medians.items():  # shown by pytest -rP
        print(f"{name:22}", *(f"{value:.3f}" for value in values), f"mean {sum(values) / len(values):.3f}")
    assert sum(medians["minimum-norm"]) / 5 <= 0.67
    assert sum(medians["minimum-norm-thorough"]) / 5 <= 0.60


def test_it_is_known_by_name_and_described() -> None:
    assert registry.attacks.create("minimum-norm") == MinimumNorm()
    thorough = registry.attacks.create("minimum-norm-thorough", objective=ASK(), starts=3)
    assert (thorough.targets, thorough.starts, thorough.objective) == (9, 3, ASK())  # type: ignore[attr-defined]
    assert to_config(thorough, registry.attacks)["starts"] == 3
