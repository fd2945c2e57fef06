"""Randomised smoothing of the hard decision: closed forms, plain loops, and attacks inside the radius."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm
from small import digits
from torch import Tensor, nn

from robustknn import KNN, DkNN, FeatureExtractor, ReferenceSet, ThreatModel, registry, rng
from robustknn.attacks import PGD, Square
from robustknn.certification import ABSTAINS, Smoothed, Smoothing
from robustknn.certification.confidence import share_at_least
from robustknn.classifiers import Classifier, FunctionClassifier, Network, Rejecting
from robustknn.classifiers.under_noise import GaussianNoise
from robustknn.errors import InputError
from robustknn.evaluation import evaluate, finish
from robustknn.objectives import ASK, CrossEntropy, ThroughNoise
from robustknn.recipes import WorstCase, pgd_transfer

W, B = torch.tensor([3.0, -4.0]), 0.5


def half_plane(x: Tensor) -> Tensor:
    """A linear classifier, whose smoothed decision holds exactly up to the plane."""
    return (x @ W.to(x) + B > 0).long()


def linear() -> FunctionClassifier:
    return FunctionClassifier(half_plane, 2, name="half plane")


def at(distance: float, n: int) -> Tensor:
    """n copies of a point at this distance from the plane, on its positive side."""
    foot = -B * W / (W @ W)
    return (foot + distance * W / W.norm()).expand(n, 2).clone()


def pair_knn() -> KNN:
    """1-NN of two references: its smoothed decision holds exactly up to their bisector, the plane x₁ = 1."""
    vectors = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    return KNN(ReferenceSet.from_vectors(vectors, torch.tensor([0, 1]), features=FeatureExtractor(nn.Flatten())), 1)


# ---------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("victim", ["linear", "1-NN"])
def test_the_radius_is_below_the_true_one_as_often_as_promised_and_near_it(victim: str) -> None:
    repeats, alpha, sigma, true = 600, 0.05, 0.5, 0.4
    classifier = linear() if victim == "linear" else pair_knn()
    x = at(true, repeats) if victim == "linear" else torch.tensor([[1 + true, 0.3, -2.0]]).expand(repeats, 3)
    made = Smoothing(sigma, n0=100, n=400, alpha=alpha)(classifier, x)
    assert (made.labels == 1).all()
    beyond = int((made.radius > true).sum())
    # Clopper–Pearson promises no more than alpha; a count that is rarer than 1 in 10,000 refutes it.
    assert binomtest(beyond, repeats, alpha, alternative="greater").pvalue > 1e-4
    assert beyond > 0  # nor does it promise much less
    p = norm.cdf(true / sigma)
    low = sigma * norm.ppf(p - 1.65 * math.sqrt(p * (1 - p) / 400))
    assert float(made.radius.mean()) == pytest.approx(low, rel=0.03)


def test_more_draws_come_nearer_to_the_true_radius() -> None:
    radii = [float(Smoothing(0.5, n=n)(linear(), at(0.4, 4)).radius.mean()) for n in (100, 1000, 10_000)]
    assert radii[0] < radii[1] < radii[2] < 0.4
    assert radii[2] == pytest.approx(0.4, rel=0.08)


def test_on_the_boundary_it_abstains() -> None:
    made = Smoothing(0.5, n=1000)(linear(), at(0.0, 50))
    assert (made.labels == ABSTAINS).all()
    assert (made.radius == -1).all()
    assert made.accuracy(torch.ones(50), [0.0]).tolist() == [0.0]


def test_all_draws_alike_give_the_largest_radius() -> None:
    made = Smoothing(0.25, n=1000)(linear(), at(100.0, 2))
    want = 0.25 * norm.ppf(0.001 ** (1 / 1000))
    assert made.radius.tolist() == pytest.approx([want] * 2, rel=1e-8)
    assert (made.radius < want).all()
    assert made.unit == "L2 of the input"


def test_the_bound_of_a_share_is_that_of_clopper_and_pearson() -> None:
    for n in (1, 7, 100, 1000):
        counts = torch.arange(0, n + 1, max(1, n // 20))
        for alpha in (0.2, 0.001):
            want = [
                binomtest(int(k), n, alternative="greater").proportion_ci(1 - alpha, method="exact").low for k in counts
            ]
            assert share_at_least(counts, n, alpha).tolist() == pytest.approx(want, abs=1e-9)


# ---------------------------------------------------------------------------------------- plain loops


def by_hand(f: Any, x: Tensor, ids: list[int], sigma: float, n0: int, n: int, alpha: float, seed: int) -> list[Any]:
    """The paper's CERTIFY, one draw after the other."""
    out = []
    for xi, i in zip(x, ids, strict=True):
        counts = {"choose": np.zeros(10, dtype=int), "estimate": np.zeros(10, dtype=int)}
        for purpose, many in (("choose", n0), ("estimate", n)):
            for key in rng.bits(torch.tensor([i]), many, seed, "smoothing", purpose)[0]:
                noise = rng.normal(key[None], tuple(xi.shape), seed, "noise", dtype=torch.float64)[0]
                counts[purpose][int(f((xi.double() + sigma * noise).float()[None]))] += 1
        chosen = int(counts["choose"].argmax())
        low = binomtest(int(counts["estimate"][chosen]), n, alternative="greater").proportion_ci(1 - alpha).low
        out.append((chosen, sigma * norm.ppf(low)) if low > 0.5 else (-1, -1.0))
    return out


