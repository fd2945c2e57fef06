"""Attacks against loops written out by hand, the exact optimum of 1-NN, and what every attack must keep."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from small import LAYERS, digits, digits_references
from torch import Tensor, nn

from robustknn import KNN, DkNN, FeatureExtractor, InputError, ReferenceSet, ThreatModel, registry
from robustknn.attacks import BIM, FGSM, PGD, Attack, AttackResult, DecisionAttack, GradientAttack, Suite
from robustknn.classifiers import TIE, Classifier, margin
from robustknn.objectives import ASK, CrossEntropy
from robustknn.recipes import ask_published, pgd_transfer

RADII = {"linf": 0.1, "l2": 0.7, "l1": 3.0}


@pytest.fixture(scope="module")
def victim() -> dict[str, Any]:
    source, model = digits()
    references = digits_references(source, model)
    test = source.test.first(64)
    x, y = test.batch(torch.arange(64)), test.labels
    return {
        "model": model,
        "references": references,
        "x": x,
        "y": y,
        "knn": KNN(references, 15, layer="relu3"),
        "dknn": DkNN(references, 15),
        "cosine": DkNN(references, 15, metric="cosine"),
    }


ATTACKS: dict[str, GradientAttack] = {
    "fgsm": FGSM(),
    "bim": BIM(steps=5),
    "pgd": PGD(steps=12, check_every=5),
    "pgd restarts": PGD(steps=6, restarts=3, check_every=3),
    "pgd random constant": PGD(steps=6, start="random", schedule="constant", momentum=0.0, step=0.3),
    "pgd keeps neighbors": PGD(steps=12, check_every=4, refresh=False),
    "instance-wise": PGD(ASK("instance-wise"), steps=5),
    "published": ask_published(steps=6),
    "transfer": pgd_transfer(steps=6),
    "fgsm-transfer": FGSM(CrossEntropy()),
}


# ------------------------------------------------------------------------------- what every attack keeps


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("classifier", ["knn", "dknn", "cosine"])
@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_keeps_its_promises(victim: dict[str, Any], name: str, classifier: str, norm: str) -> None:
    model, x, y = victim[classifier], victim["x"], victim["y"]
    threat = ThreatModel(norm, RADII[norm])
    result = ATTACKS[name](model, x, y, threat, seed=3)
    # inside the threat model, dtype and shape kept, the input untouched
    assert result.x_adv.shape == x.shape
    assert result.x_adv.dtype == x.dtype
    assert float(threat.distance(result.x_adv, x).max()) <= RADII[norm] + 1e-6
    assert float(result.x_adv.min()) >= 0
    assert float(result.x_adv.max()) <= 1
    # success is the hard decision of the classifier on the example returned, a strict win
    scores = model.scores(result.x_adv)
    assert torch.equal(model.labels(result.x_adv), result.labels)
    assert torch.allclose(margin(scores, y), result.margin)
    assert torch.equal(result.success, margin(scores, y) < -TIE)
    assert bool((result.labels[result.success] != y[result.success]).all())
    assert torch.equal(result.clean_labels, model.labels(x))
    # the distances it reports
    delta = (result.x_adv - x).flatten(1)
    assert torch.allclose(result.l2, delta.norm(dim=1))
    assert torch.allclose(result.linf, delta.abs().amax(1))


@pytest.mark.parametrize(
    ("name", "size", "threads"),
    [
        *itertools.product(
            ("pgd", "pgd restarts", "pgd random constant", "instance-wise", "published", "transfer"), (1, 7, 64), (1,)
        ),
        ("pgd", 7, 2),
        ("transfer", 64, 2),
    ],
)
def test_batch_size_order_and_threads_change_no_bit(victim: dict[str, Any], name: str, size: int, threads: int) -> None:
    attack, threat = ATTACKS[name], ThreatModel("linf", 0.1)
    n = 64 if size == 64 else 20
    x, y, ids = victim["x"][:n], victim["y"][:n], torch.arange(100, 100 + n)
    whole = attack(victim["dknn"], x, y, threat, sample_ids=ids, seed=1, batch_size=n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(threads)
    try:
        parts = attack(victim["dknn"], x[order], y[order], threat, sample_ids=ids[order], seed=1, batch_size=size)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(parts.x_adv, whole.x_adv[order])
    assert torch.equal(parts.success, whole.success[order])
    assert torch.equal(parts.gradient_passes, whole.gradient_passes[order])


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("name", ATTACKS)
def test_radius_zero_changes_nothing(victim: dict[str, Any], name: str, norm: str) -> None:
    x, y = victim["x"][:20], victim["y"][:20]
    result = ATTACKS[name](victim["knn"], x, y, ThreatModel(norm, 0.0))
    assert torch.equal(result.x_adv, x)


@pytest.mark.parametrize("norm", RADII)
def test_the_whole_box_breaks_the_classifier(victim: dict[str, Any], norm: str) -> None:
    x, y = victim["x"], victim["y"]
    threat = ThreatModel(norm, 1.0)
    for name in ("knn", "dknn", "cosine"):
        result = PGD(steps=40, restarts=2)(victim[name], x, y, threat.with_eps(threat.diameter(x)))
        assert float(result.success.double().mean()) >= 0.99


def test_each_sample_has_its_own_radius(victim: dict[str, Any]) -> None:
    x, y = victim["x"], victim["y"]
    eps = torch.linspace(0, 0.15, len(x))
    result = PGD(steps=6)(victim["knn"], x, y, ThreatModel("linf", eps))
    assert bool((result.linf <= eps + 1e-6).all())
    alone = PGD(steps=6)(
        victim["knn"], x[40:41], y[40:41], ThreatModel("linf", float(eps[40])), sample_ids=torch.tensor([40])
    )
    assert torch.equal(alone.x_adv[0], result.x_adv[40])


def test_more_restarts_never_do_worse_and_seeds_differ(victim: dict[str, Any]) -> None:
    x, y, threat = victim["x"], victim["y"], ThreatModel("linf", 0.08)
    few = PGD(steps=5, restarts=1)(victim["knn"], x, y, threat)
    more = PGD(steps=5, restarts=4)(victim["knn"], x, y, threat)
    assert bool((more.success | ~few.success).all())
    assert bool((more.margin <= few.margin + 1e-12).all())
    a = PGD(steps=3, start="random")(victim["knn"], x, y, threat, seed=0)
    b = PGD(steps=3, start="random")(victim["knn"], x, y, threat, seed=1)
    again = PGD(steps=3, start="random")(victim["knn"], x, y, threat, seed=0)
    assert torch.equal(a.x_adv, again.x_adv)
    assert not torch.equal(a.x_adv, b.x_adv)


def test_targets_are_reached_strictly(victim: dict[str, Any]) -> None:
    x, y, model = victim["x"], victim["y"], victim["knn"]
    target = (y + 1) % 10
    result = PGD(steps=30)(model, x, y, ThreatModel("linf", 0.5), targets=target)
    assert float(result.success.double().mean()) > 0.9
    assert bool((result.labels[result.success] == target[result.success]).all())
    scores = model.scores(result.x_adv)
    assert torch.equal(result.success, margin(scores, target) > TIE)
    head = PGD(CrossEntropy(), steps=30, keep="last")(model, x, y, ThreatModel("linf", 0.5), targets=target)
    reached = victim["model"](head.x_adv).argmax(1) == target
    assert float(reached.double().mean()) > 0.9


def test_what_is_wrong_already_is_left_as_it_is(victim: dict[str, Any]) -> None:
    x, y, model = victim["x"], victim["y"], victim["knn"]
    wrong = (model.labels(x) + 1) % 10
    result = PGD(steps=10)(model, x, wrong, ThreatModel("linf", 0.1))
    assert bool(result.success.all())
    assert torch.equal(result.x_adv, x)
    assert int(result.gradient_passes.sum()) == 0
    assert bool((result.forward_passes == 1).all())
    assert not torch.equal(y, wrong)


def test_passes_are_counted(victim: dict[str, Any]) -> None:
    x, y, model = victim["x"], victim["y"], victim["knn"]
    tiny = ThreatModel("linf", 1e-4)
    result = PGD(steps=20, check_every=5, restarts=2)(model, x, y, tiny)
    standing = ~result.success
    assert bool((result.gradient_passes[standing] == 40).all())
    assert bool((result.forward_passes[standing] == 1 + 4 + 4).all())
    last = pgd_transfer(steps=7)(model, x, y, tiny)
    assert bool((last.gradient_passes == 7).all())
    assert bool((last.forward_passes == 2).all())
    one = FGSM()(model, x[:1], y[:1], tiny)  # a batch of one is padded, and still costs one pass
    assert (int(one.gradient_passes), int(one.forward_passes)) == (1, 2)


def test_the_trace_shows_the_loss_rising(victim: dict[str, Any]) -> None:
    result = PGD(steps=10, keep="last")(victim["knn"], victim["x"], victim["y"], ThreatModel("linf", 0.1), trace=True)
    assert [t[:2] for t in result.trace] == [(0, t) for t in range(10)]
    assert result.trace[-1][2] > result.trace[0][2]


# --------------------------------------------------------------------------------- loops written by hand


def test_transfer_pgd_equals_a_bare_loop(victim: dict[str, Any]) -> None:
    model, x, y = victim["model"], victim["x"], victim["y"]
    attack = PGD(
        CrossEntropy(), steps=10, absolute_step=0.02, schedule="constant", momentum=0.0, start="clean", keep="last"
    )
    result = attack(victim["knn"], x, y, ThreatModel("linf", 0.1))
    z = x.clone()
    for _ in range(10):
        z.requires_grad_(True)
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(z), y, reduction="sum"), z)
        z = (x + (z.detach() + 0.02 * g.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
    assert torch.equal(result.x_adv, z)


def test_fgsm_and_bim_equal_their_equations(victim: dict[str, Any]) -> None:
    model, x, y = victim["model"], victim["x"], victim["y"]
    z = x.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(z), y, reduction="sum"), z)
    threat = ThreatModel("linf", 0.07)
    assert torch.allclose(
        FGSM(CrossEntropy())(victim["knn"], x, y, threat).x_adv, (x + 0.07 * g.sign()).clamp(0, 1), atol=1e-7
    )
    z = x.clone()
    for _ in range(4):
        z = z.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(z), y, reduction="sum"), z)
        z = torch.minimum(torch.maximum(z.detach() + 0.02 * g.sign(), x - 0.07), x + 0.07).clamp(0, 1)
    got = BIM(CrossEntropy(), steps=4, absolute_step=0.02)(victim["knn"], x, y, threat).x_adv
    assert torch.allclose(got, z, atol=1e-6)


def test_momentum_and_cosine_schedule_equal_their_equations(victim: dict[str, Any]) -> None:
    model, x, y = victim["model"], victim["x"], victim["y"]
    steps, eps = 9, 0.1
    attack = PGD(CrossEntropy(), steps=steps, keep="last", refresh=False)
    result = attack(victim["knn"], x, y, ThreatModel("linf", eps))
    z, before = x, x
    for t in range(steps):
        leaf = z.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        step = 0.005 * eps + (0.5 * eps - 0.005 * eps) * (1 + np.cos(np.pi * t / (steps - 1))) / 2
        moved = (x + (z + step * g.sign() - x).clamp(-eps, eps)).clamp(0, 1)
        after = z + 0.75 * (moved - z) + 0.25 * (z - before)
        z, before = (x + (after - x).clamp(-eps, eps)).clamp(0, 1), z
    assert torch.allclose(result.x_adv, z, atol=1e-6)


# ---------------------------------------------------------------------------------- the exact optimum


def exact_radius(
    x: np.ndarray[Any, Any], y: int, references: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]
) -> float:
    """The least L2 move after which the nearest reference has another label.

    For each negative n: the shortest δ with ⟨2(n − p), δ⟩ ≥ ‖x − n‖² − ‖x − p‖² for every positive p, a least
    distance problem solved exactly by non-negative least squares (Lawson & Hanson, 1974, ch. 23).
    """
    positives, best = references[labels == y], np.inf
    for negative in references[labels != y]:
        g = 2 * (negative - positives)
        h = ((x - negative) ** 2).sum() - ((x - positives) ** 2).sum(1)
        system = np.vstack([g.T, h])
        target = np.append(np.zeros(len(x)), 1.0)
        solution, _ = nnls(system, target)
        residual = system @ solution - target
        if residual[-1] < -1e-12:
            delta = -residual[:-1] / residual[-1]
            assert (g @ delta - h).min() > -1e-8
            best = min(best, float(np.linalg.norm(delta)))
    return best


@pytest.mark.parametrize(("dim", "seed"), [(2, 0), (4, 1), (8, 2)])
def test_pgd_reaches_the_exact_distance_of_1nn_and_never_beats_it(dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.tensor([[0.0] * dim, [1.0] + [0.0] * (dim - 1), [0.0] * (dim - 1) + [1.2]], dtype=torch.float64)
    labels = torch.arange(24) % 3
    vectors = centers[labels] + 0.25 * torch.randn(24, dim, generator=generator, dtype=torch.float64)
    y = torch.arange(30) % 3
    x = centers[y] + 0.2 * torch.randn(30, dim, generator=generator, dtype=torch.float64)
    classifier = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (vectors, labels)), 1)
    right = classifier.labels(x) == y
    x, y = x[right], y[right]
    radius = torch.tensor(
        [exact_radius(x[i].numpy(), int(y[i]), vectors.numpy(), labels.numpy()) for i in range(len(x))]
    )
    threat = ThreatModel("l2", 1.0, bounds=None)
    inside, outside = torch.zeros(len(x), dtype=torch.bool), torch.zeros(len(x), dtype=torch.bool)
    for k in (1, 3):
        for shift in (None, 1, 2):  # any wrong class, and each of the two
            targets = None if shift is None else (y + shift) % 3
            attack = PGD(ASK(n_neighbors=k), steps=40, check_every=1, restarts=6)
            inside |= attack(classifier, x, y, threat.with_eps(radius * 0.9999), targets=targets).success
            outside |= attack(classifier, x, y, threat.with_eps(radius * 1.02), targets=targets).success
    assert not bool(inside.any())  # nobody wins inside the exact radius
    assert float(outside.double().mean()) >= 0.95  # and the way just outside is found


def test_one_reference_a_class_has_the_bisector_as_its_boundary() -> None:
    p, n = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    classifier = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (torch.cat([p, n]), torch.tensor([0, 1]))), 1)
    x, y = torch.tensor([[0.25, 0.5], [-1.0, 3.0]]), torch.tensor([0, 0])
    bisector = ((x - n) ** 2).sum(1) - ((x - p) ** 2).sum(1)
    radius = bisector / (2 * (p - n).norm())
    assert radius.tolist() == pytest.approx([0.75, 2.0])
    for factor, wins in ((0.999, False), (1.001, True)):
        eps = radius * factor
        result = PGD(steps=60)(classifier, x, y, ThreatModel("l2", eps, bounds=None))
        assert result.success.tolist() == [wins, wins]


# ------------------------------------------------------------------------------------------ gradients


def test_zero_gradients_are_reported(victim: dict[str, Any]) -> None:
    x, y, threat = victim["x"], victim["y"], ThreatModel("linf", 0.1)
    assert not bool(PGD(steps=2)(victim["knn"], x, y, threat).zero_gradient.any())
    saturated = ask_published(steps=2)(victim["knn"], x, y, threat)
    assert float(saturated.zero_gradient.double().mean()) > 0.5


def test_a_gradient_that_is_not_finite_counts_as_none() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.sqrt((x - x.detach()).abs())  # the value is x, the gradient infinite or NaN

    x, y = torch.rand(20, 3), torch.arange(20) % 2
    classifier = KNN(ReferenceSet.build(FeatureExtractor(Broken()), (x, y)), 1)
    result = PGD(steps=3)(classifier, x + 0.01, y, ThreatModel("linf", 0.01, bounds=None))
    assert bool(result.zero_gradient.all())
    assert bool(torch.isfinite(result.x_adv).all())


# ------------------------------------------------------------------------------------- other inputs


@pytest.mark.parametrize("shape", [(6,), (2, 9), (3, 4, 4), (2, 3, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors_series_images_and_volumes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    size = int(np.prod(shape))
    net = nn.Sequential(nn.Flatten(), nn.Linear(size, 7), nn.ReLU(), nn.Linear(7, 3)).to(dtype)
    x = torch.rand(60, *shape, generator=generator, dtype=dtype)
    y = torch.arange(60) % 3
    classifier = DkNN(ReferenceSet.build(FeatureExtractor(net, ["1", "2", "3"]), (x, y)), 5)
    for norm, attack in itertools.product(RADII, (PGD(steps=4, start="random"), pgd_transfer(steps=3))):
        for n in (1, 7):
            result = attack(classifier, x[:n], y[:n], ThreatModel(norm, 0.05))
            assert result.x_adv.shape == (n, *shape)
            assert result.x_adv.dtype == dtype
            assert float(ThreatModel(norm, 0.05).distance(result.x_adv, x[:n]).max()) <= 0.05 + 1e-6


def test_attacks_work_where_gradients_are_switched_off(victim: dict[str, Any]) -> None:
    x, y, threat = victim["x"][:20], victim["y"][:20], ThreatModel("linf", 0.1)
    victim["model"].zero_grad(set_to_none=True)  # what training left there
    with torch.no_grad():
        off = PGD(steps=4)(victim["knn"], x, y, threat)
    assert torch.equal(off.x_adv, PGD(steps=4)(victim["knn"], x, y, threat).x_adv)
    assert not x.requires_grad
    assert all(p.grad is None for p in victim["model"].parameters())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(3, 1, 8, 8, dtype=torch.uint8)}, "convert it to floating point"),
    ({"x": torch.full((3, 1, 8, 8), 1.5)}, "outside the bounds"),
    ({"x": torch.full((3, 1, 8, 8), float("nan"))}, "NaN"),
    ({"x": torch.zeros(8)}, "first dimension counts the samples"),
    ({"x": torch.zeros(3, 2, 8, 8)}, "cannot run on inputs of shape"),
    ({"y": torch.tensor([1, 2])}, "2 labels for 3 samples"),
    ({"y": torch.tensor([1, 2, 10])}, "label 10"),
    ({"y": torch.tensor([0.5, 1, 2])}, "integers"),
    ({"targets": torch.tensor([0, 0, 0])}, "equals the true label"),
    ({"targets": torch.tensor([1, 1, 99])}, "targets"),
    ({"sample_ids": torch.arange(2)}, "sample_ids has 2 entries"),
    ({"batch_size": 0}, "batch_size"),
    ({"threat": ThreatModel("linf", torch.tensor([0.1, 0.2]))}, "2 radii for 3 samples"),
    ({"threat": 0.1}, r"threat must be a ThreatModel, such as ThreatModel\('linf', 8 / 255\), not 0.1"),
    ({"threat": None}, "threat must be a ThreatModel"),
    ({"y": ["a", "b", "c"]}, "y must be a tensor or an array of numbers"),
    ({"y": None}, "y must be a tensor or an array of numbers"),
    ({"sample_ids": [0.5, 1.0, 2.0]}, "sample_ids has dtype float64; pass whole numbers"),
    ({"sample_ids": 3}, r"sample_ids has shape \(\), not entries for 3 samples"),
    ({"seed": "a"}, "seed must be a whole number, not 'a'"),
    ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_input_is_refused_in_a_sentence(victim: dict[str, Any], change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "x": torch.zeros(3, 1, 8, 8),
        "y": torch.tensor([0, 1, 2]),
        "threat": ThreatModel("linf", 0.1),
    }
    given |= change
    with pytest.raises(InputError, match=message) as raised:
        PGD(steps=2)(victim["knn"], given.pop("x"), given.pop("y"), given.pop("threat"), **given)
    assert "\n" not in str(raised.value)


def test_what_is_no_classifier_is_refused_in_a_sentence(victim: dict[str, Any]) -> None:
    x, y, threat = victim["x"][:3], victim["y"][:3], ThreatModel("linf", 0.1)
    for given, message in (
        (victim["model"], r"classifier is a model \(DigitsCNN\); make a classifier of it first: KNN\("),
        (victim["references"].features, r"classifier is a model \(FeatureExtractor\)"),
        (victim["references"], r"classifier is a reference set; make a classifier of it first: KNN\(references\)"),
        ("knn", "classifier must be a Classifier such as KNN.*, not str"),
    ):
        with pytest.raises(InputError, match=message):
            PGD()(given, x, y, threat)
    one = KNN(ReferenceSet.build(FeatureExtractor(nn.Flatten()), (x, [0, 0, 0])), 1)
    with pytest.raises(InputError, match="has one class, so nothing can be taken for another"):
        PGD()(one, x, [0, 0, 0], threat)
    with pytest.raises(InputError, match=r"a layer is named by text.*not by 3"):
        KNN(victim["references"], 5, layer=3)  # type: ignore[arg-type]
    for layers in (3, []):
        with pytest.raises(InputError, match="layers must be a list of layers' names, or None for all"):
            DkNN(victim["references"], 5, layers=layers)  # type: ignore[arg-type]


def test_sample_ids_may_be_a_list(victim: dict[str, Any]) -> None:
    x, y, threat, attack = victim["x"][:3], victim["y"][:3], ThreatModel("linf", 0.1), PGD(steps=1, start="random")
    listed = attack(victim["knn"], x, y, threat, sample_ids=[7, 8, 9])
    assert torch.equal(listed.x_adv, attack(victim["knn"], x, y, threat, sample_ids=torch.arange(7, 10)).x_adv)


def test_an_attack_checks_the_classifier_before_it_runs(victim: dict[str, Any]) -> None:
    from dataclasses import dataclass

    seen: list[Any] = []

    @dataclass(frozen=True)
    class Picky(PGD):
        def check(self, classifier: Classifier, x: Tensor) -> None:
            seen.append((classifier, x))
            raise InputError("this attack does not like it.")

        def run(self, job: Any) -> None:
            seen.append("run")

    with pytest.raises(InputError, match="does not like it"):
        Picky()(victim["knn"], victim["x"].double(), victim["y"], ThreatModel("linf", 0.1))
    [(classifier, x)] = seen
    assert classifier is victim["knn"]
    assert torch.equal(x, victim["x"][:1])  # placed: in the model's float32


def test_robust_is_right_without_attack_and_not_fooled(victim: dict[str, Any]) -> None:
    x, y = victim["x"], victim["y"].clone()
    y[:5] = (victim["knn"].labels(x[:5]) + 1) % 10  # wrong without attack
    result = PGD(steps=5)(victim["knn"], x, y, ThreatModel("linf", 0.08), batch_size=20)
    assert torch.equal(result.y, y)
    expected = [bool(c == t and not s) for c, t, s in zip(result.clean_labels, y, result.success, strict=True)]
    assert result.robust.tolist() == expected
    assert 0 < sum(expected) < len(expected) - 5


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"objective": "ask"}, "must be an Objective"),
    ({"steps": 0}, "steps"),
    ({"restarts": 0}, "restarts"),
    ({"check_every": 0}, "check_every"),
    ({"schedule": "linear"}, "schedule must be one of"),
    ({"start": "warm"}, "start must be one of"),
    ({"keep": "all"}, "keep must be one of"),
    ({"step": 0.0}, "step must be a number above 0"),
    ({"step": "a"}, "step must be a number above 0"),
    ({"momentum": "a"}, "momentum must be in"),
    ({"absolute_step": -1.0}, "absolute_step must be a number above 0"),
    ({"momentum": 1.0}, "momentum must be in"),
    ({"keep": "last", "restarts": 2}, "forgets all restarts"),
]


@pytest.mark.parametrize(("options", "message"), SETTINGS, ids=lambda v: str(v)[:40])
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PGD(**options)


def test_an_attack_of_ones_own_is_thirty_lines(victim: dict[str, Any]) -> None:
    from dataclasses import dataclass

    from robustknn.attacks import Job

    @dataclass(frozen=True)
    class Noise(Attack):
        tries: int = 3

        def run(self, job: Job) -> None:
            rows = torch.arange(len(job.x))
            job.begin(job.look(job.x, rows)[0])
            for i in range(self.tries):
                x = job.threat.random_start(job.x, job.ids, job.seed, "noise", i)
                job.offer(x, rows, job.look(x, rows)[0])

    result = Noise()(victim["knn"], victim["x"], victim["y"], ThreatModel("linf", 0.4))
    assert isinstance(result, AttackResult)
    assert 0 < float(result.success.double().mean()) < 1


def test_a_classifier_without_voters_meets_what_needs_no_gradient(victim: dict[str, Any]) -> None:
    class Labels(Classifier):
        """A function x → labels, nothing else."""

        n_classes = 10

        def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
            return nn.functional.one_hot(victim["knn"].labels(x), 10).double()

        def fingerprint(self) -> str:
            return "labels"

    with pytest.raises(InputError, match="black-box"):
        PGD()(Labels(), victim["x"], victim["y"], ThreatModel())
    with pytest.raises(InputError, match="black-box"):
        pgd_transfer()(Labels(), victim["x"], victim["y"], ThreatModel())


def test_every_registered_attack_runs(victim: dict[str, Any]) -> None:
    """With fewer steps than it would take; the worst case itself runs in test_suite.py."""
    least = {"steps": 3, "search_steps": 2, "queries": 4, "restarts": 1, "starts": 0, "further_steps": 2}
    calibrated = DkNN(victim["dknn"].references_, 15).calibrate(victim["x"][16:], victim["y"][16:])
    for entry in registry.attacks:
        attack = entry.build(**({"source": victim["dknn"]} if entry.name == "transferred" else {}))
        if isinstance(attack, (DecisionAttack, Suite)):  # another library; attacks made of attacks
            continue
        known = {f.name for f in fields(attack)}
        attack = replace(attack, **{name: value for name, value in least.items() if name in known})
        classifier = calibrated if entry.name == "credible" else victim["knn"]
        result = attack(classifier, victim["x"][:16], victim["y"][:16], ThreatModel("linf", 0.1))
        assert len(result.success) == 16, entry.name
    assert {"ask", "ask-published", "pgd-transfer", "fgsm", "bim", "pgd"} <= {e.name for e in registry.attacks}


def test_layers_and_metrics_other_than_the_voters(victim: dict[str, Any]) -> None:
    x, y, threat = victim["x"], victim["y"], ThreatModel("linf", 0.15)
    for objective in (ASK(layers=LAYERS), ASK(metric="cosine"), ASK(layers=("relu2",), metric="cosine", n_neighbors=4)):
        result = PGD(objective, steps=15)(victim["knn"], x, y, threat)
        assert float(result.success.double().mean()) > 0.2, objective
