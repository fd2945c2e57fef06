"""What the parts of an experiment share: settings, data, networks, and folders for what several experiments use."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustknn import store
from robustknn.code_version import code_fingerprint
from robustknn.datasets import DataSource, load
from robustknn.evaluation.experiment import pick_device
from robustknn.progress import Progress, Silent
from robustknn.reproduce.blocks import alone
from robustknn.reproduce.experiment import Part
from robustknn.reproduce.networks import Recipe


@dataclass(frozen=True)
class Settings:
    """One run of an experiment: it decides every number, together with the code.

    Attributes:
        options: the preset's, as changed.
        changed: what was changed of them, for the record.
        device: "cpu", "cuda", …
    """

    experiment: str
    data: str
    preset: str
    seed: int
    options: Mapping[str, Any]
    changed: Mapping[str, Any]
    device: str = "cpu"

    def to_config(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@cache
def code() -> str:
    """The version and fingerprint of the library's code, as it was when this process first asked."""
    return code_fingerprint()


def module_digest(name: str) -> str:
    """The sha256 of a module's source."""
    return store.sha256_file(Path(str(sys.modules[name].__file__)))


class Bench:
    """Where an experiment works. Everything is made when it is first asked for.

    Args:
        work: the folder of all experiments' work; networks, and what several experiments use, are below it too.
        root: the folder of the data sets.
    """

    def __init__(
        self,
        settings: Settings,
        work: Path,
        root: Path | str | None = None,
        download: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.settings, self.work, self.root, self.download = settings, work, root, download
        self.progress: Progress = progress or Silent()
        self._networks: dict[str, nn.Module] = {}
        self._sources: dict[tuple[str, str], DataSource] = {}

    def __getitem__(self, option: str) -> Any:
        """An option of the preset."""
        return self.settings.options[option]

    @property
    def seed(self) -> int:
        """Of training and attacks."""
        return self.settings.seed

    @cached_property
    def device(self) -> torch.device:
        """Where networks run."""
        return pick_device(self.settings.device)

    def source(self, protocol: str = "published", **options: Any) -> DataSource:
        """The data set, divided by a protocol; read once."""
        key = (protocol, repr(sorted(options.items())))
        if key not in self._sources:
            name, wanted = self.settings.data, {"download": self.download, "progress": self.progress, **options}
            self._sources[key] = load(name, root=self.root, protocol=protocol, **wanted)
        return self._sources[key]

    # -------------------------------------------------------------------------------------- networks

    def train(self, recipe: Recipe, epoch_seconds: float) -> Part:
        """The part that trains a network, or goes on training; its row says how, and the sha256 of the weights.

        Args:
            epoch_seconds: of one epoch on two cores.
        """
        left = recipe.epochs_left(self._home(recipe))
        return Part(f"train {recipe.title}", left * epoch_seconds, lambda _: self._trained(recipe))

    def network(self, recipe: Recipe) -> nn.Module:
        """A trained network, on the device, in eval mode; trained first where it is not."""
        key = recipe.key(self.settings.data, self.seed)
        if key not in self._networks:
            self._trained(recipe)
            self._networks[key] = recipe.load(self._home(recipe)).to(self.device)
        return self._networks[key]

    def _home(self, recipe: Recipe) -> Path:
        return self.work / "models" / recipe.key(self.settings.data, self.seed)

    def _trained(self, recipe: Recipe) -> dict[str, Any]:
        source, home = self.source(recipe.protocol), self._home(recipe)
        with alone(home):
            return recipe.train(source, home, self.settings.data, self.seed, self.device, self.progress)

    # --------------------------------------------------------------------------------------- folders

    def shared(self, kind: str, home: str, **described: Any) -> Path:
        """A folder for work that several experiments use, named by all that decides it.

        The data set, the seed, the device and the library's code are described without being named; networks must be
        (by `Recipe.describe()`), as must samples, references and attacks.

        Args:
            kind: the folder's name begins with it.
            home: `__name__` of the module that does the work; where that is edited, the work is done anew.
            described: all else that decides, JSON.
        """
        own = {"data": self.settings.data, "seed": self.seed, "device": self.settings.device}
        sources = {"code": code(), "home": module_digest(home)}
        digest = store.fingerprint_config({**described, **own, **sources})
        return self.work / "shared" / f"{kind}-{self.settings.data}-{digest[:16]}"
