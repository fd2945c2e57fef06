"""Networks published by recipe: the command that trains one, its seed, and the sha256 of the weights it gave."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustknn import registry, store
from robustknn.datasets import DataSource
from robustknn.models import checkpoint, load_model
from robustknn.progress import Progress
from robustknn.training import TrainConfig, accuracy, initialise, train

RECIPE = "recipe.json"


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, whatever the data set and the seed.

    Args:
        title: a short name for people and folders.
        model, options: as `robustknn.models.load_model` takes them.
        config: the settings, but for the seed.
        method, method_options: as `robustknn list methods` has them.
        protocol: how the data set is divided.
    """

    title: str
    model: str
    config: TrainConfig
    options: Mapping[str, Any] = field(default_factory=dict)
    method: str = "standard"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    protocol: str = "published"

    def describe(self) -> dict[str, Any]:
        """All that decides the weights beside data, seed and code, as JSON."""
        return asdict(self)

    def key(self, data: str, seed: int) -> str:
        """The name of its folder."""
        digest = store.fingerprint_config({**self.describe(), "title": "", "data": data, "seed": seed})
        return f"{self.title}-{data}-seed{seed}-{digest[:8]}"

    def command(self, data: str, seed: int) -> str:
        """The command that trains the same network."""
        plain, words = TrainConfig(), ["robustknn", "train", "--data", data, "--protocol", self.protocol]
        words += ["--model", self.model]
        for flag, table in (("model", self.options), ("method", self.method_options)):
            if flag == "method":
                words += ["--method", self.method]
            for name, value in table.items():
                shown = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
                words += [f"--{flag}-option", f"{name}={shown}"]
        for name, value in asdict(self.config).items():
            if name == "seed" or value == getattr(plain, name):
                continue
            if name == "milestones":
                words += [w for v in value for w in ("--milestone", str(v))]
            else:
                words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return shlex.join([*words, "--seed", str(seed), "--out", "RUN"])

    def epochs_left(self, home: Path) -> int:
        """How many epochs are still to be trained in a folder."""
        return self.config.epochs - max(checkpoint.epochs(home), default=0)

    def train(
        self, source: DataSource, home: Path, data: str, seed: int, device: torch.device, progress: Progress
    ) -> dict[str, Any]:
        """Train in a folder, or go on after the last whole epoch; what is to be said of the network.

        Raises:
            ResumeError: the folder holds a network of other data or settings.
        """
        network = self.fresh(seed)
        method = registry.methods.create(self.method, **self.method_options)
        config = replace(self.config, seed=seed)
        result = train(network, source, config, home, method=method, device=device, progress=progress)
        assert result.checkpoint is not None
        said = home / RECIPE
        digest = store.sha256_file(result.checkpoint / checkpoint.WEIGHTS)
        if said.exists() and (held := store.read_sealed(said)).get("sha256_weights") == digest:
            return held
        made = {
            "network": self.title,
            "command": self.command(data, seed),
            "seed": seed,
            "sha256_weights": digest,
            "test_accuracy": accuracy(network, source.test),
        }
        store.write_sealed(said, made)
        return made

    def fresh(self, seed: int) -> nn.Module:
        """The network before training."""
        return initialise(lambda: load_model(self.model, None, **self.options), seed)

    def load(self, home: Path) -> nn.Module:
        """The trained network of a folder, in eval mode."""
        return load_model(self.model, home, **self.options).eval()