@pytest.fixture(scope="module")
def victim() -> tuple[KNN, DkNN, Tensor]:
    source, model = digits(epochs=2)
    references = ReferenceSet.build(FeatureExtractor(model, ["relu2", "relu3"]), source.train.first(300))
    return KNN(references, 5, layer="relu3"), DkNN(references, 5), source.test.batch(torch.arange(8))


def test_it_is_the_papers_algorithm(victim: tuple[KNN, DkNN, Tensor]) -> None:
    knn, _, x = victim
    ids = [3, 14, 15, 92, 65, 35, 89, 79]
    made = Smoothing(0.4, n0=30, n=60, alpha=0.01)(knn, x, ids, seed=7)
    want = by_hand(knn.labels, x, ids, 0.4, 30, 60, 0.01, 7)
    assert made.labels.tolist() == [label for label, _ in want]
    assert made.radius.tolist() == pytest.approx([radius for _, radius in want], rel=1e-7)
    assert len(set(made.radius.tolist())) > 3


def test_batches_and_order_change_nothing_not_a_bit(victim: tuple[KNN, DkNN, Tensor]) -> None:
    for classifier in victim[:2]:
        x, ids = victim[2], torch.arange(8) + 40
        whole = Smoothing(0.4, n=130)(classifier, x, ids)
        for size in (16, 37, 1000):
            other = Smoothing(0.4, n=130, batch_size=size)(classifier, x, ids)
            assert torch.equal(whole.radius, other.radius)
        order = torch.tensor([5, 0, 7, 2])
        some = Smoothing(0.4, n=130)(classifier, x[order], ids[order])
        assert torch.equal(some.radius, whole.radius[order])
        assert torch.equal(some.labels, whole.labels[order])


def test_noise_is_gaussian_independent_and_not_clipped() -> None:
    noise, x, ids = GaussianNoise(0.5, seed=1), torch.full((3, 4), 0.25, dtype=torch.float64), torch.tensor([5, 6, 7])
    drawn = list(noise.draws(x, ids, 4000, "a"))
    rows, z = torch.cat([d.rows for d in drawn]), (torch.cat([d.x for d in drawn]) - 0.25) / 0.5
    assert torch.bincount(rows).tolist() == [4000] * 3
    assert torch.cat([d.ids for d in drawn]).unique().numel() == 12_000
    samples = z.view(3, 4000, 4).transpose(0, 1).flatten(1)  # the numbers of one draw of all samples beside each other
    assert torch.allclose(samples.mean(0), torch.zeros(12, dtype=torch.float64), atol=5 / math.sqrt(4000))
    assert torch.allclose(torch.cov(samples.T), torch.eye(12, dtype=torch.float64), atol=0.12)
    assert float((z**4).mean()) == pytest.approx(3, abs=0.15)
    other = torch.cat([d.x for d in noise.draws(x, ids, 4000, "b")])
    assert not (other == torch.cat([d.x for d in drawn])).any()


