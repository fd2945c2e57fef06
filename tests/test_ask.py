"""ASK against its formulas written out in NumPy, one reference at a time."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from small import random_classifier, random_net
from torch import Tensor, nn

from robustknn import KNN, PGD, DkNN, FeatureExtractor, InputError, ReferenceSet, ThreatModel
from robustknn.classifiers import Classifier, RetrievalClassifier
from robustknn.objectives import ASK
from robustknn.objectives.classes import winners

Array = NDArray[np.float64]


def by_hand(
    ask: ASK, classifier: DkNN, x0: Tensor, x: Tensor, y: int, target: int | None = None, least: int = 1
) -> float:
    """The loss of one input whose guides were looked up at x0: loops over layers, classes and references.

    Only classes with at least `least` references are tried.
    """
    own = y if target is None else target
    layers = classifier.references_.layers
    kappa = ask.weight if isinstance(ask.weight, tuple) else (ask.weight,) * len(layers)
    temperatures = ask.temperature if isinstance(ask.temperature, tuple) else (ask.temperature,) * len(layers)
    labels = classifier.references_.labels.numpy()
    ids = torch.arange(len(labels))
    classes = np.unique(labels)
    vectors = {layer: classifier.references_.rows(layer, ids).numpy() for layer in layers}
    with torch.no_grad():
        start = {k: v[0].numpy() for k, v in classifier.references_.extractor()(x0[None]).items()}
        here = {k: v[0].numpy() for k, v in classifier.references_.extractor()(x[None]).items()}
    metric = ask.metric or classifier.metric
    k = ask.n_neighbors or classifier.n_neighbors
    guides: dict[str, dict[int, Array]] = {}
    for layer in layers:
        guides[layer] = {}
        for c in classes:
            members = vectors[layer][labels == c]
            nearest = np.argsort([distance(start[layer], r, metric) for r in members], kind="stable")[:k]
            guides[layer][int(c)] = members[nearest]
    if ask.max_classes is not None:
        ranking = np.zeros(len(classes))
        for layer in layers:
            means = np.array(
                [np.mean([distance(start[layer], r, metric) for r in guides[layer][c]]) for c in range(len(classes))]
            )
            ranking += means / means.mean()
        others = [c for c in np.argsort(ranking) if c != own and (labels == c).sum() >= least][: ask.max_classes]
    else:
        others = [c for c in range(len(classes)) if c != own]
    total, scores = 0.0, np.zeros(1 + len(others))
    for place, layer in enumerate(layers):
        distances = [[distance(here[layer], r, metric) for r in guides[layer][c]] for c in [own, *others]]
        if ask.kind == "class-wise":
            if metric == "l2" and ask.mean == "quadratic":
                means = np.array([np.sqrt(np.mean(np.square(d))) for d in distances])
            else:
                means = np.array([np.mean(d) for d in distances])
            if ask.scale == "mean":
                means = means / means.mean()
            if ask.loss == "cross-entropy":
                logits = -means / temperatures[place]
                total += kappa[place] * (np.log(np.exp(logits).sum()) - logits[0])
            else:
                scores += kappa[place] * means
            continue
        flat = np.concatenate(distances)
        scale = flat.mean() if ask.scale == "mean" else 1.0
        weights = [np.exp(-np.array(d) / (temperatures[place] * scale)) for d in distances]
        if ask.include_self:
            itself = np.exp(-distance(here[layer], start[layer], metric) / (temperatures[place] * scale))
            weights[0] = np.append(weights[0], itself)
        shares = np.array([w.sum() for w in weights]) / sum(w.sum() for w in weights)
        if ask.loss == "cross-entropy":
            total += kappa[place] * -np.log(shares[0] + 1e-6)
        else:
            scores += kappa[place] * -np.log(shares)
    if ask.loss == "margin" and ask.kind == "class-wise":
        t, s = float(np.mean(temperatures)), scores / sum(kappa)
        total = s[0] + t * np.log(np.exp(-s[1:] / t).sum())
    elif ask.loss == "margin":
        s = scores / sum(kappa)
        total = s[0] - s[1:].min()
    else:
        total /= sum(kappa)
    return float(total if target is None else -total)


def distance(a: Array, b: Array, metric: str) -> float:
    if metric == "ip":
        return float(-a @ b)
    if metric == "l2":
        return float(np.sqrt(((a - b) ** 2).sum()))
    return float(1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def losses(ask: ASK, classifier: DkNN, x0: Tensor, x: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    bound = ask.bind(classifier)
    return bound.start(x0, y, target, classifier.look(x0, bound.requests)).loss(x)


FORMS: list[dict[str, Any]] = [
    {"kind": kind, "loss": loss, "scale": scale, "metric": metric, "mean": mean, "max_classes": None}
    for kind, loss, scale, metric, mean in itertools.product(
        ("class-wise", "instance-wise"),
        ("cross-entropy", "margin"),
        ("none", "mean"),
        ("l2", "cosine"),
        ("arithmetic", "quadratic"),
    )
]


def rounding(form: dict[str, Any]) -> float:
    """Class means take their spread from distances that the search by class keeps to 23 bits."""
    by_means = form["kind"] == "class-wise" and (form["metric"] == "cosine" or form["mean"] == "quadratic")
    return 2e-5 if by_means else 1e-7


@pytest.mark.parametrize("form", FORMS, ids=lambda f: " ".join(str(v) for v in f.values()))
def test_every_form_equals_the_formula(form: dict[str, Any]) -> None:
    classifier, x0, y = random_classifier(metric=form["metric"])
    ask = ASK(**form, n_neighbors=3, temperature=(0.1, 0.3), weight=(1.0, 0.5))
    x = x0 + 0.05
    got = losses(ask, classifier, x0, x, y)
    want = [by_hand(ask, classifier, x0[i], x[i], int(y[i])) for i in range(len(x))]
    assert got.tolist() == pytest.approx(want, rel=rounding(form), abs=rounding(form))


@pytest.mark.parametrize(
    "ask",
    [
        ASK(),
        ASK(max_classes=2),
        ASK(max_classes=2, loss="cross-entropy"),
        ASK(kind="instance-wise", max_classes=2),
        ASK(kind="instance-wise", loss="cross-entropy", include_self=True, max_classes=None),
        ASK.published(),
        ASK.published(metric="cosine"),
        ASK.published("instance-wise", include_self=True),
        ASK(n_neighbors=50),
    ],
    ids=str,
)
def test_defaults_and_the_published_setting(ask: ASK) -> None:
    classifier, x0, y = random_classifier()
    target = (y + 1) % 4
    x = x0 - 0.03
    for t in (None, target):
        got = losses(ask, classifier, x0, x, y, t)
        want = [
            by_hand(ask, classifier, x0[i], x[i], int(y[i]), None if t is None else int(t[i])) for i in range(len(x))
        ]
        assert got.tolist() == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_the_published_setting_is_the_released_one() -> None:
    ask = ASK.published()
    assert (ask.kind, ask.loss, ask.metric, ask.temperature, ask.n_neighbors) == (
        "class-wise",
        "cross-entropy",
        "l2",
        0.1,
        5,
    )
    assert (ask.scale, ask.mean, ask.max_classes, ask.include_self) == ("none", "arithmetic", None, False)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: " ".join(str(v) for v in f.values()))
def test_gradients_by_finite_differences(form: dict[str, Any]) -> None:
    classifier, x0, y = random_classifier(metric=form["metric"])
    ask = ASK(**form, n_neighbors=3, temperature=0.3)
    bound = ask.bind(classifier)
    batch = bound.start(x0, y, None, classifier.look(x0, bound.requests))
    x = (x0 + 0.05).requires_grad_(True)
    (gradient,) = torch.autograd.grad(batch.loss(x).sum(), x)
    # The scale is held fixed in the gradient on purpose, so its own derivative is added back here.
    with torch.no_grad():
        step = 1e-6
        for i, j in ((0, 0), (3, 2), (7, 5), (11, 1)):
            moved = x.detach().clone()
            moved[i, j] += step
            back = x.detach().clone()
            back[i, j] -= step
            slope = float((batch.loss(moved)[i] - batch.loss(back)[i]) / (2 * step))
            if form["scale"] == "none":
                assert float(gradient[i, j]) == pytest.approx(slope, rel=1e-4, abs=1e-7)
            else:
                assert np.isfinite(slope)
    if form["scale"] == "mean":
        fixed = frozen_scale_loss(ask, classifier, x0, y)
        x2 = (x0 + 0.05).requires_grad_(True)
        (want,) = torch.autograd.grad(fixed(x2).sum(), x2)
        assert torch.allclose(gradient, want, rtol=10 * rounding(form), atol=1e-9)


def frozen_scale_loss(ask: ASK, classifier: DkNN, x0: Tensor, y: Tensor) -> Any:
    """The same loss with each layer's scale computed beforehand at the point of the gradient, as a constant."""
    references = classifier.references_
    scales: dict[str, Tensor] = {}

    def loss(x: Tensor) -> Tensor:
        features = references.extractor()(x)
        at_start = references.extractor()(x0)
        total: Tensor | float = 0.0
        for layer in references.layers:
            vectors = references.rows(layer, torch.arange(len(references)))
            columns = []
            for c in range(4):
                members = vectors[references.labels == c]
                near = pairwise(at_start[layer], members, classifier.metric).argsort(1)[:, :3]
                chosen = members[near]
                columns.append(pairwise_rows(features[layer], chosen, classifier.metric))
            d = torch.stack(columns, 1)  # (N, C, K)
            if ask.kind == "class-wise":
                quadratic = ask.mean == "quadratic" and classifier.metric == "l2"
                means = d.square().mean(2).sqrt() if quadratic else d.mean(2)
                scales.setdefault(layer, means.detach().mean(1, keepdim=True))
                part = means / scales[layer]
                if ask.loss == "cross-entropy":
                    part = torch.nn.functional.cross_entropy(-part / 0.3, y, reduction="none")
            else:
                scales.setdefault(layer, d.detach().mean((1, 2), keepdim=True))
                part = torch.logsumexp(-d / (0.3 * scales[layer]), 2)
                part = part - torch.logsumexp(part, 1, keepdim=True)
                own = part.gather(1, y[:, None])[:, 0]
                part = -torch.log(own.exp() + 1e-6) if ask.loss == "cross-entropy" else -part
            total = total + part / len(references.layers)
        assert isinstance(total, Tensor)
        if ask.loss == "cross-entropy":
            return total
        own = total.gather(1, y[:, None])[:, 0]
        others = total.scatter(1, y[:, None], float("inf"))
        if ask.kind == "class-wise":
            return own + 0.3 * torch.logsumexp(-others / 0.3, 1)
        return own - others.amin(1)

    return loss


