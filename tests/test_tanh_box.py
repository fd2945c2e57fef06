"""The tanh-space minimum-norm attack against problems whose least norm is known, and torch's own optimizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small import digits, digits_references, random_classifier
from torch import Tensor, nn

from robustknn import KNN, DkNN, FeatureExtractor, InputError, ReferenceSet, ThreatModel
from robustknn.attacks import Job, TanhBox
from robustknn.attacks.tanh_box import SHRINK, _Adam, _Box, _distance, _RMSprop, _Start
from robustknn.classifiers import TIE, Classifier, Look
from robustknn.objectives import ASK, BatchObjective, BoundObjective, LogitMargin, NeighborHinge, Objective, SoftCount
from robustknn.recipes import cw_l2, sw1, sw1_published, sw2, sw2_pgd, sw2_published


class HalfSpaces(Classifier):
    """Class 1 where ⟨x, w⟩ > b, with w = (3, 4)/5 and no references: the least L2 move is b − ⟨x, w⟩."""

    n_classes = 2
    w = torch.tensor([0.6, 0.8], dtype=torch.float64)

    def __init__(self, b: float) -> None:
        self.b = b

    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        side = (x.double() @ self.w > self.b).long()
        return nn.functional.one_hot(side, 2).double()

    def fingerprint(self) -> str:
        return "half-spaces"


@dataclass(frozen=True)
class Side(Objective):
    """max(0, b − ⟨x, w⟩), negative: zero beyond the boundary, as a hinge of neighbors is."""

    b: float = 1.0

    def bind(self, classifier: Classifier) -> BoundObjective:
        return _Side(self.b)


class _Side(BoundObjective, BatchObjective):
    def __init__(self, b: float) -> None:
        self.b = b

    def start(self, x: Tensor, y: Tensor, target: Tensor | None, look: Look | None) -> BatchObjective:
        return self

    def loss(self, x: Tensor) -> Tensor:
        return (x @ HalfSpaces.w.to(x) - self.b).clamp_max(0)

    def update(self, kept: Tensor | None, look: Look | None) -> None:
        pass


# ------------------------------------------------------------------------------------- known least norms


LEAST = {"l2": lambda gap: gap, "linf": lambda gap: gap / 1.4, "l1": lambda gap: gap / 0.8}
"""The distance to a half-space is ⟨w, x⟩'s gap divided by the dual norm of w."""
WITHIN = {"l2": 1e-3, "linf": 0.06, "l1": 0.1}  # max |δ| and Σ |δ| have no gradient to settle by


@pytest.mark.parametrize("bounds", [(-2.0, 2.0), None])
@pytest.mark.parametrize("norm", LEAST)
def test_the_distance_to_a_half_space_is_found(norm: str, bounds: tuple[float, float] | None) -> None:
    x = torch.tensor([[0.0, 0.0], [0.5, -0.3], [-0.4, 0.2], [0.9, 0.4]], dtype=torch.float64)
    gap = 1.0 - x @ HalfSpaces.w
    for check_every, bisections in ((1, 0), (10, 20)):
        attack = TanhBox(
            Side(), lr=0.02, steps=150, search_steps=8, c0=0.01, fall=10.0, check_every=check_every,
            refresh_every=0, bisections=bisections,
        )  # fmt: skip
        result = attack(HalfSpaces(1.0), x, [0] * 4, ThreatModel(norm, 4.0, bounds))
        assert bool(result.success.all())
        found = ThreatModel(norm, 4.0, bounds).distance(result.x_adv, x)
        least = LEAST[norm](gap)
        assert bool((found >= least * (1 - 1e-9)).all())
        assert found.tolist() == pytest.approx(least.tolist(), rel=WITHIN[norm])