def test_clipping_is_a_part_of_the_base_classifier(victim: tuple[KNN, DkNN, Tensor]) -> None:
    knn, _, x = victim
    seen = []

    def f(v: Tensor) -> Tensor:
        seen.append((float(v.min()), float(v.max())))
        return knn.labels(v)

    made = Smoothing(0.4, n=100, clip=(0, 1))(FunctionClassifier(f, 10), x)
    assert min(low for low, _ in seen) == 0
    assert max(high for _, high in seen) == 1
    inside = Smoothing(0.4, n=100)(FunctionClassifier(lambda v: knn.labels(v.clamp(0, 1)), 10), x)
    assert torch.equal(made.radius, inside.radius)
    assert not torch.equal(made.radius, Smoothing(0.4, n=100)(knn, x).radius)
    assert "clipped to [0, 1]" in " ".join(made.assumptions)


# ------------------------------------------------------------------------- bases that draw, bases that reject


class Coin(Classifier):
    """The half plane, turned round in one of five draws by the sample's own randomness."""

    n_classes = 2

    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        assert sample_ids is not None
        turned = rng.uniform(sample_ids, (), 0, "coin") < 0.2
        return nn.functional.one_hot(torch.where(turned, 1 - half_plane(x), half_plane(x)), 2).double()

    def fingerprint(self) -> str:
        return "coin"


class Wary(Coin):
    """Rejects instead of being turned round."""

    def decide(self, scores: Tensor) -> Tensor:
        return torch.where(scores.amax(1) > 1, -1, super().decide(scores))

    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        assert sample_ids is not None
        turned = rng.uniform(sample_ids, (), 0, "coin") < 0.2
        return nn.functional.one_hot(half_plane(x), 2) * (1 + turned.double())[:, None]


@pytest.mark.parametrize("base", [Coin(), Wary()])
def test_a_base_that_draws_or_rejects_draws_anew_in_every_draw(base: Classifier) -> None:
    sigma, true, n = 0.5, 0.4, 4000
    made = Smoothing(sigma, n=n)(base, at(true, 20))
    p = norm.cdf(true / sigma)
    share = 0.8 * p + 0.2 * (1 - p) if type(base) is Coin else 0.8 * p
    low = share - 3.1 * math.sqrt(share * (1 - share) / n)
    assert (made.labels == 1).all()
    assert float(made.radius.mean()) == pytest.approx(sigma * norm.ppf(low), rel=0.05)
    assert (made.radius < true).all()  # both smoothed classifiers change at the plane or before


def test_a_rejecting_classifier_that_rejects_most_draws_abstains() -> None:
    class Never(Wary):
        def decide(self, scores: Tensor) -> Tensor:
            return torch.full((len(scores),), -1)

    assert Smoothing(0.5, n=100)(Never(), at(2.0, 3)).labels.tolist() == [ABSTAINS] * 3
    assert Smoothed(Never(), 0.5).labels(at(2.0, 3)).tolist() == [ABSTAINS] * 3


# ----------------------------------------------------------------------------------------- soundness


def test_no_attack_inside_the_radius_changes_the_smoothed_decision() -> None:
    """3-NN of 30 references in the plane, three classes; the smoothed decision from 10,000 further draws."""
    made = np.random.default_rng(0)
    references, labels = made.random((30, 2)), np.arange(30) % 3
    classifier = KNN(
        ReferenceSet.from_vectors(
            torch.tensor(references), torch.tensor(labels), features=FeatureExtractor(nn.Flatten())
        ),
        3,
    )
    x, sigma = torch.tensor(made.random((25, 2))), 0.15
    certified = Smoothing(sigma, n=3000)(classifier, x)
    draws = sigma * made.normal(size=(10_000, 2))
    angles = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    around = np.stack([np.cos(angles), np.sin(angles)], 1)

    def counts(point: Any) -> Any:
        gaps = ((point + draws)[:, None] - references) ** 2
        near = labels[np.argpartition(gaps.sum(2), 2, axis=1)[:, :3]]
        votes = (near[:, :, None] == np.arange(3)).sum(1)
        return np.bincount(votes.argmax(1), minlength=3)

    certain = [i for i in range(25) if certified.labels[i] >= 0]
    assert len(certain) >= 8
    broken_outside = 0
    for i in certain:
        label = int(certified.labels[i])
        for factor in (1.0, 4.0):
            for direction in around:
                seen = counts(x[i].numpy() + factor * float(certified.radius[i]) * direction)
                lead = seen[label] - np.delete(seen, label).max()
                if factor == 1:
                    assert lead > -4 * math.sqrt(10_000)  # four standard deviations of a tie
                else:
                    broken_outside += lead < -4 * math.sqrt(10_000)
    assert broken_outside > 0  # the attacks do reach the boundary