def pairwise(q: Tensor, r: Tensor, metric: str) -> Tensor:
    return pairwise_rows(q, r.expand(len(q), *r.shape), metric)


def pairwise_rows(q: Tensor, r: Tensor, metric: str) -> Tensor:
    if metric == "l2":
        return (q[:, None] - r).square().sum(2).sqrt()
    return 1 - torch.nn.functional.cosine_similarity(q[:, None], r, dim=2)


@pytest.mark.parametrize("kind", ["class-wise", "instance-wise"])
@pytest.mark.parametrize("loss", ["margin", "cross-entropy"])
def test_scale_free_losses_do_not_feel_the_size_of_features(kind: str, loss: str) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(40, 5, dtype=torch.float64), torch.arange(40) % 4
    found = []
    for size in (1.0, 1e4):
        identity = FeatureExtractor(torch.nn.Identity())
        references = ReferenceSet.build(identity, (x * size, y))
        classifier = DkNN(references, 3)
        found.append(losses(ASK(kind=kind, loss=loss), classifier, x[:9] * size, (x[:9] + 0.1) * size, y[:9]))
    assert torch.allclose(found[0], found[1], rtol=1e-6)


@pytest.mark.parametrize("kind", ["class-wise", "instance-wise"])
@pytest.mark.parametrize("loss", ["margin", "cross-entropy"])
def test_inner_products_equal_the_formula(kind: str, loss: str) -> None:
    """Without scale: what the distances are measured from cancels in every form."""
    classifier, x0, y = random_classifier(metric="ip")
    ask = ASK(kind=kind, loss=loss, scale="none", n_neighbors=3, temperature=0.3, max_classes=None)
    x = x0 + 0.05
    want = [by_hand(ask, classifier, x0[i], x[i], int(y[i])) for i in range(len(x))]
    assert losses(ask, classifier, x0, x, y).tolist() == pytest.approx(want, rel=1e-7, abs=1e-7)


