"""The networks of ASK-Def and of the adversarial training beside it, and the kNN on each.

The kNN is that of the authors: k = 5 by cosine in the layer that ASK-Def was trained on, 2,000 references a class.
References keep the labels of their classes (in the released code nine in ten of them are wrong), and nothing is
selected by the test set.

The worst case knows the defense (`WorstCaseASKDef`): beside the suite it has ASK at other layers than the one trained
on, by other metrics, at other temperatures, and over fewer and more neighbors than decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from robustknn import registry, rng
from robustknn.attacks import Attack
from robustknn.classifiers import DkNN
from robustknn.config import to_config
from robustknn.datasets import Split
from robustknn.features import FeatureExtractor
from robustknn.recipes.ask_def import WorstCaseASKDef
from robustknn.recipes.attacks import ask_published, pgd_transfer
from robustknn.reference import ReferenceSet
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.blocks import by_block, left
from robustknn.reproduce.experiment import PUBLISHED, WORST, Cell, Experiment, Part, Presets
from robustknn.reproduce.fine_tuning import FineTuned, Published, network_of, published_weights
from robustknn.reproduce.networks import Recipe
from robustknn.reproduce.scenes_victim import SGD, TUNED, refuse_without_cuda, with_epochs
from robustknn.reproduce.worst_victim import flags_of, worst_part
from robustknn.threat import ThreatModel
from robustknn.training import TrainConfig

PLAIN, ADVERSARIAL, DEFENSE = "standard", "adversarial", "ASK-Def"
LONGER = "adversarial, as many gradient passes as ASK-Def"
HALF = ", cross-entropy at half the radius"
CLEAN, TRANSFER, ATTACK = "clean", "PGD on the network", "ASK-Atk"
COLUMNS = (CLEAN, TRANSFER, ATTACK)
_REFERENCES = 5
"""Of each class in every step of ASK-Def."""
_BLOCK = 200
_OPTIONS: dict[str, Any] = {
    "epochs": None,
    "images": None,
    "per_class": 2000,
    "k": 5,
    "n": None,
    "worst_n": 500,
    "strength": "fast",
}


@dataclass(frozen=True)
class Scene:
    """A data set, the network that is trained and how, and the radius.

    Attributes:
        layer: of ASK-Def and of the kNN.
        others: layers that the worst case looks at besides.
        steps, step, warmup: of the inner maximum; a step of None is 2.5 eps / steps.
        images: the first training images that are seen; None for all.
        n: test images.
        published: whether training starts from published weights.
        seconds: of a gradient pass over an image on two cores.
    """

    model: str
    layer: str
    others: tuple[str, ...]
    eps: float
    config: TrainConfig
    steps: int = 10
    step: float | None = None
    warmup: float = 0.0
    images: int | None = None
    n: int = 5000
    options: Mapping[str, Any] = field(default_factory=dict)
    published: bool = False
    cuda: bool = False
    seconds: float = 0.0003


_MNIST = Scene(
    model="mnist-cnn",
    layer="relu3",
    others=("relu2",),
    eps=0.2,
    config=TrainConfig(epochs=10, precision="bf16", channels_last=True),
    warmup=0.3,
    images=20_000,
    n=2000,
)
_IMAGENETTE = Scene(
    model="resnet18",
    layer="layer3",
    others=("layer4",),
    eps=4 / 255,
    config=replace(SGD, lr=0.01, batch_size=64, weight_decay=2e-4),
    step=1 / 255,
    n=3925,
    options={"n_classes": 10},
    cuda=True,
    seconds=0.1,
)
SCENES = {
    ("mnist", "cpu"): _MNIST,
    ("mnist", "paper"): replace(_MNIST, config=TrainConfig(epochs=20), images=None, n=10_000),
    ("cifar10", "cpu"): Scene(
        model="resnet20",
        layer="avgpool",
        others=("layer3",),
        eps=8 / 255,
        config=with_epochs(TUNED, 5),
        steps=7,
        warmup=0.3,
        images=10_000,
        n=1000,
        published=True,
        seconds=0.001,
    ),
    ("cifar10", "paper"): Scene(
        model="vgg16-bn",
        layer="layer4",
        others=("layer5",),
        eps=8 / 255,
        config=replace(SGD, weight_decay=2e-4),
        step=2 / 255,
        cuda=True,
        seconds=0.02,
    ),
    ("imagenette", "cpu"): _IMAGENETTE,
    ("imagenette", "paper"): _IMAGENETTE,
}


class Compared(Experiment):
    """Ways of training beside each other on the same samples.

    Attributes:
        networks: their names, in the order of the table.
        gains: the rows of differences: name, the two networks.
    """

    paper = "ASK (arXiv 2106.14300)"
    data = ("cifar10", "mnist", "imagenette")
    suite = "worst-case-ask-def"
    presets: ClassVar[Presets] = {"cpu": _OPTIONS, "paper": {**_OPTIONS, "worst_n": 1000, "strength": "standard"}}
    networks: ClassVar[tuple[str, ...]]
    gains: ClassVar[Mapping[str, tuple[str, str]]]

    def parts(self, bench: Bench) -> list[Part]:
        trained = Trained(bench)
        made = []
        for name in self.networks:
            made += trained.train(name)
            made += [trained.score(name), trained.worst(name)]
        return made

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        made = []
        for name in self.networks:
            for column in COLUMNS:
                flags = found[f"score {name}"][column]
                made.append(Cell.share(name, column, flags.count("1"), len(flags)))
            worst = found[f"worst case, {name}"]
            made.append(Cell.share(name, WORST, worst["right"], worst["n"], WORST))
        for said, (ours, other) in self.gains.items():
            made += gains(said, found, ours, other)
        return made


def gains(said: str, found: Mapping[str, Any], ours: str, other: str) -> list[Cell]:
    """By how many points one training is right more often than another, on the same samples."""
    pairs = {column: (found[f"score {ours}"][column], found[f"score {other}"][column]) for column in COLUMNS}
    pairs[WORST] = (found[f"worst case, {ours}"]["flags"], found[f"worst case, {other}"]["flags"])
    made = []
    for column, (a, b) in pairs.items():
        points = [100.0 * (int(x) - int(y)) for x, y in zip(a, b, strict=True)]
        made.append(Cell.mean(said, column, points, "points", WORST if column == WORST else PUBLISHED))
    return made


def passes(scene: Scene, method: str, batch_size: int, classes: int = 10) -> int:
    """Gradient passes over images in one step of training."""
    if method == "standard":
        return batch_size
    if method == "adversarial":
        return batch_size * (scene.steps + 1)
    references = classes * _REFERENCES
    # The examples of ASK, those of the cross-entropy and the references' copies, then one pass of all of them.
    return scene.steps * (2 * batch_size + references) + 2 * batch_size + 2 * references


class Trained:
    """The networks of a scene and the kNN on each."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.scene: Scene = SCENES[bench.settings.data, bench.settings.preset]
        if self.scene.cuda:
            refuse_without_cuda(bench)
        self.n = min(bench["n"] or self.scene.n, self.scene.n if bench.settings.data == "imagenette" else 10_000)
        self.threat = ThreatModel("linf", self.scene.eps)
        self.recipes = self._recipes()

    def _recipes(self) -> dict[str, Recipe | Published]:
        scene, bench = self.scene, self.bench
        weights = None
        if scene.published:
            weights = published_weights(bench, "standard, published weights", scene.model)
        config = with_epochs(scene.config, bench["epochs"])
        more = passes(scene, "ask-def", config.batch_size) / passes(scene, "adversarial", config.batch_size)
        inner: dict[str, Any] = {"steps": scene.steps, "warmup": scene.warmup, "step": scene.step}
        inner = {name: value for name, value in inner.items() if value}
        defense: dict[str, Any] = {"layers": (scene.layer,), "ask_eps": scene.eps, "n_references": _REFERENCES}

        def recipe(title: str, method: str, config: TrainConfig = config, **options: Any) -> FineTuned:
            images = bench["images"] or scene.images
            options = options if method == "standard" else {**inner, **options}
            return FineTuned(title, scene.model, config, scene.options, method, options, "published", weights, images)

        made: dict[str, Recipe | Published] = {
            PLAIN: weights or recipe("standard", "standard"),
            ADVERSARIAL: recipe("adversarial", "adversarial", eps=scene.eps),
            DEFENSE: recipe("ask-def", "ask-def", eps=scene.eps, **defense),
        }
        longer = with_epochs(config, round(more * config.epochs))
        made[LONGER] = recipe("adversarial-longer", "adversarial", longer, eps=scene.eps)
        made[ADVERSARIAL + HALF] = recipe("adversarial-half", "adversarial", eps=scene.eps / 2)
        made[DEFENSE + HALF] = recipe("ask-def-half", "ask-def", eps=scene.eps / 2, **defense)
        return made

    def train(self, name: str) -> list[Part]:
        """The part that trains a network; none where weights are published."""
        recipe = self.recipes[name]
        if isinstance(recipe, Published):
            return []
        images = getattr(recipe, "images", None) or 50_000
        size = recipe.config.batch_size
        return [self.bench.train(recipe, images / size * passes(self.scene, recipe.method, size) * self.scene.seconds)]

    def split(self) -> Split:
        """The test images: a counted random choice in their order."""
        test = self.bench.source().test
        return test.subset(rng.permutation(len(test), 0, "ask-def")[: self.n].sort().values)

    def classifier(self, name: str) -> DkNN:
        """The kNN on a network's features."""
        source = self.bench.source()
        layers = [self.scene.layer, *self.scene.others]
        extractor = FeatureExtractor(network_of(self.bench, self.recipes[name]), layers)
        images = source.train.per_class(self.bench["per_class"])
        references = ReferenceSet.build(extractor, images, n_classes=source.n_classes, progress=self.bench.progress)
        return DkNN(references, self.bench["k"], metric="cosine", layers=[self.scene.layer])

    def folder(self, kind: str, name: str, **further: Any) -> Path:
        """Where work on a network is kept."""
        options = {option: self.bench[option] for option in ("per_class", "k")}
        wanted = {"network": self.recipes[name].describe(), "layer": self.scene.layer, "eps": self.scene.eps}
        return self.bench.shared(kind, __name__, **wanted, **options, n=self.n, **further)

    def score(self, name: str) -> Part:
        """The part that says on which images the kNN is right, clean and under the attacks: a digit each."""
        attacks: dict[str, Attack] = {
            TRANSFER: pgd_transfer(steps=20, step=0.25),
            ATTACK: ask_published(metric="cosine", temperature=0.01, steps=20, step=0.25),
        }
        folder = self.folder("defended", name)

        def run(_: Path) -> dict[str, str]:
            classifier, split = self.classifier(name), self.split()

            def measure(rows: Tensor) -> Mapping[str, Tensor]:
                x, y, ids, found = split.batch(rows), split.labels[rows], split.ids[rows], {}
                for column, attack in attacks.items():
                    done = attack(classifier, x, y, self.threat, sample_ids=ids, seed=self.bench.seed)
                    found[column] = done.robust
                return {CLEAN: done.clean_labels.cpu() == y, **found}

            found = by_block(folder, len(split), _BLOCK, measure, self.bench.progress, f"attacking {name}")
            return {column: flags_of(found[column]) for column in COLUMNS}

        seconds = self.n * (40 * self.scene.seconds + 0.01) * left(folder, self.n, _BLOCK)
        return Part(f"score {name}", seconds, run)

    def worst(self, name: str) -> Part:
        """The worst case of the kNN on a network."""
        n, layers = min(self.bench["worst_n"], self.n), (self.scene.layer, *self.scene.others)
        attack = WorstCaseASKDef(layers, self.bench["strength"])
        wanted = {"attack": to_config(attack, registry.attacks), "worst_n": n}
        folder, seconds = self.folder("worst-case", name, **wanted), 100 * self.scene.seconds + 0.1
        return worst_part(
            self.bench, name, lambda: self.classifier(name), self.split, self.threat, attack, n, folder, seconds
        )
