"""What the M largest of 100 probabilities are worth: `python -m benchmarks.reproduce.many_classes [--results FILE]`.

Pairs of MNIST digits side by side, 28 × 56, are 100 classes. The network learns pairs of every second training
image, the database has pairs of the others, attacked are pairs of test images; retrieval with K = 50 on the last hidden
layer. Beside clean accuracy and decisions that differ from those of the whole vectors: gray-box examples (of the
network) and one adaptive run at L∞ .1. Nothing is chosen here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import kept
from robustknn import PGD, Adaptive, CrossEntropy, FeatureExtractor, ReferenceSet, RetrievalClassifier, ThreatModel
from robustknn.classifiers import Network
from robustknn.datasets import DataSource, Split, load
from robustknn.payload import TopSoftmax
from robustknn.training import Standard, TrainConfig, initialise, train

PAIRS, DECIDED, ATTACKED = 20_000, 2_000, 300
THREAT = ThreatModel("linf", 0.1)
PAYLOADS: dict[str, TopSoftmax | str] = {
    "whole": "softmax",
    **{f"{tail}, M = {top}": TopSoftmax(top, tail) for tail in ("spread", "drop") for top in (1, 2, 5, 20)},
}
COLUMNS = ("bytes", "clean", "differ", "gray-box", "adaptive")


def pairs(split: Split, n: int, seed: int) -> Split:
    """Random pairs of a split's images, of class 10 · left + right."""
    drawn = torch.randint(len(split), (2, n), generator=torch.Generator().manual_seed(seed))
    images = torch.cat([split.batch(side) for side in drawn], dim=3)
    left, right = (split.labels[side] for side in drawn)
    return Split(images, 10 * left + right, split.part)


def source(data: Path, seed: int) -> tuple[DataSource, Split]:
    """Pairs to learn and to test, and the database."""
    whole = load("mnist", root=data, protocol="published")
    places = torch.arange(len(whole.train))
    parts = [whole.train.subset(places[places % 2 == side]) for side in (0, 1)]
    learned, held = (pairs(part, PAIRS, 10 * seed + place) for place, part in enumerate(parts))
    test = pairs(whole.test, DECIDED, 10 * seed + 2)
    names = tuple(f"{n:02d}" for n in range(100))
    return DataSource("mnist-pairs", learned, None, None, test, names), held


def network() -> nn.Module:
    """Two strided convolutions and two layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, 2, 2), nn.ReLU(), nn.Conv2d(32, 64, 5, 2, 2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64 * 7 * 14, 128), nn.ReLU(), nn.Linear(128, 100)),
    )


def measure(data: Path, seed: int, rows: dict[str, list[dict[str, float]]]) -> None:
    """The rows of a training seed."""
    learned, held = source(data, seed)
    model = initialise(network, seed)
    train(model, learned, TrainConfig(epochs=4, batch_size=128, lr=1e-3, seed=seed), method=Standard())
    model.eval()
    features = FeatureExtractor(model, "6")
    x, y = learned.test.batch(torch.arange(DECIDED)), learned.test.labels
    few, known = x[:ATTACKED], y[:ATTACKED]
    moved = PGD(CrossEntropy(), steps=40)(Network(model, 100), few, known, THREAT, seed=seed).x_adv
    for weighting in ("UW", "CBW-E", "CBW-D"):
        reference: Tensor | None = None
        for name, payload in PAYLOADS.items():
            references = ReferenceSet.build(features, held, payload=payload, labels="payload")
            classifier = RetrievalClassifier(references, 50, weighting=weighting)
            decided = classifier.labels(x)
            reference = decided if reference is None else reference
            result = PGD(Adaptive(), steps=40)(classifier, few, known, THREAT, seed=seed)
            found = {
                "bytes": 400.0 if isinstance(payload, str) else 4.0 * payload.top,
                "clean": right(decided, y),
                "differ": float((decided != reference).double().mean()),
                "gray-box": right(classifier.labels(moved), known),
                "adaptive": float(result.robust.double().mean()),
            }
            rows.setdefault(f"{weighting}, {name}", []).append(found)
            print(f"seed {seed} {weighting}, {name}: {found}", file=sys.stderr, flush=True)


def right(labels: Tensor, y: Tensor) -> float:
    """The share that is right."""
    return float((labels == y).double().mean())


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: means over the seeds, in % but for the bytes of a reference."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for name, found in rows.items():
        means: list[Any] = [statistics.mean(seed[column] for seed in found) for column in COLUMNS]
        lines.append(f"| {name} | {means[0]:.0f} | " + " | ".join(f"{100 * mean:.1f}" for mean in means[1:]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.many_classes")
    parser.add_argument("--data", type=Path, required=True, help="the folder with MNIST")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        measure(args.data, seed, rows)
    print(table(rows))
    sizes = {"pairs": PAIRS, "decided": DECIDED, "attacked": ATTACKED}
    kept.write_record(args.results, rows=rows, seeds=args.seeds, eps=THREAT.eps, **sizes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