def test_inner_products_of_unit_vectors_are_attacked_as_well_as_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(340) % 4
    x = (torch.rand(4, 12, generator=generator)[y] + 0.2 * torch.randn(340, 12, generator=generator)).clamp(0, 1)
    features = FeatureExtractor(random_net(inputs=12, dtype=torch.float32), "3", normalize=True)
    references = ReferenceSet.build(features, (x[:300], y[:300]))
    fooled = {}
    for metric in ("cosine", "ip"):
        result = PGD()(KNN(references, 5, metric=metric), x[300:], y[300:], ThreatModel("linf", 0.1))
        fooled[metric] = float(result.success.double().mean())
    assert 0.2 < fooled["cosine"] < 0.95
    assert abs(fooled["ip"] - fooled["cosine"]) <= 0.1


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_references_of_another_precision_than_the_network(metric: str, dtype: torch.dtype) -> None:
    classifier, x, y, _ = few_near_many_far(60)
    rows = classifier.references_.rows("(output)", torch.arange(len(classifier.references_))).to(dtype)
    references = ReferenceSet.from_vectors(
        rows, classifier.references_.labels, features=FeatureExtractor(torch.nn.Linear(100, 100).requires_grad_(False))
    )
    network: Any = references.extractor().model
    network.weight.copy_(torch.eye(100))
    network.bias.zero_()
    result = PGD()(KNN(references, 15, metric=metric), x, y, ThreatModel("l2", 0.5))
    assert result.x_adv.dtype == torch.float32
    assert bool(result.success.all())


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.integers(1, 7), st.integers(1, 2))
def test_classes_that_cannot_win_are_known_by_counting(counts: list[int], k: int, voters: int) -> None:
    """Against all the ways in which voters can find k of their references."""
    k = min(k, sum(counts))
    splits = [s for s in itertools.product(*(range(n + 1) for n in counts)) if sum(s) == k]
    sums = {tuple(map(sum, zip(*chosen, strict=True))) for chosen in itertools.product(splits, repeat=voters)}
    can = [any(v[c] > max(v[:c] + v[c + 1 :]) for v in sums) for c in range(len(counts))]
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    x = torch.arange(2.0 * len(y)).view(-1, 2)
    layers = ["0", "1"][:voters]
    network = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    classifier = DkNN(ReferenceSet.build(FeatureExtractor(network, layers), (x, y)), k)
    found = winners(classifier)
    assert found is None if all(can) or sum(can) < 2 else found is not None and found.tolist() == can