# ------------------------------------------------------------------------------- the smoothed classifier


@pytest.mark.parametrize("n", [10, 101])
def test_the_smoothed_decision_is_that_of_the_binomial_test(n: int) -> None:
    smoothed = Smoothed(linear(), 0.5, n, alpha=0.02)
    ones = torch.arange(n + 1)
    got = smoothed.decide(torch.stack([n - ones, ones], 1).double() / n)
    for k, label in zip(ones.tolist(), got.tolist(), strict=True):
        sure = binomtest(max(k, n - k), n, 0.5).pvalue <= 0.02
        assert label == ((1 if k > n - k else 0) if sure else ABSTAINS)
    assert len(set(got.tolist())) == 3


def test_rejections_count_in_the_binomial_test_as_a_class() -> None:
    smoothed = Smoothed(linear(), 0.5, 100)
    shares = torch.tensor([[0.3, 0.02], [0.3, 0.68], [0.9, 0.0]], dtype=torch.float64)
    assert smoothed.decide(shares).tolist() == [ABSTAINS, 1, 0]


def test_the_smoothed_scores_are_shares_of_draws_counted_by_sample() -> None:
    smoothed, x = Smoothed(linear(), 0.5, 5000), at(0.4, 3)
    scores = smoothed.scores(x, torch.tensor([4, 9, 4]))
    assert scores[:, 1].tolist() == pytest.approx([norm.cdf(0.8)] * 3, abs=0.03)
    assert torch.equal(scores[0], scores[2])
    assert not torch.equal(scores[0], scores[1])
    assert torch.equal(smoothed.scores(x[1:2], torch.tensor([9]))[0], scores[1])
    other = smoothed.with_seed(1)
    assert not torch.equal(other.scores(x, torch.tensor([4, 9, 4])), scores)
    assert other.fingerprint() != smoothed.fingerprint()


def test_an_attacked_sample_on_which_it_abstains_is_defended() -> None:
    smoothed = Smoothed(linear(), 0.5, 100)
    scores = torch.tensor([[0.55, 0.45], [0.9, 0.1]], dtype=torch.float64)
    y = torch.tensor([1, 1])
    assert smoothed.decide(scores).tolist() == [ABSTAINS, 0]
    assert smoothed.lead(scores, y).tolist() == pytest.approx([0.0, -0.8])


def test_a_black_box_attack_moves_it_only_beyond_the_certificate() -> None:
    x, y = at(0.6, 6), torch.ones(6, dtype=torch.int64)
    smoothed = Smoothed(linear(), 0.3, 200)
    radius = Smoothing(0.3, n=5000)(linear(), x).radius
    attack = Square(queries=60)
    inside = attack(smoothed, x, y, ThreatModel("l2", float(radius.min()), None))
    outside = attack(smoothed, x, y, ThreatModel("l2", 2.5, None))
    assert inside.robust.all()
    assert not outside.robust.any()


def test_it_is_evaluated_as_any_classifier(victim: tuple[KNN, DkNN, Tensor], tmp_path: Path) -> None:
    x, y = victim[2], victim[0].labels(victim[2])
    smoothed = Smoothed(victim[0], 0.4, 40)
    run = evaluate({"g": smoothed}, (x, y), attacks=[Square(queries=5)], threat=ThreatModel("l2", 0.5), out=tmp_path)
    (summary,) = finish(run).classifiers
    decided = smoothed.labels(x)
    assert summary.clean_accuracy == float((decided == y).double().mean())
    assert (decided == ABSTAINS).any()
    assert summary.worst_case_accuracy <= summary.clean_accuracy


