"""Which defense survives: `python -m benchmarks.reproduce.defenses --work DIR [--results FILE]`, on the digits.

Every way of training at the same number of epochs (one at ASK-Def's number of passes), and every classifier over them,
under the protocol of its own paper and under `worst-case`; three training seeds, the 500 test images of the published
split. The settings below were fixed before the first run. Networks and the rows of this suite are kept in the work
folder.
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
from torch import Tensor, nn

from benchmarks import kept
from robustknn import KNN, DkNN, FeatureExtractor, ReferenceSet, RetrievalClassifier, ThreatModel
from robustknn.attacks import AttackResult
from robustknn.classifiers import RAILS, Classifier, DAEkNN, Network, Randomized
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
    "adversarial, as many gradient passes as ASK-Def": Adversarial(eps=EPS, steps=7, warmup=0.3),
}
LONGER = {"adversarial, as many gradient passes as ASK-Def": 72}
"""Epochs where they are not EPOCHS: at batches of 64 a step of ASK-Def takes 7 (2 · 64 + 50) + 2 · 64 + 100 passes over
images, one of adversarial training 8 · 64, 2.88 times fewer."""
EVOLVED = 60
"""Test images, the first, on which RAILS is measured: a decision of it takes 2,200 forward passes."""
OVER = ("standard", "adversarial")
"""The networks that every classifier is built over; the others have the 15-NN and their own head."""


def network(name: str, source: DataSource, work: Path, seed: int) -> nn.Module:
    """A network, trained once and kept."""
    model = initialise(DigitsCNN, seed)
    config = TrainConfig(epochs=LONGER.get(name, EPOCHS), batch_size=64, lr=2e-3, seed=seed)
    file = work / f"{list(METHODS).index(name)}-{seed}.safetensors"
    return kept.network(file, model, lambda: train(model, source, config, method=METHODS[name]))


def classifiers(name: str, model: nn.Module, source: DataSource) -> dict[str, Classifier]:
    """What is built over a network."""
    features = FeatureExtractor(model, LAYERS)
    references = ReferenceSet.build(features, source.train, payload="softmax", keep_images=True)
    made: dict[str, Classifier] = {
        "its own head": Network(model, 10),
        "15-NN": KNN(references, 15, layer=EMBEDDING),
    }
    if name in OVER:
        hardened = adversarial_references(features, source.train, ThreatModel("linf", EPS), n_classes=10)
        made["DkNN, k = 15"] = DkNN(references, 15)
        made["DkNN, k = 5"] = DkNN(references, 5)
        made["DAEkNN, k = 5"] = DAEkNN(references, hardened, 5)
        made["retrieval, K = 50"] = RetrievalClassifier(references, 50, layer=EMBEDDING)
        made["RAILS, 200 candidates"] = RAILS(references, layers=[EMBEDDING], population=200)
    return made


def measure(classifier: Classifier, source: DataSource, seed: int) -> dict[str, float]:
    """The figures of a classifier; of one that draws, of its examples in draws that they have not seen."""
    random = isinstance(classifier, Randomized)
    places = torch.arange(EVOLVED if random else len(source.test))
    x, y, threat = source.test.batch(places), source.test.labels[places], ThreatModel("linf", EPS)
    published, worst = (a(classifier, x, y, threat, seed=seed) for a in (Published(), WorstCase()))
    left = [robust(classifier, result) for result in (published, worst)]
    return {
        "clean": float((worst.clean_labels == y).double().mean()),
        "published": float(left[0].mean()),
        "worst": float(torch.minimum(*left).mean()),
        "n": len(places),
    }


def robust(classifier: Classifier, result: AttackResult) -> Tensor:
    """How often each sample is right on its example, (n,) in [0, 1]; 0 where it is wrong without one."""
    if not isinstance(classifier, Randomized):
        return result.robust.double()
    fooled = classifier.fooled(result.x_adv, result.y, draws=10)
    return torch.where(result.clean_labels == result.y, 1 - fooled.double(), 0.0)


def table(rows: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    """Markdown, mean ± standard deviation over the seeds, in %."""
    lines = ["| training | classifier | clean | published protocol | worst case |", "|---|---|---:|---:|---:|"]
    for name, per_seed in rows.items():
        for kind in per_seed[0]:
            shown = []
            for column in ("clean", "published", "worst"):
                values = [100 * seed[kind][column] for seed in per_seed]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                shown.append(f"{statistics.mean(values):.1f}{spread}")
            lines.append(f"| {name} | {kind} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has no row in the work folder yet, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.defenses")
    parser.add_argument("--work", type=Path, required=True, help="where networks and finished rows are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    source = load("digits", protocol="published")
    rows: dict[str, list[Any]] = {name: [] for name in METHODS}
    suite = kept.digest(WorstCase())
    for seed in args.seeds:
        for place, name in enumerate(METHODS):
            found = {}
            for kind, classifier in classifiers(name, network(name, source, args.work, seed), source).items():
                file = args.work / f"{place}-{seed}-{kind.replace(' ', '-')}-{suite}.json"
                found[kind] = kept.row(file, partial(measure, classifier, source, seed))
                print(f"{name}, {kind}, seed {seed}: {found[kind]}", file=sys.stderr, flush=True)
            rows[name].append(found)
    print(table(rows))
    kept.write_record(args.results, rows=rows, eps=EPS, seeds=list(args.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
