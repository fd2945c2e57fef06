"""Smoothing of the embedding: closed forms, the bound of a mean, plain sums, and attacks inside the radius."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from small import Pixels, digits
from torch import Tensor, nn

from robustknn import KNN, DkNN, FeatureExtractor, ReferenceSet, registry, rng
from robustknn.certification import ABSTAINS, EmbeddingSmoothing, SmoothedEmbedding, Smoothing, smoothed_references
from robustknn.certification.confidence import mean_error
from robustknn.classifiers import FunctionClassifier, knn_from_index
from robustknn.errors import InputError, NotReadyError


class Side(nn.Module):
    """(1, 0) beyond the plane x₁ = 0 and (−1, 0) before it: the mean feature is (2Φ(x₁/σ) − 1, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        side = torch.where(x[:, :1] > 0, 1.0, -1.0)
        return torch.cat([side, torch.zeros_like(side)], 1)


def side_knn() -> KNN:
    references = torch.tensor([[5.0, 0.0], [-0.1, 0.0]])
    return KNN(ReferenceSet.from_vectors(references, [1, 0], features=FeatureExtractor(Side())), 1, metric="cosine")


class Angle(nn.Module):
    """A point of the plane on the unit circle's upper half and its double: 4 numbers that vary smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        turns = torch.stack([3 * x[:, 0] + x[:, 1], 4 * x[:, 1] - 2 * x[:, 0]], 1)
        return torch.cat([turns.sin(), turns.cos()], 1)


def angle_knn(k: int = 3, n: int = 45) -> tuple[KNN, Tensor]:
    made = np.random.default_rng(3)
    points = torch.tensor(made.random((n, 2)))
    labels = ((points[:, 0] > 0.5).long() + (points[:, 1] > 0.6).long()).clamp_max(2)
    references = ReferenceSet.build(FeatureExtractor(Angle()), (points, labels))
    return KNN(references, k, metric="cosine"), torch.tensor(made.random((14, 2)))


# ------------------------------------------------------------------------------------- the mean's error


@pytest.mark.parametrize(("spread", "n"), [(0.05, 60), (0.5, 60), (3.0, 60), (0.5, 1000)])
def test_the_mean_is_off_by_more_than_the_bound_as_rarely_as_promised(spread: float, n: int) -> None:
    """A distribution on 40 unit vectors in 30 dimensions, whose mean is known."""
    made = np.random.default_rng(0)
    values = made.normal(size=(40, 30)) * spread / np.sqrt(30)
    values[:, 0] += 1
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    mean = values.mean(0)
    repeats, alpha = 3000, 0.1
    counts = made.multinomial(n, np.full(40, 1 / 40), size=repeats)
    found = counts @ values / n
    errors = np.linalg.norm(found - mean, axis=1)
    bounds = mean_error(torch.tensor(np.linalg.norm(found, axis=1)), n, alpha).numpy()
    assert (errors > bounds).mean() <= alpha
    usual = math.sqrt(1 - mean @ mean) / math.sqrt(n)  # the root mean square error
    assert (
        bounds.mean() < 3 * usual + 6 * math.log(2 / alpha) / n
    )  # of the right size, also where the variance is small


def test_the_bound_of_a_mean_of_signs_holds_at_the_worst_case() -> None:
    made = np.random.default_rng(1)
    n, alpha = 50, 0.2
    found = made.choice([-1.0, 1.0], size=(5000, n)).mean(1)
    bounds = mean_error(torch.tensor(np.abs(found)), n, alpha).numpy()
    assert (np.abs(found) > bounds).mean() <= alpha
    assert (np.abs(found) > bounds / 2).mean() > alpha / 2


@pytest.mark.parametrize("n", [5, 50, 5000])
def test_the_bound_is_the_largest_over_all_lengths_that_agree_with_what_was_seen(n: int) -> None:
    tau, grid = math.log(2 / 0.01), np.linspace(0, 1, 400_001)
    each = np.sqrt(2 * (1 - grid**2) * tau / n) + 2 * tau / (3 * n)
    for length in (0.0, 0.1, 0.5, 0.9, 0.99, 0.9999, 1.0):
        want = each[grid + each >= length].max()
        got = float(mean_error(torch.tensor([length], dtype=torch.float64), n, 0.01))
        assert got == pytest.approx(want, abs=1e-4)
        assert got >= want - 1e-12


# ------------------------------------------------------------------------------------------ closed form


def test_the_radius_is_the_true_one_less_what_draws_leave_open() -> None:
    sigma, n, alpha = 0.5, 20_000, 0.01
    true = torch.tensor([0.1, 0.3, 0.6, -0.4])
    x = torch.stack([true, torch.full((4,), 7.0)], 1)
    made = EmbeddingSmoothing(sigma, n, alpha)(side_knn(), x)
    assert made.labels.tolist() == [1, 1, 1, 0]
    for radius, distance in zip(made.radius.tolist(), true.abs().tolist(), strict=True):
        assert radius < distance
        margin = 2 * norm.cdf(distance / sigma) - 1
        off = math.sqrt(2 * (1 - margin**2) * math.log(2 / alpha) / n) + 0.001
        assert radius > sigma * norm.ppf((1 + margin - 2 * off) / 2)
        assert radius > sigma * math.sqrt(math.pi / 2) * (margin - 2 * off)  # what the Lipschitz constant would give


def test_the_radius_exceeds_the_true_one_no_more_often_than_promised() -> None:
    """Without the term of the draws it would be exceeded half of the time."""
    x = torch.tensor([[0.3, 0.0]]).expand(400, 2)
    made = EmbeddingSmoothing(0.5, 300, 0.1)(side_knn(), x)
    assert int((made.radius > 0.3).sum()) <= 40 + 3 * 6
    assert (made.radius > 0).all()
    assert float(made.radius.mean()) > 0.15


def test_on_the_boundary_it_abstains() -> None:
    made = EmbeddingSmoothing(0.5, 500)(side_knn(), torch.zeros(30, 2))
    assert (made.labels == ABSTAINS).all()
    assert (made.radius == -1).all()
    assert made.unit == "L2 of the input"


def test_one_class_alone_can_never_change() -> None:
    references = ReferenceSet.from_vectors(torch.eye(2), [0, 0], features=FeatureExtractor(Side()))
    made = EmbeddingSmoothing(0.5, 50)(KNN(references, 1, metric="cosine"), torch.ones(1, 2))
    assert made.radius.tolist() == [math.inf]


# ------------------------------------------------------------------------------------------- soundness


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_no_attack_inside_the_radius_changes_the_neighbors_of_the_mean(k: int) -> None:
    knn, x = angle_knn(k)
    sigma = 0.12
    made = EmbeddingSmoothing(sigma, 4000)(knn, x)
    points = knn.references_.rows(knn.references_.layers[0], torch.arange(45)).double()
    points = points / points.norm(dim=1, keepdim=True)
    labels = knn.references_.labels.numpy()
    draws = sigma * torch.randn(12_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def votes(point: Tensor) -> Any:
        features = Angle()(point + draws)
        mean = (features / features.norm(dim=1, keepdim=True)).mean(0)
        near = np.argsort(((points - mean) ** 2).sum(1).numpy())[:k]
        return np.bincount(labels[near], minlength=3)

    certain = [i for i in range(len(x)) if made.labels[i] >= 0]
    assert len(certain) >= 4
    outside = 0
    for i in certain:
        label = int(made.labels[i])
        for angle in np.linspace(0, 2 * np.pi, 24, endpoint=False):
            way = torch.tensor([np.cos(angle), np.sin(angle)]) * float(made.radius[i])
            inside = votes(x[i] + way)
            assert inside[label] > np.delete(inside, label).max()  # ties count as failure
            beyond = votes(x[i] + 6 * way)
            outside += beyond[label] <= np.delete(beyond, label).max()
    assert outside > 0


def test_the_margin_is_that_of_the_bisectors() -> None:
    """The b-th smallest over others of the a-th largest over own of the distance to a bisector, in plain loops."""
    for k in (1, 2, 5):
        knn, x = angle_knn(k)
        sigma, n, alpha = 0.1, 50_000, 0.5
        made = EmbeddingSmoothing(sigma, n, alpha)(knn, x[:5])
        points = knn.references_.rows(knn.references_.layers[0], torch.arange(45)).double().numpy()
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        labels = knn.references_.labels.numpy()
        noise = sigma * torch.randn(200_000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for i in range(5):
            features = Angle()(x[i] + noise)
            mean = (features / features.norm(dim=1, keepdim=True)).mean(0).numpy()
            gaps = ((points - mean) ** 2).sum(1)
            label = np.bincount(labels[np.argsort(gaps)[:k]]).argmax()
            apart = [
                sorted(
                    (
                        max(0.0, gaps[j] - gaps[p]) / (2 * np.linalg.norm(points[j] - points[p]))
                        for p in np.flatnonzero(labels == label)
                    ),
                    reverse=True,
                )[k // 2]
                for j in np.flatnonzero(labels != label)
            ]
            margin = sorted(apart)[k - k // 2 - 1]
            held = margin - float(mean_error(torch.tensor([np.linalg.norm(mean)]), n, alpha))
            if held > 0.01:
                assert made.labels[i] == label
                assert float(made.radius[i]) == pytest.approx(sigma * norm.ppf((1 + held) / 2), abs=0.01 * sigma)


# ------------------------------------------------------------------------------------------ plain sums


@pytest.fixture(scope="module")
def victim() -> tuple[KNN, Tensor]:
    source, model = digits(epochs=2)
    part = source.train.first(200)
    references = ReferenceSet.build(FeatureExtractor(model, ["relu3"]), part, keep_images=True)
    return KNN(references, 5, metric="cosine"), source.test.batch(torch.arange(6))


def mean_by_hand(knn: KNN, x: Tensor, i: int, sigma: float, n: int, seed: int, purpose: str) -> Tensor:
    total = 0
    for key in rng.bits(torch.tensor([i]), n, seed, "smoothing", purpose)[0]:
        noise = rng.normal(key[None], tuple(x.shape), seed, "noise", dtype=torch.float64)[0]
        z = knn.read((x.double() + sigma * noise).float()[None], ["relu3"])["relu3"][0].double()
        total = total + z / z.norm()
    assert isinstance(total, Tensor)
    return total / n


def test_the_smoothed_classifier_votes_by_the_neighbors_of_the_mean(victim: tuple[KNN, Tensor]) -> None:
    knn, x = victim
    ids = torch.tensor([7, 1, 0, 22, 3, 9])
    smoothed = SmoothedEmbedding(knn, 0.3, 25, seed=4)
    scores = smoothed.scores(x, ids)
    references = knn.references_.rows("relu3", torch.arange(200)).double()
    cosines = nn.functional.normalize(references, dim=1)
    for i in range(6):
        mean = mean_by_hand(knn, x[i], int(ids[i]), 0.3, 25, 4, "predict")
        near = (cosines @ mean).topk(5).indices
        want = torch.bincount(knn.references_.labels[near], minlength=10) / 5
        assert scores[i].tolist() == pytest.approx(want.tolist())
    assert smoothed.fingerprint() != SmoothedEmbedding(knn, 0.3, 25, seed=5).fingerprint()
    assert smoothed.extractor is knn.extractor


def test_batches_and_order_change_nothing_not_a_bit(victim: tuple[KNN, Tensor]) -> None:
    knn, x = victim
    ids, alpha = torch.arange(6) + 11, 0.5
    whole = EmbeddingSmoothing(0.1, 350, alpha)(knn, x, ids)
    assert len(whole.radius.unique()) > 3
    for size in (16, 37, 1000):
        other = EmbeddingSmoothing(0.1, 350, alpha, batch_size=size)(knn, x, ids)
        assert torch.equal(other.radius, whole.radius)
        assert torch.equal(other.labels, whole.labels)
    order = torch.tensor([4, 0, 3])
    assert torch.equal(EmbeddingSmoothing(0.1, 350, alpha)(knn, x[order], ids[order]).radius, whole.radius[order])


def test_smoothed_references_are_means_of_unit_features(victim: tuple[KNN, Tensor]) -> None:
    knn, x = victim
    held = smoothed_references(knn.references_, 0.3, 20, seed=2)
    assert torch.equal(held.labels, knn.references_.labels)
    assert held.made_by == {"smoothed": {"sigma": 0.3, "n": 20, "clip": None, "seed": 2}}
    images = knn.references_.image(torch.tensor([0, 150]))
    for place, image in zip((0, 150), images, strict=True):
        want = mean_by_hand(knn, image, place, 0.3, 20, 2, "references")
        assert torch.allclose(held.rows("relu3", torch.tensor([place]))[0].double(), want, atol=1e-6)
    made = EmbeddingSmoothing(0.1, 350, 0.5)(KNN(held, 5, metric="cosine"), x)
    assert (made.labels >= 0).any()


# ------------------------------------------------------------------------------------------- refusals


def two_layers() -> ReferenceSet:
    _, model = digits(epochs=1)
    data = Pixels(torch.rand(10, 1, 8, 8), torch.arange(10))
    return ReferenceSet.build(FeatureExtractor(model, ["relu2", "relu3"]), data)


def approximate() -> KNN:
    faiss = pytest.importorskip("faiss")
    points = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    index = faiss.IndexHNSWFlat(2, 8, faiss.METRIC_INNER_PRODUCT)
    index.add(points / np.linalg.norm(points, axis=1, keepdims=True))
    return knn_from_index(Side(), index, np.arange(40) % 2, 3, metric="cosine")


SIDES = torch.ones(1, 2)
BAD: list[tuple[str, Any, str]] = [
    ("l2", lambda: certify(KNN(side_knn().references_, 1)), "its metric is 'l2'.*use metric='cosine'"),
    ("ip", lambda: certify(KNN(side_knn().references_, 1, metric="ip")), "its metric is 'ip'"),
    ("layers", lambda: certify(DkNN(side_knn().references_, 1)), "pass a KNN, or use 'smoothing'"),
    ("function", lambda: certify(FunctionClassifier(lambda x: x, 2)), "pass a KNN"),
    ("no network", lambda: certify(KNN(ReferenceSet.from_vectors(torch.eye(2), [0, 1]), 1)), "it knows no network"),
    ("approximate", lambda: certify(approximate()), "its index is approximate"),
    ("alpha", lambda: EmbeddingSmoothing(alpha=0), "alpha must be"),
    ("sigma", lambda: SmoothedEmbedding(side_knn(), -1.0), "sigma must be"),
    ("n", lambda: SmoothedEmbedding(side_knn(), n=0), "n must be"),
    ("several layers", lambda: smoothed_references(two_layers(), 0.3), "choose one with layer="),
    ("draws", lambda: smoothed_references(side_knn().references_, 0.3, 0), "n must be"),
]


def certify(classifier: Any) -> Any:
    return EmbeddingSmoothing(n=10)(classifier, SIDES)


@pytest.mark.parametrize(("make", "said"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_what_cannot_be_certified_is_refused_in_a_sentence(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        make()
    assert len(str(caught.value).splitlines()) == 1


def test_an_approximate_index_is_smoothed_by_its_decisions() -> None:
    made = Smoothing(0.5, n=60)(approximate(), SIDES)
    assert made.labels.tolist() == approximate().labels(SIDES).tolist()


def test_references_without_images_cannot_be_smoothed() -> None:
    with pytest.raises(NotReadyError, match="keep_images=True"):
        smoothed_references(side_knn().references_, 0.3)


def test_it_is_registered() -> None:
    assert registry.certifiers.create("smoothed-embedding", sigma=0.5, n=20) == EmbeddingSmoothing(0.5, 20)
