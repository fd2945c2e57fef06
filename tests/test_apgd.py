"""APGD against its algorithm written out sample by sample, closed forms, and what every attack must keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from small import random_classifier
from torch import Tensor, nn

from robustknn import KNN, DkNN, FeatureExtractor, InputError, ReferenceSet, ThreatModel
from robustknn.attacks import APGD
from robustknn.attacks.apgd import checkpoints, sparse_step
from robustknn.classifiers import TIE, Classifier, Look, margin
from robustknn.objectives import ASK, DLR, BatchObjective, BoundObjective, CrossEntropy, LogitMargin, Objective
from robustknn.objectives.class_scores import ClassScores

Array = np.ndarray[Any, Any]
CURVATURE = torch.tensor([1.0, 30.0, 0.3, 8.0, 100.0, 3.0, 0.1, 50.0] * 4, dtype=torch.float64)
DIM = len(CURVATURE)
EPS = {"linf": 0.1, "l2": 0.3, "l1": 0.6}


# ------------------------------------------------------------------ a problem in which every step can be followed


class Recorder(Classifier):
    """Decides for class 0 whatever comes, and keeps what it was asked."""

    n_classes = 2

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        self.seen.append(x.clone())
        return torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(len(x), 2)

    def fingerprint(self) -> str:
        return "recorder"


@dataclass(frozen=True)
class Bowl(Objective):
    """−Σ a_i (x_i − c_i)², whose goal c moves at every update, as a loss does when neighbors are looked up anew."""

    shift: float = 0.0

    def bind(self, classifier: Classifier) -> BoundObjective:
        return BoundBowl(self.shift)


class BoundBowl(BoundObjective):
    def __init__(self, shift: float) -> None:
        self.shift = shift

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return BatchBowl(goals(x), self.shift)


class BatchBowl(BatchObjective):
    def __init__(self, goal: Tensor, shift: float) -> None:
        self.goal, self.shift = goal, shift

    def loss(self, x: Tensor) -> Tensor:
        return -(CURVATURE * (x - self.goal) ** 2).sum(1)

    def update(self, kept: Tensor | None, look: Look | None) -> None:
        self.goal = self.goal + self.shift


def goals(x: Tensor) -> Tensor:
    """Some goals inside the ball, some outside, in other directions for every sample."""
    turn = torch.arange(len(x), dtype=x.dtype)[:, None] + torch.arange(DIM, dtype=x.dtype)
    return x + 0.02 * (1 + torch.arange(len(x), dtype=x.dtype)[:, None]) * torch.sin(1.7 * turn)


def project(z: Array, x0: Array, norm: str, eps: float) -> Array:
    delta = z - x0
    if norm == "linf":
        return x0 + np.clip(delta, -eps, eps)
    if norm == "l2":
        return x0 + delta * min(1.0, eps / max(float(np.linalg.norm(delta)), 1e-300))
    if np.abs(delta).sum() <= eps:
        return z
    low, high = 0.0, float(np.abs(delta).max())  # the soft threshold, by bisection
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(np.abs(delta) - middle, 0).sum() > eps else (low, middle)
    return x0 + np.sign(delta) * np.maximum(np.abs(delta) - high, 0)


def gradient_step(g: Array, norm: str, count: int) -> Array:
    if norm == "linf":
        return np.sign(g)
    if norm == "l2":
        return g / np.linalg.norm(g)
    step = np.zeros_like(g)
    largest = np.argsort(-np.abs(g))[:count]
    step[largest] = np.sign(g[largest]) / count
    return step


def by_hand(
    x0: Array, c: Array, norm: str, eps: float, steps: int, shift: float, refresh: bool
) -> tuple[list[Array], list[bool]]:
    """The points at which each step ends (after going back), the best one last, and the verdicts at checkpoints.

    Algorithm 1 of arXiv 2003.01690 and of arXiv 2103.01208, one sample; with `refresh` c moves at checkpoints, where
    the sample goes on from its best point.
    """
    curvature, d = CURVATURE.numpy(), len(x0)

    def f(z: Array) -> float:
        return -float((curvature * (z - c) ** 2).sum())

    def slope(z: Array) -> Array:
        return np.asarray(-2 * curvature * (z - c))

    marks, share, gap = [0], 0.22, 0.22
    while norm != "l1" and share < 1:
        marks.append(math.ceil(round(share * steps, 6)))
        gap = max(gap - 0.03, 0.06)
        share += gap
    if norm == "l1":
        marks = list(range(0, steps, math.ceil(0.04 * steps)))
    eta = eps if norm == "l1" else 2 * eps
    count, support = max(1, int(0.2 * d)), float(d)
    points, verdicts = [], []
    x, best, before = x0, x0, None
    earlier, halved, rises = f(x0), False, 0
    for t in range(1, steps + 1):
        z = project(x + eta * gradient_step(slope(x), norm, count), x0, norm, eps)
        if norm != "l1" and before is not None:
            z = project(x + 0.75 * (z - x) + 0.25 * (x - before), x0, norm, eps)
        rises += f(z) > f(x)
        before, x = x, z
        if t < steps and f(x) > f(best):
            best = x
        if t < steps and t in marks:
            if norm == "l1":
                now = float((np.abs(best - x0) > 1e-6 * np.abs(best - x0).max()).sum())
                back = now < 0.95 * support
                eta = eps if back else max(eta / 1.5, eps / 10)
                count, support = max(1, int(now) * 2 // 3), now
            else:
                since = t - marks[marks.index(t) - 1]
                back = rises < 0.75 * since or (not halved and f(best) == earlier)
                eta = eta / 2 if back else eta
                halved, rises = back, 0
            verdicts.append(back)
            x = best if back or refresh else x
            if refresh:
                c = c + shift
            earlier = f(best)
        points.append(x)
    return [*points, best], verdicts


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("steps", [10, 40])
@pytest.mark.parametrize("norm", EPS)
def test_every_point_is_that_of_the_algorithm(norm: str, steps: int, refresh: bool) -> None:
    n, shift = 16, 0.01 if refresh else 0.0  # 16 rows: not padded
    x = torch.rand(n, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    looks, verdicts = [], []
    for i in range(n):
        path, said = by_hand(x[i].numpy(), goals(x)[i].numpy(), norm, EPS[norm], steps, shift, refresh)
        looks.append(path)
        verdicts.append(said)
    at_marks = APGD(Bowl(shift), steps=steps, check_every=1000, refresh=refresh)
    always = APGD(Bowl(), steps=steps, check_every=1, refresh=False)
    threat, y = ThreatModel(norm, EPS[norm], bounds=None), torch.zeros(n, dtype=torch.int64)
    recorder = Recorder()
    (at_marks if refresh else always)(recorder, x, y, threat)
    seen = recorder.seen[1:]  # the first look is at the inputs
    if refresh:
        every = -(-4 * steps // 100)
        marks = range(every, steps, every) if norm == "l1" else [m for m in checkpoints(steps) if m < steps]
        expected = [[path[m - 1] for m in marks] + path[-2:] for path in looks]
    else:
        expected = looks
    assert len(seen) == len(expected[0])
    for i in range(n):
        for t, point in enumerate(expected[i]):
            assert np.allclose(seen[t][i].numpy(), point, atol=1e-9), (i, t)
    said = {verdict for sample in verdicts for verdict in sample}
    assert said == {True, False}  # both happen
    assert len({tuple(v) for v in verdicts}) > 1  # and not to all samples alike


def test_the_step_is_halved_by_either_condition() -> None:
    x = torch.zeros(3, 2, dtype=torch.float64)
    start = torch.tensor([10.0, 0.0, 0.0], dtype=torch.float64)
    path = APGD()._path(ThreatModel("linf", 1.0, bounds=None), x, x, start, x)

    def go(*losses: list[float]) -> list[float]:
        for values in zip(*losses, strict=True):
            path.take(torch.tensor(values, dtype=torch.float64), x)
        path.adapt(4)
        return path.size.tolist()

    # Three rises of four are enough. The first sample rises but never to where it was, the second to new heights,
    # the third rises twice.
    assert go([0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 1, 0]) == [1.0, 2.0, 1.0]
    assert path.loss.tolist() == [10.0, 3.0, 2.0]  # back at the best point, or not
    assert go([0, 1, 2, 3], [2, 3, 4, 5], [1, 0, 3, 4]) == [1.0, 2.0, 0.5]  # never twice because the best stays
    assert go([4, 5, 6, 7], [6, 7, 8, 9], [5, 6, 7, 8]) == [0.5, 2.0, 0.5]
    path.renew(torch.tensor([5.0, 5.0, 5.0], dtype=torch.float64), x)
    assert go([0, 1, 2, 3], [6, 7, 8, 9], [0, 1, 2, 3]) == [0.5, 2.0, 0.25]  # the best is measured anew
    assert go([0, 1, 2, 3], [6, 7, 8, 9], [0, 1, 2, 3]) == [0.25, 1.0, 0.25]  # 9 again is no new height


def test_checkpoints_are_those_of_the_paper() -> None:
    assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
    assert checkpoints(1000) == (220, 410, 570, 700, 800, 870, 930, 990)
    assert checkpoints(1) == (1,)


# ---------------------------------------------------------------------------------------------- closed forms


def line(seed: int = 0) -> tuple[KNN, Tensor, Tensor, Tensor]:
    """A 1-NN that decides as a linear network does between two classes; a third one is out of reach.

    Returns: the classifier, inputs (20, 10), classes, and w₀ − w₁.
    """
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(10, 3).double())
    with torch.no_grad():
        net[0].weight[2] = 0
        net[0].bias[2] = -5
    weight, bias = net[0].weight.detach(), net[0].bias.detach()
    goal = torch.tensor([[10.0, 0.0, -5.0], [0.0, 10.0, -5.0], [-1e3, -1e3, -5.0]], dtype=torch.float64)
    vectors = (goal - bias) @ torch.linalg.pinv(weight).T
    classifier = KNN(ReferenceSet.build(FeatureExtractor(net, "0"), (vectors, torch.arange(3))), 1)
    x = torch.randn(20, 10, dtype=torch.float64)
    y = net(x)[:, :2].argmax(1)
    assert torch.equal(classifier.labels(x), y)
    return classifier, x, y, (weight[0] - weight[1])


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("objective", [CrossEntropy(), LogitMargin(), DLR(), ASK()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("norm", EPS)
def test_a_linear_network_is_broken_at_its_distance_and_not_before(
    norm: str, objective: Objective, targeted: bool
) -> None:
    classifier, x, y, w = line()
    logits = classifier.extractor.logits(x).detach()
    dual = {"linf": w.abs().sum(), "l2": w.norm(), "l1": w.abs().max()}[norm]
    radius = (logits[:, 0] - logits[:, 1]).abs() / dual
    targets = 1 - y if targeted else None
    for factor, wins in ((0.9999, 0), (1.002, 20)):
        threat = ThreatModel(norm, radius * factor, bounds=None)
        result = APGD(objective, steps=60)(classifier, x, y, threat, targets=targets)
        assert int(result.success.sum()) == wins, factor


def test_sparse_steps_take_the_largest_coordinates_with_room() -> None:
    gradient = torch.tensor([[3.0, -2.0, 1.0, 0.5], [3.0, -2.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.5, 0.0]])
    x = torch.tensor([[0.5, 0.5, 0.5, 0.5], [1.0, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
    step = sparse_step(gradient, x, ThreatModel("l1", 1.0), torch.tensor([2, 2, 2, 0]))
    expected = [[0.5, -0.5, 0.0, 0.0], [0.0, -0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]
    assert step.tolist() == expected  # the last one takes one coordinate, and both of two equal ones


# --------------------------------------------------------------------------------------- what it must keep


def victim() -> tuple[DkNN, Tensor, Tensor]:
    """A DkNN on a network whose widths are multiples of 4, after which no bit depends on a row's place (MKL)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x = torch.rand(92, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(92) % 4
    return DkNN(ReferenceSet.build(FeatureExtractor(net, ["1", "3"]), (x[:80], y[:80])), 5), x[80:], y[80:]