def few_near_many_far(n_near: int, decoys: int = 0, k: int = 15) -> tuple[KNN, Tensor, Tensor, Tensor]:
    """Class 1 has a few references near class 0 and its others far off; decoys are nearer, and too few to win.

    Returns:
        The kNN on the inputs themselves, 40 inputs of class 0, their labels, and the direction of class 1.
    """
    generator = torch.Generator().manual_seed(0)

    def around(center: Tensor, n: int) -> Tensor:
        return (center + 0.01 * torch.randn(n, 100, generator=generator)).clamp(0, 1)

    origin, direction = torch.full((100,), 0.5), torch.eye(100)[0]
    far = (torch.rand(100, generator=generator) > 0.5).float()
    parts = [around(origin, 100), around(origin + 0.4 * direction, n_near), around(far, 60)]
    y = [0] * 100 + [1] * (n_near + 60)
    for decoy in range(decoys):
        parts.append(around(origin - 0.3 * torch.eye(100)[1 + decoy], 3))
        y += [2 + decoy] * 3
    references = ReferenceSet.from_vectors(
        torch.cat(parts), torch.tensor(y), features=FeatureExtractor(torch.nn.Identity())
    )
    return KNN(references, k), around(origin, 40), torch.zeros(40, dtype=torch.int64), direction


