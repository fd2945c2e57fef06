"""A kNN on 1-Lipschitz features, MNIST: `python -m benchmarks.reproduce.lipschitz_mnist --work DIR [--results FILE]`.

The network and finished rows are kept in the work folder. Needs ROBUSTKNN_DATA.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import kept
from robustknn import KNN, FeatureExtractor, ReferenceSet, ThreatModel, WorstCase
from robustknn.certification import Lipschitz
from robustknn.datasets import DataSource, load
from robustknn.models import LipschitzCNN, lipschitz_bound
from robustknn.training import LipschitzMargin, TrainConfig, initialise, train

RADII = (0.5, 1.0, 1.58)
NEIGHBORS = (1, 5, 75)
LAYERS = ("embed", "fc")


def network(work: Path, source: DataSource, epochs: int, margin: float, seed: int) -> nn.Module:
    """The network, trained once and kept."""
    config = TrainConfig(epochs=epochs, batch_size=256, lr=3e-3, schedule="one-cycle", seed=seed)
    model = initialise(LipschitzCNN, seed)
    file = work / f"lipschitz-{epochs}-{margin}-{seed}.safetensors"
    return kept.network(file, model, lambda: train(model, source, config, method=LipschitzMargin(margin)))


def measure(references: ReferenceSet, k: int, layer: str, source: DataSource, n: int, seed: int) -> dict[str, Any]:
    """Certified and attacked accuracy of one kNN on the first n test images."""
    knn = KNN(references, k, layer=layer)
    x, y = source.test.batch(torch.arange(n)), source.test.labels[:n]
    certified = Lipschitz()(knn, x)
    row: dict[str, Any] = {"clean": float((certified.labels == y).double().mean())}
    shares = certified.accuracy(y, RADII).tolist()
    for eps, share in zip(RADII, shares, strict=True):
        attacked = WorstCase("fast")(knn, x, y, ThreatModel("l2", eps), seed=seed).robust
        row[f"{eps}"] = {"certified": share, "attacked": float(attacked.double().mean())}
        held = (certified.labels == y) & (certified.radius >= eps)
        row[f"{eps}"]["violations"] = int((held & ~attacked).sum())
    row["median radius"] = float(certified.radius.median())
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not kept, measure what has no row yet, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.lipschitz_mnist")
    parser.add_argument("--work", type=Path, required=True, help="where the network and finished rows are kept")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--margin", type=float, default=1.58)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    source = load("mnist", protocol="published")
    model = network(args.work, source, args.epochs, args.margin, args.seed)
    references = ReferenceSet.build(FeatureExtractor(model, LAYERS), source.train)
    rows: dict[str, Any] = {"bounds": {layer: lipschitz_bound(model, layer) for layer in LAYERS}}
    for layer in LAYERS:
        for k in NEIGHBORS:
            file = args.work / f"lipschitz-{args.epochs}-{args.margin}-{args.seed}-{layer}-{k}-{args.samples}.json"
            measured = kept.row(
                file, lambda k=k, layer=layer: measure(references, k, layer, source, args.samples, args.seed)
            )
            rows[f"{layer}, k = {k}"] = measured
            print(layer, k, measured, flush=True)
    settings = {"epochs": args.epochs, "margin": args.margin, "seed": args.seed, "samples": args.samples}
    kept.write_record(args.results, rows=rows, **settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