ATTACKS: dict[str, APGD] = {
    "plain": APGD(steps=15, check_every=4),
    "restarts": APGD(steps=8, restarts=3, check_every=3),
    "random": APGD(steps=8, start="random"),
    "keeps neighbors": APGD(steps=12, refresh=False),
    "cross-entropy": APGD(CrossEntropy(), steps=8),
    "dlr": APGD(DLR(), steps=8, start="random", momentum=0.0),
}


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("name", ATTACKS)
def test_promises(name: str, norm: str, bounds: tuple[float, float] | None) -> None:
    attack, (classifier, x, y) = ATTACKS[name], victim()
    eps = torch.linspace(0, EPS[norm], len(x))
    threat = ThreatModel(norm, eps, bounds)
    whole = attack(classifier, x, y, threat, seed=3)
    assert bool((threat.distance(whole.x_adv, x) <= eps.double() * (1 + 1e-6)).all())
    if bounds is not None:
        assert bool(((whole.x_adv >= 0) & (whole.x_adv <= 1)).all())
    scores = classifier.scores(whole.x_adv)
    assert torch.equal(whole.success, margin(scores, y) < -TIE)
    assert torch.equal(whole.labels, classifier.labels(whole.x_adv))
    assert torch.equal(whole.x_adv[0], x[0])  # eps = 0
    assert torch.equal(attack(classifier, x, y, threat, seed=3).x_adv, whole.x_adv)
    order = torch.tensor([4, 2, 0, 1, 3, 11, 9, 10, 8, 6, 7, 5])
    for size in (1, 7, 12):
        parts = attack(classifier, x[order], y[order], threat.select(order), sample_ids=order, seed=3, batch_size=size)
        assert torch.equal(parts.x_adv, whole.x_adv[order])
        assert torch.equal(parts.gradient_passes, whole.gradient_passes[order])
        assert torch.equal(parts.forward_passes, whole.forward_passes[order])


