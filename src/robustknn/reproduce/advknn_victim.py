"""What the tables on DkNN and AdvKNN attack: the papers' network, its kNN and DkNN, examples made on the kNN.

Network and training, k = 75, cosine, all training images as references, L∞ eps .25, FGSM and BIM (100 steps of .01) are
those of arXiv 1911.06591; what was calibrated with (75 test images a class) is not attacked. Examples are made on the
kNN of the third layer, or on the network itself ("plain"), and scored by every classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustknn import registry, rng
from robustknn.attacks import BIM, FGSM, Attack
from robustknn.classifiers import KNN, DkNN, Network, decide
from robustknn.config import to_config
from robustknn.datasets import Split
from robustknn.evaluation import Options, evaluate, finish
from robustknn.evaluation.experiment import calibration_overlap
from robustknn.features import FeatureExtractor
from robustknn.objectives import CrossEntropy, train_heads
from robustknn.objectives.advknn import AdvKNN
from robustknn.recipes.worst_case import WorstCase
from robustknn.reference import ReferenceSet
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.blocks import by_block, left
from robustknn.reproduce.experiment import Part
from robustknn.reproduce.networks import Recipe
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
METHODS = ("plain", "DkNNB", "DkNNB + CL")
KINDS = ("FGSM", "BIM")
# Seconds on two cores: of a sample's gradient step, of its neighbors in all layers of all references, of a reference's
# neighbors in the third layer, of training an epoch, of one image's worst case on kNN and on DkNN.
STEP, SEARCH, HEAD, EPOCH, WORST_KNN, WORST_DKNN = 0.0006, 0.045, 0.004, 35.0, 0.6, 4.0
_MADE, _SCORED = 250, 500


class Victim:
    """The network of a data set with everything that stands on it, made when first asked for."""

    def __init__(self, bench: Bench, model: str = "mnist-cnn", dataset: str | None = None) -> None:
        self.bench, data = bench, dataset or bench.settings.data
        shape = {"in_channels": 3, "image_size": 32} if data == "svhn" else {}
        self.recipe = Recipe(model, model, TrainConfig(epochs=bench["epochs"]), options=shape)
        self.scored = min(bench["n"] or SIZES[data], SIZES[data] - CALIBRATION)
        self.n_references = bench["references"] or TRAINED[data]
        self.threat = ThreatModel("linf", bench["eps"])
        self._banks: dict[tuple[str, ...], ReferenceSet] = {}

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
        """The references' features at these layers; a set that holds more of them is taken where there is one."""
        for held, bank in self._banks.items():
            if set(layers) <= set(held):
                return bank
        source = self.bench.source()
        train = source.train if self.bench["references"] is None else source.train.first(self.bench["references"])
        extractor = FeatureExtractor(self.network, layers)
        made = ReferenceSet.build(extractor, train, n_classes=source.n_classes, progress=self.bench.progress)
        self._banks = {layers: made}  # the smaller set's memory is given back
        return made

    def knn(self, k: int | None = None) -> KNN:
        """The kNN of the third layer."""
        return KNN(self.references(self.layer), k or self.bench["k"], layer=self.layer, metric="cosine")

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
        return self.bench.shared("heads", __name__, **self.described(), **wanted)

    def objective(self, method: str, k: int | None = None, layers: tuple[str, ...] | None = None) -> Any:
        """What a row of the paper climbs; AdvKNN's heads are trained once and kept."""
        if method == "plain":
            return CrossEntropy()
        consistency = method.endswith("CL")
        folder = self.heads_folder(consistency, k, layers)
        plain = AdvKNN.published(consistency=consistency, layers=layers)
        if not folder.exists():
            classifier = self.knn(k) if layers is None else self.dknn
            train_heads(classifier, layers, plain.training, self.bench.progress).save(folder)
        return AdvKNN.published(consistency=consistency, layers=layers, heads=str(folder))

    def attack(self, method: str, kind: str, k: int | None = None, layers: tuple[str, ...] | None = None) -> Attack:
        """FGSM, or BIM in steps of .01, by a row's objective."""
        objective = self.objective(method, k, layers)
        return FGSM(objective) if kind == "FGSM" else BIM(objective, steps=self.bench["steps"], absolute_step=0.01)

    def examples_folder(self, method: str, kind: str) -> Path:
        """Where examples made on the kNN are kept."""
        wanted = {"method": method, "attack": kind}
        return self.bench.shared("examples", __name__, **self.described("k", "eps", "steps"), **wanted)

    def examples(self, method: str, kind: str) -> Tensor:
        """Examples made on the kNN, (n, …); "clean" gives the images."""
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
        seconds = n * (STEP * steps + 2 * self._search() / 10) * left(self.examples_folder(method, kind), n, _MADE)
        if method != "plain" and not self.heads_folder(method.endswith("CL")).exists():
            seconds += HEAD * self.n_references * self.n_references / 60_000
        return Part(f"make {kind}, {method}", seconds, lambda _: {"made": len(self.examples(method, kind))})

    def _search(self) -> float:
        return SEARCH * self.n_references / 60_000

    # ------------------------------------------------------------------------------------ the scores

    def scores_folder(self, method: str, kind: str) -> Path:
        """Where the decisions on examples are kept."""
        wanted = {"method": method, "attack": kind}
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

        seconds = self.scored * 1.3 * self._search() * left(self.scores_folder(method, kind), self.scored, _SCORED)
        return Part(f"score {kind or 'clean'}{', ' + method if kind else ''}", seconds, run)

    # --------------------------------------------------------------------------------- the worst case

    def worst(self, name: str) -> Part:
        """The part that attacks a classifier ("kNN" or "DkNN") as it decides: the worst case, sample by sample."""
        n, strength = min(self.bench["worst_n"], self.scored), self.bench["strength"]
        wanted = {"classifier": name, "attack": to_config(WorstCase(strength), registry.attacks), "worst_n": n}
        folder = self.bench.shared("worst-case", __name__, **self.described("k", "eps"), **wanted)

        def run(_: Path) -> dict[str, Any]:
            classifier = self.knn() if name == "kNN" else self.dknn
            places = rng.permutation(len(self.split), self.bench.seed, "worst case")[:n].sort().values
            done = evaluate(
                {name: classifier},
                self.split.subset(places),
                attacks={"worst-case": WorstCase(strength)},
                threat=self.threat,
                out=folder,
                options=Options(self.bench.seed, batch_size=50, examples=0, controls=0),
                progress=self.bench.progress,
            )
            summary = finish(done).classifiers[0]
            return {"n": summary.n, "right": round(summary.worst_case_accuracy * summary.n)}

        each = (WORST_KNN if name == "kNN" else WORST_DKNN) * self.n_references / 60_000
        whole = (folder / "summary.json").exists()
        return Part(f"worst case, {name}", 0.0 if whole else n * each, run)
