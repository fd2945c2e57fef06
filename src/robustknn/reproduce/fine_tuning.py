"""Networks that start from published weights, and networks trained on the first images alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustknn import store
from robustknn.datasets import DataSource
from robustknn.models import load_model
from robustknn.progress import Progress
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.networks import Recipe
from robustknn.reproduce.published_weights import weights_file


@dataclass(frozen=True)
class Published:
    """A network with weights that others trained.

    Args:
        title: a short name for people.
        model: as `robustknn.models.load_model` takes it.
        file: the weights.
    """

    title: str
    model: str
    file: Path

    def describe(self) -> dict[str, Any]:
        """All that decides the network, as JSON: the weights by their content, wherever they lie."""
        return {"model": self.model, "weights": _digest(self.file)}

    def load(self) -> nn.Module:
        """The network, in eval mode."""
        return load_model(self.model, self.file).eval()


@dataclass(frozen=True)
class FineTuned(Recipe):
    """A recipe that does not begin with fresh weights, or does not see every image.

    Args:
        weights: where it begins; None for fresh weights.
        images: how many of the first training images it sees; None for all.
    """

    weights: Published | None = None
    images: int | None = None

    def describe(self) -> dict[str, Any]:
        start = None if self.weights is None else self.weights.describe()
        return {**asdict(replace(self, weights=None)), "weights": start}

    def command(self, data: str, seed: int) -> str:
        words = super().command(data, seed)
        if self.weights is not None:
            words += f" --checkpoint {self.weights.file.name}"
        return words if self.images is None else f"{words} --first {self.images}"

    def fresh(self, seed: int) -> nn.Module:
        return super().fresh(seed) if self.weights is None else self.weights.load()

    def train(
        self, source: DataSource, home: Path, data: str, seed: int, device: torch.device, progress: Progress
    ) -> dict[str, Any]:
        part = source if self.images is None else replace(source, train=source.train.first(self.images))
        return super().train(part, home, data, seed, device, progress)


def published_weights(bench: Bench, title: str, model: str) -> Published:
    """A network with the weights that were published for it.

    Raises:
        InputError: they are not beside the data sets.
        IntegrityError: the file is not the published one.
    """
    return Published(title, model, weights_file(bench.root, model))


def network_of(bench: Bench, made: Recipe | Published) -> nn.Module:
    """The network, on the device, in eval mode; trained first where it is not."""
    return bench.network(made) if isinstance(made, Recipe) else made.load().to(bench.device)


@cache
def _digest(file: Path) -> str:
    return store.sha256_file(file)
