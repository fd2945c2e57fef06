"""Losses on the network's class scores against loops written out by hand, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small import random_net
from torch import Tensor, nn

from robustknn import KNN, FeatureExtractor, InputError, ReferenceSet, ThreatModel, registry
from robustknn.attacks import APGD, PGD
from robustknn.classifiers import Classifier
from robustknn.config import from_config, to_config
from robustknn.objectives import DLR, ClassScores, CrossEntropy, LogitMargin

LOSSES: tuple[ClassScores, ...] = (CrossEntropy(), LogitMargin(), DLR())


def plain(name: str, scores: list[float], y: int, target: int | None) -> float:
    """The losses as their papers write them, for one sample."""
    order = sorted(scores, reverse=True)
    if name == "cross-entropy":
        own = y if target is None else target
        loss = -float(torch.log_softmax(torch.tensor(scores, dtype=torch.float64), 0)[own])
        return loss if target is None else -loss
    if name == "logit-margin":
        own = y if target is None else target
        best = max(s for c, s in enumerate(scores) if c != own)
        return best - scores[own] if target is None else scores[own] - best
    if target is None:
        best = max(s for c, s in enumerate(scores) if c != y)
        return -(scores[y] - best) / (order[0] - order[2])
    low = order[2] if len(scores) == 3 else (order[2] + order[3]) / 2
    return -(scores[y] - scores[target]) / (order[0] - low)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("classes", [3, 4, 7])
@pytest.mark.parametrize("name", ["cross-entropy", "logit-margin", "dlr"])
def test_losses_equal_their_equations(name: str, classes: int, targeted: bool) -> None:
    scores = torch.randn(40, classes, generator=torch.Generator().manual_seed(classes), dtype=torch.float64)
    y = torch.arange(40) % classes
    target = (y + 1 + torch.arange(40) % (classes - 1)) % classes if targeted else None
    found = registry.objectives.create(name).of_scores(scores, y, target)
    for i in range(40):
        goal = None if target is None else int(target[i])
        assert float(found[i]) == pytest.approx(plain(name, scores[i].tolist(), int(y[i]), goal), abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_gradients_equal_differences(loss: ClassScores) -> None:
    scores = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    y, target = torch.arange(8) % 5, (torch.arange(8) + 2) % 5
    for goal in (None, target):
        assert torch.autograd.gradcheck(lambda s, goal=goal: loss.of_scores(s, y, goal), (scores,))


def test_dlr_feels_neither_scale_nor_offset() -> None:
    scores = torch.randn(20, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y, target = torch.arange(20) % 6, (torch.arange(20) + 1) % 6
    for goal in (None, target):
        assert torch.allclose(DLR().of_scores(scores * 40 + 3, y, goal), DLR().of_scores(scores, y, goal))
        assert not torch.allclose(
            LogitMargin().of_scores(scores * 40, y, goal), LogitMargin().of_scores(scores, y, goal)
        )


def test_equal_scores_give_finite_losses_and_gradients() -> None:
    for loss in LOSSES:
        scores = torch.zeros(3, 4, requires_grad=True)
        for target in (None, torch.tensor([1, 2, 3])):
            value = loss.of_scores(scores, torch.tensor([0, 0, 0]), target)
            (gradient,) = torch.autograd.grad(value.sum(), scores)
            assert bool(torch.isfinite(value).all())
            assert bool(torch.isfinite(gradient).all())


def test_cross_entropy_saturates_where_margins_do_not() -> None:
    scores = torch.tensor([[200.0, 0.0, -30.0, -40.0]], requires_grad=True)
    sizes = {}
    for loss in LOSSES:
        (gradient,) = torch.autograd.grad(loss.of_scores(scores, torch.tensor([0]), None).sum(), scores)
        sizes[loss.called] = float(gradient.abs().max())
    assert sizes["cross-entropy"] == 0.0
    assert sizes["logit-margin"] == 1.0
    assert sizes["dlr"] > 1e-5


def test_the_margin_is_positive_exactly_where_the_network_is_fooled() -> None:
    scores = torch.randn(200, 3, generator=torch.Generator().manual_seed(3))
    y = torch.arange(200) % 3
    assert torch.equal(LogitMargin().of_scores(scores, y, None) > 0, scores.argmax(1) != y)
    assert torch.equal(LogitMargin().of_scores(scores, y, (y + 1) % 3) > 0, scores.argmax(1) == (y + 1) % 3)


class Stubborn(Classifier):
    """A network's face that always decides for class 0, so that no sample stops early."""

    n_classes = 4

    def __init__(self, extractor: FeatureExtractor) -> None:
        self._extractor = extractor

    @property
    def extractor(self) -> FeatureExtractor:
        return self._extractor

    def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        return torch.eye(4, dtype=torch.float64)[torch.zeros(len(x), dtype=torch.int64)]

    def fingerprint(self) -> str:
        return "stubborn"


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("make", [PGD, APGD])
def test_attacks_raise_the_loss_they_climb(make: Callable[..., PGD], loss: ClassScores) -> None:
    classifier = Stubborn(FeatureExtractor(random_net()))
    x, y = torch.rand(16, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.zeros(16).long()
    for target in (None, y + 2):
        result = make(loss, steps=10)(classifier, x, y, ThreatModel("l2", 0.3), targets=target, trace=True)
        before = loss.of_scores(classifier.extractor.logits(x), y, target).detach()
        assert result.trace[0][2] == pytest.approx(float(before.mean()))
        assert result.trace[-1][2] > result.trace[0][2] + 1e-3
        assert not bool(result.success.any())


def flat(classes: int, outputs: int) -> tuple[KNN, Tensor, Tensor]:
    """A 1-NN on a linear network of so many outputs."""
    torch.manual_seed(0)
    x, y = torch.rand(20, 3), torch.arange(20) % classes
    references = ReferenceSet.build(FeatureExtractor(nn.Sequential(nn.Linear(3, outputs)), "0"), (x, y))
    return KNN(references, 1), x, y


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    class Labels(Classifier):
        n_classes = 4

        def scores(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
            return torch.eye(4, dtype=torch.float64)[torch.zeros(len(x), dtype=torch.int64)]

        def fingerprint(self) -> str:
            return "labels"

    threat = ThreatModel("linf", 0.1)
    for loss in LOSSES:
        with pytest.raises(InputError, match=f"the {loss.called} objective needs the network's own output"):
            PGD(loss)(Labels(), torch.rand(2, 3), [0, 0], threat)
        classifier, x, y = flat(3, 5)
        with pytest.raises(InputError, match=f"returns 5 numbers where there are 3 classes.*by {loss.called}"):
            PGD(loss)(classifier, x, y, threat)
    two, x, y = flat(2, 2)
    with pytest.raises(InputError, match="the dlr objective needs 3 classes, and there are 2; use 'logit-margin'"):
        PGD(DLR())(two, x, y, threat)
    assert len(PGD(LogitMargin(), steps=2)(two, x, y, threat).success) == 20
    three, x, y = flat(3, 3)
    assert len(PGD(DLR(), steps=2)(three, x, y, threat, targets=(y + 1) % 3).success) == 20


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-margin"])
def test_recipes_are_transfer_attacks_that_can_be_written_down(name: str) -> None:
    attack = registry.attacks.create(name, steps=7)
    assert attack.transfer
    assert not APGD().transfer
    assert (attack.steps, attack.start) == (7, "random")
    assert from_config(to_config(attack, registry.attacks), registry.attacks) == attack
