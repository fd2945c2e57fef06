"""The bisector bound against a plain double loop, and against attackers who try to break it."""

from __future__ import annotations

import exact
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small import random_classifier
from torch import Tensor, nn

from robustknn import KNN, DkNN, ExactIndex, FeatureExtractor, InputError, ReferenceSet, ThreatModel, registry
from robustknn.attacks import PGD
from robustknn.certification import FeatureBisector, FeatureExact, FeatureVotes, InputCertificate
from robustknn.classifiers import RAILS, Classifier, Joint, RetrievalClassifier

Array = NDArray[np.float64]


def rounded(value: float) -> float:
    """What a certificate makes of a radius: 2·10⁻⁶ less."""
    return value * (1 - 2e-6)


def raw_knn(vectors: Tensor, labels: Tensor, k: int, metric: str = "l2", index: str = "exact") -> KNN:
    references = ReferenceSet.from_vectors(vectors.clone(), labels, features=FeatureExtractor(nn.Identity()))
    return KNN(references, k, metric=metric, index=index)


def scene(seed: int, n: int, dim: int, classes: int, grid: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """References, labels and queries; on a grid there are duplicates and ties."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.rand(n + 8, dim, generator=generator, dtype=torch.float64)
    both = (3 * both).round() / 3 + 0.5 if grid else both
    labels = torch.randint(classes, (n,), generator=generator)
    labels[:classes] = torch.arange(classes)
    return both[:n], labels, both[n:]


def eps_of(x: Array, p: Array, n: Array) -> float:
    apart = np.linalg.norm(p - n)
    return 0.0 if apart == 0 else max(0.0, ((x - n) ** 2).sum() - ((x - p) ** 2).sum()) / (2 * apart)


def rho(x: Array, references: Array, labels: NDArray[np.int64], y: int, a: int, b: int) -> float:
    """The b-th smallest over negatives of the a-th largest eps over positives, by a double loop."""
    positives, negatives = references[labels == y], references[labels != y]
    if len(positives) < a:
        return 0.0
    if len(negatives) < b:
        return np.inf
    return float(sorted(sorted(eps_of(x, p, n) for p in positives)[-a] for n in negatives)[b - 1])


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 40])
def test_the_formula(k: int, metric: str) -> None:
    vectors, labels, x = scene(k, 40, 5, 3)
    found = FeatureBisector(nearest=None, visits=None)(raw_knn(vectors, labels, k, metric), x)
    rows, queries, scale = vectors.numpy(), x.numpy(), np.ones(len(x))
    if metric == "cosine":
        rows, scale = rows / np.linalg.norm(rows, axis=1, keepdims=True), np.linalg.norm(queries, axis=1)
        queries = queries / scale[:, None]
    certified = 0
    for i, y in enumerate(found.labels.tolist()):
        if found.radius[i] < 0:
            continue
        exact = scale[i] * rho(queries[i], rows, labels.numpy(), y, k // 2 + 1, k - k // 2)
        assert float(found.radius[i]) == pytest.approx(rounded(exact), rel=1e-8, abs=1e-9)
        assert float(found.radius[i]) <= exact
        certified += exact > 0
    assert certified or k == 40


def test_fewer_positives_give_no_larger_radius() -> None:
    vectors, labels, _ = scene(0, 200, 4, 2)
    x = torch.rand(60, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    smaller = 0
    for k in (1, 3, 8):
        knn = raw_knn(vectors, labels, k)
        every, few = (FeatureBisector(nearest=n)(knn, x).radius for n in (None, 1))
        assert bool((few <= every + 1e-12).all())
        assert bool((few > 0).any())
        smaller += int((few < every - 1e-6).sum())
    assert smaller


@pytest.mark.parametrize("k", [1, 5, 12])
def test_few_visits_give_no_larger_radius(k: int) -> None:
    vectors, labels, x = scene(0, 600, 3, 2)
    knn = raw_knn(vectors, labels, k)
    every, few = (FeatureBisector(nearest=None, visits=visits)(knn, x).radius for visits in (None, 1))
    assert bool((few <= every + 1e-12).all())
    assert bool((few > 0).any())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_more_than_the_exact_optimum(k: int) -> None:
    vectors, labels, x = scene(5, 12, 3, 3)
    found = FeatureBisector(upper="programs")(raw_knn(vectors, labels, k), x)
    for i, y in enumerate(found.labels.tolist()):
        least, _ = exact.knn(x[i].numpy(), y, vectors.numpy(), labels.numpy(), k)
        assert float(found.radius[i]) <= least + 1e-12
    assert bool((found.radius > 0).any())


def test_a_class_that_cannot_be_outvoted_is_safe_at_any_distance() -> None:
    vectors, _, x = scene(0, 12, 3, 2)
    labels = (torch.arange(12) < 3).long()
    found = FeatureBisector()(raw_knn(vectors, labels, 12), x)
    assert bool(found.radius.isinf().all())
    assert bool(found.upper.isinf().all())  # type: ignore[union-attr]


def test_a_tie_of_votes_certifies_nothing() -> None:
    vectors = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
    found = FeatureBisector()(raw_knn(vectors, torch.tensor([0, 1, 0]), 2), torch.tensor([[0.2], [4.9]]).double())
    assert found.radius.tolist() == [-1.0, -1.0]
    assert found.accuracy([0, 0], [0.0]).tolist() == [0.0]


def test_a_plurality_without_a_majority_is_certified_as_it_is_alone() -> None:
    vectors = torch.tensor([[0.0], [0.1], [0.2], [0.3]], dtype=torch.float64)
    found = FeatureBisector()(raw_knn(vectors, torch.tensor([0, 0, 1, 2]), 4), torch.zeros(1, 1).double())
    assert found.radius.tolist() == [0.0]


# --------------------------------------------------------------------------------------- attackers


def tries(x: Tensor, radius: Tensor, references: Tensor, seed: int) -> Tensor:
    """Moves (T, N, D) no longer than the radius: toward every reference, and in random directions."""
    generator = torch.Generator().manual_seed(seed)
    toward = references[:, None] - x
    random = torch.randn(200, *x.shape, generator=generator, dtype=torch.float64)
    moves = torch.cat([toward, -toward, random])
    moves = moves / moves.norm(dim=2, keepdim=True).clamp_min(1e-12)
    shares = torch.where(torch.arange(len(moves)) % 3 == 0, 0.7, 1.0)
    return moves * shares[:, None, None] * radius[:, None]


def still_decided(knn: Classifier, x: Tensor, labels: Tensor) -> Tensor:
    """Whether the labels lead beyond a tie."""
    scores = knn.scores(x)
    return knn.lead(scores, labels) > 1e-6


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("k", "classes", "n"), [(1, 2, 9), (2, 2, 20), (3, 3, 20), (4, 4, 24), (5, 2, 12), (6, 3, 6)])
@pytest.mark.parametrize("grid", [False, True])
def test_no_attempt_inside_a_radius_succeeds(k: int, classes: int, n: int, grid: bool, metric: str) -> None:
    attempts = 0
    for seed in range(4):
        vectors, labels, x = scene(100 * k + seed, n, 3, classes, grid)
        knn = raw_knn(vectors, labels, k, metric)
        for certifier in (FeatureBisector(), FeatureExact()) if k == 1 else (FeatureBisector(),):
            found = certifier(knn, x)
            sure = found.radius > 0
            if not bool(sure.any()):
                continue
            moves = tries(x[sure], found.radius[sure].clamp_max(10), vectors, seed)
            moved = (x[sure] + moves).flatten(0, 1)
            assert bool(still_decided(knn, moved, found.labels[sure].repeat(len(moves))).all())
            attempts += len(moved)
    assert attempts or grid


@pytest.mark.parametrize("upper", ["straight", "programs"])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_upper_side_is_no_less_and_is_reached(k: int, upper: str) -> None:
    vectors, labels, x = scene(k, 80, 4, 2)
    knn = raw_knn(vectors, labels, k)
    found = FeatureBisector(upper=upper)(knn, x)
    assert found.upper is not None
    known = found.upper.isfinite() & (found.radius >= 0)
    assert bool(known.any())
    assert bool((found.upper >= found.radius)[known].all())
    moves = tries(x[known], found.upper[known] * 1.5, vectors, 0)
    moved = (x[known] + moves).flatten(0, 1)
    assert not bool(still_decided(knn, moved, found.labels[known].repeat(len(moves))).all())


def test_pgd_inside_the_radius_fails() -> None:
    """Ours, on raw inputs in float32, at the certified radius with the threat model's own rounding."""
    vectors, labels, x = scene(3, 60, 6, 3)
    knn = raw_knn(vectors.float(), labels, 3)
    found = InputCertificate()(knn, x.float())
    sure = found.radius > 0
    assert bool(sure.any())
    threat = ThreatModel("l2", found.radius[sure], bounds=None)
    result = PGD(steps=20)(knn, x.float()[sure], found.labels[sure], threat)
    assert not bool(result.success.any())
    wide = PGD(steps=20)(knn, x.float()[sure], found.labels[sure], threat.with_eps(4 * found.radius[sure]))
    assert bool(wide.success.any())  # the attack can win at all


# ------------------------------------------------------------------------------------------- votes


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("k", [1, 2, 3, 6, 9])
def test_votes_of_one_layer_are_the_bisector_bound(k: int, metric: str) -> None:
    classifier, x, _ = random_classifier(k, metric, layers=("3",))
    one = KNN(classifier.references, k, metric=metric)
    assert torch.equal(FeatureVotes()(classifier, x).radius, FeatureBisector()(one, x).radius)


def votes_by_hand(x: list[Array], rows: list[Array], labels: NDArray[np.int64], y: int, k: int) -> float:
    """The least move at which half of the votes may be lost, by scanning all breakpoints."""
    table = [[rho(q, r, labels, y, k - b + 1, b) for b in range(1, k + 1)] for q, r in zip(x, rows, strict=True)]
    for r in sorted(value for layer in table for value in layer):
        if 2 * sum(value <= r for layer in table for value in layer) >= k * len(rows):
            return r
    return float("inf")


@pytest.mark.parametrize("k", [1, 2, 5])
def test_votes_of_two_layers(k: int) -> None:
    classifier, x, _ = random_classifier(k, n=60, n_classes=2)
    found = FeatureVotes(nearest=None, visits=None)(classifier, x)
    features = {layer: rows.detach().numpy() for layer, rows in classifier.read(x, ["1", "3"]).items()}
    held = [classifier.references_.vectors(layer)[0].numpy() for layer in ("1", "3")]
    labels = classifier.references_.labels.numpy()
    certified = 0
    for i, y in enumerate(found.labels.tolist()):
        if found.radius[i] >= 0:
            exact = votes_by_hand([features[layer][i] for layer in ("1", "3")], held, labels, y, k)
            assert float(found.radius[i]) == pytest.approx(rounded(exact), rel=1e-7, abs=1e-9)
            certified += exact > 0
    assert certified


def test_votes_with_few_breakpoints_claim_no_more() -> None:
    classifier, x, _ = random_classifier(9, n_classes=2)
    every, few = FeatureVotes()(classifier, x).radius, FeatureVotes(breakpoints=2)(classifier, x).radius
    assert bool((few <= every).all())
    assert bool((every > 0).any())


def test_votes_scale() -> None:
    classifier, x, _ = random_classifier(3, n_classes=2)
    once, twice = FeatureVotes()(classifier, x), FeatureVotes(scales=(2.0, 2.0))(classifier, x)
    sure = once.radius > 0
    torch.testing.assert_close(twice.radius[sure], once.radius[sure] / 2)
    assert "times 2" in twice.unit
    with pytest.raises(InputError, match="scales holds 1 numbers for 2 voters"):
        FeatureVotes(scales=(1.0,))(classifier, x)


def test_joint_moves_of_all_layers_inside_the_radius_fail() -> None:
    """Each layer's features moved on their own, as the certificate allows."""
    for seed, k in ((0, 3), (1, 4), (2, 5)):
        classifier, x, _ = random_classifier(k, n_classes=2, seed=seed)
        found = FeatureVotes()(classifier, x)
        sure = found.radius > 0
        assert bool(sure.any())
        features, counts = classifier.read(x[sure], ["1", "3"]), torch.zeros(0)
        for voter in classifier.voters:
            rows = features[voter.layer].detach()
            moved = rows + tries(rows, found.radius[sure], voter.references.vectors(voter.layer)[0], seed)
            near = voter.index.search(moved.flatten(0, 1), k).ids
            own = (voter.labels_of(near) == found.labels[sure].repeat(len(moved))[:, None]).sum(1)
            worst = own.view(len(moved), -1).amin(0)
            counts = worst if not len(counts) else counts + worst
        assert bool((2 * counts > 2 * k).all())


# ---------------------------------------------------------------------------------------- refusals


def test_what_is_refused() -> None:
    classifier, x, _ = random_classifier(3)
    references = classifier.references_
    one = KNN(references, 3, layer="3")
    cases: list[tuple[str, Classifier, str]] = [
        ("feature-bisector", classifier, "use 'feature-votes'"),
        ("feature-exact", classifier, "use 'feature-votes'"),
        ("feature-exact", one, "has 3 neighbors and not one; use 'feature-bisector'"),
        ("input", one, "features are not the input itself"),
        ("lipschitz", classifier, "has several voters"),
        ("feature-bisector", KNN(references, 3, layer="3", metric="ip"), "metric 'ip' is no distance"),
        ("feature-votes", Joint({"a": one, "b": KNN(references, 5, layer="3")}), "more than its votes"),
    ]
    for name, victim, why in cases:
        with pytest.raises(InputError, match=why):
            registry.certifiers.create(name)(victim, x)


def test_weighted_votes_are_refused() -> None:
    vectors, labels, x = scene(0, 20, 3, 2)
    references = ReferenceSet.from_vectors(
        vectors, labels, features=FeatureExtractor(nn.Identity()), payload=nn.functional.one_hot(labels).double()
    )
    with pytest.raises(InputError, match="does not count votes"):
        FeatureBisector()(RetrievalClassifier(references, 3), x)


def test_a_random_decision_is_refused() -> None:
    x = torch.rand(20, 1, 4, 4)
    references = ReferenceSet.build(FeatureExtractor(nn.Flatten()), (x, torch.arange(20) % 2), keep_images=True)
    with pytest.raises(InputError, match="its decision is random or unknown"):
        FeatureBisector()(RAILS(references, population=50), x[:2])


def test_an_approximate_index_is_refused() -> None:
    class Approximate(ExactIndex):
        exact = False

    vectors, labels, x = scene(0, 20, 3, 2)
    references = ReferenceSet.from_vectors(vectors, labels, features=FeatureExtractor(nn.Identity()))
    knn = KNN(references, 3, index=Approximate().build(vectors))
    for certifier in (FeatureBisector(), FeatureVotes(), InputCertificate()):
        with pytest.raises(InputError, match="index is approximate"):
            certifier(knn, x)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FeatureBisector(nearest=0), "nearest must be a whole number of at least 1"),
        (lambda: FeatureVotes(visits=0), "visits must be a whole number of at least 1"),
        (lambda: FeatureBisector(upper="best"), "upper must be one of"),
        (lambda: FeatureBisector(pivots=0), "pivots must be"),
        (lambda: FeatureVotes(scales=(0.0,)), "a scale must be a number above 0"),
        (lambda: FeatureVotes(breakpoints=0), "breakpoints must be"),
        (lambda: InputCertificate(bounds=(1.0, 0.0)), "bounds"),
    ],
)
def test_options_that_cannot_work(make: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()  # type: ignore[operator]


def test_float64_features_over_float32_references_allow_for_the_rounding() -> None:
    """The search rounds such a feature to float32, so a radius of that size is none."""
    vectors = torch.tensor([[1.0], [-1.0]])
    knn = raw_knn(vectors, torch.tensor([0, 1]), 1)
    found = FeatureBisector()(knn, torch.tensor([[1e-8], [0.5]], dtype=torch.float64))
    assert float(found.radius[0]) <= 0
    assert float(found.radius[1]) == pytest.approx(0.5, rel=1e-5)


def test_dknn_on_raw_inputs_of_one_layer() -> None:
    x, y = torch.rand(30, 4), torch.arange(30) % 2
    dknn = DkNN(None, 3).fit(x, y)
    assert torch.equal(FeatureVotes()(dknn, x[:5]).radius, FeatureBisector()(KNN(None, 3).fit(x, y), x[:5]).radius)
