"""What the tables on DAEkNN and ASK attack: networks, their DkNN and DAEkNN, and the attack of arXiv 2108.06797.

Its accuracy under attack is that of examples made on the network alone (10 steps of PGD on the cross-entropy from a
random start, the last iterate), so these are made once for each network and scored by every classifier on it. So are
the adversarial references D_adv. An example counts as right by the classifier's decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robustknn import registry, rng
from robustknn.attacks import PGD
from robustknn.classifiers import Classifier, DAEkNN, DkNN, Network
from robustknn.config import to_config
from robustknn.datasets import DataSource, Split
from robustknn.evaluation.metrics import harmonic_mean
from robustknn.features import FeatureExtractor
from robustknn.recipes.attacks import pgd_transfer
from robustknn.reference import ReferenceSet
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.blocks import by_block, left
from robustknn.reproduce.experiment import WORST, Cell, Part
from robustknn.reproduce.fine_tuning import Published, network_of
from robustknn.reproduce.networks import Recipe
from robustknn.reproduce.scenes_victim import Scene, adversarial_recipe, scene_of, standard_recipe, worst_case
from robustknn.reproduce.worst_victim import worst_part
from robustknn.threat import ThreatModel

STANDARD, ADVERSARIAL = "standard", "adversarial"
NO_ATTACK, ATTACKED, BOTH = "SA", "AA", "HM"
"""The paper's columns: accuracy without attack, under it, and their harmonic mean."""
STEPS = 10
# Seconds on two cores: of searching 20,000 references in a layer for one image, of the worst case of one image.
SEARCH, WORST_SECONDS = 0.003, 0.6
EPOCH = 135.0
"""Of adversarial training on 53,000 images of MNIST."""
_MADE, _SCORED = 200, 500


@dataclass(frozen=True)
class Row:
    """A classifier of a table.

    Attributes:
        network: STANDARD or ADVERSARIAL.
        layers: that vote, by their places; None for the network's own head.
        hardening: radius of its adversarial references; None for a DkNN.
        weighting, scale: of a DAEkNN.
    """

    network: str
    layers: tuple[int, ...] | None = None
    hardening: float | None = None
    weighting: str = "paper"
    scale: float | str = 1.0


