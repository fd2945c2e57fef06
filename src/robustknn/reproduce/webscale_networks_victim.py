"""The networks of the tables on the web-scale defense: published weights where there are any, else trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustknn import store
from robustknn.datasets import DataSource
from robustknn.errors import InputError
from robustknn.models import load_model
from robustknn.progress import Progress
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.experiment import Part
from robustknn.reproduce.networks import Recipe
from robustknn.reproduce.published_weights import WEIGHTS, weights_file
from robustknn.training import TrainConfig, accuracy

OTHERWISE = "train a network with --set weights=trained"
DEFENDED, STRANGER = "resnet20", "resnet32"
PAPER_ONLY = (
    "preset 'paper' of {} is ImageNet with ResNet-50 (conv_5_1, 256 components) and databases of 1.3 million to 50 "
    "billion images: that data cannot be had here; use --preset cpu, and `robustknn index` with "
    "robustknn.recipes.web_scale_features for a database of your own."
)
FORWARD, TRAINED = 0.0011, 0.003
"""Seconds on one core of a plain CPU: an image through ResNet-20, and a training image."""
CONFIG = TrainConfig(
    optimizer="sgd",
    lr=0.1,
    weight_decay=5e-4,
    schedule="one-cycle",
    augment=True,
    precision="bf16",
    channels_last=True,
)


@dataclass(frozen=True)
class FirstHalf(Recipe):
    """A network trained on the first half of the training images."""

    def train(
        self, source: DataSource, home: Path, data: str, seed: int, device: torch.device, progress: Progress
    ) -> dict[str, Any]:
        half = replace(source, train=source.train.first(len(source.train) // 2))
        return super().train(half, home, data, seed, device, progress)

    def command(self, data: str, seed: int) -> str:
        return f"robustknn reproduce webscale-table1 --dataset {data} --seed {seed}"


class Networks:
    """The defended network of each scene, "seen" and "unseen", and the "stranger"'s.

    Raises:
        InputError: the preset of the paper, an unknown kind of weights, or published ones that are not there.
        IntegrityError: a file of weights is not the published one.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        if bench.settings.preset == "paper":
            raise InputError(PAPER_ONLY.format(bench.settings.experiment))
        if bench["weights"] not in ("published", "trained"):
            raise InputError(f"weights must be 'published' or 'trained', not {bench['weights']!r}.")
        config = replace(CONFIG, epochs=bench["epochs"])
        self.recipes = {
            "seen": Recipe(DEFENDED, DEFENDED, config),
            "unseen": FirstHalf(f"{DEFENDED}-half", DEFENDED, config),
            "stranger": Recipe(STRANGER, STRANGER, config),
        }
        self._networks: dict[str, nn.Module] = {}
        for who in self._published():
            weights_file(bench.root, self.recipes[who].model)

    def _published(self) -> tuple[str, ...]:
        return ("seen", "stranger") if self.bench["weights"] == "published" else ()

    def networks(self, *scenes: str) -> list[Part]:
        """The parts that train, or check, the networks of these scenes and the stranger's."""
        made = []
        for who in (*scenes, "stranger"):
            recipe = self.recipes[who]
            if who in self._published():
                seconds = len(self.bench.source().test) * FORWARD
                made.append(Part(f"weights {recipe.title}", seconds, partial(self._measured, who)))
            else:
                share = 0.5 if who == "unseen" else 1.6 if who == "stranger" else 1.0
                made.append(self.bench.train(recipe, share * TRAINED * len(self.bench.source().train)))
        return made

    def _measured(self, who: str, _: Path) -> dict[str, Any]:
        file, recipe = weights_file(self.bench.root, self.recipes[who].model, OTHERWISE), self.recipes[who]
        right = accuracy(self.network(who), self.bench.source().test)
        digest = store.sha256_file(file)
        return {"network": recipe.title, "command": file.name, "sha256_weights": digest, "test_accuracy": right}

    def network(self, who: str) -> nn.Module:
        """The network of a scene, or the "stranger"."""
        if who not in self._published():
            return self.bench.network(self.recipes[who])
        if who not in self._networks:
            model = self.recipes[who].model
            found = load_model(model, weights_file(self.bench.root, model, OTHERWISE))
            self._networks[who] = found.eval().to(self.bench.device)
        return self._networks[who]

    def described(self, who: str) -> dict[str, Any]:
        """What decides a network, for `Bench.shared`."""
        if who in self._published():
            return {"weights": WEIGHTS[self.recipes[who].model]}
        return {"recipe": self.recipes[who].describe(), "half": who == "unseen"}
