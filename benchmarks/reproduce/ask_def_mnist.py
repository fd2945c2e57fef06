"""ASK-Def beside plain adversarial training on MNIST at equal epochs: `python -m benchmarks.reproduce.ask_def_mnist`.

20,000 images × 10 epochs, three seeds; 15-NN on the last convolution, under ASK and the worst case. Both train at the
radius that they are attacked at. Published gains of ASK-Def (arXiv 2106.14300): 6.9 points on CIFAR-10. Networks and
finished rows are kept in the work folder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import kept
from robustknn import KNN, FeatureExtractor, ReferenceSet, ThreatModel, WorstCase, rng
from robustknn.attacks import PGD
from robustknn.datasets import Split, load
from robustknn.models import MnistCNN
from robustknn.objectives import ASK
from robustknn.progress import Console
from robustknn.recipes import Published
from robustknn.training import Adversarial, ASKDef, Method, TrainConfig, initialise, train

EPS, SEEDS, IMAGES = 0.2, (0, 1, 2), 20_000
LAYER = MnistCNN.embedding_layer
METHODS: dict[str, Method] = {
    "adversarial": Adversarial(eps=EPS, steps=10, warmup=0.3),
    "ASK-Def": ASKDef(layers=(LAYER,), eps=EPS, ask_eps=EPS, steps=10, warmup=0.3),
    "ASK-Def, CE at half the radius as published": ASKDef(
        layers=(LAYER,), eps=EPS / 2, ask_eps=EPS, steps=10, warmup=0.3
    ),
}
CONFIG = TrainConfig(epochs=10, batch_size=128, lr=1e-3, precision="bf16", channels_last=True)


@dataclass
class Part:
    """What is trained on, without validation: nothing is selected."""

    train: Split
    validation: None = None


def measure(name: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train (or go on) and attack."""
    source = load("mnist", root=args.data, protocol="published")
    model = initialise(MnistCNN, seed)
    config = TrainConfig(**{**CONFIG.__dict__, "seed": seed})
    split = source.train.first(IMAGES)
    folder = args.work / f"{list(METHODS).index(name)}-{seed}"
    train(model, Part(split), config, folder, method=METHODS[name], progress=Console())
    references = ReferenceSet.build(FeatureExtractor(model, [LAYER]), split)
    classifier, threat = KNN(references, 15), ThreatModel("linf", EPS)
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
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.ask_def_mnist")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("-n", type=int, default=500)
    parser.add_argument("--strength", default="standard")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found: dict[str, list[Any]] = {}
    for place, name in enumerate(METHODS):
        for seed in SEEDS:
            file = args.work / f"row-{place}-{seed}.json"
            found.setdefault(name, []).append(kept.row(file, partial(measure, name, seed, args)))
    columns = ("clean", "published", "ask", "worst")
    print("| training | clean | published protocol | ask | worst case |\n|---|---:|---:|---:|---:|")
    for name, rows in found.items():
        values = {c: [100 * r[c] for r in rows] for c in columns}
        shown = [f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" for v in values.values()]
        print(f"| {name} | {' | '.join(shown)} |")
    kept.write_record(args.results, rows=found, eps=EPS, seeds=SEEDS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