@pytest.mark.parametrize("make", [lambda r: APGD(steps=6, restarts=r), lambda r: APGD(DLR(), steps=6, restarts=r)])
def test_more_restarts_never_do_worse_and_seeds_differ(make: Callable[[int], APGD]) -> None:
    classifier, x, y = random_classifier()
    threat = ThreatModel("linf", 0.05)
    few, more = make(1)(classifier, x, y, threat), make(4)(classifier, x, y, threat)
    assert bool((more.margin <= few.margin).all())
    assert not bool(few.success.all())
    for seed in (0, 1):
        again = [replace(make(1), start="random")(classifier, x, y, threat, seed=s).x_adv for s in (seed, 0)]
        assert torch.equal(*again) == (seed == 0)


def test_passes_are_counted() -> None:
    classifier, x, y = random_classifier()
    tiny, right = ThreatModel("linf", 1e-9), classifier.labels(x) == y
    x, y = x[right], y[right]
    result = APGD(steps=40, restarts=2, check_every=1000)(classifier, x, y, tiny)
    assert bool((result.gradient_passes == 80).all())
    assert bool(
        (result.forward_passes == 1 + 2 * (7 * 2 + 2)).all()
    )  # 7 checkpoints: a loss and a look; two at the end
    result = APGD(CrossEntropy(), steps=40, check_every=10)(classifier, x, y, tiny)
    assert bool((result.gradient_passes == 40).all())
    assert bool((result.forward_passes == 1 + 7 + 3 + 2).all())  # every 10 steps, of which the last is the end
    assert (int(APGD(steps=1)(classifier, x, y, tiny).gradient_passes.max())) == 1


def test_targets_are_reached_strictly() -> None:
    classifier, x, y = random_classifier(k=1)
    target = (y + 1) % 4
    result = APGD(steps=30)(classifier, x, y, ThreatModel("linf", 0.5), targets=target)
    assert torch.equal(result.success, margin(classifier.scores(result.x_adv), target) > TIE)
    assert float(result.success.double().mean()) > 0.7


def test_transfer_objectives_keep_to_the_plain_algorithm() -> None:
    classifier, x, y = random_classifier()
    threat = ThreatModel("linf", 0.05)
    a, b = (APGD(CrossEntropy(), steps=20, refresh=r)(classifier, x, y, threat).x_adv for r in (True, False))
    assert torch.equal(a, b)
    assert isinstance(CrossEntropy(), ClassScores)


def test_bad_settings_are_refused() -> None:
    for options, message in (
        ({"step": 0.0}, "step must be a number above 0"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\)"),
        ({"rho": 1.5}, r"rho must be a number in \[0, 1\]"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"start": "warm"}, "start must be one of"),
        ({"objective": "ask"}, "must be an Objective"),
    ):
        with pytest.raises(InputError, match=message):
            APGD(**options)  # type: ignore[arg-type]
