"""Which defense survives: `python -m benchmarks.reproduce.defenses --work DIR [--results FILE]`, on the digits.

Every way of training at the same number of epochs, and every classifier over them, under the protocol of its own paper
and under `worst-case`; three training seeds, the 500 test images of the published split. The settings below were fixed
before the first run. Networks and finished rows are kept in the work folder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import kept
from robustknn import KNN, DkNN, FeatureExtractor, ReferenceSet, RetrievalClassifier, ThreatModel
from robustknn.classifiers import Classifier, DAEkNN, Network
from robustknn.datasets import DataSource, load
from robustknn.models import DigitsCNN
from robustknn.recipes import Published, WorstCase, adversarial_references
from robustknn.training import TRADES, Adversarial, ASKDef, Method, Standard, TrainConfig, fast, initialise, train

EPS, EPOCHS, SEEDS = 0.15, 25, (0, 1, 2)
EMBEDDING = DigitsCNN.embedding_layer
LAYERS = DigitsCNN.feature_layers[1:3]
METHODS: dict[str, Method] = {
    "standard": Standard(),
    "adversarial": Adversarial(eps=EPS, steps=7, warmup=0.3),
    "adversarial at half the radius": Adversarial(eps=EPS / 2, steps=7, warmup=0.3),
    "fast": fast(eps=EPS, warmup=0.3),
    "TRADES": TRADES(eps=EPS, steps=7, warmup=0.3),
    "ASK-Def (CE at half the radius, as published)": ASKDef(
        layers=(EMBEDDING,), eps=EPS / 2, ask_eps=EPS, steps=7, warmup=0.3
    ),
    "ASK-Def (both at the radius)": ASKDef(layers=(EMBEDDING,), eps=EPS, ask_eps=EPS, steps=7, warmup=0.3),
}
OVER = ("standard", "adversarial")
"""The networks that every classifier is built over; the others have the 15-NN and their own head."""


def network(name: str, source: DataSource, work: Path, seed: int) -> nn.Module:
    """A network, trained once and kept."""
    model = initialise(DigitsCNN, seed)
    config = TrainConfig(epochs=EPOCHS, batch_size=64, lr=2e-3, seed=seed)
    file = work / f"{list(METHODS).index(name)}-{seed}.safetensors"
    return kept.network(file, model, lambda: train(model, source, config, method=METHODS[name]))


def classifiers(name: str, model: nn.Module, source: DataSource) -> dict[str, Classifier]:
    """What is built over a network."""
    features = FeatureExtractor(model, LAYERS)
    references = ReferenceSet.build(features, source.train, payload="softmax")
    made: dict[str, Classifier] = {
        "its own head": Network(model, 10),
        "15-NN": KNN(references, 15, layer=EMBEDDING),
    }
    if name in OVER:
        hardened = adversarial_references(features, source.train, ThreatModel("linf", EPS), n_classes=10)
        made["DkNN, k = 15"] = DkNN(references, 15)
        made["DAEkNN, k = 5"] = DAEkNN(references, hardened, 5)
        made["retrieval, K = 50"] = RetrievalClassifier(references, 50, layer=EMBEDDING)
    return made


def measure(name: str, source: DataSource, work: Path, seed: int) -> dict[str, dict[str, float]]:
    """The figures of every classifier over one network."""
    places = torch.arange(len(source.test))
    x, y, threat = source.test.batch(places), source.test.labels, ThreatModel("linf", EPS)
    rows = {}
    for kind, classifier in classifiers(name, network(name, source, work, seed), source).items():
        published, worst = (a(classifier, x, y, threat, seed=seed) for a in (Published(), WorstCase()))
        rows[kind] = {
            "clean": float((worst.clean_labels == y).double().mean()),
            "published": float(published.robust.double().mean()),
            "worst": float((published.robust & worst.robust).double().mean()),
        }
    return rows


def table(rows: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    """Markdown, mean ± standard deviation over the seeds, in %."""
    lines = ["| training | classifier | clean | published protocol | worst case |", "|---|---|---:|---:|---:|"]
    for name, per_seed in rows.items():
        for kind in per_seed[0]:
            shown = []
            for column in ("clean", "published", "worst"):
                values = [100 * seed[kind][column] for seed in per_seed]
                shown.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
            lines.append(f"| {name} | {kind} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has no row in the work folder yet, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.defenses")
    parser.add_argument("--work", type=Path, required=True, help="where networks and finished rows are kept")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    source = load("digits", protocol="published")
    rows: dict[str, list[Any]] = {}
    for place, name in enumerate(METHODS):
        for seed in SEEDS:
            file = args.work / f"rows-{place}-{seed}.json"
            done = kept.row(file, partial(measure, name, source, args.work, seed))
            rows.setdefault(name, []).append(done)
    print(table(rows))
    kept.write_record(args.results, rows=rows, eps=EPS, seeds=SEEDS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
