"""AdvKNN's heads and losses against formulas written plainly, votes against brute force, and what heads refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from small import LAYERS, digits, digits_references, random_classifier, random_net
from torch import Tensor, nn

from robustknn import KNN, PGD, DkNN, FeatureExtractor, InputError, IntegrityError, ReferenceSet, ThreatModel, registry
from robustknn.attacks import BIM, FGSM, GradientAttack
from robustknn.classifiers import Classifier
from robustknn.config import from_config, to_config
from robustknn.objectives import AdvKNN, CrossEntropy, DkNNB, HeadTraining, train_heads
from robustknn.objectives import head_training as module
from robustknn.objectives.dknnb import head_loss
from robustknn.objectives.head_training import reference_votes

Array = NDArray[np.float64]


def votes_by_hand(vectors: Array, labels: Array, k: int, metric: str, n_classes: int) -> Array:
    """Vote fractions of every reference among the others, one at a time."""
    found = np.zeros((len(vectors), n_classes))
    for i, z in enumerate(vectors):
        others = [j for j in range(len(vectors)) if j != i]
        if metric == "l2":
            distances = [np.sqrt(((z - vectors[j]) ** 2).sum()) for j in others]
        elif metric == "cosine":
            distances = [1 - z @ vectors[j] / np.linalg.norm(z) / np.linalg.norm(vectors[j]) for j in others]
        else:
            distances = [-z @ vectors[j] for j in others]
        near = [others[place] for place in np.argsort(np.round(distances, 12), kind="stable")[:k]]
        for j in near:
            found[i, labels[j]] += 1 / len(near)
    return found


def loss_by_hand(logits: Array, p: Array, weight: float, consistency: bool) -> Array:
    """λ (−log q_t) + KL(p‖q), or −log q_t, of each row."""
    found = []
    for row, fractions in zip(logits, p, strict=True):
        q = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        own = -np.log(q[int(np.argmax(fractions))])
        kl = sum(f * np.log(f / v) for f, v in zip(fractions, q, strict=True) if f > 0)
        found.append(weight * own + kl if consistency else own)
    return np.array(found)


@pytest.fixture
def clean() -> None:
    """No heads in memory."""
    module._HEADS.clear()
    module._VOTES.clear()


# --------------------------------------------------------------------------------------------- votes


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("k", [1, 5, 79])
def test_votes_leave_the_reference_itself_out(metric: str, k: int) -> None:
    classifier, _, _ = random_classifier(k, metric, layers=("1",))
    references, voter = classifier.references_, classifier.voters[0]
    vectors = references.rows("1", torch.arange(80)).numpy()
    want = votes_by_hand(vectors, references.labels.numpy(), k, metric, 4)
    order = torch.arange(80).flip(0)
    assert np.allclose(reference_votes(voter, order, 4).numpy(), want[::-1], atol=1e-12)


def test_of_copies_only_the_reference_itself_is_left_out() -> None:
    """Six equal vectors, k = 3: the own id is past the four found for the last of them."""
    x = torch.cat([torch.zeros(6, 2), torch.ones(6, 2)])
    y = torch.tensor([0, 1, 1, 0, 0, 0, 2, 2, 2, 2, 2, 2])
    classifier = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (x, y)), 3)
    got = reference_votes(classifier.voters[0], torch.arange(12), 3)
    assert np.allclose(got.numpy(), votes_by_hand(x.double().numpy(), y.numpy(), 3, "l2", 3))
    third = 1 / 3
    assert got[0].tolist() == pytest.approx([third, 2 * third, 0])  # of 1, 2, 3
    assert got[5].tolist() == pytest.approx([third, 2 * third, 0])  # of 0, 1, 2


def test_k_of_all_references_leaves_one_less_to_vote() -> None:
    x, y = torch.rand(6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 1, 1, 1])
    classifier = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (x, y)), 6)
    got = reference_votes(classifier.voters[0], torch.arange(6), 2)
    assert (
        got.tolist() == [[pytest.approx(0.4), pytest.approx(0.6)]] * 3 + [[pytest.approx(0.6), pytest.approx(0.4)]] * 3
    )


def test_a_single_reference_has_no_others() -> None:
    classifier = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (torch.rand(1, 2), torch.tensor([0]))), 1)
    with pytest.raises(InputError, match="but one"):
        train_heads(classifier)


# --------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("consistency", [True, False])
def test_the_loss_of_heads_equals_the_formula(consistency: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(20, 4, generator=generator, dtype=torch.float64)
    p = torch.rand(20, 4, generator=generator, dtype=torch.float64)
    p[:, 0], p[3] = 0.0, torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    p = p / p.sum(1, keepdim=True)
    got = head_loss(logits, p, p.argmax(1), HeadTraining(consistency=consistency, weight=0.7).weights)
    assert np.allclose(got.numpy(), loss_by_hand(logits.numpy(), p.numpy(), 0.7, consistency), rtol=1e-12)


def test_the_attack_may_weigh_the_parts_of_the_loss_as_the_release_does() -> None:
    """KL + 20 CE under BIM, CE alone under FGSM, on heads that learned λ = 0.3 with consistency."""
    classifier, x, y = random_classifier(3, "cosine", layers=("1",), n=30)
    plain = AdvKNN.published()
    values = {}
    for weights in ((20.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.3, 1.0), None):
        objective = replace(plain, loss_weights=weights)
        assert objective.training == plain.training
        bound = objective.bind(classifier)
        batch = bound.start(x, y, None, classifier.look(x, bound.requests))
        values[weights] = batch.loss(x + 0.05).detach()
    label, divergence = values[1.0, 0.0], values[0.0, 1.0]
    assert torch.allclose(values[20.0, 1.0], 20 * label + divergence, rtol=1e-5)
    assert torch.equal(values[0.3, 1.0], values[None])
    assert not torch.allclose(label, divergence)


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.0), (-1.0, 1.0), "ab", 3, (float("nan"), 1.0), ("a", 1)])
def test_loss_weights_that_are_none_are_refused(weights: Any) -> None:
    with pytest.raises(InputError, match="loss_weights"):
        AdvKNN.published(loss_weights=weights)


@pytest.mark.parametrize("consistency", [True, False])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("features", ["voter", "raw"])
def test_heads_reach_the_optimum_of_their_convex_loss(metric: str, features: str, consistency: bool) -> None:
    """SciPy's minimizer, in float64, on the same loss written plainly; few references, so none is held out."""
    classifier, _, _ = random_classifier(3, metric, layers=("1",), n=30)
    references = classifier.references_
    training = HeadTraining(consistency=consistency, weight=0.5, features=features, penalty=1e-2, steps=300)
    head = train_heads(classifier, training=training).heads["1"]
    z = references.rows("1", torch.arange(30)).numpy()
    p = votes_by_hand(z, references.labels.numpy(), 3, metric, 4)
    unit = metric == "cosine" and features == "voter"
    seen = z / np.linalg.norm(z, axis=1, keepdims=True) if unit else z
    center = seen.mean(0)
    scale = np.sqrt(((seen - center) ** 2).sum(1).mean())
    scaled = (seen - center) / scale

    def value(flat: Array) -> float:
        weight, bias = flat[:-4].reshape(4, -1), flat[-4:]
        mean = loss_by_hand(scaled @ weight.T + bias, p, 0.5, consistency).mean() / (1.5 if consistency else 1)
        return float(mean + 1e-2 * (weight**2).sum())

    best = minimize(value, np.zeros(4 * 8 + 4), method="L-BFGS-B", options={"maxiter": 2000, "maxfun": 10**6})
    mine = np.concatenate([(head.weight.double().numpy() * scale).ravel(), head.bias.double().numpy()])
    assert value(mine) <= best.fun + 1e-5
    assert np.allclose(head.center.numpy(), center, atol=1e-6)
    with torch.no_grad():
        logits = head(torch.from_numpy(z))
    weight = best.x[:-4].reshape(4, -1)
    want = scaled @ weight.T + best.x[-4:]
    want -= want.mean(1, keepdims=True)  # a constant added to all logits changes nothing
    assert np.allclose(logits.numpy() - logits.numpy().mean(1, keepdims=True), want, atol=0.02)
    assert head.spread == pytest.approx(np.sqrt((want**2).mean()), rel=0.01)