@pytest.mark.parametrize(("n_near", "decoys", "k"), [(10, 0, 15), (60, 1, 15), (60, 4, 15), (10, 2, 15), (60, 2, 7)])
def test_what_a_straight_line_reaches_the_default_attack_reaches(n_near: int, decoys: int, k: int) -> None:
    classifier, x, y, direction = few_near_many_far(n_near, decoys, k)
    threat = ThreatModel("l2", 0.35)
    assert bool((classifier.labels(threat.project(x + direction, x)) == 1).all())
    assert bool(PGD()(classifier, x, y, threat).success.all())


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_the_default_attack_feels_neither_offset_nor_size_of_features(metric: str) -> None:
    classifier, x, y, _ = few_near_many_far(60)
    threat = ThreatModel("l2", 0.25)
    rows, labels = classifier.references_.rows("(output)", torch.arange(220)), classifier.references_.labels
    kept = labels.bincount()
    assert kept.tolist() == [100, 120]
    found = []
    for scale, offset in ((1.0, 0.0), (1e-8, 0.0), (1e8, 0.0), (1.0, 1e3)):
        network = torch.nn.Linear(100, 100)
        with torch.no_grad():
            network.weight.copy_(scale * torch.eye(100))
            network.bias.fill_(offset - 0.5 * scale)
        references = ReferenceSet.build(FeatureExtractor(network), (rows, labels))
        shifted = metric == "cosine" and offset  # the direction of an offset is shared by all: another classifier
        result = PGD()(KNN(references, 15, metric="l2" if shifted else metric), x, y, threat)
        found.append(float(result.success.double().mean()))
    assert max(found) - min(found) <= 0.05, found


@pytest.mark.parametrize("kind", ["class-wise", "instance-wise"])
@pytest.mark.parametrize("mean", ["arithmetic", "quadratic"])
def test_a_common_offset_of_all_features_is_not_felt(kind: str, mean: str) -> None:
    """Features far from the origin in float32, as many embeddings are: the loss stays that of centered ones."""
    torch.manual_seed(0)
    x, y = torch.randint(64, (40, 5)) / 64.0, torch.arange(40) % 4
    found = []
    for offset in (0.0, 4096.0):  # sums with these are exact
        references = ReferenceSet.build(FeatureExtractor(torch.nn.Identity()), (x + offset, y))
        ask = ASK(kind=kind, mean=mean)
        found.append(losses(ask, DkNN(references, 3), x[:9] + offset, x[:9] + 0.125 + offset, y[:9]))
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-3)  # a float32 of 4096 is known to 2.4e-4


def test_the_published_loss_saturates_where_the_default_does_not() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(40, 5), torch.arange(40) % 2
    x[y == 1] += 100.0  # two far clusters: raw distances / 0.1 leave no gradient in float32
    classifier = DkNN(ReferenceSet.build(FeatureExtractor(torch.nn.Identity()), (x, y)), 3)
    gradients = {}
    for name, ask in (("published", ASK.published()), ("default", ASK())):
        bound = ask.bind(classifier)
        z = (x[:8] + 0.01).requires_grad_(True)
        loss = bound.start(x[:8], y[:8], None, classifier.look(x[:8], bound.requests)).loss(z)
        gradients[name] = torch.autograd.grad(loss.sum(), z)[0].abs().amax(1)
    assert bool((gradients["published"] == 0).all())
    assert bool((gradients["default"] > 1e-6).all())


