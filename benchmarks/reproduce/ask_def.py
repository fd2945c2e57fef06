"""ASK-Def beside plain adversarial training at equal epochs: `python -m benchmarks.reproduce.ask_def --help`.

MNIST: the papers' CNN from scratch on 20,000 images × 10 epochs, L∞ 0.2, 15-NN on the last convolution. CIFAR-10: the
published ResNet-20 fine-tuned on 10,000 images × 5 epochs, L∞ 8/255, 15-NN on its pooled features. Three seeds, under
the published protocol, ASK and the worst case; both train at the radius that they are attacked at. Published gains of
ASK-Def (arXiv 2106.14300): 6.9 points on CIFAR-10, 3.5 on "ImageNet". Networks and finished rows are kept in the work
folder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import kept
from robustknn import KNN, FeatureExtractor, ReferenceSet, ThreatModel, WorstCase, rng
from robustknn.attacks import PGD
from robustknn.datasets import Split, load
from robustknn.models import CifarResNet, MnistCNN, load_model
from robustknn.objectives import ASK
from robustknn.progress import Console
from robustknn.recipes import Published
from robustknn.training import Adversarial, ASKDef, Method, TrainConfig, initialise, train

SEEDS, NEIGHBORS = (0, 1, 2), 15


@dataclass(frozen=True)
class Scene:
    """A data set, the network that is trained and how, and the radius."""

    name: str
    images: int
    eps: float
    layer: str
    steps: int
    config: TrainConfig
    start: Callable[[argparse.Namespace, int], nn.Module]
    references: int

    def methods(self) -> dict[str, Method]:
        """What is compared, by name."""
        inner: dict[str, Any] = {"steps": self.steps, "warmup": 0.3}
        half = replace(ASKDef(layers=(self.layer,), eps=self.eps, ask_eps=self.eps, **inner), eps=self.eps / 2)
        return {
            "adversarial": Adversarial(eps=self.eps, **inner),
            "ASK-Def": replace(half, eps=self.eps),
            "ASK-Def, CE at half the radius as published": half,
        }


SCENES = {
    "mnist": Scene(
        "mnist",
        20_000,
        0.2,
        MnistCNN.embedding_layer,
        10,
        TrainConfig(epochs=10, batch_size=128, lr=1e-3, precision="bf16", channels_last=True),
        lambda args, seed: initialise(MnistCNN, seed),
        20_000,
    ),
    "cifar10": Scene(
        "cifar10",
        10_000,
        8 / 255,
        CifarResNet.embedding_layer,
        7,
        TrainConfig(
            epochs=5,
            batch_size=128,
            optimizer="sgd",
            lr=0.02,
            weight_decay=5e-4,
            schedule="one-cycle",
            augment=True,
            precision="bf16",
            channels_last=True,
        ),
        lambda args, seed: load_model("resnet20", args.checkpoint),
        50_000,
    ),
}


@dataclass
class Part:
    """What is trained on, without validation: nothing is selected."""

    train: Split
    validation: None = None


def measure(scene: Scene, name: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train (or go on) and attack."""
    source = load(scene.name, root=args.data, protocol="published")
    folder = args.work / f"{scene.name}-{list(scene.methods()).index(name)}-{seed}"
    model, config = scene.start(args, seed), replace(scene.config, seed=seed)
    part = Part(source.train.first(scene.images))
    train(model, part, config, folder, method=scene.methods()[name], progress=Console())
    model.eval()
    references = ReferenceSet.build(FeatureExtractor(model, [scene.layer]), source.train.first(scene.references))
    classifier, threat = KNN(references, NEIGHBORS), ThreatModel("linf", scene.eps)
    chosen = rng.permutation(len(source.test), 0, "ask-def")[: args.n].sort().values
    x, y = source.test.batch(chosen), source.test.labels[chosen]
    row: dict[str, float] = {}
    for label, attack in (
        ("published", Published()),
        ("ask", PGD(objective=ASK())),
        ("worst", WorstCase(args.strength)),
    ):
        result = attack(classifier, x, y, threat, sample_ids=chosen, seed=seed)
        row[label] = float(result.robust.double().mean())
        row["clean"] = float((result.clean_labels == y).double().mean())
    print(name, seed, row, file=sys.stderr, flush=True)
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.ask_def")
    parser.add_argument("scene", choices=list(SCENES))
    parser.add_argument("--data", type=Path, required=True, help="the folder with the data set")
    parser.add_argument("--checkpoint", type=Path, help="cifar10: the published weights, resnet20-12fca82f.th")
    parser.add_argument("--work", type=Path, required=True, help="where networks and finished rows are kept")
    parser.add_argument("-n", type=int, default=500, help="test samples")
    parser.add_argument("--strength", default="fast", help="of the worst case")
    parser.add_argument("--methods", type=int, nargs="+", default=[0, 1, 2], help="which of the three")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    scene = SCENES[args.scene]
    names = list(scene.methods())
    found: dict[str, list[Any]] = {names[place]: [] for place in args.methods}
    for seed in SEEDS:
        for name, rows in found.items():
            file = args.work / f"{scene.name}-{names.index(name)}-{seed}-n{args.n}-{args.strength}.json"
            rows.append(kept.row(file, partial(measure, scene, name, seed, args)))
    columns = ("clean", "published", "ask", "worst")
    print("| training | clean | published protocol | ask | worst case |\n|---|---:|---:|---:|---:|")
    for name, rows in found.items():
        values = {c: [100 * r[c] for r in rows] for c in columns}
        shown = [f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" for v in values.values()]
        print(f"| {name} | {' | '.join(shown)} |")
    kept.write_record(args.results, rows=found, eps=scene.eps, seeds=SEEDS, n=args.n, strength=args.strength)
    return 0


if __name__ == "__main__":
    sys.exit(main())
