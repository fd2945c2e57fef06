"""Small victims that several test files share: quick to make, the same in every run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustknn import DkNN, FeatureExtractor, ReferenceSet
from robustknn.datasets import DataSource, load
from robustknn.models import DigitsCNN
from robustknn.training import TrainConfig, initialise, train

LAYERS = ("relu1", "relu2", "relu3")


class Pixels:
    """A labelled set in memory."""

    def __init__(self, data: Tensor, labels: Tensor) -> None:
        self.data, self.labels = data, labels

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, positions: Tensor) -> Tensor:
        return self.data[positions]


def random_net(seed: int = 0, inputs: int = 6, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A smooth two-layer network on vectors, with random weights: layers "0" … "3", 4 classes."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4))
    return net.to(dtype)


def random_classifier(
    k: int = 5, metric: str = "l2", layers: tuple[str, ...] = ("1", "3"), n: int = 80, n_classes: int = 4, seed: int = 0
) -> tuple[DkNN, Tensor, Tensor]:
    """A DkNN in float64 on random vectors, and 12 inputs with labels."""
    generator = torch.Generator().manual_seed(seed)
    net = random_net(seed)
    x = torch.rand(n + 12, 6, generator=generator, dtype=torch.float64)
    y = torch.arange(n + 12) % n_classes
    references = ReferenceSet.build(FeatureExtractor(net, layers), (x[:n], y[:n]), n_classes=n_classes)
    return DkNN(references, k, metric=metric), x[n:], y[n:]


def digits(seed: int = 0, epochs: int = 6) -> tuple[DataSource, DigitsCNN]:
    """scikit-learn's digits (published split) and a network trained on them for a few epochs."""
    source = load("digits", protocol="published")
    model = initialise(DigitsCNN, seed)
    train(model, source, TrainConfig(epochs=epochs, batch_size=64, lr=2e-3, seed=seed))
    assert isinstance(model, DigitsCNN)
    return source, model


def digits_references(source: DataSource, model: DigitsCNN) -> ReferenceSet:
    """References of three layers over all training digits, images kept."""
    return ReferenceSet.build(FeatureExtractor(model, LAYERS), source.train, keep_images=True)