@pytest.mark.usefixtures("clean")
def test_the_steps_that_serve_held_out_references_best_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random labels cannot be learned: all that more steps do is to learn the others by heart."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 150, generator=generator), torch.randint(4, (200,), generator=generator)
    classifier = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (x, y)), 1)
    head = train_heads(classifier, training=HeadTraining(penalty=0.0)).heads["(output)"]
    ((order, p),) = module._VOTES.values()
    assert torch.equal(order.sort().values, torch.arange(200))
    held = -(p[:20] * head(x[order[:20]]).log_softmax(1).double()).sum(1).mean()
    module._HEADS.clear()
    monkeypatch.setattr(module, "_FEWEST", 1000)  # nothing is held out
    by_heart = train_heads(classifier, training=HeadTraining(penalty=0.0)).heads["(output)"]
    learned = -(p * by_heart(x[order]).log_softmax(1).double()).sum(1).mean()
    assert float(learned) < 0.1
    assert head.spread < by_heart.spread / 4
    assert float(held) < 2.5  # chance: ln 4 = 1.39


def test_heads_predict_what_neighbors_vote(victim: tuple[DkNN, KNN, Tensor, Tensor]) -> None:
    classifier, _, x, _ = victim
    heads = train_heads(classifier)
    look = classifier.look(x)
    for voter in classifier.voters:
        votes = voter.labels_of(look.nearest[voter].ids[:, :15]).mode(1).values
        agree = heads.heads[voter.layer](look.features[voter.layer]).argmax(1) == votes
        assert int(agree.sum()) >= 56, voter.layer  # of 64; chance is 6


