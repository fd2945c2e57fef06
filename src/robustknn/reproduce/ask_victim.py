"""The attacks that ASK (arXiv 2106.14300) is compared with, as its authors ran them and at full strength.

The authors' toolkit (github.com/tqch/advkit) has: PGD on the network; AdvKNN as 10 steps of PGD on the divergence from
the clean votes; and an attack called DkNN-Atk, Sitawarin & Wagner's first without its repelling half, with a sigmoid
that is all but linear (α = 0.3), 15 guides and 30 steps of Adam. ASK itself has 20 steps at T = 0.01. Sitawarin &
Wagner's second attack, which the toolkit has not, is given the same 30 steps here, at its released loss.
At full strength every objective has 100 steps, the best iterate by the hard decision is kept, and neighbors are looked
up anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from robustknn import rng
from robustknn.attacks import PGD, Attack, TanhBox
from robustknn.classifiers import DkNN
from robustknn.objectives import ASK, CrossEntropy, NeighborHinge, SoftCount, train_heads
from robustknn.objectives.advknn import AdvKNN
from robustknn.recipes.attacks import ask_published, pgd_transfer
from robustknn.recipes.sitawarin_wagner import sw2_pgd
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.blocks import alone, by_block, left
from robustknn.reproduce.daeknn_victim import ADVERSARIAL, Victims
from robustknn.reproduce.experiment import Part
from robustknn.reproduce.worst_victim import flags_of

NETWORK, ADV, SW1, SW2, OURS = "PGD on the network", "AdvKNN", "Sitawarin & Wagner 1", "Sitawarin & Wagner 2", "ASK"
COMPARED = {NETWORK: 20, ADV: 10, SW1: 30, SW2: 30, OURS: 20}
"""The steps of each as the authors compared them."""
FULL = 100
"""The steps of each at full strength."""
_BLOCK, _HEAD = 100, 0.0005
_CONSTANT: dict[str, Any] = {
    "step": 0.25,
    "schedule": "constant",
    "momentum": 0.0,
    "start": "random",
    "keep": "last",
    "refresh": False,
}
DIVERGENCE = AdvKNN.published(weight=1e-6)
"""AdvKNN as compared. The weight of the label's loss must be above zero; the toolkit has the divergence alone."""
PULLED = SoftCount(steepness=0.3, threshold="average", repel=False, n_guides=15)
"""Sitawarin & Wagner's first objective as compared."""
_BOX: dict[str, Any] = {"hard_box": True, "penalty": False, "search_steps": 1, "bisections": 0}


class Attacked(Victims):
    """The DkNN of one group of layers of the adversarially trained network, and the attacks on it."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self._classifiers: dict[Any, DkNN] = {}

    def dknn(self, layers: tuple[int, ...]) -> DkNN:
        """k nearest by cosine at every layer, as the authors evaluate."""
        if layers not in self._classifiers:
            references = self.references(ADVERSARIAL, self.layer_names(layers))
            self._classifiers = {layers: DkNN(references, self.bench["k"], metric="cosine")}
        return self._classifiers[layers]

    def folder(self, kind: str, layers: tuple[int, ...], **further: Any) -> Path:
        """Where work on a DkNN is kept."""
        wanted = self.described(ADVERSARIAL, layers=self.layer_names(layers), k=self.bench["k"], **further)
        return self.bench.shared(kind, __name__, **wanted)

    def heads(self, layers: tuple[int, ...], objective: AdvKNN) -> AdvKNN:
        """AdvKNN with heads that are trained once and kept."""
        folder = self.folder("heads", layers, objective=repr(objective))
        with alone(folder):
            if not folder.exists():
                train_heads(self.dknn(layers), None, objective.training, self.bench.progress).save(folder)
        return replace(objective, heads=str(folder))

    def rival(self, name: str, layers: tuple[int, ...], steps: int, full: bool) -> Attack:
        """An attack by name, as compared or at full strength."""
        made: Mapping[str, Callable[[], Attack]]
        if full:
            made = {
                NETWORK: lambda: PGD(objective=CrossEntropy(), steps=steps),
                ADV: lambda: PGD(objective=self.heads(layers, AdvKNN()), steps=steps),
                SW1: lambda: PGD(objective=SoftCount(), steps=steps),
                SW2: lambda: sw2_pgd(steps=steps),
                OURS: lambda: PGD(objective=ASK(), steps=steps),
            }
            return made[name]()
        once: dict[str, Any] = {**_BOX, "final_lr": 1.0, "steps": steps, "check_every": steps, "peak": 1.0}
        made = {
            NETWORK: lambda: pgd_transfer(steps=steps, step=0.25),
            ADV: lambda: PGD(objective=self.heads(layers, DIVERGENCE), steps=steps, **_CONSTANT),
            SW1: lambda: TanhBox(PULLED, optimizer="adam", lr=0.3, refresh_every=0, noise=0.1, **once),
            SW2: lambda: TanhBox(NeighborHinge.published(), optimizer="rmsprop", lr=0.1, refresh_every=200, **once),
            OURS: lambda: ask_published(metric="cosine", temperature=0.01, steps=steps, step=0.25),
        }
        return made[name]()

    def measure(self, key: str, name: str, layers: tuple[int, ...], eps: float, n: int, steps: int, full: bool) -> Part:
        """The part that counts on how many of n images a DkNN stays right under an attack."""
        where = self.folder("attacked", layers, attack=name, eps=eps, n=n, of=self.n, steps=steps, full=full)

        def run(_: Path) -> dict[str, Any]:
            places = chosen(len(self.split), n)
            split = self.split.subset(places)
            classifier, attack = self.dknn(layers), self.rival(name, layers, steps, full)

            def one(rows: Tensor) -> Mapping[str, Tensor]:
                found = attack(
                    classifier,
                    split.batch(rows),
                    split.labels[rows],
                    self.threat.with_eps(eps),
                    sample_ids=split.ids[rows],
                    seed=self.bench.seed,
                )
                return {"right": found.robust, "clean": found.clean_labels == split.labels[rows]}

            found = by_block(where, n, _BLOCK, one, self.bench.progress, key)
            right, clean = found["right"], int(found["clean"].sum())
            return {
                **{"n": n, "right": int(right.sum()), "clean": clean},
                **{"flags": flags_of(right), "of": len(self.split)},
            }

        looks = steps / (10 if full else steps)
        each = steps * self.scene.passes * (3 if self.scene.passes < 0.001 else 1) + looks * 0.003 * len(layers)
        heads = _HEAD * self.n_references * len(layers) if name == ADV else 0.0
        return Part(key, (n * each + heads) * left(where, n, _BLOCK), run)


def chosen(available: int, n: int) -> Tensor:
    """The places of a counted random choice of n images; a smaller n chooses among those of a larger one."""
    return rng.permutation(available, 0, "ask")[:n].sort().values
