"""The adaptive objective and the rank-paired margin against float64 references written out in NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logsumexp
from small import digits, digits_references, random_classifier, random_net
from test_ask import distance, few_near_many_far
from torch import Tensor, nn

from robustknn import KNN, PGD, DkNN, FeatureExtractor, InputError, ReferenceSet, ThreatModel, registry
from robustknn.attacks import GradientAttack
from robustknn.classifiers import Classifier, Look, Network, Rule, VoterClassifier, Votes, VoteShare, margin
from robustknn.neighbors import ExactIndex
from robustknn.objectives import ASK, Adaptive, Objective, RankPair
from robustknn.objectives.adaptive import guide_ids, soft_lead

Array = NDArray[np.float64]


class Near(Rule):
    """Votes count by exp(−distance)."""

    def __call__(self, votes: Sequence[Votes], n_classes: int) -> Tensor:
        totals = []
        for v in votes:
            counts = v.weights.new_zeros(len(v.weights), n_classes)
            totals.append(counts.scatter_add(1, v.labels, v.weights * torch.exp(-v.distances)))
        return torch.stack(totals).sum(0)


class Softmaxes(Rule):
    """The weighted mean of the neighbors' payloads; labels count nothing."""

    def __call__(self, votes: Sequence[Votes], n_classes: int) -> Tensor:
        means = []
        for v in votes:
            assert v.payload is not None
            weights = (v.weights / v.weights.sum(1, keepdim=True))[..., None]
            means.append((weights * v.payload.to(v.weights)).sum(1))
        return torch.stack(means).sum(0)


class Hard(Rule):
    """The decision itself: a rule without gradient."""

    def __call__(self, votes: Sequence[Votes], n_classes: int) -> Tensor:
        return nn.functional.one_hot(VoteShare()(votes, n_classes).argmax(1), n_classes).double()


class WithRule(DkNN):
    """A DkNN of another rule."""

    given: Rule = VoteShare()

    @property
    def rule(self) -> Rule:
        return self.given


def with_rule(rule: Rule, references: ReferenceSet, k: int, metric: str = "l2") -> WithRule:
    made = WithRule(references, k, metric=metric)
    made.given = rule
    return made


# ------------------------------------------------------------------------------------- by hand


def numbers(rule: Rule, weights: list[Array], distances: list[Array], labels: list[Any], payload: Any) -> Array:
    """Class scores of one input, 4 classes."""
    scores = np.zeros(4)
    for w, d, label, p in zip(weights, distances, labels, payload, strict=True):
        for j in range(len(w)):
            if isinstance(rule, Near):
                scores[label[j]] += w[j] * np.exp(-d[j])
            elif isinstance(rule, Softmaxes):
                scores += w[j] * p[j] / w.sum()
            else:
                scores[label[j]] += w[j] / (5 * len(weights))
    return scores


def surplus(tau: float, d: Array, h: float, k: int) -> float:
    return float(expit((tau - d) / h).sum() - k)


def by_hand(
    objective: Adaptive, classifier: DkNN, rule: Rule, x0: Tensor, x: Tensor, y: int, target: int | None
) -> float:
    """The loss of one input whose guides were looked up at x0 (k = 5, 4 classes, all of them attacked)."""
    references, k, s = classifier.references_, 5, 3
    labels = references.labels.numpy()
    everything = None if references.stored_payload is None else references.stored_payload.double().numpy()
    says = labels if not isinstance(rule, Softmaxes) else np.asarray(everything).argmax(1)
    weights, found, voted, payload = [], [], [], []
    for layer in references.layers:
        vectors = references.rows(layer, torch.arange(len(references))).double().numpy()
        z0, z = (classifier.references_.extractor()(v[None])[layer][0].double().detach().numpy() for v in (x0, x))
        d0 = np.array([distance(z0, r, classifier.metric) for r in vectors])
        order = np.argsort(d0, kind="stable")
        guides = set(order[:k])
        for c in range(4):
            guides |= set([j for j in order if labels[j] == c][: k + 5 if c == y else s + 3])
        chosen = np.array(sorted(guides))
        lengths = np.linalg.norm(vectors[chosen], axis=1)
        shift = np.linalg.norm(z0) * lengths.max() if classifier.metric == "ip" else 0.0
        there = d0[chosen] + shift
        tau0 = np.sort(there)[k - 1]
        wanted = [c for c in range(4) if c != y] if target is None else [target]
        theirs = [np.sort(there[says[chosen] == c])[:s] for c in wanted]
        most = max(map(len, theirs))  # a class with fewer than s counts only where all have fewer
        thirds = [ranked[-1] for ranked in theirs if len(ranked) == s or (most < s and len(ranked))]
        h = max(objective.floor * tau0, objective.reach * max(min(thirds, default=tau0) - tau0, 0))
        d = np.array([distance(z, vectors[j], classifier.metric) for j in chosen])
        tau = brentq(surplus, d.min() - 99 * h, d.max() + 99 * h, args=(d, h, k), xtol=1e-14)
        weights.append(expit((tau - d) / h))
        found.append(d)
        voted.append(labels[chosen])
        payload.append(None if everything is None else everything[chosen])
    scores = numbers(rule, weights, found, voted, payload)
    smooth = (0.1 if target is None else 0.2) if objective.smooth is None else objective.smooth
    t = smooth * (scores.max() - scores.min())
    own = y if target is None else target
    best = t * logsumexp([scores[c] / t for c in range(4) if c != own])
    return float(best - scores[own] if target is None else scores[own] - best)