@pytest.mark.usefixtures("clean")
def test_training_is_the_same_every_time_and_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, _, _ = random_classifier(n=120)
    training = HeadTraining(max_references=60)
    first = train_heads(classifier, training=training)
    trained: list[str] = []
    real = module._train
    monkeypatch.setattr(module, "_train", lambda voter, *rest: trained.append(voter.layer) or real(voter, *rest))
    again = train_heads(DkNN(classifier.references_, 5), training=training)  # another classifier with the same votes
    alone = train_heads(KNN(classifier.references_, 5, layer="3"), training=training)
    assert trained == []
    assert again.heads["1"] is first.heads["1"]
    assert alone.heads["3"] is first.heads["3"]
    train_heads(DkNN(classifier.references_, 4), training=training)
    assert trained == ["1", "3"]
    module._HEADS.clear()
    module._VOTES.clear()
    anew = train_heads(classifier, training=training)
    for layer, head in anew.heads.items():
        assert head is not first.heads[layer]
        assert torch.equal(head.weight, first.heads[layer].weight)
        assert torch.equal(head.bias, first.heads[layer].bias)
    other = train_heads(classifier, training=HeadTraining(max_references=60, seed=1))
    assert not torch.equal(other.heads["1"].weight, first.heads["1"].weight)


@pytest.mark.usefixtures("clean")
def test_small_batches_of_features_give_the_same_head(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, _, _ = random_classifier(layers=("1",))
    whole = train_heads(classifier).heads["1"]
    module._HEADS.clear()
    monkeypatch.setattr(module, "_BYTES", 4 * 8 * 7)  # seven rows at a time
    parts = train_heads(classifier).heads["1"]
    assert torch.allclose(parts.weight, whole.weight, rtol=1e-2, atol=1e-2)


def test_heads_feel_neither_offset_nor_size_of_features() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(64, (100, 5), generator=generator) / 64.0, torch.arange(100) % 3
    x[:, 0] += y
    found = []
    for scale, offset in ((1.0, 0.0), (1.0, 4096.0), (2.0**-60, 0.0), (2.0**60, 0.0)):
        references = ReferenceSet.build(FeatureExtractor(nn.Identity()), (x * scale + offset, y))
        head = train_heads(KNN(references, 5)).heads["(output)"]
        logits = head(x[:20] * scale + offset)
        found.append(logits - logits.mean(1, keepdim=True))
    for logits in found[1:]:
        assert torch.allclose(logits, found[0], atol=0.05)


def test_features_that_are_all_alike_and_classes_of_one_reference() -> None:
    y = torch.cat([torch.arange(30) % 3, torch.tensor([3])])
    x = torch.zeros(31, 4)
    same = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (x, y)), 5)
    assert bool(torch.isfinite(train_heads(same).heads["(output)"].weight).all())
    x = torch.rand(31, 4, generator=torch.Generator().manual_seed(0)) + y[:, None]
    classifier = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (x, y)), 5)
    result = PGD(AdvKNN(), steps=5)(classifier, x[:6], y[:6], ThreatModel("l2", 3.0, bounds=None))
    assert bool(result.success.any())


