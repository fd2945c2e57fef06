"""What the tables on DkNN and AdvKNN attack: the papers' network, its kNN and DkNN, examples made on the kNN.

Network and training, k = 75, cosine, all training images as references, L∞ eps .25, FGSM and BIM (100 steps of .01) are
those of arXiv 1911.06591; what was calibrated with (75 test images a class) is not attacked. Examples are made on the
kNN of the third layer, or on the network itself ("plain"), and scored by every classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustknn import registry, rng
from robustknn.attacks import BIM, FGSM, Attack
from robustknn.classifiers import KNN, DkNN, Network, Rejecting, decide
from robustknn.config import to_config
from robustknn.datasets import Split
from robustknn.evaluation.experiment import calibration_overlap
from robustknn.features import FeatureExtractor
from robustknn.objectives import CrossEntropy, train_heads
from robustknn.objectives.advknn import AdvKNN
from robustknn.objectives.dknnb import DkNNB, Head
from robustknn.recipes.worst_case import WorstCase
from robustknn.reference import ReferenceSet
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.blocks import alone, by_block, left
from robustknn.reproduce.experiment import Part, Presets
from robustknn.reproduce.networks import Recipe
from robustknn.reproduce.worst_victim import worst_part
from robustknn.threat import ThreatModel, norm
from robustknn.training import TrainConfig

CALIBRATION = 750
SIZES = {"mnist": 10_000, "fashion-mnist": 10_000, "svhn": 26_032}
TRAINED = {"mnist": 60_000, "fashion-mnist": 60_000, "svhn": 73_257}
COMMON: dict[str, Any] = {
    "epochs": 18,
    "k": 75,
    "eps": 0.25,
    "steps": 100,
    "n": None,
    "references": None,
    "worst_n": 1000,
    "strength": "fast",
}
"""Options that the tables share: None takes all. `n` counts test images, `references` the first training images."""
DATA = ("mnist", "fashion-mnist", "svhn")
PRESETS: Presets = {"cpu": COMMON, "paper": {**COMMON, "strength": "standard"}}
DECIDED = {"DNN": "network", "kNN": "knn", "DkNN": "dknn"}
"""What scores call a classifier, by what the papers do."""
METHODS = ("plain", "DkNNB", "DkNNB + CL")
KINDS = ("FGSM", "BIM")
# Seconds on two cores: of a sample's gradient step, of its neighbors in all layers of all references, of a reference's
# neighbors in the third layer, of training an epoch, of one image's worst case.
STEP, SEARCH, HEAD, EPOCH = 0.0006, 0.03, 0.0024, 28.0
WIDTH = {"lenet5": 0.35}  # features that are searched, beside those of the papers' network
WORST = {"DNN": 0.02, "kNN": 0.05, "DkNN": 0.3, "DkNN, credible": 0.6}
_MADE, _SCORED = 250, 500


class Victim:
    """The network of a data set with everything that stands on it, made when first asked for.

    Args:
        model, options: the network, as `robustknn.models.load_model` takes it.
        source: what examples are made on, where that is another.
    """

    def __init__(self, bench: Bench, model: str = "mnist-cnn", source: Victim | None = None, **options: Any) -> None:
        self.bench, self.source, data = bench, source or self, bench.settings.data
        shape = {"in_channels": 3, "image_size": 32} if data == "svhn" else {}
        config = TrainConfig(epochs=bench["epochs"], batch_size=bench.settings.options.get("batch_size", 128))
        self.recipe = Recipe("-".join([model, *options.values()]), model, config, options={**shape, **options})
        self.scored = min(bench["n"] or SIZES[data], SIZES[data] - CALIBRATION)
        self.n_references = bench["references"] or TRAINED[data]
        self.threat = ThreatModel("linf", bench["eps"])
        self._banks: dict[tuple[str, ...], ReferenceSet] = {}
        self._planned: set[Path] = set()  # heads that a part trains

    @property
    def epoch_seconds(self) -> float:
        """Of training, on two cores."""
        return EPOCH * TRAINED[self.bench.settings.data] / 60_000

    # ------------------------------------------------------------------------------------ classifiers

    @cached_property
    def network(self) -> nn.Module:
        """The trained network."""
        return self.bench.network(self.recipe)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that vote in DkNN."""
        return tuple(str(layer) for layer in self.network.feature_layers)  # type: ignore[union-attr]

    @property
    def layer(self) -> str:
        """The layer of the kNN."""
        return str(self.network.embedding_layer)

    def references(self, *layers: str) -> ReferenceSet:
        """The references' features at these layers. Heads know the set they learned from: no larger one stands in."""
        if layers in self._banks:
            return self._banks[layers]
        source = self.bench.source()
        train = source.train if self.bench["references"] is None else source.train.first(self.bench["references"])
        extractor = FeatureExtractor(self.network, layers)
        made = ReferenceSet.build(extractor, train, n_classes=source.n_classes, progress=self.bench.progress)
        self._banks[layers] = made
        return made

    def knn(self, k: int | None = None) -> KNN:
        """The kNN of the third layer."""
        return KNN(self.references(self.layer), k or self.bench["k"], layer=self.layer, metric="cosine")

    def blocks(self) -> tuple[Tensor, ...]:
        """The places of the samples, some hundreds at a time."""
        found: tuple[Tensor, ...] = torch.arange(len(self.split)).split(_SCORED)
        return found

    @cached_property
    def dknn(self) -> DkNN:
        """The DkNN of all layers, calibrated as the papers did."""
        calibration = self.bench.source().calibration
        return DkNN(self.references(*self.layers), self.bench["k"], metric="cosine").calibrate(calibration)

    # ------------------------------------------------------------------------------------ the samples

    @cached_property
    def split(self) -> Split:
        """The test images that did not calibrate: all, or a counted random choice in their order."""
        source = self.bench.source()
        free = torch.ones(len(source.test), dtype=torch.bool)
        free[calibration_overlap(source, source.test)] = False
        places = free.nonzero()[:, 0]
        order = rng.permutation(len(places), self.bench.seed, "scored")[: self.bench["n"]]
        return source.test.subset(places[order.sort().values])

    def described(self, *options: str) -> dict[str, Any]:
        """Recipe, samples and references, for `Bench.shared`."""
        return {"recipe": self.recipe.describe(), **{name: self.bench[name] for name in ("n", "references", *options)}}

    # ------------------------------------------------------------------------------------ the attacks

    def heads_folder(self, consistency: bool, k: int | None = None, layers: tuple[str, ...] | None = None) -> Path:
        """Where the heads of AdvKNN are kept."""
        wanted = {"consistency": consistency, "neighbors": k or self.bench["k"], "layers": layers}
        wanted["learned_from"] = self._head_references
        return self.bench.shared("heads", __name__, **self.described(), **wanted)

    def objective(self, method: str, k: int | None = None, layers: tuple[str, ...] | None = None) -> Any:
        """What a row of the paper climbs; AdvKNN's heads are trained once and kept."""
        if method == "plain":
            return CrossEntropy()  # of the network, whatever stands on it
        consistency = method.endswith("CL")
        folder, learned = self.heads_folder(consistency, k, layers), self._head_references
        plain = AdvKNN.published(consistency=consistency, layers=layers, max_references=learned)
        with alone(folder):
            if not folder.exists():
                classifier = self.knn(k) if layers is None else self.dknn
                train_heads(classifier, layers, plain.training, self.bench.progress).save(folder)
        return replace(plain, heads=str(folder))

    @property
    def _head_references(self) -> int | None:
        """References that heads learn from; None for all."""
        found: int | None = self.bench.settings.options.get("head_references")
        return found

    def head(self) -> Head:
        """DkNNB with consistency learning at the kNN's layer."""
        self.objective(METHODS[-1])
        return DkNNB.load(self.heads_folder(True), self.knn()).heads[self.layer]

    def heads_part(self) -> Part:
        """The part that trains DkNNB."""
        return Part("learn DkNNB", self.heads_seconds(METHODS[-1]), lambda _: {"made": bool(self.head())})

    def heads_seconds(self, method: str, k: int | None = None, layers: tuple[str, ...] | None = None) -> float:
        """Of training a method's heads, where no part before does."""
        if method == "plain":
            return 0.0
        folder = self.heads_folder(method.endswith("CL"), k, layers)
        if folder.exists() or folder in self._planned:
            return 0.0
        self._planned.add(folder)
        learned = min(self._head_references or self.n_references, self.n_references)
        return HEAD * learned * self.n_references / 60_000 * (1 if layers is None else 10)

    def attack(self, method: str, kind: str, k: int | None = None, layers: tuple[str, ...] | None = None) -> Attack:
        """FGSM, or BIM in steps of .01, by a row's objective."""
        objective = self.objective(method, k, layers)
        return FGSM(objective) if kind == "FGSM" else BIM(objective, steps=self.bench["steps"], absolute_step=0.01)

    def examples_folder(self, method: str, kind: str) -> Path:
        """Where examples made on the kNN are kept."""
        wanted = {"method": method, "attack": kind}
        return self.bench.shared("examples", __name__, **self.described("k", "eps", "steps"), **wanted)

    def examples(self, method: str, kind: str) -> Tensor:
        """Examples made on the source's kNN, (n, …); "clean" gives the images."""
        if self.source is not self:
            return self.source.examples(method, kind)
        split, seed = self.split, self.bench.seed
        if method == "clean":
            return split.batch(torch.arange(len(split)))

        def make(rows: Tensor) -> Mapping[str, Tensor]:
            attack, x, y = self.attack(method, kind), split.batch(rows), split.labels[rows]
            found = attack(self.knn(), x, y, self.threat, sample_ids=split.ids[rows], seed=seed, batch_size=_MADE)
            return {"x": found.x_adv}

        folder = self.examples_folder(method, kind)
        return by_block(folder, len(split), _MADE, make, self.bench.progress, f"{kind}, {method}")["x"]

    def make(self, method: str, kind: str) -> Part:
        """The part that makes examples on the kNN."""
        steps, n = (1 if kind == "FGSM" else self.bench["steps"]), self.scored
        seconds = n * (STEP * steps + 2 * self.search_seconds / 10) * left(self.examples_folder(method, kind), n, _MADE)
        seconds += self.heads_seconds(method)
        return Part(f"make {kind}, {method}", seconds, lambda _: {"made": len(self.examples(method, kind))})

    @property
    def search_seconds(self) -> float:
        """Of a sample's neighbors in all layers."""
        return SEARCH * WIDTH.get(self.recipe.model, 1.0) * self.n_references / 60_000

    # ------------------------------------------------------------------------------------ the scores

    def scores_folder(self, method: str, kind: str) -> Path:
        """Where the decisions on examples are kept."""
        wanted = {"method": method, "attack": kind, "made on": self.source.recipe.describe()}
        return self.bench.shared("scores", __name__, **self.described("k", "eps", "steps"), **wanted)

    def scores(self, method: str, kind: str = "") -> dict[str, Tensor]:
        """What every classifier decides on examples, (n,) each: network, knn, dknn (ties by votes), p (ties to the
        smallest class, as released), credibility, l2; and the label."""
        x, split = self.examples(method, kind), self.split

        def measure(rows: Tensor) -> Mapping[str, Tensor]:
            part = x[rows]
            head = Network(self.network, self.bench.source().n_classes)
            alpha = self.dknn.nonconformity(part)
            p = self.dknn._p_values(alpha)
            return {
                "label": split.labels[rows],
                "network": head.labels(head.place(part)).cpu(),
                "knn": self.knn().predict(part),
                "dknn": alpha.argmin(1),
                "p": decide(p),
                "credibility": p.amax(1),
                "l2": norm(part - split.batch(rows), "l2"),
            }

        what = f"scoring {kind or 'clean images'}{', ' + method if kind else ''}"
        return by_block(self.scores_folder(method, kind), len(split), _SCORED, measure, self.bench.progress, what)

    def score(self, method: str, kind: str = "") -> Part:
        """The part that scores examples: counts of right decisions by classifier, and sums for means."""

        def run(_: Path) -> dict[str, Any]:
            found = self.scores(method, kind)
            right = {c: int((found[c] == found["label"]).sum()) for c in ("network", "knn", "dknn", "p")}
            return {"n": len(found["label"]), "right": right}

        seconds = self.scored * 1.1 * self.search_seconds * left(self.scores_folder(method, kind), self.scored, _SCORED)
        return Part(f"score {kind or 'clean'}{', ' + method if kind else ''}", seconds, run)

    # --------------------------------------------------------------------------------- the worst case

    def classifier(self, name: str, k: int | None = None) -> Any:
        """ "DNN", "kNN", "DkNN", or "DkNN, credible" which rejects credibilities below .5."""
        if name == "DNN":
            return Network(self.network, self.bench.source().n_classes)
        if name == "kNN":
            return self.knn(k)
        return Rejecting(self.dknn, 0.5) if name.endswith("credible") else self.dknn

    def worst(self, name: str, k: int | None = None, n: int | None = None) -> Part:
        """The part that attacks a classifier as it decides: the worst case, sample by sample.

        Args:
            name: see `classifier`.
            n: images; the preset's `worst_n` when left out.
        """
        n, strength = min(n or self.bench["worst_n"], self.scored), self.bench["strength"]
        wanted = {"classifier": name, "neighbors": k, "attack": to_config(WorstCase(strength), registry.attacks)}
        wanted["worst_n"] = n
        folder = self.bench.shared("worst-case", __name__, **self.described("k", "eps"), **wanted)

        return worst_part(
            self.bench,
            f"{name}{f', k = {k}' if k else ''}",
            lambda: self.classifier(name, k),
            lambda: self.split,
            self.threat,
            WorstCase(strength),
            n,
            folder,
            WORST.get(name, WORST["DkNN"]) * self.n_references / 60_000,
        )

    def some(self, n: int, purpose: str) -> Tensor:
        """A counted random choice of n samples' places, ascending; all where there are fewer."""
        chosen: Tensor = rng.permutation(len(self.split), self.bench.seed, purpose)[:n].sort().values
        return chosen