def losses(
    objective: Objective, classifier: Classifier, x0: Tensor, x: Tensor, y: Tensor, target: Tensor | None = None
) -> Tensor:
    assert isinstance(classifier, VoterClassifier)
    bound = objective.bind(classifier)
    return bound.start(x0, y, target, classifier.look(x0, bound.requests)).loss(x)


def random_victim(rule: Rule, metric: str, layers: tuple[str, ...] = ("1", "3")) -> tuple[WithRule, Tensor, Tensor]:
    plain, x, y = random_classifier(k=5, metric=metric, layers=layers)
    references = plain.references_
    generator = torch.Generator().manual_seed(5)
    references.stored_payload = torch.rand(len(references), 4, generator=generator, dtype=torch.float64)
    return with_rule(rule, references, 5, metric), x, y


RULES = [VoteShare(), Near(), Softmaxes()]
ALL = Adaptive(max_classes=None)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_the_loss_equals_the_formula(rule: Rule, metric: str) -> None:
    classifier, x0, y = random_victim(rule, metric)
    x, target = x0 + 0.05, (y + 1) % 4
    for objective in (ALL, Adaptive(floor=0.2, reach=0.25, smooth=0.5, max_classes=None)):
        for t in (None, target):
            got = losses(objective, classifier, x0, x, y, t)
            want = [
                by_hand(objective, classifier, rule, x0[i], x[i], int(y[i]), None if t is None else int(t[i]))
                for i in range(len(x))
            ]
            assert got.tolist() == pytest.approx(want, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_gradients_by_finite_differences(rule: Rule, metric: str) -> None:
    """With a hard maximum, since its temperature is held fixed in the gradient."""
    classifier, x0, y = random_victim(rule, metric)
    bound = Adaptive(floor=0.1, smooth=1e-9, max_classes=None).bind(classifier)
    batch = bound.start(x0, y, None, classifier.look(x0, bound.requests))
    assert torch.autograd.gradcheck(batch.loss, (x0 + 0.05).requires_grad_(True), atol=1e-6)


def test_the_smooth_lead_weighs_its_rivals_by_a_softmax() -> None:
    scores = torch.tensor([[0.7, 0.3, 0.1, -0.3], [0.2, 0.2, 0.2, 0.2]], dtype=torch.float64, requires_grad=True)
    lead = soft_lead(scores, torch.tensor([1, 0]), 0.1)
    t = 0.1
    assert float(lead[0].detach()) == pytest.approx(0.3 - t * logsumexp(np.array([0.7, 0.1, -0.3]) / t))
    (gradient,) = torch.autograd.grad(lead.sum(), scores)
    share = np.exp(np.array([0.7, 0.1, -0.3]) / t)
    share /= share.sum()
    assert gradient[0].tolist() == pytest.approx([-share[0], 1, -share[1], -share[2]])
    assert gradient[1].tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])  # all equal: nothing to divide by


def test_scores_that_are_minus_infinity_count_nothing() -> None:
    scores = torch.tensor([[2.0, 1.0, float("-inf")]], dtype=torch.float64, requires_grad=True)
    lead = soft_lead(scores, torch.tensor([0]), 0.1)
    assert float(lead.detach()) == pytest.approx(1.0)
    assert torch.autograd.grad(lead.sum(), scores)[0][0].tolist() == pytest.approx([1, -1, 0])


