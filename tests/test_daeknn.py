"""DAEkNN by hand and against a plain float64 implementation; how D_adv is made; attacks through both voters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from small import random_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robustknn import (
    KNN,
    PGD,
    DkNN,
    FeatureExtractor,
    InputError,
    IntegrityError,
    Network,
    ReferenceSet,
    ThreatModel,
    load_classifier,
    registry,
)
from robustknn.attacks import Attack, Square
from robustknn.classifiers import WAD, DAEkNN, NeighborEstimator, SetWeighted, Votes
from robustknn.datasets import DataSource, Split, load
from robustknn.evaluation import evaluate, finish
from robustknn.models import DigitsCNN
from robustknn.objectives import ASK, Adaptive, CrossEntropy, NeighborHinge, RankPair
from robustknn.recipes import Hardening, WorstCase, adversarial_references, daeknn, pgd_transfer
from robustknn.training import initialise

Array = np.ndarray[Any, Any]
LAYERS = ("relu2", "relu3")
INF = math.inf


def votes(distances: list[float], labels: list[int], weights: list[float] | None = None, k: int | None = None) -> Votes:
    """The votes on one input."""
    found = [float(d < INF) for d in distances] if weights is None else weights
    rows = (torch.tensor([row], dtype=torch.float64) for row in (found, distances))
    return Votes(*rows, torch.tensor([labels]), len(distances) if k is None else k)


# ------------------------------------------------------------------------------------------------ by hand


def weights_of(rule: SetWeighted, *given: Votes) -> list[list[float]]:
    found: list[list[float]] = rule.set_weights(given)[0].tolist()
    return found


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def test_two_sets_are_weighted_as_the_paper_describes() -> None:
    clean, adversarial = votes([0.5, 1.5], [0, 1]), votes([2.0, 4.0], [1, 1])  # mean distances 1 and 3
    expected = math.exp(-1) / (math.exp(-1) + math.exp(-3))
    ((w_clean, w_adversarial),) = weights_of(SetWeighted(2), clean, adversarial)
    assert w_clean == pytest.approx(expected, rel=1e-14)
    assert w_clean + w_adversarial == pytest.approx(1, rel=1e-14)
    assert w_clean > 0.5  # the nearer one
    scores = SetWeighted(2)([clean, adversarial], 3)[0].tolist()
    assert scores == pytest.approx([w_clean / 2, w_clean / 2 + w_adversarial, 0], rel=1e-14)


def test_the_released_sign_is_the_opposite() -> None:
    clean, adversarial = votes([0.5, 1.5], [0, 1]), votes([2.0, 4.0], [1, 1])
    ((w_clean, w_adversarial),) = weights_of(SetWeighted(2, "released"), clean, adversarial)
    assert w_clean == pytest.approx(1 / (1 + math.exp(3 - 1)), rel=1e-14)  # the code's 1 / (1 + exp(d_a − d_b))
    assert w_adversarial == pytest.approx(1 - w_clean, rel=1e-14)
    assert w_clean < 0.5


@pytest.mark.parametrize("weighting", ["paper", "released", "uniform"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, "mean"])
def test_sets_equally_far_count_alike(weighting: str, scale: float | str) -> None:
    both = votes([1.0, 3.0], [0, 0]), votes([2.0, 2.0], [1, 1])
    assert weights_of(SetWeighted(2, weighting, scale), *both) == [[0.5, 0.5]]
    on_references = votes([0.0], [0]), votes([0.0], [1])
    assert weights_of(SetWeighted(2, weighting, scale), *on_references) == [[0.5, 0.5]]


def test_layers_have_weights_of_their_own_and_scores_are_their_mean() -> None:
    given = [votes([1.0], [0]), votes([2.0], [1]), votes([5.0], [1]), votes([3.0], [2])]  # layer by layer, set by set
    first, second = weights_of(SetWeighted(2), *given)
    assert first == pytest.approx([sigmoid(1), sigmoid(-1)], rel=1e-14)
    assert second == pytest.approx([sigmoid(-2), sigmoid(2)], rel=1e-14)
    scores = SetWeighted(2)(given, 3)[0].tolist()
    assert scores == pytest.approx([first[0] / 2, (first[1] + second[0]) / 2, second[1] / 2], rel=1e-14)
    assert sum(scores) == pytest.approx(1, rel=1e-14)


def test_several_sets_share_by_a_softmax() -> None:
    given = votes([1.0], [0]), votes([2.0], [1]), votes([4.0], [2])
    parts = [math.exp(-1), math.exp(-2), math.exp(-4)]
    assert weights_of(SetWeighted(3), *given)[0] == pytest.approx([p / sum(parts) for p in parts], rel=1e-14)
    parts = [math.exp(1), math.exp(2), math.exp(4)]
    released = weights_of(SetWeighted(3, "released"), *given)[0]
    assert released == pytest.approx([p / sum(parts) for p in parts], rel=1e-14)


def test_scales() -> None:
    given = votes([10.0], [0]), votes([30.0], [1])
    assert weights_of(SetWeighted(2, scale=20), *given)[0][0] == pytest.approx(sigmoid(1), rel=1e-14)
    assert weights_of(SetWeighted(2, scale="mean"), *given)[0][0] == pytest.approx(sigmoid(20 / 20), rel=1e-14)
    for unit in (1e-3, 1e6):  # "mean" does not feel the unit
        other = votes([10.0 * unit], [0]), votes([30.0 * unit], [1])
        assert weights_of(SetWeighted(2, scale="mean"), *other)[0][0] == pytest.approx(sigmoid(1), rel=1e-12)
    inner = votes([-10.0], [0]), votes([-30.0], [1])  # inner products: the second is nearer
    assert weights_of(SetWeighted(2, scale="mean"), *inner)[0][0] == pytest.approx(sigmoid(-1), rel=1e-14)


def test_soft_votes_weigh_the_mean_distance() -> None:
    clean = votes([1.0, 2.0, 9.0], [0, 1, 1], [0.9, 0.6, 0.5], k=2)
    adversarial = votes([3.0, 3.0], [0, 1], [1.0, 1.0])
    mean = (0.9 * 1 + 0.6 * 2 + 0.5 * 9) / 2.0
    ((w_clean, w_adversarial),) = weights_of(SetWeighted(2), clean, adversarial)
    assert w_clean == pytest.approx(sigmoid(3 - mean), rel=1e-14)
    scores = SetWeighted(2)([clean, adversarial], 2)[0].tolist()
    own = w_clean * 0.9 / 2 + w_adversarial / 2
    assert scores == pytest.approx([own, w_clean * 1.1 / 2 + w_adversarial / 2], rel=1e-14)


def test_fixed_weights() -> None:
    given = votes([1.0], [0]), votes([2.0], [1]), votes([4.0], [2])
    for weighting, expected in (
        ("uniform", [1 / 3] * 3),
        ("clean", [1, 0, 0]),
        ("adversarial", [0, 1 / 2, 1 / 2]),
        ((1, 0.5, 0.5), [1 / 2, 1 / 4, 1 / 4]),
        ([0, 3, 0], [0, 1, 0]),
    ):
        assert weights_of(SetWeighted(3, weighting), *given)[0] == pytest.approx(expected, rel=1e-14)  # type: ignore[arg-type]


@pytest.mark.parametrize("weighting", ["paper", "released", "uniform", "clean", "adversarial", (1, 2)])
@pytest.mark.parametrize("scale", [1.0, "mean"])
def test_missing_neighbors_have_no_distance_and_no_vote(weighting: Any, scale: Any) -> None:
    rule = SetWeighted(2, weighting, scale)
    part = votes([1.0, INF, INF], [1, 0, 0]), votes([3.0, 3.0, 3.0], [1, 1, 2])
    whole = votes([1.0], [1]), votes([3.0], [1])
    assert weights_of(rule, *part) == weights_of(rule, *whole)
    w_clean, w_adversarial = weights_of(rule, *part)[0]
    scores = rule(part, 3)[0].tolist()
    assert scores == pytest.approx([0, w_clean / 3 + w_adversarial * 2 / 3, w_adversarial / 3], rel=1e-14)
    # A set of which nothing was found weighs nothing under either sign.
    nothing = votes([INF, INF, INF], [0, 0, 0])
    found = weights_of(rule, nothing, part[1])[0]
    assert found == ([0, 0] if weighting == "clean" else [0, 1])
    assert rule([nothing, nothing], 3)[0].tolist() == [0, 0, 0]
    # Nor does it stop the gradient of the others.
    distances = torch.tensor([[3.0, 3.0, 3.0]], dtype=torch.float64, requires_grad=True)
    with_gradient = Votes(part[1].weights.clone().requires_grad_(True), distances, part[1].labels, 3)
    score = rule([nothing, nothing, part[0], with_gradient], 3)[:, 1].sum()
    for gradient in torch.autograd.grad(score, (distances, with_gradient.weights), allow_unused=True):
        assert gradient is None or bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("scale", [1.0, 0.3, "mean"])
@pytest.mark.parametrize("weighting", ["paper", "released", "uniform", "adversarial"])
@pytest.mark.parametrize("sets", [2, 3])
def test_gradients_in_weights_and_distances_by_finite_differences(sets: int, weighting: str, scale: Any) -> None:
    generator = torch.Generator().manual_seed(sets)
    n, guides, layers = 3, 6, 2
    rule, voters = SetWeighted(sets, weighting, scale), layers * sets
    labels = torch.randint(0, 4, (voters, n, guides), generator=generator)
    weights = torch.rand(voters, n, guides, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    distances = torch.rand(voters, n, guides, generator=generator, dtype=torch.float64) + 0.5

    def scores(weights: Tensor, distances: Tensor) -> Tensor:
        return rule([Votes(weights[v], distances[v], labels[v], 3) for v in range(voters)], 4)

    moving = weights.requires_grad_(True), distances.requires_grad_(True)
    assert torch.autograd.gradcheck(scores, moving)
    through = torch.autograd.grad(scores(*moving).square().sum(), moving[1], allow_unused=True)[0]
    by_distance = weighting in ("paper", "released")
    assert by_distance == (through is not None and bool((through != 0).any()))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SetWeighted(2, "papper"), "weighting must be one of 'paper', 'released', 'uniform'"),
        (lambda: SetWeighted(1, "adversarial"), "needs another reference set than the clean one"),
        (lambda: SetWeighted(2, (1.0,)), r"one number for each of the 2 reference sets \(clean first\)"),
        (lambda: SetWeighted(2, (0.0, 0.0)), "not all 0"),
        (lambda: SetWeighted(2, (1.0, -1.0)), "a weight in weighting must be a number of at least 0 and finite"),
        (lambda: SetWeighted(2, (1.0, INF)), "a weight in weighting must be a number of at least 0 and finite"),
        (lambda: SetWeighted(2, scale=0.0), "scale, unless it is 'mean', must be a number above 0 and finite, not 0"),
        (lambda: SetWeighted(2, scale="median"), "unless it is 'mean', must be a number above 0"),
        (lambda: SetWeighted(0), "sets must be a whole number of at least 1"),
    ],
)
def test_rules_that_cannot_work_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


# ------------------------------------------------------------------------------- against a plain implementation


def first(split: Split, n: int) -> Tensor:
    return split.batch(torch.arange(n))


@pytest.fixture(scope="module")
def source() -> DataSource:
    return load("digits", protocol="published")


@pytest.fixture(scope="module")
def hardened(source: DataSource) -> DigitsCNN:
    """A digits network trained for a few epochs on PGD examples of L∞ .1."""
    model = initialise(DigitsCNN, 0)
    x, y = first(source.train, 1000), source.train.labels[:1000]
    optimizer, generator = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(0)
    threat, attack = ThreatModel("linf", 0.1), pgd_transfer(steps=3)
    for epoch in range(10):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            strength = threat.with_eps(0.1 * min(1, epoch / 4))
            attacked = attack(Network(model, 10), x[rows], y[rows], strength, seed=epoch, sample_ids=rows).x_adv
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(attacked), y[rows]).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def sets(source: DataSource, hardened: DigitsCNN) -> list[ReferenceSet]:
    """Clean references, and adversarial ones of two strengths and norms; of different sizes."""
    features, train = FeatureExtractor(hardened, LAYERS), source.train
    made = [ReferenceSet.build(features, train.subset(torch.arange(600)), keep_images=True)]
    for n, threat in ((600, ThreatModel("linf", 0.1)), (400, ThreatModel("l2", 0.5))):
        made.append(adversarial_references(features, train.subset(torch.arange(n)), threat))
    return made


def plain_scores(
    x: Tensor, sets: list[ReferenceSet], k: int, weighting: str, scale: float | str, metric: str
) -> tuple[Array, Array]:
    """Scores (N, C) and weights (N, L, S) of DAEkNN, in loops over inputs, layers and sets."""
    extractor, scores, weights = sets[0].extractor(), np.zeros((len(x), 10)), np.zeros((len(x), 2, len(sets)))
    with torch.no_grad():
        found = {layer: value.double().numpy() for layer, value in extractor(x).items()}
    for i, (place, layer) in product(range(len(x)), enumerate(LAYERS)):
        z, means, shares = found[layer][i], [], []
        for held in sets:
            vectors = held.rows(layer, torch.arange(len(held))).double().numpy()
            if metric == "l2":
                distances = np.sqrt(((vectors - z) ** 2).sum(1))
            else:
                distances = 1 - vectors @ z / np.linalg.norm(vectors, axis=1) / np.linalg.norm(z)
            nearest = np.argsort(distances, kind="stable")[:k]
            means.append(distances[nearest].mean())
            shares.append(np.bincount(held.labels.numpy()[nearest], minlength=10) / k)
        d = np.array(means) / (np.mean(means) if scale == "mean" else scale)
        power = {"paper": np.exp(-d), "released": np.exp(d), "uniform": np.ones(len(sets))}[weighting]
        weights[i, place] = power / power.sum()
        scores[i] += weights[i, place] @ np.array(shares)
    return scores / len(LAYERS), weights


@pytest.mark.parametrize(
    ("n_sets", "k", "weighting", "scale", "metric"),
    [
        (2, 5, "paper", 1.0, "l2"),
        (2, 5, "released", 1.0, "l2"),
        (3, 5, "paper", 1.0, "l2"),
        (3, 4, "paper", 0.02, "cosine"),
        (3, 1, "released", "mean", "cosine"),
        (3, 7, "paper", "mean", "l2"),
        (2, 3, "uniform", 1.0, "l2"),
    ],
)
def test_daeknn_is_the_plain_implementation(
    source: DataSource, sets: list[ReferenceSet], n_sets: int, k: int, weighting: str, scale: Any, metric: str
) -> None:
    x, chosen = first(source.test, 40), sets[:n_sets]
    ours = DAEkNN(chosen[0], chosen[1:], k, metric=metric, weighting=weighting, scale=scale)
    scores, weights = plain_scores(x, chosen, k, weighting, scale, metric)
    assert np.allclose(ours.set_weights(x).numpy(), weights, rtol=1e-6, atol=1e-9)
    assert np.allclose(ours.scores(x).numpy(), scores, rtol=1e-6, atol=1e-9)
    assert np.allclose(ours.predict_proba(x.numpy()), scores, atol=1e-6)
    clear = np.sort(scores, 1)[:, -1] - np.sort(scores, 1)[:, -2] > 1e-5
    assert clear.sum() > 30
    assert np.array_equal(ours.predict(x.numpy())[clear], scores.argmax(1)[clear])
    assert np.allclose(ours.set_weights(x.numpy()), weights, rtol=1e-6, atol=1e-9)


def test_the_clean_references_alone_are_dknn(source: DataSource, sets: list[ReferenceSet]) -> None:
    x = first(source.test, 60)
    ours = DAEkNN(sets[0], sets[1:], 5, weighting="clean")
    adversarial = DAEkNN(sets[0], sets[2], 5, weighting="adversarial")
    for mine, plain in ((ours, DkNN(sets[0], 5)), (adversarial, DkNN(sets[2], 5))):
        assert torch.allclose(mine.scores(x), plain.scores(x), rtol=0, atol=1e-14)
        assert torch.equal(mine.labels(x), plain.labels(x))


def test_ties_are_those_of_all_rules() -> None:
    x = torch.tensor([[0.0, 0.0]])
    clean = ReferenceSet.from_vectors(torch.tensor([[1.0, 0.0], [9.0, 0.0]]), [1, 0], features=raw())
    adversarial = ReferenceSet.from_vectors(torch.tensor([[0.0, 1.0], [0.0, 9.0]]), [0, 1], features=raw())
    ours = DAEkNN(clean, adversarial, 1)
    assert ours.scores(x).tolist() == [[0.5, 0.5]]
    assert ours.labels(x).tolist() == [0]  # of those tied the smallest
    # Weights that are equal but for rounding are a tie too.
    shifted = ReferenceSet.from_vectors(torch.tensor([[0.0, 1.0 - 1e-7], [0.0, 9.0]]), [1, 0], features=raw())
    other = DAEkNN(ReferenceSet.from_vectors(torch.tensor([[1.0, 0.0]] * 2), [0, 1], features=raw()), shifted, 1)
    assert other.labels(x).tolist() == [0]


def raw() -> FeatureExtractor:
    return FeatureExtractor(nn.Identity())


# ---------------------------------------------------------------------------------------------- making D_adv


def test_adversarial_references_are_the_papers(source: DataSource, hardened: DigitsCNN) -> None:
    """The last iterate of 10 constant steps of ε_h/4 from a random start, with the true labels: in a plain loop."""
    features, threat = FeatureExtractor(hardened, LAYERS), ThreatModel("linf", 0.1)
    x, y = first(source.train, 60), source.train.labels[:60]
    made = adversarial_references(features, (x, y), threat, n_classes=10, keep_images=True, seed=3, batch_size=20)
    moved = threat.random_start(x, torch.arange(60), 3, "restart", 0)
    for _ in range(10):
        moved = moved.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(hardened(moved), y, reduction="sum"), moved)
        moved = torch.max(torch.min(moved.detach() + 0.025 * gradient.sign(), x + 0.1), x - 0.1).clamp(0, 1)
    assert made.images is not None
    assert float((made.images - moved).abs().amax()) < 1e-5
    assert torch.equal(made.labels, y)
    with torch.no_grad():
        found = features(made.images)
    for layer in LAYERS:
        assert torch.allclose(made.rows(layer, torch.arange(60)), found[layer], atol=1e-5)
    logits = hardened(torch.cat([x, moved])).detach()
    clean, attacked = (nn.functional.cross_entropy(part, y) for part in logits.split(60))
    assert attacked > clean + 0.1


def test_how_the_data_come_and_are_batched_changes_nothing(source: DataSource, hardened: DigitsCNN) -> None:
    features, threat = FeatureExtractor(hardened, "relu3"), ThreatModel("linf", 0.1)
    x, y = first(source.train, 60), source.train.labels[:60]
    expected = adversarial_references(features, (x, y), threat, n_classes=10).fingerprint()
    for data, size in (
        ((x, y), 7),
        (Split(x, y, "train"), 16),
        (TensorDataset(x, y), 13),
        (DataLoader(TensorDataset(x, y), batch_size=11), 128),
    ):
        assert adversarial_references(features, data, threat, n_classes=10, batch_size=size).fingerprint() == expected
    other = adversarial_references(features, (x, y), threat, n_classes=10, seed=1)
    assert other.fingerprint() != expected


ATTACKS: dict[str, Attack] = {
    "neighbors": PGD(steps=5),
    "adaptive": PGD(Adaptive(), steps=5, keep="last"),
    "square": Square(queries=20),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_any_attack_on_any_classifier_makes_them(
    name: str, source: DataSource, hardened: DigitsCNN, sets: list[ReferenceSet]
) -> None:
    features, victim, threat = FeatureExtractor(hardened, LAYERS), DkNN(sets[0], 5), ThreatModel("l2", 0.8)
    data = source.train.subset(torch.arange(600, 640))
    hardening = Hardening(threat, ATTACKS[name])
    made = adversarial_references(features, data, hardening, classifier=victim, n_classes=10, keep_images=True, seed=2)
    by_hand = ATTACKS[name](victim, first(data, 40), data.labels, threat, seed=2)
    assert made.images is not None
    assert torch.equal(made.images, by_hand.x_adv)
    assert bool(by_hand.success.any())
    assert made.made_by is not None
    assert made.made_by["classifier"] == victim.fingerprint()
    ours = DAEkNN(sets[0], [sets[1], made], 5)
    assert len(ours.voters) == 6
    assert ours.set_weights(first(data, 40)[:3]).shape == (3, 2, 3)


def test_what_it_was_made_by_is_kept_saved_and_loaded(sets: list[ReferenceSet], tmp_path: Path) -> None:
    made = sets[1].made_by
    assert made is not None
    assert made["attack"]["name"] == "pgd"
    assert made["attack"]["objective"] == {"name": "cross-entropy"}
    assert (made["attack"]["steps"], made["attack"]["step"], made["attack"]["start"]) == (10, 0.25, "random")
    assert (made["threat"]["norm"], made["threat"]["eps"], made["seed"]) == ("linf", 0.1, 0)
    assert made["model"] == sets[0].extractor().fingerprint() == sets[1].model_fingerprint
    sets[1].save(tmp_path / "adversarial")
    assert ReferenceSet.load(tmp_path / "adversarial", sets[0].extractor()).made_by == made
    sets[0].save(tmp_path / "clean")
    assert ReferenceSet.load(tmp_path / "clean").made_by is None


def test_the_progress_of_making_them_is_told(source: DataSource, hardened: DigitsCNN) -> None:
    told: list[Any] = []

    class Told:
        def start(self, what: str, total: int, done: int = 0) -> None:
            told.append((what, total))

        def advance(self, amount: int = 1) -> None:
            told.append(amount)

        def stop(self) -> None:
            told.append("stop")

    data = source.train.subset(torch.arange(60))
    features, threat = FeatureExtractor(hardened, "relu3"), ThreatModel("linf", 0.1)
    adversarial_references(features, data, threat, n_classes=10, batch_size=25, progress=Told())
    assert told == [("making references", 60), 25, 25, 10, "stop"]


def test_hardening_that_cannot_work_is_refused(source: DataSource, sets: list[ReferenceSet]) -> None:
    features, data = sets[0].extractor(), source.train.subset(torch.arange(40))
    with pytest.raises(InputError, match="threat must be a ThreatModel"):
        adversarial_references(features, data, 0.1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="attack must be an Attack such as PGD"):
        Hardening(ThreatModel(), CrossEntropy())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="hardening is empty"):
        daeknn(features, data, [])
    with pytest.raises(InputError, match="variant must be one of 'daeknn', 'daeknn-wat', 'daeknn-wad'"):
        daeknn(features, data, ThreatModel(), variant="wat")
    with pytest.raises(InputError, match=r"wat_share must be a number in \(0, 1\]"):
        daeknn(features, data, ThreatModel(), wat_share=0)
    encoder = FeatureExtractor(nn.Sequential(nn.Unflatten(1, (1, 3))))
    with pytest.raises(InputError, match="the model returns no class scores"):
        adversarial_references(encoder, (torch.rand(4, 3), [0, 1, 0, 1]), ThreatModel())


# ------------------------------------------------------------------------------------------------ variants by name


def test_daeknn_and_its_variants_by_name(source: DataSource, hardened: DigitsCNN, sets: list[ReferenceSet]) -> None:
    features, data, x = sets[0].extractor(), source.train.subset(torch.arange(600)), first(source.test, 30)
    threats = [ThreatModel("linf", 0.1), Hardening(ThreatModel("l2", 0.4), pgd_transfer(steps=2))]
    made = daeknn(features, data, threats[0])
    assert isinstance(made, DAEkNN)
    assert made.fingerprint() == DAEkNN(sets[0], sets[1]).fingerprint()
    both = daeknn(features, data, threats, n_neighbors=3, scale="mean", keep_images=True)
    assert isinstance(both, DAEkNN)
    assert (both.n_neighbors, both.scale, len(both.reference_sets_)) == (3, "mean", 3)
    assert all(held.images is not None for held in both.reference_sets_)

    wad = daeknn(features, data, threats, variant="daeknn-wad")
    assert type(wad) is WAD
    assert isinstance(wad, DkNN)
    assert torch.equal(wad.scores(x), DkNN(sets[0], 5).scores(x))
    wat = daeknn(features, data, threats, variant="daeknn-wat", wat_share=0.5)
    assert isinstance(wat, DAEkNN)
    said = [held.made_by for held in wat.reference_sets_[1:]]
    assert [s and s["threat"]["eps"] for s in said] == [0.05, 0.2]
    assert [s and s["attack"]["steps"] for s in said] == [10, 2]


# ---------------------------------------------------------------------------------------------------- refusals


def adversarial_of(net: nn.Module, layers: tuple[str, ...] = ("1", "3"), n: int = 40, **options: Any) -> ReferenceSet:
    x = torch.rand(n, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ReferenceSet.build(FeatureExtractor(net, layers, **options), (x, torch.arange(n) % 4))


def other_net() -> nn.Module:
    net = random_net()
    net[4].bias.data[0] += 1e-9  # behind every layer that votes: another network all the same
    return net


def three_classes() -> ReferenceSet:
    return ReferenceSet.build(FeatureExtractor(random_net(), ("1", "3")), (torch.rand(9, 6).double(), [0, 1, 2] * 3))


def other_length() -> ReferenceSet:
    vectors = {"1": torch.rand(40, 8).double(), "3": torch.rand(40, 7).double()}
    return ReferenceSet.from_vectors(vectors, torch.arange(40) % 4)


CLEAN = adversarial_of(random_net())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: DAEkNN(CLEAN),
            "DAEkNN needs adversarial references; name a hardening strength",
        ),
        (lambda: DAEkNN(CLEAN, []), "needs adversarial references"),
        (lambda: DAEkNN(CLEAN, "D_adv"), "adversarial must be a ReferenceSet or a list of several, not 'D_adv'"),
        (lambda: DAEkNN(CLEAN, [CLEAN, 5]), "adversarial must be a ReferenceSet or a list of several"),
        (
            lambda: DAEkNN(CLEAN, adversarial_of(other_net())),
            "the adversarial set was made with another network than the references",
        ),
        (
            lambda: DAEkNN(CLEAN, [CLEAN, adversarial_of(other_net())]),
            "adversarial set 2 was made with another network than the references",
        ),
        (
            lambda: DAEkNN(CLEAN, adversarial_of(random_net(), ("3",))),
            "the adversarial set holds the layers 3, not 1; make it with these too",
        ),
        (
            lambda: DAEkNN(CLEAN, adversarial_of(random_net(), normalize=True)),
            "another pooling, normalising, centering or transform of layer '1'",
        ),
        (lambda: DAEkNN(CLEAN, other_length()), "features of length 7 at layer '3', the references 5"),
        (lambda: DAEkNN(CLEAN, three_classes()), "has 3 classes, the references 4"),
        (
            lambda: DAEkNN(CLEAN, [CLEAN, adversarial_of(random_net(), n=4)]),
            "n_neighbors = 5 exceeds the 4 references of adversarial set 2",
        ),
        (lambda: DAEkNN(CLEAN, CLEAN, 41), "n_neighbors = 41 exceeds the 40 references"),
        (lambda: DAEkNN(CLEAN, CLEAN, 0), "n_neighbors must be a whole number of at least 1"),
        (lambda: DAEkNN(CLEAN, CLEAN, scale=-1), "scale, unless it is 'mean', must be a number above 0"),
        (lambda: DAEkNN(CLEAN, CLEAN, weighting="Paper"), "weighting must be one of 'paper'"),
        (lambda: DAEkNN(CLEAN, CLEAN, weighting=[1, 2, 3]), "one number for each of the 2 reference sets"),
        (lambda: DAEkNN(CLEAN, CLEAN, layers=["2"]), "unknown reference layer '2'"),
        (lambda: DAEkNN(CLEAN, CLEAN, layers=[]), "layers must be a list"),
        (lambda: DAEkNN(CLEAN, CLEAN, metric="l1"), "l1"),
        (lambda: DAEkNN(CLEAN, CLEAN, index=KNN(CLEAN, layer="1").voters[0].index), "name an engine in index="),
        (lambda: DAEkNN(CLEAN, CLEAN, index="exat"), "exat"),
    ],
)
def test_what_cannot_work_is_refused_at_once(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_sets_of_an_unknown_network_and_of_more_layers_are_taken() -> None:
    vectors = {layer: CLEAN.rows(layer, torch.arange(40)).clone() for layer in CLEAN.layers}
    unknown = ReferenceSet.from_vectors(vectors, CLEAN.labels)
    x = torch.rand(5, 6).double()
    assert torch.allclose(DAEkNN(CLEAN, unknown).scores(x), DkNN(CLEAN, 5).scores(x), rtol=0, atol=1e-12)
    one = adversarial_of(random_net(), ("3",))
    assert DAEkNN(one, CLEAN).scores(x).shape == (5, 4)


def test_one_whose_parameters_became_wrong_says_so() -> None:
    ours = DAEkNN(CLEAN, CLEAN)
    for change, said in (({"scale": 0}, "scale"), ({"adversarial": adversarial_of(other_net())}, "another network")):
        changed = clone(ours).set_params(**change)
        for use in (changed.predict, lambda _: changed.fingerprint()):  # noqa: B023
            with pytest.raises(InputError, match=said):
                use(np.zeros((1, 6)))


# -------------------------------------------------------------------------------------------------- the face


def test_parameters_clones_and_changes() -> None:
    given = {
        "references": CLEAN,
        "adversarial": [CLEAN, CLEAN],
        "n_neighbors": 3,
        "metric": "cosine",
        "layers": ["3"],
        "weighting": [1, 0, 2],
        "scale": "mean",
        "features": None,
        "index": "exact",
        "batch_size": 9,
    }
    ours = DAEkNN(**given)  # type: ignore[arg-type]
    assert ours.get_params() == given
    twin = clone(ours)
    assert twin is not ours
    assert twin.get_params() == given
    assert twin.adversarial[0] is CLEAN
    assert "weighting=[1, 0, 2]" in repr(ours)
    x = torch.rand(5, 6).double()
    before = ours.scores(x)
    ours.set_params(weighting="clean", layers=None)
    assert torch.equal(ours.scores(x), DkNN(CLEAN, 3, metric="cosine").scores(x))
    assert not torch.equal(ours.scores(x), before)
    assert [v.layer for v in ours.voters] == ["1", "1", "1", "3", "3", "3"]
    assert ours.to("cpu") is ours
    assert torch.equal(ours.scores(x), DkNN(CLEAN, 3, metric="cosine").scores(x))
    with pytest.raises(InputError, match="unknown parameter of DAEkNN: 'sclae'; did you mean 'scale'"):
        ours.set_params(sclae=2)
    assert registry.classifiers.create("daeknn", references=CLEAN, adversarial=CLEAN).fingerprint()
    with pytest.raises(NotFittedError, match="this DAEkNN has no references"):
        DAEkNN().predict(np.zeros((1, 6)))


def test_fit_reads_the_clean_references() -> None:
    features = CLEAN.extractor()
    x, y = torch.rand(30, 6).double(), torch.arange(30) % 4
    ours = DAEkNN(adversarial=CLEAN, features=features).fit(x, y)
    given = DAEkNN(ReferenceSet.build(features, (x, y)), CLEAN)
    assert torch.equal(ours.scores(x), given.scores(x))
    assert 0 <= ours.score(x, y) <= 1


def test_moving_it_moves_every_set() -> None:
    ours = DAEkNN(adversarial_of(random_net()), [adversarial_of(random_net()) for _ in range(2)])
    ours.to("meta")
    assert {held.device.type for held in ours.reference_sets_} == {"meta"}
    with pytest.raises(InputError, match="the adversarial set is on cpu, the references on meta; move one"):
        DAEkNN(ours.references_, CLEAN)


# ------------------------------------------------------------------------------------------------- on disk


def test_saved_and_loaded_it_decides_the_same(
    sets: list[ReferenceSet], hardened: DigitsCNN, source: DataSource, tmp_path: Path
) -> None:
    x = first(source.test, 30)
    for place, options in enumerate(({}, {"metric": "cosine", "weighting": (0.5, 1, 1), "scale": "mean"})):
        ours = DAEkNN(sets[0], sets[1:], 4, **options)  # type: ignore[arg-type]
        path = tmp_path / str(place)
        ours.save(path)
        assert sorted(p.name for p in path.iterdir()) == [
            "adversarial-0",
            "adversarial-1",
            "classifier.json",
            "references",
        ]
        assert {p.suffix for p in path.rglob("*") if p.is_file()} == {".json", ".npy"}
        for model in (hardened, FeatureExtractor(hardened, LAYERS)):
            loaded = load_classifier(path, model)
            assert type(loaded) is DAEkNN
            assert loaded.fingerprint() == ours.fingerprint()
            assert torch.equal(loaded.scores(x), ours.scores(x))
            assert [s.made_by for s in loaded.reference_sets_] == [s.made_by for s in sets]
            assert len({id(s.features) for s in loaded.reference_sets_}) == 1
    with pytest.raises(InputError, match="exists"):
        ours.save(path)
    DAEkNN(sets[0], sets[1], 4).save(path, overwrite=True)
    assert len(DAEkNN.load(path, hardened).reference_sets_) == 2


def test_another_model_and_another_set_are_refused(
    sets: list[ReferenceSet], hardened: DigitsCNN, tmp_path: Path
) -> None:
    DAEkNN(sets[0], sets[1:]).save(tmp_path / "c")
    with pytest.raises(IntegrityError, match="were made with another model"):
        load_classifier(tmp_path / "c", DigitsCNN())
    sets[1].save(tmp_path / "c" / "adversarial-1", overwrite=True)
    with pytest.raises(IntegrityError, match="are not those the classifier was saved with"):
        load_classifier(tmp_path / "c", hardened)
    array = next((tmp_path / "c" / "adversarial-0").glob("layer-0.npy"))
    array.write_bytes(array.read_bytes()[:-1] + b"\1")
    with pytest.raises(IntegrityError, match="altered"):
        load_classifier(tmp_path / "c", hardened)


def test_the_fingerprint_covers_all_that_decides(sets: list[ReferenceSet]) -> None:
    clean, one, two = sets
    made = [
        DAEkNN(clean, one),
        DAEkNN(clean, two),
        DAEkNN(clean, [one, two]),
        DAEkNN(clean, [two, one]),
        DAEkNN(one, clean),
        DAEkNN(clean, one, 4),
        DAEkNN(clean, one, weighting="released"),
        DAEkNN(clean, one, scale=2),
        DAEkNN(clean, one, scale="mean"),
        DAEkNN(clean, one, layers=["relu3"]),
        DkNN(clean, 5),
    ]
    assert len({c.fingerprint() for c in made}) == len(made)
    assert DAEkNN(clean, [one], batch_size=3).fingerprint() == made[0].fingerprint()


# -------------------------------------------------------------------------------------------------- under attack


def small_daeknn(metric: str = "l2", scale: Any = 1.0, weighting: str = "paper") -> tuple[DAEkNN, Tensor, Tensor]:
    """A DAEkNN in float64 of two adversarial sets over a smooth random network, and inputs near its boundary."""
    net, generator = random_net(), torch.Generator().manual_seed(0)
    x = torch.rand(90, 6, generator=generator, dtype=torch.float64)
    y, features = torch.arange(90) % 4, FeatureExtractor(net, ("1", "3"))
    clean = ReferenceSet.build(features, (x[:80], y[:80]))
    sets = [
        adversarial_references(features, (x[:n], y[:n]), ThreatModel("linf", eps)) for n, eps in ((80, 0.1), (60, 0.3))
    ]
    return DAEkNN(clean, sets, 5, metric=metric, scale=scale, weighting=weighting), x[80:], y[80:]


@pytest.mark.parametrize("weighting", ["paper", "released"])
@pytest.mark.parametrize(("metric", "scale"), [("l2", 1.0), ("l2", 0.05), ("cosine", 0.01), ("ip", "mean")])
def test_gradients_through_all_voters_and_weights_by_finite_differences(
    metric: str, scale: Any, weighting: str
) -> None:
    """The adaptive objective, with a hard maximum, since the temperature of a soft one is held fixed."""
    classifier, x0, y = small_daeknn(metric, scale, weighting)
    bound = Adaptive(floor=0.1, smooth=1e-9, max_classes=None).bind(classifier)
    batch = bound.start(x0, y, None, classifier.look(x0, bound.requests))
    x = (x0 + 0.05).requires_grad_(True)
    assert torch.autograd.gradcheck(batch.loss, x, atol=1e-6)
    # The weights have their part in it: held fixed, the gradient is another.
    (whole,) = torch.autograd.grad(batch.loss(x).sum(), x)
    rule = type("Held", (SetWeighted,), {"set_weights": lambda self, v: SetWeighted.set_weights(self, v).detach()})
    made = rule(3, weighting, scale)
    classifier.__class__ = type("HeldDAEkNN", (DAEkNN,), {"rule": made})
    (held,) = torch.autograd.grad(batch.loss(x).sum(), x)
    assert float((whole - held).abs().amax()) > 1e-4 * float(whole.abs().amax())


def test_every_voter_of_every_set_is_attacked() -> None:
    classifier, *_ = small_daeknn()
    banks = list(classifier.reference_sets_)
    for objective, expected in (
        (Adaptive(), 6),
        (ASK(), 6),
        (RankPair(), 6),
        (NeighborHinge(), 6),
        (ASK(metric="cosine"), 6),
        (ASK(layers=("3",)), 3),
        (ASK(layers=("3",), metric="cosine"), 3),
    ):
        voters = objective.bind(classifier).voters  # type: ignore[attr-defined]
        assert len(set(voters)) == expected
        assert [v.references for v in voters] == banks * (expected // 3)
    with pytest.raises(InputError, match=r"different references.*guide_layer='each'"):
        NeighborHinge(guide_layer="first").bind(classifier)


ON_IT: dict[str, Attack] = {
    "ask": PGD(steps=6, check_every=3),
    "adaptive": PGD(Adaptive(), steps=6, check_every=3),
    "rank-pair": PGD(RankPair(), steps=6, check_every=3),
    "neighbor-hinge": PGD(NeighborHinge(), steps=6, check_every=3),
    "pgd-transfer": pgd_transfer(steps=6),
    "square": Square(queries=30),
    "worst-case-fast": WorstCase("fast"),
}


@pytest.mark.parametrize("name", ON_IT)
def test_attacks_run_on_it_and_succeed_by_the_hard_decision(name: str) -> None:
    classifier, x, _ = small_daeknn()
    y, threat = classifier.labels(x), ThreatModel("linf", 0.2)
    result = ON_IT[name](classifier, x, y, threat)
    assert torch.equal(result.success, classifier.lead(classifier.scores(result.x_adv), y) < -1e-6)
    assert bool(result.success.any())
    for size in (1, 3):
        assert torch.equal(ON_IT[name](classifier, x, y, threat, batch_size=size).x_adv, result.x_adv)


def test_the_attack_through_the_rule_is_the_stronger_one(source: DataSource, sets: list[ReferenceSet]) -> None:
    """The paper's protocol, PGD on the network's cross-entropy, flatters it: the gain is lost to who knows the rule."""
    x, y, threat = first(source.test, 150), source.test.labels[:150], ThreatModel("linf", 0.2)
    ours, plain = DAEkNN(sets[0], sets[1]), DkNN(sets[0], 5)

    def left(classifier: NeighborEstimator, attack: Attack) -> float:
        return float(attack(classifier, x, y, threat).robust.double().mean())

    published, adaptive = pgd_transfer(steps=10), PGD(Adaptive(), steps=20)
    assert left(ours, published) > left(plain, published) + 0.05  # what the paper reports
    assert left(ours, adaptive) < left(ours, published) - 0.2
    assert left(ours, PGD(steps=20)) < left(ours, published)


def test_evaluate_describes_every_set_and_says_how_much_it_counts(
    source: DataSource, sets: list[ReferenceSet], tmp_path: Path
) -> None:
    ours, test = DAEkNN(sets[0], sets[1:]), source.test.subset(torch.arange(20))
    attacks = {"published": pgd_transfer(steps=3)}
    run = evaluate(ours, test, attacks=attacks, threat=ThreatModel("linf", 0.1), out=tmp_path / "run")
    assert finish(run).classifiers[0].clean_accuracy == ours.score(first(test, 20), test.labels)
    clean = next(cell for cell in run.cells if cell.attack == "clean")
    expected = ours.set_weights(first(test, 20))[:, :, 1:].sum(2).mean(1).numpy()
    assert np.allclose(run.rows(clean)["adversarial_weight"], expected, atol=1e-12)
    (described,) = run.header["plan"]["classifiers"].values()
    assert [v["references"] for v in described["voters"]] == [600, 600, 400] * 2


def test_the_page_runs_as_printed(source: DataSource, hardened: DigitsCNN) -> None:
    page = Path(__file__).parents[1] / "docs" / "defenses" / "daeknn.md"
    parts = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    here: dict[str, Any] = {"model": hardened, "layers": LAYERS, "data": source.train.subset(torch.arange(80))}
    here |= {"x": first(source.test, 10), "y": source.test.labels[:10]}
    for part in parts:
        exec(compile(part, str(page), "exec"), here)
    assert len(parts) == 3
    assert len(here["defense"].reference_sets_) == 4
    assert here["adaptive"].robust.sum() <= here["published"].robust.sum()