def test_it_stands_on_what_its_base_stands_on(victim: tuple[KNN, DkNN, Tensor]) -> None:
    knn = victim[0]
    smoothed = Smoothed(knn, 0.3, 20)
    assert smoothed.extractor is knn.extractor
    assert smoothed.reference_sets == knn.reference_sets
    assert smoothed.n_classes == 10
    assert smoothed.fingerprint() != Smoothed(knn, 0.31, 20).fingerprint()


# ------------------------------------------------------------------------------------ use and refusals


def test_it_is_registered_and_reports_every_draw() -> None:
    class Told:
        total = done = stops = 0

        def start(self, what: str, total: int, done: int = 0) -> None:
            self.total += total

        def advance(self, amount: int = 1) -> None:
            self.done += amount

        def stop(self) -> None:
            self.stops += 1

    told, certifier = Told(), registry.certifiers.create("smoothing", sigma=0.5, n=50, n0=10)
    certifier(linear(), at(1.0, 3), progress=told)
    assert (told.total, told.done, told.stops) == (180, 180, 1)


BAD: list[tuple[str, Any, str]] = [
    ("sigma", lambda: Smoothing(0.0), "sigma must be a number above 0"),
    ("n", lambda: Smoothing(n=0), "n must be a whole number"),
    ("n0", lambda: Smoothing(n0=0), "n0 must be a whole number"),
    ("alpha", lambda: Smoothing(alpha=1.0), "alpha must be a number above 0 and below 1"),
    ("batch_size", lambda: Smoothing(batch_size=0), "batch_size must be"),
    ("clip", lambda: Smoothing(clip=(1, 0)), "bounds"),
    ("twice", lambda: Smoothing()(Smoothed(linear()), at(1, 1)), "it is smoothed already"),
    ("model", lambda: Smoothing()(nn.Identity(), at(1, 1)), "make a classifier of it first"),  # type: ignore[arg-type]
    ("no network", lambda: Smoothing()(bare(), at(1, 1)), "it knows no network"),
    ("smoothed twice", lambda: Smoothed(Smoothed(linear())), "it is smoothed already"),
    ("smoothed n", lambda: Smoothed(linear(), n=0), "n must be"),
    ("smoothed seed", lambda: Smoothed(linear(), seed=0.5), "seed must be"),  # type: ignore[arg-type]
    ("NaN", lambda: Smoothing()(linear(), torch.full((1, 2), float("nan"))), "NaN"),
]


def bare() -> KNN:
    return KNN(ReferenceSet.from_vectors(torch.eye(2), torch.tensor([0, 1])), 1)