# -------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_narrow_votes_over_all_references_are_the_hard_decision(rule: Rule, metric: str) -> None:
    plain, x, y = random_classifier(k=5, metric=metric, n=24)  # six references a class: all of them are guides
    plain.references_.stored_payload = torch.rand(24, 4, generator=torch.Generator().manual_seed(1)).double()
    classifier = with_rule(rule, plain.references_, 5, metric)
    exact = Adaptive(floor=1e-7, reach=1e-9, smooth=1e-9, max_classes=None)
    assert losses(exact, classifier, x, x, y).tolist() == pytest.approx(
        (-margin(classifier.scores(x), y)).tolist(), abs=1e-5
    )
    target = (y + 1) % 4
    want = margin(classifier.scores(x), target)
    assert losses(exact, classifier, x, x, y, target).tolist() == pytest.approx(want.tolist(), abs=1e-5)


def test_the_loss_falls_with_the_number_of_right_neighbors() -> None:
    """On a line, with m references of the own class near and 9 − m of another; both have more farther off."""
    found = []
    for m in range(10):
        near = torch.linspace(0.9, 1.1, 9, dtype=torch.float64)
        far = torch.linspace(3.0, 4.0, 24, dtype=torch.float64)
        y = torch.cat([(torch.arange(9) >= m).long(), torch.arange(24) % 2])
        references = ReferenceSet.build(FeatureExtractor(nn.Identity()), (torch.cat([near, far])[:, None], y))
        x = torch.zeros(1, 1, dtype=torch.float64)
        found.append(float(losses(Adaptive(), KNN(references, 9), x, x, torch.tensor([0]))))
    assert all(b < a for a, b in itertools.pairwise(found)), found
    assert found[0] > 0.5
    assert found[-1] < -0.5


def test_the_rival_form_is_the_lead_of_the_best_other_class_over_the_next() -> None:
    classifier, x, y = random_classifier(k=9, n=200, layers=("3",))
    found = {}
    for loss in ("margin", "rival"):
        bound = Adaptive(max_classes=None, loss=loss).bind(classifier)
        look = classifier.look(x, bound.requests)
        batch = bound.start(x, y, None, look)
        moved = x.clone().requires_grad_(True)
        found[loss] = batch.loss(moved)
        (gradient,) = torch.autograd.grad(found[loss].sum(), moved)
        assert bool((gradient.flatten(1).norm(dim=1) > 0).all())
    scores = classifier.combine(
        [b.votes(look.features["3"]) for b in batch._parts]  # type: ignore[attr-defined]
    )
    expected = [
        sorted((s for c, s in enumerate(row) if c != own), reverse=True)
        for row, own in zip(scores.tolist(), y.tolist(), strict=True)
    ]
    assert found["rival"].tolist() == pytest.approx([a - b for a, b, *_ in expected])
    aimed = [
        bound.start(x, y, (y + 1) % 4, look).loss(x)
        for bound in (Adaptive(loss=loss).bind(classifier) for loss in ("margin", "rival"))
    ]
    assert torch.equal(aimed[0], aimed[1])


def test_of_two_classes_the_rival_form_is_the_margin() -> None:
    classifier, x, y = random_classifier(k=5, n_classes=2)
    bounds = [Adaptive(loss=loss).bind(classifier) for loss in ("margin", "rival")]
    losses = [b.start(x, y, None, classifier.look(x, b.requests)).loss(x) for b in bounds]
    assert torch.equal(losses[0], losses[1])


# -------------------------------------------------------------------------------------- guides