def test_classes_of_unequal_size_and_a_thousand_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    n_classes = 1000
    y = torch.cat([torch.arange(n_classes), torch.arange(n_classes)[::2], torch.zeros(50, dtype=torch.int64)])
    x = torch.rand(len(y), 4, generator=generator, dtype=torch.float64)
    classifier = DkNN(ReferenceSet.build(FeatureExtractor(torch.nn.Identity()), (x, y)), 5)
    ask = ASK(mean="arithmetic", n_neighbors=3, max_classes=4)
    queries, labels = x[:5] + 0.01, y[:5]
    got = losses(ask, classifier, queries, queries, labels)
    # One reference of five never wins strictly, two can (2, 1, 1, 1).
    want = [by_hand(ask, classifier, queries[i], queries[i], int(labels[i]), least=2) for i in range(5)]
    assert got.tolist() == pytest.approx(want, rel=1e-6)
    bound = ask.bind(classifier)
    state: Any = bound.start(queries, labels, None, classifier.look(queries, bound.requests))
    assert state._parts[0].rows.vectors.shape == (5, 5 * 3, 4)  # five classes of three references, not a thousand


@pytest.mark.parametrize("loss", ["margin", "cross-entropy"])
@pytest.mark.parametrize("aimed", [False, True])
def test_a_class_without_references_draws_no_one(loss: str, aimed: bool) -> None:
    """It was at distance 0: nearer than any, so that the others were no longer looked at."""
    x, y = torch.rand(40, 3, dtype=torch.float64), torch.arange(40) % 3
    query, labels = torch.rand(6, 3, dtype=torch.float64), torch.arange(6) % 3
    target = (labels + 1) % 3 if aimed else None
    found = []
    for n_classes in (3, 5):
        payload = nn.functional.one_hot(y, n_classes).double()
        references = ReferenceSet.from_vectors(x, features=FeatureExtractor(nn.Identity()), payload=payload)
        classifier = RetrievalClassifier(references, 7)
        bound = ASK(loss=loss, max_classes=2 if aimed else 4).bind(classifier)
        batch = bound.start(query, labels, target, classifier.look(query, bound.requests))
        moved = query.clone().requires_grad_(True)
        value = batch.loss(moved)
        found.append((value.detach(), torch.autograd.grad(value.sum(), moved)[0]))
    assert torch.allclose(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1])
    assert bool((found[0][1].norm(dim=1) > 1e-9).all())


def test_a_reference_at_the_input_gives_a_finite_gradient() -> None:
    classifier, _, _ = random_classifier(layers=("1",))
    x = torch.rand(80, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:8]
    for ask in (ASK(), ASK.published(), ASK(kind="instance-wise", include_self=True)):
        bound = ask.bind(classifier)
        z = x.clone().requires_grad_(True)
        batch = bound.start(x, torch.arange(8) % 4, None, classifier.look(x, bound.requests))
        (gradient,) = torch.autograd.grad(batch.loss(z).sum(), z)
        assert bool(torch.isfinite(gradient).all())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"kind": "classwise"}, "kind must be one of"),
    ({"loss": "ce"}, "loss must be one of"),
    ({"scale": "std"}, "scale must be one of"),
    ({"metric": "l1"}, "metric must be one of"),
    ({"weight": float("nan")}, "weight must be a number above 0 and finite"),
    ({"temperature": float("inf")}, "temperature must be a number above 0 and finite"),
    ({"n_neighbors": 0}, "at least 1"),
    ({"temperature": "warm"}, "temperature must be a number above 0"),
    ({"temperature": 0.0}, "temperature must be a number above 0"),
    ({"include_self": True}, "include_self belongs to"),
    ({"max_classes": 0}, "at least 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda v: str(v)[:30])
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ASK(**options)


def test_what_ask_cannot_attack_is_refused_in_a_sentence() -> None:
    classifier, _, _ = random_classifier()
    with pytest.raises(InputError, match="2 layers"):
        ASK(temperature=(0.1, 0.2, 0.3)).bind(classifier)
    with pytest.raises(InputError, match="unknown reference layer"):
        ASK(layers=("9",)).bind(classifier)

    class Black(Classifier):
        n_classes = 2

        def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
            return torch.zeros(len(x), 2)

        def fingerprint(self) -> str:
            return "black"

    with pytest.raises(InputError, match="black-box attack"):
        ASK().bind(Black())
