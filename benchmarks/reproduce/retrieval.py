"""What retrieval holds and against whom: `python -m benchmarks.reproduce.retrieval [--n 300] [--seeds 0 1 2]`.

Digits. Two networks a seed (one defended, one a stranger's) are trained on every second training image. The database is
those images ("seen") or the others ("unseen"), without their labels. L2 radius: a share of each image's own norm. The
share of the test images that stay right: clean, under examples of the stranger's network (black-box), of the defended
network (gray-box) and of the adaptive attack on the very classifier. Nothing is chosen here.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import kept
from benchmarks.record import versions
from robustknn import (
    PGD,
    Adaptive,
    CrossEntropy,
    FeatureExtractor,
    ReferenceSet,
    RetrievalClassifier,
    ThreatModel,
    TrainConfig,
    train,
)
from robustknn.classifiers import Classifier, Network
from robustknn.datasets import DataSource, Split, load
from robustknn.fitting import with_projection
from robustknn.models import DigitsCNN
from robustknn.payload import TopSoftmax
from robustknn.recipes import web_scale_features
from robustknn.training import initialise

COLUMNS = ("clean", "black", "gray", "white")
Rows = dict[str, list[tuple[float, ...]]]


def right(classifier: Classifier, x: Tensor, y: Tensor) -> float:
    return float((classifier.labels(x) == y).double().mean())


def networks(source: DataSource, seen: Tensor, seed: int) -> tuple[DigitsCNN, DigitsCNN]:
    """The defended network and a stranger's, on the same images."""
    made = []
    for start in (seed, 100 + seed):
        model = initialise(DigitsCNN, start)
        part = replace(source, train=source.train.subset(seen))
        train(model, part, TrainConfig(epochs=20, batch_size=64, lr=2e-3, seed=start))
        made.append(model)
    return made[0], made[1]


def measure(source: DataSource, seed: int, n: int, share: float, rows: Rows) -> None:
    seen = torch.arange(len(source.train)) % 2 == 0
    model, stranger = networks(source, seen, seed)
    x, y = source.test.batch(torch.arange(n)), source.test.labels[:n]
    threat = ThreatModel("l2", share * x.flatten(1).norm(dim=1))
    transfer = PGD(CrossEntropy())
    black, gray = (transfer(Network(m, 10), x, y, threat, seed=seed).x_adv for m in (stranger, model))

    def add(name: str, classifier: Classifier, white: bool = True) -> None:
        found = [right(classifier, v, y) for v in (x, black, gray)]
        attack = PGD(Adaptive()) if isinstance(classifier, RetrievalClassifier) else transfer
        if white:
            found.append(right(classifier, attack(classifier, x, y, threat, seed=seed).x_adv, y))
        rows[name].append(tuple(found))
        print(seed, name, *(f"{v:.3f}" for v in found), flush=True)

    def database(split: Split, features: FeatureExtractor, payload: object = "softmax") -> ReferenceSet:
        return ReferenceSet.build(features, split, payload=payload, labels="payload")  # type: ignore[arg-type]

    add("network", Network(model, 10))
    parts = {"seen": source.train.subset(seen), "unseen": source.train.subset(~seen)}
    for name, split in parts.items():
        features = with_projection(FeatureExtractor(model, "relu3"), split, 64)
        held = database(split, features)
        for k, weighting in product((1, 5, 15, 50, 100), ("UW", "CBW-E", "CBW-D")):
            classifier = RetrievalClassifier(held, k, weighting=weighting)
            add(f"{name}, K = {k}, {weighting}", classifier, white=k not in (5, 100))
    split = parts["unseen"]
    for top in (1, 2, 5, 10):
        held = database(split, with_projection(FeatureExtractor(model, "relu3"), split, 64), TopSoftmax(top))
        add(f"unseen, K = 15, CBW-D, the {top} largest", RetrievalClassifier(held, 15), white=False)
    for recipe, layer, components in (
        ("average", "relu2", 32),
        ("average", "relu3", 32),
        ("rmac", "relu2", 32),
        ("rmac-bits", "relu2", 64),
        ("rmac-bits", "relu3", 64),
    ):
        features = web_scale_features(model, layer, split, n_components=components, recipe=recipe)
        add(f"unseen, K = 15, CBW-D, {layer} {recipe} {components}", RetrievalClassifier(database(split, features), 15))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--share", type=float, default=0.15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: Rows = defaultdict(list)
    for seed in given.seeds:
        measure(load("digits"), seed, given.n, given.share, rows)
    print(versions())
    print("| | " + " | ".join(COLUMNS) + " |\n|---" + "|---:" * len(COLUMNS) + "|")
    for name, found in rows.items():
        means = [f"{statistics.mean(v):.3f}" for v in zip(*found, strict=True)]
        print(f"| {name} | " + " | ".join([*means, "", ""][: len(COLUMNS)]) + " |")
    kept.write_record(given.results, rows=rows, columns=COLUMNS, n=given.n, share=given.share, seeds=given.seeds)


if __name__ == "__main__":
    main()
