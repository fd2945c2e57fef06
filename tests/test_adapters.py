"""A classifier's faces for other libraries, and the attacks that other libraries lend to ours."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small import random_classifier, random_net
from torch import Tensor, nn

from robustknn import (
    ASK,
    KNN,
    PGD,
    DkNN,
    FeatureExtractor,
    InputError,
    MissingExtraError,
    ReferenceSet,
    ThreatModel,
    registry,
)
from robustknn.adapters import as_hard, surrogate, to_art, to_foolbox
from robustknn.attacks import Boundary, HopSkipJump
from robustknn.attacks import decision_based as decisions
from robustknn.attacks.base import Job
from robustknn.classifiers import TIE, FunctionClassifier, Rejecting, Rule, VoterClassifier, Votes, decide, margin
from robustknn.classifiers.base import Classifier
from robustknn.objectives.adaptive import Adaptive

CLEAN_THREAT = ThreatModel("linf", 0.1)


def images(k: int = 9, n: int = 24, keep_images: bool = True) -> tuple[KNN, Tensor, Tensor]:
    """A kNN on the features of a small convolutional network with batch normalization, and inputs to attack."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 4
    x = 0.6 * torch.rand(240, 1, 6, 6, generator=generator) + 0.4 * torch.rand(4, 1, 6, 6, generator=generator)[y]
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    features = FeatureExtractor(net)
    return KNN(ReferenceSet.build(features, (x[40:], y[40:]), keep_images=keep_images), k), x[:n], y[:n]