class Victims:
    """The networks of a data set with everything that stands on them, made when first asked for."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.scene: Scene = scene_of(bench)
        self.recipes: dict[str, Recipe | Published] = {
            STANDARD: standard_recipe(bench, self.scene),
            ADVERSARIAL: adversarial_recipe(bench, self.scene),
        }
        self.n = min(bench["n"] or self.scene.tests, 10_000)
        self.n_references = 10 * int(bench["per_class"])
        self.threat = ThreatModel("linf", self.scene.attacked)
        self._networks: dict[str, nn.Module] = {}
        self._held: dict[Any, ReferenceSet] = {}

    # ----------------------------------------------------------------------------- networks and data

    def network(self, which: str) -> nn.Module:
        """A network, trained."""
        if which not in self._networks:
            self._networks[which] = network_of(self.bench, self.recipes[which])
        return self._networks[which]

    def train(self, which: str) -> list[Part]:
        """The part that trains a network; none where weights are published."""
        recipe, scene = self.recipes[which], self.scene
        if isinstance(recipe, Published):
            return []
        images = getattr(recipe, "images", None) or 50_000
        passes = 1 if which == STANDARD else 1 + STEPS
        return [self.bench.train(recipe, EPOCH * passes / (1 + STEPS) * images / 50_000 * scene.passes / 0.0003)]

    @property
    def source(self) -> DataSource:
        """The data, divided."""
        return self.bench.source(self.scene.protocol)

    @cached_property
    def split(self) -> Split:
        """The test images: all, or a counted random choice in their order."""
        test = self.source.test
        return test.subset(rng.permutation(len(test), 0, "daeknn")[: self.n].sort().values)

    @cached_property
    def reference_images(self) -> Split:
        """The images of the references."""
        return self.source.train.per_class(self.bench["per_class"])

    def layer_names(self, places: Sequence[int]) -> tuple[str, ...]:
        """Layers by their places."""
        return tuple(self.scene.layers[place] for place in places)

    # ------------------------------------------------------------------------------------ the attack

    def attack(self, eps: float) -> PGD:
        """The paper's attack; its step grows with the radius."""
        share = self.scene.step / self.scene.hardened if eps != self.scene.attacked else self.scene.step / eps
        return pgd_transfer(steps=STEPS, absolute_step=eps * share)

    def described(self, which: str, **further: Any) -> dict[str, Any]:
        """For `Bench.shared`."""
        scene = {"protocol": self.scene.protocol, "attack step": self.scene.step}
        return {
            "network": self.recipes[which].describe(),
            "scene": scene,
            "per_class": self.bench["per_class"],
            **further,
        }

    def _attacked(self, which: str, split: Split, eps: float, folder: Path, what: str) -> Tensor:
        victim = Network(self.network(which), self.source.n_classes)

        def make(rows: Tensor) -> Mapping[str, Tensor]:
            x, y, threat = split.batch(rows), split.labels[rows], self.threat.with_eps(eps)
            found = self.attack(eps)(victim, x, y, threat, sample_ids=split.ids[rows], seed=self.bench.seed)
            return {"x": found.x_adv}

        return by_block(folder, len(split), _MADE, make, self.bench.progress, what)["x"]

    def examples_folder(self, which: str) -> Path:
        """Where the attacked test images are kept."""
        return self.bench.shared("examples", __name__, **self.described(which, n=self.n, eps=self.scene.attacked))

    def examples(self, which: str) -> Tensor:
        """The attacked test images (n, …)."""
        folder = self.examples_folder(which)
        return self._attacked(which, self.split, self.scene.attacked, folder, f"attacking the {which} network")

    def hardened_folder(self, which: str, eps: float) -> Path:
        """Where the images of adversarial references are kept."""
        return self.bench.shared("hardened", __name__, **self.described(which, eps=eps))

    def hardened(self, which: str, eps: float) -> Tensor:
        """The images of the adversarial references D_adv (n, …)."""
        folder = self.hardened_folder(which, eps)
        return self._attacked(which, self.reference_images, eps, folder, f"references at {255 * eps:g}/255")

    def make(self, which: str) -> Part:
        """The part that attacks the test images."""
        seconds = self.n * STEPS * self.scene.passes * left(self.examples_folder(which), self.n, _MADE)
        return Part(f"attack the {which} network", seconds, lambda _: {"made": len(self.examples(which))})

    def harden(self, which: str, eps: float) -> Part:
        """The part that makes adversarial references."""
        n = self.n_references
        seconds = n * STEPS * self.scene.passes * left(self.hardened_folder(which, eps), n, _MADE)
        key = f"harden the {which} network's references at {255 * eps:g}/255"
        return Part(key, seconds, lambda _: {"made": len(self.hardened(which, eps))})

    # ------------------------------------------------------------------------------------ classifiers

    def references(self, which: str, layers: tuple[str, ...], eps: float | None = None) -> ReferenceSet:
        """Clean references, or adversarial ones."""
        key = (which, layers, eps)
        if key not in self._held:
            features, images = FeatureExtractor(self.network(which), layers), self.reference_images
            data: Any = images if eps is None else (self.hardened(which, eps), images.labels)
            made = ReferenceSet.build(features, data, n_classes=self.source.n_classes, progress=self.bench.progress)
            if any(held[:2] != key[:2] for held in self._held):
                self._held = {}  # another classifier's: the first layer's take a gigabyte
            self._held[key] = made
        return self._held[key]

    def classifier(self, row: Row) -> Classifier:
        """The classifier of a row."""
        if row.layers is None:
            return Network(self.network(row.network), self.source.n_classes)
        layers = self.layer_names(row.layers)
        clean, k = self.references(row.network, layers), self.bench["k"]
        if row.hardening is None:
            return DkNN(clean, k)
        hardened = self.references(row.network, layers, row.hardening)
        return DAEkNN(clean, hardened, k, weighting=row.weighting, scale=row.scale)

    # ------------------------------------------------------------------------------------ the scores

    def scores_folder(self, row: Row) -> Path:
        """Where decisions are kept."""
        return self.bench.shared("scores", __name__, **self._of(row), n=self.n, eps=self.scene.attacked)

    def _of(self, row: Row) -> dict[str, Any]:
        layers = None if row.layers is None else self.layer_names(row.layers)
        return self.described(row.network, row={**asdict(row), "layers": layers}, k=self.bench["k"])

    def score(self, name: str, row: Row) -> Part:
        """The part that scores a classifier on the test images, clean and attacked."""

        def run(_: Path) -> dict[str, int]:
            x, split, classifier = self.examples(row.network), self.split, self.classifier(row)

            def measure(rows: Tensor) -> Mapping[str, Tensor]:
                clean, attacked = (classifier.labels(classifier.place(v)) for v in (split.batch(rows), x[rows]))
                return {"label": split.labels[rows], "clean": clean, "attacked": attacked}

            folder, what = self.scores_folder(row), f"scoring {name}"
            found = by_block(folder, len(split), _SCORED, measure, self.bench.progress, what)
            right = {key: int((found[key] == found["label"]).sum()) for key in ("clean", "attacked")}
            return {"n": len(split), **right}

        searches = len(row.layers or ()) * (1 if row.hardening is None else 2) * self.n_references / 20_000
        each = 2 * (SEARCH * searches + self.scene.passes)
        return Part(f"score {name}", self.n * each * left(self.scores_folder(row), self.n, _SCORED), run)

    @property
    def worst_seconds(self) -> float:
        """Of the worst case of one image."""
        return WORST_SECONDS if self.scene.passes < 0.001 else 100 * self.scene.passes

    def worst(self, name: str, row: Row) -> Part:
        """The part that attacks a classifier as it decides: the worst case, sample by sample."""
        n = min(self.bench["worst_n"], self.n)
        attack = worst_case(self.bench, self.scene)
        wanted = {"attack": to_config(attack, registry.attacks), "worst_n": n, "n": self.n, "eps": self.scene.attacked}
        return worst_part(
            self.bench,
            name,
            lambda: self.classifier(row),
            lambda: self.split,
            self.threat,
            attack,
            n,
            self.bench.shared("worst-case", __name__, **self._of(row), **wanted),
            # What is not hardened falls to the first attack, and few attacks suit a network's own head.
            self.worst_seconds * (0.1 if row.network == STANDARD else 0.3 if row.layers is None else 1),
        )

    # --------------------------------------------------------------------------------------- a table

    def parts(self, rows: Mapping[str, Row], worst: Sequence[str] = ()) -> list[Part]:
        """All that rows need, each piece once, and then they themselves.

        Args:
            worst: rows that have a worst case too.
        """
        networks = [which for which in (STANDARD, ADVERSARIAL) if any(r.network == which for r in rows.values())]
        hardened = dict.fromkeys((r.network, r.hardening) for r in rows.values() if r.hardening is not None)
        made = [part for which in networks for part in self.train(which)]
        made += [self.make(which) for which in networks]
        made += [self.harden(which, eps) for which, eps in hardened if eps is not None]
        for name, row in rows.items():
            made.append(self.score(name, row))
            made += [self.worst(name, row)] if name in worst else []
        return made


def cells_of(rows: Sequence[str], found: Mapping[str, Any]) -> list[Cell]:
    """The numbers of rows: SA, AA, their harmonic mean, and the worst case where it was measured."""
    made = []
    for name in rows:
        score, worst = found[f"score {name}"], found.get(f"worst case, {name}")
        n = score["n"]
        made += [Cell.share(name, NO_ATTACK, score["clean"], n), Cell.share(name, ATTACKED, score["attacked"], n)]
        made.append(Cell(name, BOTH, 100 * harmonic_mean(score["clean"] / n, score["attacked"] / n), n))
        if worst is not None:
            made.append(Cell.share(name, WORST, worst["right"], worst["n"], WORST))
    return made
