"""Randomised smoothing of kNN and DAEkNN on MNIST: `python -m benchmarks.reproduce.smoothing_mnist --help`.

    python -m benchmarks.reproduce.smoothing_mnist --data DIR --work DIR -n 100 --draws 1000

The MNIST CNN (unpadded) is trained with the noise it is smoothed with, 4 epochs; kNN, k = 15, votes on its last
convolution, DAEkNN, k = 5, on the last two, its adversarial references at 60/255. Certified accuracy (decided rightly,
and certified at that radius) and accuracy under a transferred attack: PGD on the base classifier's votes, what it finds
judged by the majority of draws of other noise. Networks and finished rows are kept in the work folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import kept
from robustknn import KNN, PGD, FeatureExtractor, ReferenceSet, ThreatModel, rng
from robustknn.certification import (
    Certified,
    Certifier,
    EmbeddingSmoothing,
    Smoothed,
    SmoothedEmbedding,
    Smoothing,
    smoothed_references,
)
from robustknn.classifiers import Classifier, DAEkNN, Network
from robustknn.datasets import Split, load
from robustknn.models import MnistCNN
from robustknn.objectives import ASK, CrossEntropy
from robustknn.progress import Console
from robustknn.recipes import Hardening, adversarial_references
from robustknn.training import Gaussian, TrainConfig, initialise, train

SIGMAS = (0.25, 0.5)
RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
SMALL = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15)
"""For the smoothed embedding, whose radii are of another size."""
HARDENED = 60 / 255
JUDGED = 100
"""Draws of other noise that judge what an attack found."""
CONFIG = TrainConfig(epochs=4, lr=1e-3, schedule="one-cycle", precision="bf16", channels_last=True)
Build = Callable[["Bench", float], Classifier]


@dataclass
class Part:
    """What is trained on, without validation: nothing is selected."""

    train: Split
    validation: None = None


class Bench:
    """Networks, references and samples, each made when first asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.source = args, load("mnist", root=args.data, protocol="standard")
        self.ids = rng.permutation(len(self.source.test), 0, "smoothing")[: args.n].sort().values
        self.x, self.y = self.source.test.batch(self.ids), self.source.test.labels[self.ids]
        self._made: dict[Any, Any] = {}

    def model(self, sigma: float) -> nn.Module:
        """The network trained with this noise."""

        def make() -> nn.Module:
            model = initialise(lambda: MnistCNN(form="unpadded"), 0)
            folder = self.args.work / f"network-{sigma:g}"
            train(model, Part(self.source.train), CONFIG, folder, method=Gaussian(sigma), progress=Console())
            return model.eval()

        return self._once(("model", sigma), make)

    def clean(self, sigma: float, layers: tuple[str, ...], per_class: int) -> ReferenceSet:
        """Plain references."""
        features = FeatureExtractor(self.model(sigma), layers)
        part = self.source.train.per_class(per_class)
        return self._once(
            (sigma, layers, per_class), lambda: ReferenceSet.build(features, part, keep_images=True, n_classes=10)
        )

    def knn(self, sigma: float, **options: Any) -> KNN:
        """15-NN on the last convolution."""
        return KNN(self.clean(sigma, MnistCNN.feature_layers[2:3], self.args.per_class), 15, **options)

    def daeknn(self, sigma: float) -> DAEkNN:
        """DAEkNN on the last two convolutions."""
        layers, part = MnistCNN.feature_layers[1:3], self.source.train.per_class(self.args.per_class)
        features = FeatureExtractor(self.model(sigma), layers)
        attack = PGD(objective=CrossEntropy(), steps=10, start="random")
        hardening = Hardening(ThreatModel("linf", HARDENED), attack)
        hardened = adversarial_references(features, part, hardening, n_classes=10)
        return DAEkNN(self.clean(sigma, layers, self.args.per_class), hardened, 5)

    def averaged(self, sigma: float) -> KNN:
        """15-NN by cosine among references averaged under noise."""
        plain = self.clean(sigma, MnistCNN.feature_layers[2:3], self.args.per_class)
        return KNN(smoothed_references(plain, sigma, 20), 15, metric="cosine")

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


DECISION: dict[str, Build] = {
    "network": lambda bench, sigma: Network(bench.model(sigma), 10),
    "kNN": lambda bench, sigma: bench.knn(sigma),
    "DAEkNN": lambda bench, sigma: bench.daeknn(sigma),
}
EMBEDDING: dict[str, Build] = {
    "embedding, plain references": lambda bench, sigma: bench.knn(sigma, metric="cosine"),
    "embedding, averaged references": lambda bench, sigma: bench.averaged(sigma),
}