def test_the_search_of_c_follows_the_published_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the optimum of ‖δ‖² + c max(0, b − ⟨w, x⟩) at ⟨w, δ⟩ = c/2, only c > 2·gap can fool the classifier."""
    seen: list[float] = []

    x = torch.zeros(1, 2, dtype=torch.float64)
    attack = TanhBox(
        Side(0.5), lr=0.01, final_lr=0.01, steps=300, search_steps=6, c0=0.1, rise=10.0, fall=10.0, refresh_every=0
    )
    original = _Start._climb

    def climb(self: Any, number: int) -> Tensor:
        seen.append(float(self.c[0]))
        fooled = original(self, number)
        assert bool(fooled[0]) == (seen[-1] > 1.0)
        return fooled

    monkeypatch.setattr(_Start, "_climb", climb)
    attack(HalfSpaces(0.5), x, [0], ThreatModel("l2", 2.0, (-2.0, 2.0)))
    # .1 fails, 1 fails (2 · gap, and success is strict), 10 succeeds, then halves between the last failure and success
    assert seen == pytest.approx([0.1, 1.0, 10.0, 5.5, 3.25, 2.125])


def test_c_falls_until_a_search_fails() -> None:
    expected = {10.0: [1.0, 0.1, 0.01, 0.055], 2.0: [1.0, 0.5, 0.25, 0.125]}
    for fall, values in expected.items():
        start = _bare_start(TanhBox(Side(), c0=1.0, fall=fall))
        outcomes = iter([True, True, fall == 2.0, True])
        seen: list[float] = []

        def climb(number: int, start: Any = start, seen: list[float] = seen, outcomes: Any = outcomes) -> Tensor:
            seen.append(float(start.c[0]))
            return torch.tensor([next(outcomes)])

        start._climb = climb
        start.attack = TanhBox(Side(), c0=1.0, fall=fall, search_steps=4)
        start.search()
        assert seen == pytest.approx(values)
        assert start.share.tolist() == [0.0]  # as few guides as the votes need after a success in the last search


def _bare_start(attack: TanhBox) -> Any:
    x = torch.zeros(1, 2, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.int64)
    job = Job(HalfSpaces(1.0), x, zero, None, zero, ThreatModel("l2", 1.0), 0, False)
    return _Start(attack, job, _Side(1.0), zero, None, x, 0)


# ------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("mine", "torchs"),
    [(_RMSprop, lambda p: torch.optim.RMSprop(p, lr=0.1)), (_Adam, lambda p: torch.optim.Adam(p, lr=0.1))],
)
def test_optimizers_equal_those_of_torch(mine: Any, torchs: Callable[..., torch.optim.Optimizer]) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    theirs = z.clone().requires_grad_(True)
    step, optimizer = mine(z), torchs([theirs])
    kept = torch.tensor([2, 0])
    for t in range(20):
        gradient = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        if t == 10:
            z = z[kept]
            step.keep(kept)
        z = z - 0.1 * step(gradient if t < 10 else gradient[kept])
        theirs.grad = gradient
        optimizer.step()
    assert torch.allclose(z, theirs.detach()[kept])


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("slack", [0.0, 0.4])
def test_what_is_paid_for_distance_has_the_gradient_it_says(norm: str, slack: float) -> None:
    delta = torch.tensor([[0.3, -0.7, 0.1], [0.1, 0.0, 0.05]], dtype=torch.float64, requires_grad=True)
    formula = {
        "l2": lambda d: d.square().sum(1) - slack**2,
        "linf": lambda d: d.abs().amax(1) - slack,
        "l1": lambda d: d.abs().sum(1) - slack,
    }[norm](delta).clamp_min(0)
    (want,) = torch.autograd.grad(formula.sum(), delta)
    value, gradient = _distance(delta.detach(), norm, slack, 1.0)
    assert torch.allclose(value, formula.detach())
    assert torch.allclose(gradient, want)
    if norm == "linf":
        spread = _distance(delta.detach(), norm, 0.0, 0.4)[1]
        assert spread.tolist() == [[1.0, -1.0, 0.0], [1.0, 0.0, 1.0]]


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 3.0), None])
@pytest.mark.parametrize("hard", [False, True])
def test_the_change_of_variables(bounds: tuple[float, float] | None, hard: bool) -> None:
    x = torch.tensor([[0.0, 0.2, 1.0], [0.5, 1e-9, 0.999]], dtype=torch.float64)
    threat = ThreatModel("linf", torch.tensor([0.1, 0.4], dtype=torch.float64), bounds)
    box = _Box.around(x, threat, hard)
    z = box.enter(x)
    assert bool(torch.isfinite(z).all())
    width = 1.0 if bounds is None else bounds[1] - bounds[0]
    assert torch.allclose(box.leave(z), x, atol=width * (1 - SHRINK))
    assert torch.allclose(box.select(torch.tensor([1])).leave(z[1:]), box.leave(z)[1:])
    far = box.leave(z + 50 * torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]], dtype=torch.float64))
    if hard or bounds is not None:
        low = torch.full_like(x, -torch.inf if bounds is None else bounds[0])
        high = torch.full_like(x, torch.inf if bounds is None else bounds[1])
        if hard:
            reach = torch.tensor([[0.1], [0.4]], dtype=torch.float64)
            low, high = torch.maximum(low, x - reach), torch.minimum(high, x + reach)
        assert bool(((far >= low - 1e-12) & (far <= high + 1e-12)).all())
        assert torch.allclose(torch.minimum(far - low, high - far), torch.zeros_like(x), atol=1e-6)
    moved = z.clone().requires_grad_(True)
    through = moved if box.half is None or box.center is None else box.center + box.half * torch.tanh(moved)
    (slope,) = torch.autograd.grad(through.sum(), moved)
    assert torch.allclose(box.slope(z), slope)


# ------------------------------------------------------------------------------------ what every attack keeps


@pytest.fixture(scope="module")
def victim() -> dict[str, Any]:
    source, model = digits()
    references = digits_references(source, model)
    x, y = source.test.first(40).batch(torch.arange(40)), source.test.first(40).labels
    return {"x": x, "y": y, "knn": KNN(references, 15, layer="relu3"), "dknn": DkNN(references, 15)}


SMALL: dict[str, TanhBox] = {
    "sw1": sw1(steps=6, search_steps=2),
    "sw2": sw2(steps=6, search_steps=2),
    "sw1 published": sw1_published(20, steps=12, search_steps=2),
    "sw2 published": sw2_published(steps=12, search_steps=2, check_every=4, refresh_every=6),
    "noise and starts": TanhBox(SoftCount(), steps=8, search_steps=2, noise=0.05, starts=2, check_every=3),
    "cw": cw_l2(steps=20, search_steps=3, lr=0.1),
    "ask": TanhBox(ASK(), ceiling=0.02, steps=8, search_steps=2, optimizer="adam"),
    "abort": TanhBox(steps=20, search_steps=2, lr=0.01, abort_early=True),
}


@pytest.mark.parametrize(("name", "norm"), [*((name, "l2") for name in SMALL), ("sw1", "linf"), ("sw2", "l1")])
def test_batch_size_changes_no_bit(victim: dict[str, Any], name: str, norm: str) -> None:
    x, y, ids = victim["x"][:9], victim["y"][:9], torch.arange(50, 59)
    threat = ThreatModel(norm, {"l2": 2.0, "linf": 0.5, "l1": 10.0}[norm])
    model = victim["dknn" if name in ("sw1", "sw2") else "knn"]
    whole = SMALL[name](model, x, y, threat, sample_ids=ids, seed=3)
    for size in (1, 7):
        parts = SMALL[name](model, x, y, threat, sample_ids=ids, seed=3, batch_size=size)
        for column in ("x_adv", "success", "labels", "margin", "gradient_passes", "forward_passes", "zero_gradient"):
            assert torch.equal(getattr(parts, column), getattr(whole, column)), column
    assert torch.equal(whole.success, model.lead(model.scores(whole.x_adv), y) < -TIE)
    assert bool((threat.distance(whole.x_adv, x) <= threat.eps * (1 + 1e-6)).all())
    assert float(whole.x_adv.min()) >= 0
    assert float(whole.x_adv.max()) <= 1
    nothing = SMALL[name](model, x, y, threat.with_eps(0.0))
    assert torch.equal(nothing.x_adv, x)


def test_published_and_default_reach_everyone_and_the_default_is_shorter(victim: dict[str, Any]) -> None:
    x, y = victim["x"], victim["y"]
    threat = ThreatModel("l2", 8.0)
    lengths = {}
    for name, attack in {"sw1": sw1(), "sw2": sw2(), "published": sw2_published(steps=100, search_steps=5)}.items():
        result = attack(victim["knn"], x, y, threat)
        assert bool(result.success.all())
        lengths[name] = float(result.l2.median())
    assert lengths["sw1"] < lengths["published"]
    assert lengths["sw2"] < lengths["published"]


def test_only_examples_inside_the_ball_count(victim: dict[str, Any]) -> None:
    x, y = victim["x"], victim["y"]
    free = sw2()(victim["knn"], x, y, ThreatModel("l2", 8.0))
    eps = torch.quantile(free.l2, 0.5)
    tight = sw2()(victim["knn"], x, y, ThreatModel("l2", float(eps)))
    assert bool((tight.l2 <= eps * (1 + 1e-6)).all())
    assert 0.2 < float(tight.success.double().mean()) < 0.8


def test_starts_are_the_nearest_references_of_other_decisions(victim: dict[str, Any]) -> None:
    x, y, model = victim["x"], victim["y"], victim["knn"]
    still = TanhBox(NeighborHinge(), steps=1, search_steps=1, lr=1e-9, starts=1, bisections=0)
    result = still(model, x, y, ThreatModel("l2", 8.0))
    right = result.clean_labels == y
    assert float(result.success[right].double().mean()) > 0.9
    images = model.references_.image(torch.arange(len(model.references_))).flatten(1)
    apart = torch.cdist(result.x_adv[result.success & right].flatten(1), images).amin(1)
    assert float(apart.max()) < 1e-3  # the reference itself, up to the box's shrinking
    alone, further = (sw2(steps=10, starts=n, bisections=0)(model, x, y, ThreatModel("l2", 8.0)) for n in (0, 2))
    assert bool((further.success | ~alone.success).all())
    assert bool((further.l2 <= alone.l2)[alone.success].all())
    assert bool((further.l2 < alone.l2)[alone.success].any())


def test_vectors_are_starts_themselves_and_targets_are_reached() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.eye(3)[y] + 0.1 * torch.randn(60, 3, generator=generator)
    classifier = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (x, y)), 3)
    queries = torch.eye(3) + 0.02
    for targets in (None, [1, 2, 0]):
        result = TanhBox(steps=40, starts=2)(
            classifier, queries, [0, 1, 2], ThreatModel("l2", 2.0, None), targets=targets
        )
        assert bool(result.success.all())
        if targets is not None:
            assert result.labels.tolist() == targets
        assert float(result.l2.max()) < 1.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_every_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = (torch.eye(3)[y] * 0.8 + 0.1 * torch.rand(60, 3, generator=generator)).to(dtype)
    network = nn.Linear(3, 3)
    with torch.no_grad():
        network.weight.copy_(torch.eye(3))
        network.bias.zero_()
    classifier = KNN(ReferenceSet.build(FeatureExtractor(network.to(dtype)), (x, y)), 3)
    queries, labels = x[:9], classifier.labels(x[:9])
    for threat in (ThreatModel("l2", 2.0), ThreatModel("l2", 2.0, None)):
        result = TanhBox(steps=30)(classifier, queries, labels, threat)
        assert result.x_adv.dtype == dtype
        assert bool(torch.isfinite(result.x_adv).all())
        assert bool(result.success.all())


def test_the_fixed_radius_form_stays_in_its_box(victim: dict[str, Any]) -> None:
    x, y = victim["x"], victim["y"]
    eps = torch.linspace(0.01, 0.3, len(x))
    result = sw1_published(20, fixed_radius=True, steps=60)(victim["knn"], x, y, ThreatModel("linf", eps))
    assert bool((result.linf <= eps * (1 + 1e-6)).all())
    assert float(result.success.double().mean()) > 0.2
    assert int(result.gradient_passes.max()) <= 60


@pytest.mark.parametrize("bound", [0.0, 1.0])
@pytest.mark.parametrize(
    "attack",
    [
        sw1_published(3, threshold=1.0, fixed_radius=True, steps=60),
        TanhBox(hard_box=True, penalty=False, search_steps=1, steps=60, bisections=0),
    ],
)
def test_pixels_at_a_bound_move_as_others_do(attack: TanhBox, bound: float) -> None:
    """Half the pixels are black (or white) and must rise to about 0.25 before the other class is nearer."""
    gray = torch.full((4, 8), 0.5) + torch.tensor([0.0, 0.05, 0.0, 0.05])[:, None]
    x = torch.cat([torch.tensor([0.0, 0.0, 0.5, 0.5])[:, None].expand(4, 8), gray], 1)
    x = 1 - x if bound else x
    classifier, query = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (x, [0, 0, 1, 1])), 1), x[:1]
    result = attack(classifier, query, [0], ThreatModel("linf", 0.3))
    assert bool(result.success.all())
    assert float((result.x_adv - query)[:, :8].abs().mean()) > 0.24


def test_carlini_wagner_fools_the_network_by_little_and_is_a_transfer(victim: dict[str, Any]) -> None:
    attack = cw_l2(steps=200, search_steps=5, lr=0.05, confidence=3.0)
    assert attack.transfer
    assert not sw1().transfer
    assert not cw_l2(ASK()).transfer
    assert not sw2_pgd().transfer
    assert isinstance(attack.objective, LogitMargin)
    defaults = cw_l2()
    assert (defaults.lr, defaults.search_steps, defaults.c0, defaults.ceiling) == (0.01, 9, 1e-3, 0.0)
    assert [cw_l2(steps=n).lr for n in (10_000, 200, 20)] == [0.01, 0.05, 0.5]
    assert (defaults.optimizer, defaults.rise, defaults.fall, defaults.abort_early) == ("adam", 10.0, 2.0, True)
    x, y = victim["x"], victim["y"]
    result = attack(victim["knn"], x, y, ThreatModel("l2", 8.0))
    assert float(result.success.double().mean()) > 0.5


def test_an_early_end_spends_less_and_harms_little(victim: dict[str, Any]) -> None:
    x, y, threat = victim["x"], victim["y"], ThreatModel("l2", 8.0)
    settings: dict[str, Any] = {"steps": 200, "search_steps": 3, "lr": 0.05}
    whole = TanhBox(SoftCount(), **settings)(victim["knn"], x, y, threat)
    early = TanhBox(SoftCount(), abort_early=True, **settings)(victim["knn"], x, y, threat)
    standing = whole.gradient_passes > 0
    assert bool((whole.gradient_passes[standing] == 600).all())
    assert bool((early.gradient_passes <= whole.gradient_passes).all())
    assert bool((early.gradient_passes[standing] < 600).any())
    assert float(early.l2.median()) <= 1.2 * float(whole.l2.median())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"objective": "ask"}, "objective must be an Objective"),
    ({"optimizer": "sgd"}, "optimizer must be one of"),
    ({"steps": 0}, "at least 1"),
    ({"search_steps": 0}, "at least 1"),
    ({"starts": -1}, "at least 0"),
    ({"refresh_every": -1}, "at least 0"),
    ({"bisections": -1}, "at least 0"),
    ({"lr": 0.0}, "above 0"),
    ({"final_lr": 0.0}, "above 0"),
    ({"c0": 0.0}, "above 0"),
    ({"rise": 1.0}, "above 1"),
    ({"fall": 0.5}, "above 1"),
    ({"noise": -0.1}, "of at least 0"),
    ({"slack": float("inf")}, "of at least 0 and finite"),
    ({"peak": 0.0}, r"in \(0, 1\]"),
    ({"ceiling": float("nan")}, "finite"),
    ({"penalty": False}, "pass hard_box=True"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda v: str(v)[:30])
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TanhBox(**options)


def test_starts_that_there_are_not_are_refused_in_a_sentence(victim: dict[str, Any]) -> None:
    classifier, x, y = random_classifier()
    with pytest.raises(InputError, match="keep no images to start from; build them with keep_images=True"):
        TanhBox(starts=1)(classifier, x, y, ThreatModel())
    with pytest.raises(InputError, match="needs a classifier that decides by the votes of references"):
        TanhBox(Side(), starts=1)(HalfSpaces(1.0), torch.zeros(2, 2), [0, 0], ThreatModel())
    wide = ReferenceSet.from_vectors(
        torch.rand(8, 64), torch.arange(8) % 2, images=torch.rand(8, 3, 3), features=FeatureExtractor(nn.Flatten())
    )
    with pytest.raises(InputError, match=r"images have shape \(3, 3\), the inputs \(8, 8\)"):
        TanhBox(starts=1)(KNN(wide, 1), torch.rand(2, 8, 8), [0, 1], ThreatModel())