@pytest.mark.parametrize(("make", "said"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_what_cannot_be_smoothed_is_refused_in_a_sentence(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        make()
    assert len(str(caught.value).splitlines()) == 1


def test_a_rejecting_dknn_is_smoothed_with_its_rejections(victim: tuple[KNN, DkNN, Tensor]) -> None:
    _, dknn, x = victim
    source, _ = digits(epochs=1)
    dknn.calibrate(source.train.batch(torch.arange(300, 400)), source.train.labels[300:400])
    plain = Smoothing(0.3, n=150)(dknn, x)
    wary = Smoothing(0.3, n=150)(Rejecting(dknn, credibility=0.5), x)
    assert (wary.radius <= plain.radius).all()
    assert (wary.radius < plain.radius).any()


# --------------------------------------------------------------------------------- attacks through noise


@pytest.mark.parametrize(("share", "stands"), [(0.85, 1.0), (1.2, 0.0)])
def test_an_attack_through_noise_reaches_the_plane_and_not_before(share: float, stands: float) -> None:
    """The smoothed 1-NN of two references flips at their bisector, wherever its noise falls."""
    distance, sigma = 0.4, 0.1
    x = torch.tensor([[1 + distance, 0.3, -2.0]]).expand(20, 3).clone()
    threat = ThreatModel("l2", share * distance, bounds=None)
    victim, y = Smoothed(pair_knn(), sigma), torch.ones(20, dtype=torch.int64)
    assert (victim.labels(x) == y).all()
    result = PGD(ThroughNoise(), steps=20)(victim, x, y, threat)
    assert float(result.robust.double().mean()) == stands
    assert not result.zero_gradient.any()


def test_through_noise_is_the_mean_of_its_objective_over_the_draws() -> None:
    """A plain loop over the draws, each with its own neighbors, and new draws after `look_every` gradients."""
    source, model = digits()
    knn = KNN(ReferenceSet.build(FeatureExtractor(model, ("relu3",)), source.train), 5)
    x, y, sigma = source.test.batch(torch.arange(6)), source.test.labels[:6], 0.2
    config = ThroughNoise(ASK(), draws=4, look_every=2, seed=3)
    batch = config.bind(Smoothed(knn, sigma)).start(x, y, None, None)
    moved, inner = x + 0.01, ASK().bind(knn)
    each: list[Any] = []
    for step in range(4):
        noise = GaussianNoise(sigma, rng.derive(3, "through-noise", step // 2))
        noisy = [noise.noisy(x if step == 0 else moved, torch.full((6,), draw)) for draw in range(4)]
        if step == 0:
            each = [inner.start(n, y, None, knn.look(n, inner.requests)) for n in noisy]
        elif step == 2:
            for one, n in zip(each, noisy, strict=True):
                one.update(None, knn.look(n, inner.requests))
        losses = [one.loss(noise.noisy(moved, torch.full((6,), draw))) for draw, one in enumerate(each)]
        assert torch.allclose(batch.loss(moved), torch.stack(losses).mean(0), rtol=1e-4, atol=1e-6), step


def test_through_noise_of_a_network_is_the_loss_of_the_mean_softmax() -> None:
    """Salman et al., arXiv 1906.04584: −log of the mean over the draws, and not the mean of −log."""
    source, model = digits()
    x, y, sigma = source.test.batch(torch.arange(6)), source.test.labels[:6], 0.2
    noise = GaussianNoise(sigma, rng.derive(0, "through-noise", 0))
    shares = [model(noise.noisy(x, torch.full((6,), draw))).softmax(1) for draw in range(8)]
    mean = torch.stack(shares).double().mean(0)
    victim = Smoothed(Network(model, 10), sigma)
    batch = ThroughNoise(CrossEntropy()).bind(victim).start(x, y, None, None)
    own = mean.gather(1, y[:, None])[:, 0]
    assert torch.allclose(batch.loss(x).double(), -own.log(), atol=1e-5)
    target = (y + 1) % 10
    for aim in (None, target):
        wanted = y if aim is None else aim
        lead = mean.gather(1, wanted[:, None])[:, 0].log() - mean.scatter(1, wanted[:, None], 0).amax(1).log()
        batch = ThroughNoise().bind(victim).start(x, y, aim, None)
        assert torch.allclose(batch.loss(x).double(), -lead if aim is None else lead, atol=1e-5)
    batch.update(torch.tensor([4, 1, 1]), None)
    assert torch.allclose(batch.loss(x[[4, 1, 1]]).double(), lead[[4, 1, 1]], atol=1e-5)


def test_what_is_blind_to_the_neighbors_is_so_through_noise() -> None:
    assert PGD(ThroughNoise(CrossEntropy())).transfer
    assert not PGD(ThroughNoise()).transfer


def test_the_worst_case_of_a_smoothed_knn_goes_through_its_noise() -> None:
    """What is transferred from the network leaves far more, and is all there was without."""
    source, model = digits()
    knn = KNN(ReferenceSet.build(FeatureExtractor(model, ("relu3",)), source.train), 15)
    x, y = source.test.batch(torch.arange(60)), source.test.labels[:60]
    victim, threat = Smoothed(knn, 0.1, 50), ThreatModel("l2", 0.9)
    transferred = pgd_transfer(steps=20)(victim, x, y, threat)
    through = PGD(ThroughNoise(), steps=20)(victim, x, y, threat)
    worst = WorstCase("fast")(victim, x, y, threat)
    left = [float(r.robust.double().mean()) for r in (transferred, through, worst)]
    assert left[1] <= left[0] - 0.2
    assert left[2] <= left[1] + 0.05


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ThroughNoise(draws=0), "draws"),
        (lambda: ThroughNoise(look_every=0), "look_every"),
        (lambda: ThroughNoise("ask"), "objective"),
        (lambda: ThroughNoise().bind(pair_knn()), "attacks a smoothed classifier, not KNN"),
        (lambda: ThroughNoise().bind(Smoothed(linear())), "black-box"),
    ],
)
def test_what_cannot_be_climbed_through_noise_is_refused(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()