def measure(bench: Bench, build: Build, sigma: float, embedding: bool) -> dict[str, Any]:
    """Certify every sample, and attack."""
    draws = bench.args.draws
    base = build(bench, sigma)
    certifier: Certifier = EmbeddingSmoothing(sigma, draws) if embedding else Smoothing(sigma, n=draws)
    began = time.process_time()
    certified = certifier(base, bench.x, bench.ids, progress=Console())
    seconds = (time.process_time() - began) / len(bench.y)
    radii = SMALL if embedding else RADII
    fresh: Classifier
    if embedding:
        assert isinstance(base, KNN)
        fresh = SmoothedEmbedding(base, sigma, JUDGED, seed=1)
    else:
        fresh = Smoothed(base, sigma, JUDGED, seed=1)
    attacked = [attack(bench, base, fresh, radius) for radius in radii]
    return {"radii": radii, "attacked": attacked, "seconds a sample": seconds, **figures(certified, bench.y, radii)}


def figures(certified: Certified, y: Tensor, radii: Sequence[float]) -> dict[str, Any]:
    """What the certificates say."""
    right = certified.labels == y
    return {
        "n": len(y),
        "certified": certified.accuracy(y, radii).tolist(),
        "abstained": float((certified.labels < 0).double().mean()),
        "mean radius": float(torch.where(right, certified.radius, 0.0).mean()),
        "largest radius": float(certified.radius.max()),
        "assumptions": certified.assumptions,
    }


def attack(bench: Bench, base: Classifier, fresh: Classifier, radius: float) -> float:
    """The share of samples that most draws decide rightly at the end of a transferred attack."""
    x = bench.x
    if radius:
        objective = CrossEntropy() if isinstance(base, Network) else ASK()
        threat = ThreatModel("l2", radius, None)
        x = PGD(objective=objective, steps=40, start="random")(base, x, bench.y, threat, sample_ids=bench.ids).x_adv
    return float((fresh.scores(x, bench.ids).argmax(1) == bench.y).double().mean())


def table(found: dict[str, dict[str, Any]], radii: Sequence[float], names: Sequence[str]) -> str:
    """Markdown, in %: certified / attacked."""
    lines = ["| sigma | | " + " | ".join(f"{r:g}" for r in radii) + " | mean radius | abstained | s a sample |"]
    lines.append("|---:|---|" + "---:|" * (len(radii) + 3))
    for key, row in found.items():
        sigma, name = key.split(" ", 1)
        if name in names:
            cells = [f"{100 * c:.0f} / {100 * a:.0f}" for c, a in zip(row["certified"], row["attacked"], strict=True)]
            more = f"{row['mean radius']:.3f} | {100 * row['abstained']:.0f} | {row['seconds a sample']:.2f}"
            lines.append(f"| {sigma} | {name} | {' | '.join(cells)} | {more} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the rows that are missing in the work folder, and print the tables of all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.smoothing_mnist")
    parser.add_argument("--data", type=Path, required=True, help="the folder with MNIST")
    parser.add_argument("--work", type=Path, required=True, help="where networks and finished rows are kept")
    parser.add_argument("-n", type=int, default=200, help="test samples")
    parser.add_argument("--draws", type=int, default=1000, help="draws of noise that certify a sample")
    parser.add_argument("--per-class", type=int, default=1000, help="references of each class")
    parser.add_argument("--sigmas", type=float, nargs="+", default=SIGMAS, help="standard deviations of the noise")
    parser.add_argument("--only", nargs="+", default=[*DECISION, *EMBEDDING], help="which rows, by name")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    bench, found = Bench(args), {}
    for sigma in args.sigmas:
        for name in args.only:
            build, embedding = {**DECISION, **EMBEDDING}[name], name in EMBEDDING
            file = args.work / f"{name.replace(', ', '-').replace(' ', '-')}-{sigma:g}-{args.n}-{args.draws}.json"
            found[f"{sigma:g} {name}"] = kept.row(file, partial(measure, bench, build, sigma, embedding))
            print(sigma, name, found[f"{sigma:g} {name}"], file=sys.stderr, flush=True)
    print(table(found, RADII, list(DECISION)))
    print(table(found, SMALL, list(EMBEDDING)))
    kept.write_record(args.results, rows=found, draws=args.draws, samples=args.n, per_class=args.per_class)
    return 0


if __name__ == "__main__":
    sys.exit(main())