# ---------------------------------------------------------------------------------------------- surrogate


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 15])
def test_the_arg_max_is_the_hard_decision_everywhere(k: int, metric: str) -> None:
    classifier, _, _ = random_classifier(k=k, metric=metric)
    x = torch.rand(300, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = classifier.scores(x)
    best = scores.topk(2, dim=1).values
    tied = best[:, 0] - best[:, 1] < TIE
    assert int(tied.sum()) > 3 or k in (1, 3)  # there are ties to break
    for module in (surrogate(classifier), as_hard(classifier), as_hard(classifier, "one-hot")):
        for dtype in (torch.float64, torch.float32):
            out = module(x.to(dtype))
            assert out.dtype == dtype
            assert bool(torch.isfinite(out).all())
            assert torch.equal(out.argmax(1), classifier.labels(x.to(dtype)))
            two = out.topk(2, dim=1).values
            assert bool((two[:, 0] > two[:, 1]).all())  # by more than an arg max can mistake


def test_exact_ties_go_to_the_smallest_class() -> None:
    corners = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    features = FeatureExtractor(nn.Identity())
    references = ReferenceSet.from_vectors(corners, torch.tensor([2, 1, 0, 2]), features=features)
    classifier = KNN(references, 2)
    x = torch.tensor([[0.0, 0.0], [0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]])
    expected = [1, 0, 0, 1, 2]  # two votes: {2, 1}, {2, 0}, {1, 0}, {1, 2}, {2, 2}
    assert classifier.labels(x).tolist() == expected
    for module in (surrogate(classifier), as_hard(classifier), as_hard(classifier, "one-hot")):
        assert module(x).argmax(1).tolist() == expected


def test_rules_and_payloads_of_every_kind_pass_through() -> None:
    class NearOnes(Rule):
        def __call__(self, votes: Any, n_classes: int) -> Tensor:
            total = 0.0
            for v in votes:
                assert isinstance(v, Votes)
                weights = v.weights * torch.exp(-v.distances)
                total = total + (weights[:, :, None] * v.payload).sum(1)
            return total

    class Weighted(DkNN):
        @property
        def rule(self) -> Rule:
            return NearOnes()

    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(90, 6, generator=generator, dtype=torch.float64), torch.arange(90) % 4
    features = FeatureExtractor(random_net(), ["1", "3"])
    classifier = Weighted(ReferenceSet.build(features, (x[:70], y[:70]), payload="softmax"), 7)
    module, start = surrogate(classifier), x[70:].clone().requires_grad_(True)
    out = module(start)
    assert torch.equal(out.argmax(1), classifier.labels(x[70:]))
    (gradient,) = torch.autograd.grad(out[:, 0].sum(), start)
    assert bool((gradient.abs().amax(1) > 1e-9).all())


def test_there_is_a_gradient_where_all_vote_alike() -> None:
    classifier, x, _ = images(k=3)
    unanimous = classifier.scores(x).amax(1) == 1
    assert int(unanimous.sum()) > 10
    start = x.clone().requires_grad_(True)
    logits = surrogate(classifier)(start)
    for loss in (
        nn.functional.cross_entropy(logits, classifier.labels(x), reduction="sum"),
        nn.functional.cross_entropy(logits, (classifier.labels(x) + 1) % 4, reduction="sum"),
        margin(logits, classifier.labels(x)).sum(),
    ):
        (gradient,) = torch.autograd.grad(loss, start, retain_graph=True)
        assert float(gradient[unanimous].flatten(1).abs().amax(1).min()) > 1e-4


def test_its_gradient_is_that_of_the_soft_votes() -> None:
    """Numerically, with guides and bandwidths held where they were looked up."""
    classifier, x, _ = random_classifier(k=5)
    module = surrogate(classifier)
    x = x[:3].clone().requires_grad_(True)
    look = classifier.look(x.detach(), module.requests)
    ballots = module.bound.ballots(look, classifier.decide(look.scores))

    def soft(x: Tensor) -> Tensor:
        features = classifier.read(x, [v.layer for v in classifier.voters])
        votes = [b.votes(features[v.layer]) for v, b in zip(classifier.voters, ballots, strict=True)]
        return 5.0 * classifier.combine(votes)

    assert torch.autograd.gradcheck(soft, x)
    for c in range(4):
        (expected,) = torch.autograd.grad(soft(x)[:, c].sum(), x)
        (found,) = torch.autograd.grad(module(x)[:, c].sum(), x)
        assert torch.allclose(found, expected, atol=1e-12)


def test_the_soft_votes_are_lifted_only_where_they_decide_otherwise() -> None:
    classifier, _, _ = random_classifier(k=5)
    x = torch.rand(200, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    module = surrogate(classifier)
    look = classifier.look(x, module.requests)
    winner = decide(look.scores)
    ballots = module.bound.ballots(look, winner)
    votes = [b.votes(look.features[v.layer]) for v, b in zip(classifier.voters, ballots, strict=True)]
    soft, out = 5 * classifier.combine(votes), module(x)
    agree = (soft.argmax(1) == winner) & (soft.topk(2, dim=1).values.diff(dim=1)[:, 0] < -0.01)
    assert 100 < int(agree.sum()) < 200
    assert torch.allclose(out[agree], soft[agree], atol=1e-9)
    changed = (out - soft).abs() > 1e-9
    assert bool((changed.sum(1) <= 1).all())
    assert bool((changed.nonzero()[:, 1] == winner[changed.any(1)]).all())


def test_a_stock_attack_on_it_is_no_weaker_than_ours() -> None:
    """Bare PGD on cross-entropy, as in any library; on log-probabilities of the k nearest it finds much less."""
    classifier, x, y = images(k=9, n=40)
    voter, eps = classifier.voters[0], 0.06
    rows = classifier.references_.rows(voter.layer, torch.arange(200))

    def naive(x: Tensor) -> Tensor:
        distances = torch.cdist(classifier.read(x, [voter.layer])[voter.layer], rows)
        shares = torch.softmax(-distances / 0.01, 1) @ nn.functional.one_hot(classifier.references_.labels, 4).float()
        return torch.log(shares + 1e-12)

    def left(module: Any) -> float:
        start = x
        for _ in range(30):
            start = start.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(module(start), y), start)
            start = (x + (start + eps / 6 * gradient.sign() - x).clamp(-eps, eps)).clamp(0, 1)
        return float((margin(classifier.scores(start), y) >= -TIE).double().mean())

    ours = float((~PGD(steps=30)(classifier, x, y, ThreatModel("linf", eps)).success).double().mean())
    clean = float((classifier.labels(x) == y).double().mean())
    by_surrogate, by_naive = left(surrogate(classifier)), left(naive)
    assert by_surrogate <= ours + 0.1
    assert by_surrogate < clean - 0.3
    assert by_naive > by_surrogate + 0.1


def test_the_network_is_left_alone() -> None:
    classifier, x, _ = images()
    net = classifier.references_.extractor().model
    net.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for module in (surrogate(classifier), as_hard(classifier)):
        assert not module.training
        expected = module(x)
        module.train()
        assert torch.equal(module(x), expected)
        module.eval().requires_grad_(False).to(torch.float64)
        assert not net.training
        assert [p.dtype for p in net.parameters()] == [torch.float32] * 4
        assert all(p.requires_grad for p in net.parameters())
        assert [p.device.type for p in module.parameters()] == ["cpu"]
        assert torch.equal(module(x[:1]), expected[:1])  # small batches see what large ones do
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_hard_scores_are_the_classifiers_without_gradient() -> None:
    classifier, x, _ = images()
    scores = classifier.scores(x)
    clear = scores.topk(2, dim=1).values.diff(dim=1)[:, 0] < -TIE
    out = as_hard(classifier)(x.clone().requires_grad_(True))
    assert not out.requires_grad
    assert torch.allclose(out[clear].double(), scores[clear])
    one_hot = as_hard(classifier, "one-hot")(x)
    assert torch.equal(one_hot, nn.functional.one_hot(classifier.labels(x), 4).float())
    f = FunctionClassifier(classifier.labels, 4)
    assert torch.equal(as_hard(f)(x), one_hot)


def test_what_cannot_have_a_face_says_so() -> None:
    classifier, x, y = random_classifier(k=3)
    f = FunctionClassifier(lambda x: torch.zeros(len(x)), 2)
    with pytest.raises(InputError, match=r"a surrogate with gradients needs a classifier .* square, hop-skip-jump"):
        surrogate(f)
    with pytest.raises(InputError, match="a decision that is no class"):
        as_hard(Rejecting(DkNN(classifier.references_, 3).calibrate(x, y), 0.1))
    with pytest.raises(InputError, match="scale"):
        surrogate(classifier, scale=0)
    with pytest.raises(InputError, match="votes must be an Adaptive objective"):
        surrogate(classifier, votes=ASK())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="kind"):
        as_hard(classifier, "logits")
    with pytest.raises(InputError, match="classifier is a model"):
        as_hard(nn.Identity())  # type: ignore[arg-type]

    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().flatten(1)

    blind = KNN(ReferenceSet.build(FeatureExtractor(Detached()), (x, y)), 3)
    assert surrogate(blind)(x).shape == (12, 4)
    with pytest.raises(InputError, match="has no gradient"):
        surrogate(blind)(x.clone().requires_grad_(True))


