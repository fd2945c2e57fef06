"""What the tables on the web-scale nearest-neighbor defense attack: networks, databases, examples.

arXiv 1903.01612 in small. "seen": the published ResNet-20 and its 50,000 training images as database, as ImageNet's
were the paper's IN-1.3M. "unseen": a ResNet-20 trained on the first half of the training images; databases are taken
from the other half, smallest to all ("targeted": images of the right classes), and all with as many images of no
class among them. The stranger, a ResNet-32, makes the black-box examples. Perturbations are measured by their share
of each image's own L2 norm, the normalized L2 dissimilarity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from robustknn import registry, rng
from robustknn.attacks import FGSM, Attack
from robustknn.classifiers import Classifier, Network, RetrievalClassifier
from robustknn.config import to_config
from robustknn.datasets import Split, load
from robustknn.evaluation.metrics import normalized_l2
from robustknn.features import FeatureExtractor
from robustknn.objectives import CrossEntropy
from robustknn.recipes import web_scale_features
from robustknn.recipes.attacks import pgd_transfer
from robustknn.recipes.worst_case import WorstCase
from robustknn.reference import ReferenceSet
from robustknn.reproduce.bench import Bench, module_digest
from robustknn.reproduce.blocks import by_block, left
from robustknn.reproduce.experiment import Part, Presets
from robustknn.reproduce.paired import packed
from robustknn.reproduce.webscale_networks_victim import Networks
from robustknn.threat import ThreatModel

SCENES = ("seen", "unseen")
COMMON: dict[str, Any] = {
    "weights": "published",
    "epochs": 20,
    "n": None,
    "worst_n": 1000,
    "references": None,
    "share": 0.005,
    "shares": [0.0025, 0.01, 0.02, 0.04, 0.06],
    "steps": 20,
    "k": 50,
    "components": 64,
    "layer": "conv_4_3",
    "sizes": [1000, 5000],
    "strength": "fast",
}
"""Options that the tables share. `n` test images (None: all) meet FGSM at `share`; `worst_n` of these the other shares,
PGD and the worst case. `weights` is "published" or "trained"; `references` cuts the databases (None: all)."""
PRESETS: Presets = {"cpu": COMMON, "paper": {**COMMON, "share": 0.06, "components": 256, "layer": "conv_5_1"}}
# Seconds on one core of a plain CPU: an image through ResNet-20, its gradient, one worst case.
GRADIENT, WORST_CASE = 0.003, 0.11
_BLOCK, _WORST_BLOCK = 250, 50


@dataclass(frozen=True)
class Examples:
    """Which images: clean ones, or the examples of an attack on a network.

    Attributes:
        who: "" for the images, else the attacker: "black" (on the stranger's network), "gray" (on the defended one).
        kind: "FGSM", by signs, or "PGD" in L2.
        share: the radius, as a share of each image's L2 norm.
        few: the fewer images of the worst case alone.
    """

    who: str = ""
    kind: str = ""
    share: float = 0.0
    few: bool = False

    @property
    def name(self) -> str:
        """As columns are named."""
        return f"{self.who} {self.kind}" if self.who else "clean"

    @property
    def key(self) -> str:
        """As parts and rows name it."""
        return f"{self.name} {self.share:g}" if self.who else "clean"


@dataclass(frozen=True)
class Database:
    """Which references: of a scene, the first `size` (None: all), with as many of no class or not; which features."""

    scene: str
    size: int | None = None
    mixed: bool = False
    layer: str | None = None
    recipe: str = "average"

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class OffClass(Dataset[tuple[Tensor, int]]):
    """Images of none of CIFAR's classes: clothes, gray, with a black rim, (3, 32, 32)."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        image, _ = self.split[place]
        return nn.functional.pad(image, (2, 2, 2, 2)).expand(3, -1, -1), 0


class Victim(Networks):
    """Networks, images and databases, made when first asked for."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self._references: dict[Database, ReferenceSet] = {}

    # ----------------------------------------------------------------------------------------- images

    @cached_property
    def split(self) -> Split:
        """The test images: all, or a counted random choice in their order."""
        test = self.bench.source().test
        return test.subset(rng.permutation(len(test), self.bench.seed, "retrieval")[: self.bench["n"]].sort().values)

    @cached_property
    def few(self) -> Tensor:
        """Which of them meet the worst case, (m,) places."""
        order = rng.permutation(len(self.split), self.bench.seed, "worst case")
        return order[: self.bench["worst_n"]].sort().values

    def rows(self, which: Examples) -> Tensor:
        """The places of the images in `split`."""
        return self.few if which.few else torch.arange(len(self.split))

    def radii(self, rows: Tensor, share: float) -> Tensor:
        """A share of each image's L2 norm, (n,)."""
        norms: Tensor = self.split.batch(rows).flatten(1).norm(dim=1)
        return share * norms

    def ball(self, rows: Tensor, share: float) -> ThreatModel:
        """L2, of that radius."""
        return ThreatModel("l2", self.radii(rows, share))

    def attacks(self, *, curves: Sequence[str] = ("FGSM",)) -> list[Examples]:
        """What the tables are measured on, at the main share; the kinds in `curves` at the others too."""
        main, found = self.bench["share"], [Examples()]
        for who in ("black", "gray"):
            found += [Examples(who, "FGSM", main), Examples(who, "PGD", main, few=True)]
            found += [Examples(who, kind, s, few=True) for kind in curves for s in self.bench["shares"] if s != main]
        return found

    def _maker(self, which: Examples) -> Attack:
        if which.kind == "FGSM":
            return FGSM(CrossEntropy())
        # Its last iterate: the first that fools the network transfers less.
        return pgd_transfer(steps=self.bench["steps"])

    def _home(self, scene: str, which: Examples) -> Path:
        who = "stranger" if which.who == "black" else scene
        said = {"made": which.kind, "share": which.share, "few": which.few and self.bench["worst_n"]}
        steps = self.bench["steps"] if which.kind == "PGD" else 1
        return self.bench.shared(
            "examples", __name__, **said, network=self.described(who), n=self.bench["n"], steps=steps
        )

    def examples(self, scene: str, which: Examples) -> Tensor:
        """The images, (n, 3, 32, 32), attacked."""
        places, split = self.rows(which), self.split
        if not which.who:
            return split.batch(places)
        model = Network(self.network("stranger" if which.who == "black" else scene), self.bench.source().n_classes)

        def make(rows: Tensor) -> Mapping[str, Tensor]:
            at = places[rows]
            x, y, radii = split.batch(at), split.labels[at], self.radii(at, which.share)
            # By signs every value moves alike, so this radius is that share of the norm, but for the bounds.
            signs = ThreatModel("linf", radii / x[0].numel() ** 0.5)
            threat = signs if which.kind == "FGSM" else ThreatModel("l2", radii)
            found = self._maker(which)(model, x, y, threat, sample_ids=split.ids[at], seed=self.bench.seed)
            return {"x": found.x_adv}

        home, what = self._home(scene, which), f"{which.key}, {scene}"
        return by_block(home, len(places), _BLOCK, make, self.bench.progress, what)["x"]

    def make(self, *scenes: str, curves: Sequence[str] = ("FGSM",)) -> list[Part]:
        """The parts that make the examples of these scenes; their rows say how far they moved, on average."""
        made: dict[str, Part] = {}
        for scene in scenes:
            for which in self.attacks(curves=curves)[1:]:
                who = "" if which.who == "black" else f", {scene}"
                n = len(self.rows(which))
                seconds = n * GRADIENT * (self.bench["steps"] if which.kind == "PGD" else 1)
                seconds *= left(self._home(scene, which), n, _BLOCK)

                def run(_: Path, scene: str = scene, which: Examples = which) -> float:
                    clean = self.split.batch(self.rows(which))
                    return float(normalized_l2(clean, self.examples(scene, which)).mean())

                key = f"make {which.key}{who}"
                made.setdefault(key, Part(key, seconds, run))
        return list(made.values())

    # -------------------------------------------------------------------------------------- databases

    def images(self, scene: str) -> Split:
        """The largest database of a scene; its labels are not looked at."""
        train = self.bench.source().train
        whole = train if scene == "seen" else train.subset(torch.arange(len(train) // 2, len(train)))
        return whole if self.bench["references"] is None else whole.first(self.bench["references"])

    @cached_property
    def clothes(self) -> Split:
        """Images of none of the classes: Fashion-MNIST's.

        Raises:
            InputError: they are not there.
        """
        return load("fashion-mnist", root=self.bench.root, protocol="published", download=self.bench.download).train

    def references(self, base: Database) -> ReferenceSet:
        """A database without labels; its features are fitted on the whole database of the scene."""
        if base not in self._references:
            whole = self.images(base.scene)
            part: Any = whole if base.size is None else whole.first(base.size)
            if base.mixed:
                part = ConcatDataset([part, OffClass(self.clothes.first(len(whole)))])
            self._references[base] = ReferenceSet.build(
                self.features(base), part, payload="softmax", labels="payload", progress=self.bench.progress
            )
        return self._references[base]

    def features(self, base: Database) -> FeatureExtractor:
        """The paper's features of a layer, as many components as there are at most."""
        model, layer = self.network(base.scene), base.layer or self.bench["layer"]
        whole = self.images(base.scene)
        plain = web_scale_features(model, layer, whole, recipe="average")
        width = next(iter(plain(plain.place(whole.batch(torch.arange(1)))).values())).shape[1]
        count = min(self.bench["components"], width, len(whole))
        return web_scale_features(model, layer, whole, n_components=count, recipe=base.recipe)

    def embedding(self) -> dict[str, Any]:
        """The options that decide features, for `Bench.shared`."""
        return {name: self.bench[name] for name in ("components", "layer")}

    def retrieval(self, base: Database, weighting: str, k: int | None = None) -> RetrievalClassifier:
        """The defense."""
        return RetrievalClassifier(self.references(base), k or self.bench["k"], weighting=weighting)

    # ----------------------------------------------------------------------------------------- scores

    def scored(
        self,
        key: str,
        scene: str,
        seconds: float,
        make: Callable[[], Decide],
        *,
        curves: Sequence[str] = ("FGSM",),
        **described: Any,
    ) -> Part:
        """A part that decides on all images and examples of a scene, by a function from `make`.

        Its row has, by `Examples.key` and then by classifier, which are right (packed), and how many there are.

        Args:
            seconds: an image.
            described: all that decides beside the network, the images and the attacks.
        """
        wanted = self.attacks(curves=curves)

        def home(which: Examples) -> Path:
            said = {"scored": key, "network": self.described(scene), "examples": self._home(scene, which).name}
            said["by"] = module_digest(getattr(make, "__module__", None) or __name__)
            said |= {name: self.bench[name] for name in ("k", "references")}
            return self.bench.shared("scores", __name__, **said, **described, **self.embedding())

        def run(_: Path) -> dict[str, Any]:
            held: list[Decide] = []
            row: dict[str, Any] = {}
            for which in wanted:
                x, places = self.examples(scene, which), self.rows(which)

                def measure(rows: Tensor, x: Tensor = x, places: Tensor = places) -> Mapping[str, Tensor]:
                    if not held:
                        held.append(make())
                    at = places[rows]
                    found = held[0](x[rows], self.split.ids[at])
                    return {name: labels.cpu() == self.split.labels[at] for name, labels in found.items()}

                found = by_block(home(which), len(places), _BLOCK, measure, self.bench.progress, f"{key}: {which.key}")
                right = {name: packed(value.numpy()) for name, value in found.items()}
                row[which.key] = {"n": len(places), "right": right}
            return row

        todo = sum(len(self.rows(w)) * left(home(w), len(self.rows(w)), _BLOCK) for w in wanted)
        return Part(key, todo * seconds, run)

    def shares_of(self, databases: Mapping[str, Database], variants: Mapping[str, tuple[str, int]]) -> Decide:
        """What decides by databases of one scene and layer: one forward pass, one search of each database.

        Args:
            databases: by the name that follows a variant's.
            variants: (weighting, k) by name.
        """
        made = {
            name: {variant: self.retrieval(base, *how) for variant, how in variants.items()}
            for name, base in databases.items()
        }
        most = max(k for _, k in variants.values())

        def decide(x: Tensor, ids: Tensor) -> dict[str, Tensor]:
            found, features = {}, None
            for name, own in made.items():
                voter = next(iter(own.values())).voters[0]
                if features is None:
                    classifier = next(iter(own.values()))
                    features = classifier.read(classifier.place(x), [voter.layer])[voter.layer]
                near = voter.index.search(features, most)
                for variant, one in own.items():
                    votes = [v.votes(near.first(v.n_neighbors)) for v in one.voters]
                    found[f"{variant}, {name}" if name else variant] = one.decide(one.combine(votes))
            return found

        return torch.no_grad()(decide)

    # --------------------------------------------------------------------------------- the worst case

    def worst(
        self, name: str, scene: str, make: Callable[[], Classifier], seconds: float = WORST_CASE, **described: Any
    ) -> Part:
        """A part that attacks a classifier as it decides; its row says who stays right (packed).

        Args:
            seconds: an image.
            described: all that decides beside the network, the images and the attack.
        """
        n, share, attack = len(self.few), self.bench["share"], WorstCase(self.bench["strength"])
        said = {"scene": scene, "network": self.described(scene), "share": share, "n": self.bench["n"], "worst_n": n}
        attacked = {"attack": to_config(attack, registry.attacks), "references": self.bench["references"]}
        folder = self.bench.shared("worst-case", __name__, **said, **attacked, **described)
        made: list[Classifier] = []

        def measure(rows: Tensor) -> Mapping[str, Tensor]:
            if not made:
                made.append(make())
            at = self.few[rows]
            x, y, ids = self.split.batch(at), self.split.labels[at], self.split.ids[at]
            found = attack(made[0], x, y, self.ball(at, share), sample_ids=ids, seed=self.bench.seed)
            return {"robust": found.robust, "moved": torch.from_numpy(normalized_l2(x, found.x_adv))}

        def run(_: Path) -> dict[str, Any]:
            found = by_block(folder, n, _WORST_BLOCK, measure, self.bench.progress, f"worst case, {name}")
            return {"n": n, "right": packed(found["robust"].numpy()), "moved": float(found["moved"].max())}

        return Part(f"worst case, {name}", n * seconds * left(folder, n, _WORST_BLOCK), run)


Decide = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""Images and their ids → decisions (n,) by classifier."""