@pytest.mark.parametrize("max_classes", [1, 2, None])
def test_guides_hold_the_k_nearest_and_nothing_twice(max_classes: int | None) -> None:
    classifier, x, y = random_classifier(k=9, n=200, layers=("3",))
    bound = Adaptive(max_classes=max_classes).bind(classifier)
    look = classifier.look(x, bound.requests)
    voter = classifier.voters[0]
    rivals = torch.stack([(y + i) % 4 for i in range(1, 1 + (max_classes or 3))], 1)
    ids = guide_ids(look, voter, y, rivals)
    assert ids.shape[1] == 9 + 8 + 10 * rivals.shape[1]
    labels = classifier.references_.labels
    for i in range(len(x)):
        held = ids[i][ids[i] >= 0].tolist()
        assert len(held) == len(set(held))
        assert set(look.nearest[voter].ids[i].tolist()) <= set(held)
        for c, n in ((int(y[i]), 17), *((int(c), 10) for c in rivals[i])):
            nearest = look.by_class[voter].ids[i, c, :n].tolist()
            mine = [j for j in held if labels[j] == c]
            assert len(set(nearest) - set(mine)) <= len(held) - len(set(nearest))  # what had to give way
            assert set(nearest[: n // 2]) <= set(mine)  # is the last in its class


def test_references_of_few_a_class_still_pull() -> None:
    """Where all guides are among the k nearest every vote counts whole, whatever moves: some behind them have to be."""
    places = torch.tensor([0.0, 0.01, 0.02, 0.05, 0.06, 0.07, 0.15, 0.16, 0.17], dtype=torch.float64)[:, None]
    references = ReferenceSet.build(FeatureExtractor(nn.Identity()), (places, torch.arange(9) // 3))
    x, y = torch.tensor([[0.078], [0.08]], dtype=torch.float64), torch.tensor([0, 0])
    for k, aim in ((6, None), (6, torch.tensor([1, 1])), (7, None)):
        classifier = KNN(references, k)
        bound = Adaptive(max_classes=1).bind(classifier)
        batch = bound.start(x, y, aim, classifier.look(x, bound.requests))
        moved = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(batch.loss(moved).sum(), moved)
        assert bool((gradient.abs() > 1e-6).all()), (k, aim)


def test_with_all_references_voting_there_is_nothing_to_climb_and_nothing_breaks() -> None:
    classifier, x, y = random_classifier(k=20, n=20)
    result = PGD(Adaptive(), steps=2)(classifier, x, y, ThreatModel("linf", 0.1))
    assert bool(result.zero_gradient[result.clean_labels == y].all())


def test_of_a_network_the_rule_is_its_class_scores() -> None:
    """Their margin, which has the same gradient's direction whatever multiplies the scores."""
    net, (_, x, _) = random_net(), random_classifier()
    found = []
    for scale in (1.0, 1e4):
        last = nn.Linear(4, 4, bias=False, dtype=torch.float64)
        last.weight.data = scale * torch.eye(4, dtype=torch.float64)
        network = Network(nn.Sequential(net, last), 4)
        found.append(PGD(Adaptive(), steps=5)(network, x, network.labels(x), ThreatModel("linf", 0.2), seed=3))
    won = found[0].success
    assert torch.equal(won, found[1].success)
    assert bool(won.any())
    assert torch.allclose(found[0].x_adv[won], found[1].x_adv[won])


# ------------------------------------------------------------------------------------- attacks


@pytest.fixture(scope="module")
def victim() -> dict[str, Any]:
    source, model = digits()
    references = digits_references(source, model)
    test = source.test.first(64)
    return {"references": references, "x": test.batch(torch.arange(64)), "y": test.labels}


OBJECTIVES = [Adaptive(), RankPair()]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("size", [1, 7, 10])
def test_batch_size_and_order_change_no_bit(
    victim: dict[str, Any], objective: Objective, targeted: bool, size: int
) -> None:
    n, threat = 10, ThreatModel("linf", 0.1)
    x, y, ids = victim["x"][:n], victim["y"][:n], torch.arange(100, 100 + n)
    targets = (y + 1) % 10 if targeted else None
    classifier, attack = DkNN(victim["references"], 15), PGD(objective, steps=9, check_every=4, restarts=2)
    whole = attack(classifier, x, y, threat, targets=targets, sample_ids=ids, batch_size=n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    targets = None if targets is None else targets[order]
    parts = attack(classifier, x[order], y[order], threat, targets=targets, sample_ids=ids[order], batch_size=size)
    assert torch.equal(parts.x_adv, whole.x_adv[order])


def test_the_adaptive_attack_is_no_weaker_than_ask(victim: dict[str, Any]) -> None:
    for k, metric in ((3, "l2"), (15, "cosine")):
        classifier, left = KNN(victim["references"], k, layer="relu3", metric=metric), {}
        for objective in (ASK(), Adaptive()):
            result = PGD(objective)(classifier, victim["x"], victim["y"], ThreatModel("linf", 0.1))
            left[type(objective).__name__] = int(result.robust.sum())
        assert left["Adaptive"] <= left["ASK"] + 1


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize(("n_near", "decoys", "k"), [(10, 0, 15), (60, 1, 15), (60, 4, 15), (10, 2, 15), (60, 2, 7)])
def test_what_a_straight_line_reaches_is_reached(objective: Objective, n_near: int, decoys: int, k: int) -> None:
    classifier, x, y, _ = few_near_many_far(n_near, decoys, k)
    assert bool(PGD(objective)(classifier, x, y, ThreatModel("l2", 0.35)).success.all())


def moons(n: int, n_classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_classes)
    y = torch.arange(n) % n_classes
    centers = torch.rand(n_classes, 6, generator=generator)
    return centers[y] + 0.08 * torch.randn(n, 6, generator=generator), y


def test_a_payload_rule_is_attacked_where_labels_mislead() -> None:
    """The payload decides and the labels are noise; the attack needs no code for either rule."""
    x, y = moons(340, 4)
    noise = torch.randint(4, (300,), generator=torch.Generator().manual_seed(3))
    noise[:4] = torch.arange(4)
    features = FeatureExtractor(random_net(inputs=6, dtype=torch.float32), ("1", "3"))
    references = ReferenceSet.build(features, (x[:300], noise))
    references.stored_payload = nn.functional.one_hot(y[:300], 4).float()
    classifier = with_rule(Softmaxes(), references, 15)
    x, y = x[300:], y[300:]
    assert float((classifier.labels(x) == y).double().mean()) >= 0.9
    threat = ThreatModel("l2", 0.6, bounds=None)
    fooled = {
        type(o).__name__: float(PGD(o)(classifier, x, y, threat).success.double().mean()) for o in (ASK(), Adaptive())
    }
    assert fooled["Adaptive"] >= 0.95
    assert fooled["ASK"] <= 0.1


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("n_classes", [2, 30])
def test_two_classes_and_thirty(objective: Objective, n_classes: int) -> None:
    x, y = moons(640, n_classes)
    classifier = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (x[:600], y[:600])), 5)
    result = PGD(objective)(classifier, x[600:], y[600:], ThreatModel("l2", 0.5, bounds=None))
    assert float(result.success.double().mean()) >= 0.9
    targets = (y[600:] + 1) % n_classes
    far = PGD(objective)(classifier, x[600:], y[600:], ThreatModel("l2", 1.0, bounds=None), targets=targets)
    assert float(far.success.double().mean()) >= 0.9


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_classes_with_a_single_reference_and_k_of_all_references(objective: Objective) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.cat([torch.arange(6), torch.zeros(12, dtype=torch.int64), torch.ones(12, dtype=torch.int64)])
    x = torch.rand(len(y), 4, generator=generator, dtype=torch.float64)
    for k in (1, 7, len(y)):
        classifier = DkNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (x, y)), k)
        z = (x + 0.01).requires_grad_(True)
        loss = losses(objective, classifier, x, z, y)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        assert bool(torch.isfinite(loss).all())
        assert bool(torch.isfinite(gradient).all())


def test_inputs_that_are_references_have_a_finite_gradient() -> None:
    x = torch.zeros(12, 3, dtype=torch.float64)
    x[6:] = 1.0
    classifier = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (x, torch.arange(12) // 6)), 5)
    for objective in OBJECTIVES:
        z = x.clone().requires_grad_(True)
        loss = losses(objective, classifier, x, z, torch.arange(12) // 6)
        assert bool(torch.isfinite(torch.autograd.grad(loss.sum(), z)[0]).all())


# ------------------------------------------------------------------------------- rank-paired margin


def rank_pair_by_hand(objective: RankPair, classifier: DkNN, x0: Tensor, x: Tensor, own: int, targeted: bool) -> float:
    references, s = classifier.references_, classifier.n_neighbors // 2 + 1
    labels = references.labels.numpy()
    totals = np.zeros(4)
    for layer in references.layers:
        vectors = references.rows(layer, torch.arange(len(references))).double().numpy()
        z0, z = (references.extractor()(v[None])[layer][0].double().detach().numpy() for v in (x0, x))
        d0 = np.array([distance(z0, r, classifier.metric) for r in vectors])
        d = np.array([distance(z, r, classifier.metric) for r in vectors])
        chosen = {c: [j for j in np.argsort(d0, kind="stable") if labels[j] == c][: 2 * s] for c in range(4)}
        guides = [j for ids in chosen.values() for j in ids]
        shift = np.linalg.norm(z0) * np.linalg.norm(vectors[guides], axis=1).max() if classifier.metric == "ip" else 0.0
        scale = np.mean(d0[guides]) + shift
        for c in range(4):
            mine, theirs = np.sort(d[chosen[own]]), np.sort(d[chosen[c]])
            n = min(s, len(mine), len(theirs))
            totals[c] += np.mean(mine[:n] - theirs[:n]) / scale / len(references.layers)
    t = objective.smooth
    best = t * logsumexp([totals[c] / t for c in range(4) if c != own])
    return float(-best if targeted else best)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_rank_paired_margin_equals_the_formula(metric: str, targeted: bool) -> None:
    classifier, x0, y = random_classifier(k=9, metric=metric)
    objective = RankPair(smooth=0.1, max_classes=None)
    target = (y + 1) % 4 if targeted else None
    x, own = x0 + 0.3, y if target is None else target
    got = losses(objective, classifier, x0, x, y, target)
    want = [rank_pair_by_hand(objective, classifier, x0[i], x[i], int(own[i]), targeted) for i in range(len(x))]
    assert got.tolist() == pytest.approx(want, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_gradients_of_the_rank_paired_margin(metric: str) -> None:
    classifier, x0, y = random_classifier(metric=metric)
    bound = RankPair().bind(classifier)
    batch = bound.start(x0, y, None, classifier.look(x0, bound.requests))
    assert torch.autograd.gradcheck(batch.loss, (x0 + 0.05).requires_grad_(True))


def test_a_rare_class_is_paired_on_the_ranks_it_has() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [5.0], [6.0], [7.0]], dtype=torch.float64)
    references = ReferenceSet.build(FeatureExtractor(nn.Identity()), (x, torch.tensor([0, 0, 0, 0, 1, 1])))
    at = torch.tensor([[0.25]], dtype=torch.float64)
    got = losses(RankPair(), KNN(references, 6), at, at, torch.tensor([0]))  # s = 4; class 1 has two
    scale = np.mean([0.25, 0.75, 1.75, 4.75, 5.75, 6.75])
    assert float(got) == pytest.approx(np.mean([0.25 - 5.75, 0.75 - 6.75]) / scale)


# -------------------------------------------------------------------------------------- refusals


class Labels(Classifier):
    """A function x → scores, nothing else."""

    n_classes = 4

    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        return torch.zeros(len(x), 4, dtype=torch.float64)

    def fingerprint(self) -> str:
        return "labels"


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_what_cannot_work_is_refused(objective: Objective) -> None:
    classifier, x, y = random_classifier()
    with pytest.raises(InputError, match="use a black-box attack: square"):
        PGD(objective)(Labels(), x, y, ThreatModel())
    for voter in classifier.voters:
        assert isinstance(voter.index, ExactIndex)
        voter.index.exact = False
    with pytest.raises(InputError, match=r"approximate.*allow_approximate=True"):
        PGD(objective)(classifier, x, y, ThreatModel(bounds=None))
    allowed: Callable[..., Objective] = type(objective)
    assert len(PGD(allowed(allow_approximate=True), steps=1)(classifier, x, y, ThreatModel(bounds=None)).x_adv) == 12


def test_a_rule_without_gradient_is_refused() -> None:
    plain, x, y = random_classifier()
    with pytest.raises(InputError, match=r"the scores of the rule Hard have no gradient.*'square'"):
        PGD(Adaptive())(with_rule(Hard(), plain.references_, 5), x, y, ThreatModel(bounds=None))


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (Adaptive, {"floor": 0.0}, "floor"),
        (Adaptive, {"reach": -1}, "reach"),
        (Adaptive, {"smooth": 0}, "smooth"),
        (Adaptive, {"max_classes": 0}, "max_classes"),
        (RankPair, {"smooth": 0}, "smooth"),
        (RankPair, {"max_classes": 1.5}, "max_classes"),
    ],
)
def test_bad_settings_are_refused(made: Callable[..., Objective], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(**options)


def test_registered_by_name() -> None:
    for name, objective in (("adaptive", Adaptive()), ("rank-pair", RankPair())):
        assert registry.objectives.create(name) == objective
        attack = registry.attacks.create(name, steps=7)
        assert isinstance(attack, GradientAttack)
        assert (attack.objective, attack.steps) == (objective, 7)


def test_a_look_at_the_classifier_is_all_that_is_needed() -> None:
    """Nothing but what was looked up is searched while climbing."""
    classifier, x, y = random_classifier()
    bound = Adaptive().bind(classifier)
    look = classifier.look(x, bound.requests)
    assert isinstance(look, Look)
    for voter in classifier.voters:
        voter.index.search = voter.index.search_both = None  # type: ignore[method-assign, assignment]
    batch = bound.start(x, y, None, look)
    batch.update(torch.arange(4), None)
    assert batch.loss(x[:4]).shape == (4,)
