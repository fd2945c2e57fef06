"""The pinned victim: what one run of the default attack must reach, over five training seeds.

digits / 16, 1,297 training images as references, 500 test images; three 3×3 convolutions and a linear layer, Adam
2e-3, batch 64, 25 epochs; hard 15-NN on the last convolution, plain L2; L∞ eps .15, 40 steps.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from robustknn import KNN, FeatureExtractor, ReferenceSet, ThreatModel, registry
from robustknn.datasets import load
from robustknn.models import DigitsCNN
from robustknn.training import TrainConfig, initialise, train

SEEDS = range(5)


@pytest.fixture(scope="module")
def victims() -> tuple[list[KNN], Tensor, Tensor]:
    source = load("digits", protocol="published")
    classifiers = []
    for seed in SEEDS:
        model = initialise(DigitsCNN, seed)
        train(model, source, TrainConfig(epochs=25, batch_size=64, lr=2e-3, seed=seed))
        classifiers.append(KNN(ReferenceSet.build(FeatureExtractor(model, "relu3"), source.train), 15))
    return classifiers, source.test.batch(torch.arange(500)), source.test.labels


Victims = tuple[list[KNN], Tensor, Tensor]


def left(victims: Victims, name: str, **options: Any) -> list[float]:
    """The accuracy that an attack leaves, for every training seed."""
    classifiers, x, y = victims
    attack = registry.attacks.create(name, **options)
    threat = ThreatModel("linf", 0.15)
    found = [
        float(attack(c, x, y, threat, seed=s).robust.double().mean()) for s, c in zip(SEEDS, classifiers, strict=True)
    ]
    # shown by pytest -rP
    print(f"{name:14}", *(f"{value:.3f}" for value in found), f"mean {sum(found) / len(found):.3f}")
    return found


@pytest.fixture(scope="module")
def accuracies(victims: Victims) -> dict[str, list[float]]:
    classifiers, x, y = victims
    found = {"clean": [c.score(x, y) for c in classifiers]}
    return found | {name: left(victims, name, steps=40) for name in ("ask", "ask-published", "pgd-transfer")}


def test_the_victim_is_the_one_described() -> None:
    source = load("digits", protocol="published")
    assert (len(source.train), len(source.test), source.train.shape) == (1297, 500, (1, 8, 8))
    model = DigitsCNN()
    assert FeatureExtractor(model, "relu3")(torch.zeros(1, 1, 8, 8))["relu3"].shape == (1, 256)


def test_one_run_of_the_default_attack_is_strong(accuracies: dict[str, list[float]]) -> None:
    assert min(accuracies["clean"]) > 0.96
    assert sum(accuracies["ask"]) / 5 <= 0.31


def test_it_beats_transfer_and_the_published_setting_on_every_seed(accuracies: dict[str, list[float]]) -> None:
    for ask, transfer, published in zip(
        accuracies["ask"], accuracies["pgd-transfer"], accuracies["ask-published"], strict=True
    ):
        assert ask < transfer < published


def test_the_published_setting_reports_false_robustness(accuracies: dict[str, list[float]]) -> None:
    assert sum(accuracies["ask-published"]) / 5 == pytest.approx(0.85, abs=0.05)
    assert sum(accuracies["pgd-transfer"]) / 5 == pytest.approx(0.45, abs=0.06)


def test_the_worst_case_is_what_one_run_is_not(victims: Victims, accuracies: dict[str, list[float]]) -> None:
    fast = left(victims, "worst-case-fast")
    assert all(w <= a for w, a in zip(fast, accuracies["ask"], strict=True))
    assert sum(fast) / 5 <= 0.25


@pytest.mark.slow
def test_the_stronger_worst_cases(victims: Victims) -> None:
    standard, thorough = left(victims, "worst-case"), left(victims, "worst-case-thorough")
    assert sum(standard) / 5 <= 0.25
    assert sum(thorough) / 5 <= 0.23
