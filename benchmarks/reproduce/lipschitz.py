"""A kNN on 1-Lipschitz features: `python -m benchmarks.reproduce.lipschitz DATA --work DIR [--results FILE]`.

Certified and attacked accuracy in L2. The network and finished rows are kept in the work folder. MNIST needs
ROBUSTKNN_DATA.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import kept
from robustknn import KNN, FeatureExtractor, ReferenceSet, ThreatModel, WorstCase
from robustknn.certification import InputCertificate, Lipschitz
from robustknn.datasets import DataSource, load
from robustknn.models import LipschitzCNN, lipschitz_bound
from robustknn.training import LipschitzMargin, TrainConfig, initialise, train

NEIGHBORS = (1, 5, 75)
LAYERS = ("embed", "fc")
RAW = (1, 5)


@dataclass(frozen=True)
class Case:
    """What differs between data sets."""

    radii: tuple[float, ...]
    epochs: int
    margin: float
    batch_size: int
    network: dict[str, int]


CASES = {
    "digits": Case((0.25, 0.5, 0.75), 25, 0.5, 64, {"image_size": 8, "width": 16, "embedding": 64}),
    "mnist": Case((0.5, 1.0, 1.58), 6, 1.58, 256, {}),
}


def network(work: Path, source: DataSource, case: Case, seed: int) -> nn.Module:
    """The network, trained once and kept."""
    config = TrainConfig(case.epochs, case.batch_size, lr=3e-3, schedule="one-cycle", seed=seed)
    model = initialise(partial(LipschitzCNN, **case.network), seed)
    file = work / f"lipschitz-{case.epochs}-{case.margin}-{seed}.safetensors"
    return kept.network(file, model, lambda: train(model, source, config, method=LipschitzMargin(case.margin)))


def measure(
    references: ReferenceSet, k: int, layer: str, source: DataSource, n: int, radii: Sequence[float], seed: int
) -> dict[str, Any]:
    """Certified and attacked accuracy of one kNN on the first n test images."""
    knn = KNN(references, k, layer=layer)
    x, y = source.test.batch(torch.arange(n)), source.test.labels[:n]
    certified = Lipschitz()(knn, x)
    row: dict[str, Any] = {"clean": float((certified.labels == y).double().mean())}
    shares = certified.accuracy(y, radii).tolist()
    for eps, share in zip(radii, shares, strict=True):
        attacked = WorstCase("fast")(knn, x, y, ThreatModel("l2", eps), seed=seed).robust
        row[f"{eps}"] = {"certified": share, "attacked": float(attacked.double().mean())}
        held = (certified.labels == y) & (certified.radius >= eps)
        row[f"{eps}"]["violations"] = int((held & ~attacked).sum())
    row["median radius"] = float(certified.radius.median())
    return row


def raw(k: int, source: DataSource, n: int, radii: Sequence[float]) -> dict[str, Any]:
    """Certified accuracy of a kNN on raw pixels, on the first n test images: by geometry alone."""
    knn = KNN(ReferenceSet.build(FeatureExtractor(nn.Flatten()), source.train), k)
    certified = InputCertificate()(knn, source.test.batch(torch.arange(n)))
    y = source.test.labels[:n]
    shares = certified.accuracy(y, radii).tolist()
    row: dict[str, Any] = {f"{eps}": {"certified": share} for eps, share in zip(radii, shares, strict=True)}
    return {"clean": float((certified.labels == y).double().mean()), **row}


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not kept, measure what has no row yet, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.lipschitz")
    parser.add_argument("data", choices=list(CASES))
    parser.add_argument("--work", type=Path, required=True, help="where the network and finished rows are kept")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=500, help="the first test images")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    case, source = CASES[args.data], load(args.data, protocol="published")
    model = network(args.work, source, case, args.seed)
    references = ReferenceSet.build(FeatureExtractor(model, LAYERS), source.train)
    rows: dict[str, Any] = {"bounds": {layer: lipschitz_bound(model, layer) for layer in LAYERS}}
    for layer, k in product(LAYERS, NEIGHBORS):
        file = args.work / f"lipschitz-{args.data}-{args.seed}-{layer}-{k}-{args.samples}.json"
        what = references, k, layer, source, args.samples, case.radii, args.seed
        rows[f"{layer}, k = {k}"] = kept.row(file, partial(measure, *what))
        print(layer, k, rows[f"{layer}, k = {k}"], flush=True)
    if args.data == "digits":  # those of MNIST: benchmarks.reproduce.certified_mnist
        for k in RAW:
            rows[f"input, k = {k}"] = raw(k, source, args.samples, case.radii)
            print("input", k, rows[f"input, k = {k}"], flush=True)
    kept.write_record(args.results, rows=rows, case=asdict(case), seed=args.seed, samples=args.samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