@pytest.mark.parametrize(("name", "make"), [("foolbox", to_foolbox), ("art", lambda c: to_art(c, (1, 6, 6)))])
def test_a_library_that_is_missing_is_named(name: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, x, y = images()
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'robustknn\[{name}\]'"):
        make(classifier)
    with pytest.raises(MissingExtraError, match=name):
        HopSkipJump(backend=name)(classifier, x, y, CLEAN_THREAT)


def test_their_names_cost_no_import() -> None:
    code = (
        "import sys, robustknn.adapters, robustknn.recipes; from robustknn import registry\n"
        "made = [registry.attacks.create(n) for n in ('hop-skip-jump', 'boundary', 'square')]\n"
        "print([m for m in ('foolbox', 'art', 'eagerpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ------------------------------------------------------------------------------- decisions, with a stand-in


class Estimator:
    """What the attacks use of ART's BlackBoxClassifier."""

    def __init__(self, predict: Any, input_shape: Any, nb_classes: int, clip_values: Any) -> None:
        assert nb_classes == 2
        assert clip_values == (0.0, 1.0)
        self.predict, self.input_shape = predict, tuple(input_shape)


class Bisection:
    """A decision-based attack of a few lines: bisection, then noise from NumPy's global state."""

    def __init__(self, estimator: Estimator, **settings: Any) -> None:
        self.estimator, self.settings = estimator, settings
        Bisection.seen = settings

    def generate(self, x: Any, y: Any, x_adv_init: Any) -> Any:
        assert x.shape == x_adv_init.shape == (1, *self.estimator.input_shape)
        assert self.estimator.predict(x).argmax(1) == 0  # right
        assert self.estimator.predict(x_adv_init).argmax(1) == 1  # wrong
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            wrong = self.estimator.predict((x + middle * (x_adv_init - x)).astype(np.float32)).argmax(1)[0]
            low, high = (low, middle) if wrong else (middle, high)
        found = x + high * (x_adv_init - x)
        while True:
            noise = found + 0.02 * np.random.randn(20, *x.shape[1:]).astype(np.float32)
            self.estimator.predict(np.clip(noise, 0, 1))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    attacks = SimpleNamespace(evasion=SimpleNamespace(HopSkipJump=Bisection, BoundaryAttack=Bisection))
    estimators = SimpleNamespace(classification=SimpleNamespace(BlackBoxClassifier=Estimator))
    monkeypatch.setattr(decisions, "load_art", lambda: SimpleNamespace(attacks=attacks, estimators=estimators))


class Counting(FunctionClassifier):
    def __init__(self, classifier: VoterClassifier) -> None:
        super().__init__(classifier.scores, classifier.n_classes, kind="scores")
        self.asked: list[Tensor] = []

    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        self.asked.append(x.clone())
        return super().scores(x, sample_ids)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("norm", "bounds"), [("linf", (0.0, 1.0)), ("l2", (-0.5, 1.5)), ("l1", (0.0, 1.0))])
def test_decisions_are_counted_bounded_and_kept_inside(norm: str, bounds: tuple[float, float]) -> None:
    classifier, x, y = images(n=12)
    threat = ThreatModel(norm, {"linf": 0.12, "l2": 0.5, "l1": 2.5}[norm], bounds)
    attack = HopSkipJump(queries=120, minimize=True)
    state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    whole = attack(classifier, x, y, threat, seed=4)
    assert random.getstate() == state[0]
    assert np.array_equal(np.random.get_state()[1], state[1])
    assert torch.equal(torch.get_rng_state(), state[2])
    assert Bisection.seen["norm"] == (np.inf if norm == "linf" else 2)
    assert Bisection.seen["init_eval"] == 100
    standing = whole.clean_labels == y
    assert bool((whole.forward_passes[standing] == 120).all())
    assert bool((whole.forward_passes[~standing] == 1).all())
    assert int(whole.gradient_passes.sum()) == 0
    assert 0 < int(whole.success.sum()) < 12
    far = threat.distance(whole.x_adv.double(), x.double())
    assert bool((far <= threat.eps * (1 + 1e-6)).all())
    assert float(whole.x_adv.min()) >= bounds[0]
    assert float(whole.x_adv.max()) <= bounds[1]
    assert torch.equal(whole.success, margin(classifier.scores(whole.x_adv), y) < -TIE)
    # a sample's result depends on nothing but itself
    for size in (5, 1) if norm == "l2" else (5,):
        parts = attack(classifier, x, y, threat, seed=4, batch_size=size)
        assert torch.equal(parts.x_adv, whole.x_adv)
        assert torch.equal(parts.forward_passes, whole.forward_passes)
    again = attack(classifier, x, y, threat, seed=5)
    assert not torch.equal(again.x_adv, whole.x_adv)


@pytest.mark.usefixtures("stand_in")
def test_it_stops_at_the_first_example_unless_it_minimizes() -> None:
    classifier, x, y = images(n=12)
    threat = ThreatModel("l2", 1.2)
    found = {m: HopSkipJump(queries=150, minimize=m)(classifier, x, y, threat) for m in (False, True)}
    assert torch.equal(found[False].success, found[True].success)
    won = found[True].success & (found[True].clean_labels == y)
    assert int(won.sum()) > 5
    assert bool((found[False].forward_passes[won] < 150).all())
    assert bool((found[True].l2[won] <= found[False].l2[won] + 1e-6).all())
    assert float(found[True].l2[won].mean()) < float(found[False].l2[won].mean())


@pytest.mark.usefixtures("stand_in")
def test_targets_and_ties_are_the_houses() -> None:
    classifier, x, y = images(n=10)
    target = (y + 1) % 4
    result = HopSkipJump(queries=100)(classifier, x, y, ThreatModel("l2", 3.0), targets=target)
    assert torch.equal(result.success, margin(classifier.scores(result.x_adv), target) > TIE)
    assert int(result.success.sum()) >= 8
    tied = FunctionClassifier(lambda x: torch.zeros(len(x), 3), 3, kind="scores")
    result = Boundary(queries=30)(tied, x, y.clamp_max(2), ThreatModel("l2", 3.0))
    assert not bool(result.success.any())


def job(classifier: Classifier, x: Tensor, y: Tensor) -> Job:
    return Job(classifier, x, y, None, torch.arange(len(x)), ThreatModel("l2", 1.0), 0, False)


@pytest.mark.usefixtures("stand_in")
def test_it_starts_from_images_where_there_are_and_from_patterns_elsewhere() -> None:
    classifier, x, y = images(n=1)
    assert int(classifier.labels(x)) == int(y)
    without = Counting(classifier)
    HopSkipJump(queries=20, starts=8)(without, x, y, ThreatModel("l2", 0.01))
    first = without.asked[1][:8].view(8, 36)
    assert sorted(len(p.unique()) for p in first) == [1, 1, 4, 4, 16, 16, 36, 36]  # one color to one number a pixel
    oracle = decisions._Oracle(job(classifier, x, y), 0, 100, True)
    oracle.begin(8)
    labels = classifier.references_.labels
    images_of_others = classifier.references_.images[labels != y[0]]  # type: ignore[index]
    assert bool((images_of_others == oracle.nearest).flatten(1).all(1).any())
    plain = FunctionClassifier(lambda x: (x[:, 0] > 0.5).long(), 2)
    vectors = torch.tensor([[0.3, 0.2, 0.9], [0.9, 0.1, 0.0]])
    result = HopSkipJump(queries=60)(plain, vectors, torch.tensor([0, 1]), ThreatModel("l2", torch.tensor([0.8, 0.39])))
    assert result.success.tolist() == [True, False]


def test_what_cannot_work_is_refused(stand_in: None) -> None:
    classifier, x, y = images()
    with pytest.raises(InputError, match="give the threat model bounds, or use the attack 'square'"):
        HopSkipJump()(classifier, x, y, ThreatModel("l2", 1.0, bounds=None))
    for bad in ({"queries": 3}, {"starts": 0}, {"backend": "cleverhans"}, {"minimize": 1}, {"evaluations": 0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            HopSkipJump(**bad)  # type: ignore[arg-type]
    x0 = HopSkipJump(queries=30)(classifier, x, y, ThreatModel("l2", 0.0)).x_adv
    assert torch.equal(x0, x)


# ---------------------------------------------------------------------------------- the libraries themselves


def robust(classifier: KNN, x_adv: Tensor, y: Tensor) -> float:
    return float((margin(classifier.scores(x_adv), y) >= -TIE).double().mean())


def test_foolbox_takes_both_views() -> None:
    pytest.importorskip("foolbox")
    import foolbox.attacks as fa

    classifier, x, y = images(n=16)
    soft, hard = to_foolbox(classifier), to_foolbox(classifier, view="hard")
    _, clipped, success = fa.LinfPGD(steps=20)(soft, x, y, epsilons=0.08)
    assert float((clipped - x).abs().max()) <= 0.08 + 1e-6
    assert torch.equal(success, classifier.labels(clipped) != y)
    assert robust(classifier, clipped, y) < 0.5
    raw, _, success = fa.DDNAttack(steps=40)(soft, x, y, epsilons=None)
    assert float(success.double().mean()) > 0.9
    assert torch.equal(success, classifier.labels(raw) != y)
    raw, _, success = fa.HopSkipJumpAttack(steps=2, initial_gradient_eval_steps=10)(hard, x[:4], y[:4], epsilons=None)
    assert torch.equal(success, classifier.labels(raw) != y[:4])


def test_art_takes_both_views() -> None:
    pytest.importorskip("art")
    from art.attacks.evasion import HopSkipJump as ArtHopSkipJump
    from art.attacks.evasion import ProjectedGradientDescent, SquareAttack

    classifier, x, y = images(n=16)
    soft, hard = to_art(classifier, (1, 6, 6)), to_art(classifier, (1, 6, 6), view="hard")
    assert np.array_equal(soft.predict(x.numpy()).argmax(1), classifier.labels(x).numpy())
    pgd = ProjectedGradientDescent(soft, norm=np.inf, eps=0.08, eps_step=0.02, max_iter=20, verbose=False)
    found = torch.from_numpy(pgd.generate(x.numpy(), y.numpy()))
    assert float((found - x).abs().max()) <= 0.08 + 1e-6
    assert robust(classifier, found, y) < 0.5
    square = SquareAttack(hard, norm=np.inf, eps=0.15, max_iter=60, verbose=False)
    found = torch.from_numpy(square.generate(x.numpy(), y.numpy()))
    assert robust(classifier, found, y) < 1
    jump = ArtHopSkipJump(hard, max_iter=1, max_eval=50, init_eval=20, verbose=False)
    found = torch.from_numpy(jump.generate(x[:3].numpy()))
    assert bool((classifier.labels(found) != classifier.labels(x[:3])).any())


def test_torchattacks_takes_both_views() -> None:
    torchattacks = pytest.importorskip("torchattacks")
    classifier, x, y = images(n=16)
    found = torchattacks.PGD(surrogate(classifier), eps=0.08, alpha=0.01, steps=20)(x, y)
    assert robust(classifier, found, y) < 0.5
    found = torchattacks.Square(as_hard(classifier), eps=0.15, n_queries=60)(x, y)
    assert robust(classifier, found, y) < 1


def test_autoattack_takes_both_views() -> None:
    auto = pytest.importorskip("pyautoattack")
    classifier, x, y = images(n=16)
    right = classifier.labels(x) == y
    x, y = x[right], y[right]
    soft, hard = surrogate(classifier), as_hard(classifier)
    for name, view in (("apgd-ce", soft), ("apgd-dlr", soft), ("square", hard)):
        attack = auto.AutoAttack(view, norm="Linf", eps=0.1, version="custom", attacks=[name], device="cpu", seed=0)
        for part in (attack.apgd, attack.square):
            if part is not None and hasattr(part, "n_queries"):
                part.n_queries = 60
        out = attack.run_standard_evaluation(x, y, batch_size=32)
        found = out[0] if isinstance(out, tuple) else out
        assert robust(classifier, found, y) < 0.6, name


@pytest.mark.parametrize("backend", ["art", "foolbox"])
@pytest.mark.parametrize("kind", [HopSkipJump, Boundary])
def test_their_attacks_are_ours(kind: type[Any], backend: str) -> None:
    pytest.importorskip(backend)
    classifier, x, y = images(n=6)
    threat = ThreatModel("l2", math.sqrt(36))
    attack = kind(queries=400, backend=backend, minimize=True)
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    found = attack(classifier, x, y, threat, seed=3)
    assert np.array_equal(np.random.get_state()[1], state[0])
    assert torch.equal(torch.get_rng_state(), state[1])
    assert bool(found.success.all())
    assert int(found.forward_passes.max()) <= 400
    few = kind(queries=40, backend=backend, minimize=True)(classifier, x, y, threat, seed=3)
    assert float(found.l2.median()) < 0.9 * float(few.l2.median())
    alone = attack(classifier, x[2:3], y[2:3], threat, seed=3, sample_ids=torch.tensor([2]))
    assert torch.equal(alone.x_adv[0], found.x_adv[2])
    moved = ThreatModel("l2", math.sqrt(36) * 4, (-1.0, 3.0))  # bounds other than [0, 1]
    other = attack(classifier, x, y, moved, seed=3)
    assert bool(other.success.all())
    assert float(other.l2.median()) < 2


def test_they_are_made_by_name() -> None:
    assert registry.attacks.create("hop-skip-jump", queries=50) == HopSkipJump(queries=50)
    assert registry.attacks.create("boundary", backend="foolbox") == Boundary(backend="foolbox")
    assert surrogate(random_classifier()[0], votes=Adaptive(max_classes=1)).votes.max_classes == 1