# ------------------------------------------------------------------------------------------ the loss


def head_logits(config: AdvKNN, classifier: DkNN, x: Tensor) -> list[Array]:
    heads = train_heads(classifier, training=config.training).heads
    with torch.no_grad():
        features = classifier.references_.extractor()(x)
    found = []
    for voter in classifier.voters:
        head, z = heads[voter.layer], features[voter.layer].numpy()
        z = z / np.linalg.norm(z, axis=1, keepdims=True) if head.unit else z
        found.append((z - head.center.numpy()) @ head.weight.double().numpy().T + head.bias.double().numpy())
    return found


def clean_votes(classifier: DkNN, x: Tensor) -> list[Array]:
    found = []
    for distances, ids in classifier.kneighbors(x).values():
        assert distances.shape == ids.shape
        labels = classifier.references_.labels[ids].numpy()
        found.append(np.stack([(labels == c).mean(1) for c in range(4)], 1))
    return found


def losses(config: AdvKNN, classifier: DkNN, x0: Tensor, x: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    bound = config.bind(classifier)
    return bound.start(x0, y, target, classifier.look(x0, bound.requests)).loss(x)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("consistency", [True, False])
@pytest.mark.parametrize("targeted", [True, False])
def test_the_published_loss_is_the_sum_over_layers(metric: str, consistency: bool, targeted: bool) -> None:
    classifier, x0, y = random_classifier(metric=metric)
    config = AdvKNN.published(consistency=consistency, weight=0.4)
    x, target = x0 + 0.05, (y + 1) % 4
    want = np.zeros(12)
    for logits, votes in zip(head_logits(config, classifier, x), clean_votes(classifier, x0), strict=True):
        if targeted:
            want -= loss_by_hand(logits, np.eye(4)[target], 0.4, consistency)
        else:
            want += loss_by_hand(logits, votes, 0.4, consistency)
    got = losses(config, classifier, x0, x, y, target if targeted else None)
    assert np.allclose(got.detach().numpy(), want, rtol=1e-6)


@pytest.mark.parametrize("targeted", [True, False])
def test_the_margin_equals_its_formula(targeted: bool) -> None:
    classifier, x0, y = random_classifier(metric="cosine")
    config = AdvKNN(temperature=0.7, floor=0.02)
    x, target = x0 + 0.05, (y + 1) % 4
    spreads = [h.spread for h in train_heads(classifier, training=config.training).heads.values()]
    scaled = sum(f / s for f, s in zip(head_logits(config, classifier, x), spreads, strict=True)) / 2
    votes = sum(clean_votes(classifier, x0)) / 2
    want = []
    for i, own in enumerate(target.tolist() if targeted else y.tolist()):
        others = sum((votes[i, c] + 0.02) * np.exp(scaled[i, c] / 0.7) for c in range(4) if c != own)
        lead = 0.7 * np.log(others) - scaled[i, own]
        want.append(-lead if targeted else lead)
    got = losses(config, classifier, x0, x, y, target if targeted else None)
    assert np.allclose(got.detach().numpy(), want, rtol=1e-6)


@pytest.mark.parametrize("config", [AdvKNN(), AdvKNN.published(), AdvKNN.published(consistency=False)], ids=str)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_gradients_by_finite_differences(config: AdvKNN, metric: str) -> None:
    classifier, x0, y = random_classifier(metric=metric)
    bound = config.bind(classifier)
    batch = bound.start(x0, y, None, classifier.look(x0, bound.requests))
    x = (x0 + 0.05).requires_grad_(True)
    assert torch.autograd.gradcheck(batch.loss, (x,), eps=1e-6, atol=1e-6)


def test_looking_anew_changes_the_margin_and_not_the_published_loss() -> None:
    classifier, x0, y = random_classifier()
    x, kept = x0.flip(1), torch.tensor([5, 2, 2, 7])
    for config, changes in ((AdvKNN(), True), (AdvKNN.published(), False)):
        bound = config.bind(classifier)
        batch = bound.start(x0, y, None, classifier.look(x0, bound.requests))
        before = batch.loss(x)[kept]
        batch.update(kept, None)
        assert torch.allclose(batch.loss(x[kept]), before)
        batch.update(None, classifier.look(x[kept], bound.requests))
        assert torch.allclose(batch.loss(x[kept]), before) != changes
        fresh = bound.start(x[kept], y[kept], None, classifier.look(x[kept], bound.requests))
        assert torch.allclose(batch.loss(x[kept]), fresh.loss(x[kept])) == changes


def test_the_margin_does_not_saturate_where_the_published_loss_does() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 2
    x = torch.rand(60, 3, generator=generator) + 100.0 * y[:, None]
    classifier = KNN(ReferenceSet.build(FeatureExtractor(nn.Identity()), (x, y)), 3)
    largest = {}
    for name, config in (("published", AdvKNN.published(penalty=0.0)), ("margin", AdvKNN(penalty=0.0))):
        bound = config.bind(classifier)
        z = (x[:8] + torch.tensor(60.0) * (2 * y[:8, None] - 1)).requires_grad_(True)  # deep inside its class
        loss = bound.start(x[:8], y[:8], None, classifier.look(x[:8], bound.requests)).loss(z)
        largest[name] = torch.autograd.grad(loss.sum(), z)[0].abs().amax(1)
    assert float(largest["published"].max()) < 1e-12
    assert float(largest["margin"].min()) > 1e-4


def test_layers_that_do_not_vote_can_be_attacked() -> None:
    classifier, x, y = random_classifier(layers=("1", "3"))
    knn = KNN(classifier.references_, 5, layer="3")
    both = AdvKNN.published(layers=("1", "3"))
    got = losses(both, classifier, x, x + 0.03, y)
    bound: Any = both.bind(knn)
    batch = bound.start(x, y, None, knn.look(x, bound.requests))
    assert torch.allclose(batch.loss(x + 0.03), got)
    assert AdvKNN(layers="3") == AdvKNN(layers=("3",))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------- the attacks


def test_recipes_are_the_papers_settings() -> None:
    fgsm, bim = registry.attacks.create("advknn-fgsm"), registry.attacks.create("advknn-bim")
    assert isinstance(fgsm, FGSM)
    assert isinstance(bim, BIM)
    assert fgsm.objective == bim.objective == AdvKNN.published()
    assert (bim.steps, bim.absolute_step, bim.start, bim.keep, bim.momentum) == (100, 0.01, "clean", "last", 0.0)
    paper = AdvKNN.published()
    assert (paper.loss, paper.weight, paper.consistency, paper.features) == ("published", 0.3, True, "raw")
    assert paper.max_references is None
    plain = registry.attacks.create("advknn-bim", consistency=False, layers=("relu3",), steps=7)
    assert (plain.objective.consistency, plain.objective.layers, plain.steps) == (False, ("relu3",), 7)
    assert registry.attacks.create("advknn") == PGD(AdvKNN())


@pytest.mark.parametrize("name", ["advknn", "advknn-fgsm", "advknn-bim"])
def test_configurations_are_plain_data_and_back(name: str) -> None:
    attack = registry.attacks.create(name, layers=("relu3",))
    assert from_config(to_config(attack, registry.attacks), registry.attacks) == attack


ATTACKS: dict[str, GradientAttack] = {
    "advknn": PGD(AdvKNN(), steps=12, check_every=5, restarts=2),
    "fgsm": FGSM(AdvKNN.published()),
    "bim": BIM(AdvKNN.published(consistency=False), steps=5),
}


@pytest.fixture(scope="module")
def victim() -> tuple[DkNN, KNN, Tensor, Tensor]:
    source, model = digits()
    references = digits_references(source, model)
    x, y = source.test.batch(torch.arange(64)), source.test.labels[:64]
    return DkNN(references, 15, metric="cosine"), KNN(references, 15, layer=LAYERS[-1]), x, y


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("name", ATTACKS)
def test_batch_size_changes_no_bit(victim: tuple[DkNN, KNN, Tensor, Tensor], name: str, size: int) -> None:
    classifier, _, x, y = victim
    whole = ATTACKS[name](classifier, x[:9], y[:9], ThreatModel("linf", 0.1), seed=1)
    parts = ATTACKS[name](classifier, x[:9], y[:9], ThreatModel("linf", 0.1), seed=1, batch_size=size)
    assert torch.equal(parts.x_adv, whole.x_adv)
    assert torch.equal(parts.gradient_passes, whole.gradient_passes)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", ATTACKS)
def test_radius_zero_changes_nothing(victim: tuple[DkNN, KNN, Tensor, Tensor], name: str, norm: str) -> None:
    _, classifier, x, y = victim
    assert torch.equal(ATTACKS[name](classifier, x[:20], y[:20], ThreatModel(norm, 0.0)).x_adv, x[:20])


def test_the_default_is_stronger_than_the_published_form_and_that_than_transfer(
    victim: tuple[DkNN, KNN, Tensor, Tensor],
) -> None:
    _, classifier, x, y = victim
    left = {}
    for name, objective in (("margin", AdvKNN()), ("published", AdvKNN.published()), ("transfer", CrossEntropy())):
        result = PGD(objective, steps=40)(classifier, x, y, ThreatModel("linf", 0.12))
        left[name] = float(result.robust.double().mean())
    assert left["margin"] <= left["published"] <= left["transfer"] + 0.05, left
    assert left["margin"] < 0.75


def test_targets_are_approached(victim: tuple[DkNN, KNN, Tensor, Tensor]) -> None:
    classifier, _, x, y = victim
    for attack in (PGD(AdvKNN(), steps=20), BIM(AdvKNN.published(), steps=20)):
        result = attack(classifier, x, y, ThreatModel("linf", 0.3), targets=(y + 1) % 10)
        assert float(result.success.double().mean()) > 0.5
        assert bool((result.labels == (y + 1) % 10)[result.success].all())


def test_float64_networks_and_two_classes() -> None:
    net = random_net(dtype=torch.float64)
    x = torch.rand(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (x[:, 0] > 0.5).long()
    classifier = KNN(ReferenceSet.build(FeatureExtractor(net, "3"), (x[:30], y[:30])), 3)
    result = PGD(AdvKNN(), steps=10)(classifier, x[30:], y[30:], ThreatModel("linf", 0.5))
    assert result.x_adv.dtype == torch.float64
    assert bool(result.success.any())


# ------------------------------------------------------------------------------------------- on disk


def test_saved_heads_are_the_same_heads(tmp_path: Path) -> None:
    classifier, x, y = random_classifier(metric="cosine")
    config = AdvKNN()
    heads = train_heads(classifier, training=config.training)
    heads.save(tmp_path / "heads")
    loaded = DkNNB.load(tmp_path / "heads", classifier)
    assert loaded.training == heads.training
    for layer, head in heads.heads.items():
        other = loaded.heads[layer]
        assert (other.unit, other.spread, other.votes) == (head.unit, head.spread, head.votes)
        for name in ("weight", "bias", "center"):
            assert torch.equal(getattr(other, name), getattr(head, name))
    saved = AdvKNN(heads=str(tmp_path / "heads"))
    assert torch.equal(losses(saved, classifier, x, x + 0.1, y), losses(config, classifier, x, x + 0.1, y))
    with pytest.raises(InputError, match="exists"):
        heads.save(tmp_path / "heads")
    heads.save(tmp_path / "heads", overwrite=True)


@pytest.mark.usefixtures("clean")
def test_saved_heads_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, _, _ = random_classifier()
    train_heads(classifier).save(tmp_path / "heads")
    module._HEADS.clear()
    monkeypatch.setattr(module, "_train", None)
    AdvKNN(heads=str(tmp_path / "heads")).bind(classifier)


def test_heads_of_another_classifier_are_refused(tmp_path: Path) -> None:
    classifier, _, _ = random_classifier()
    train_heads(classifier).save(tmp_path / "heads")
    references = classifier.references_
    others = {
        "k": DkNN(references, 4),
        "metric": DkNN(references, 5, metric="cosine"),
        "references": random_classifier(seed=1)[0],
        "layers": random_classifier(layers=("1",))[0],
    }
    for what, other in others.items():
        with pytest.raises(IntegrityError, match=r"trained for another classifier.*train_heads"):
            DkNNB.load(tmp_path / "heads", other)
        with pytest.raises(IntegrityError):
            PGD(AdvKNN(heads=str(tmp_path / "heads")))(other, torch.rand(2, 6).double(), torch.zeros(2), ThreatModel())
        assert what
    with pytest.raises(IntegrityError, match="not a directory"):
        DkNNB.load(tmp_path / "nothing", classifier)


def test_heads_trained_otherwise_or_of_too_few_layers_are_refused(tmp_path: Path) -> None:
    classifier, _, _ = random_classifier()
    train_heads(classifier, layers=("3",)).save(tmp_path / "heads")
    path = str(tmp_path / "heads")
    with pytest.raises(InputError, match=r"consistency=True, not False"):
        AdvKNN(heads=path, consistency=False).bind(classifier)
    with pytest.raises(InputError, match="'1' is attacked too"):
        AdvKNN(heads=path).bind(classifier)
    AdvKNN(heads=path, layers=("3",)).bind(classifier)


@pytest.mark.parametrize("name", ["manifest.json", "heads.safetensors"])
def test_no_damaged_copy_is_accepted(name: str, tmp_path: Path) -> None:
    classifier, _, _ = random_classifier()
    train_heads(classifier).save(tmp_path / "heads")
    file = tmp_path / "heads" / name
    whole = file.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 200)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(IntegrityError):
            DkNNB.load(tmp_path / "heads", classifier)
    file.write_bytes(whole[:-1])
    with pytest.raises(IntegrityError):
        DkNNB.load(tmp_path / "heads", classifier)


# ------------------------------------------------------------------------------------------- refusals

BAD: list[tuple[dict[str, Any], str]] = [
    ({"loss": "kl"}, "loss must be one of"),
    ({"features": "unit"}, "features must be one of"),
    ({"weight": 0.0}, "weight must be a number above 0"),
    ({"temperature": float("nan")}, "temperature must be a number above 0"),
    ({"floor": 0.0}, "floor must be a number above 0"),
    ({"penalty": -1.0}, "penalty must be a number of at least 0"),
    ({"max_references": 0}, "at least 1"),
    ({"consistency": 1}, "consistency must be True or False"),
    ({"seed": 0.5}, "whole number"),
    ({"layers": ()}, "layers must be names"),
    ({"layers": (1,)}, "layers must be names"),
    ({"heads": 3}, "heads must be the path"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda v: str(v)[:30])
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AdvKNN(**options)


def test_what_it_cannot_attack_is_refused_in_a_sentence() -> None:
    classifier, x, y = random_classifier()
    with pytest.raises(InputError, match="unknown reference layer"):
        AdvKNN(layers=("9",)).bind(classifier)

    class Black(Classifier):
        n_classes = 2

        def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
            return torch.zeros(len(x), 2)

        def fingerprint(self) -> str:
            return "black"

    with pytest.raises(InputError, match=r"AdvKNN needs .* black-box attack"):
        AdvKNN().bind(Black())

    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    blind = KNN(ReferenceSet.build(FeatureExtractor(Blind()), (x, y)), 3)
    with pytest.raises(InputError, match="no gradient"):
        PGD(AdvKNN())(blind, x, y, ThreatModel())
