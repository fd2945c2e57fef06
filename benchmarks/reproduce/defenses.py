"""Which defense survives: `python -m benchmarks.reproduce.defenses --work DIR [--results FILE]`, on the digits.

Every way of training at the same number of epochs (one at ASK-Def's number of passes), and every classifier over them,
under the protocol of its own paper and under `worst-case` (a 15-NN: `worst-case-ask-def`, RAILS also: what goes on past
the draw that it meets); three training seeds, the 500 test images of the published split. The settings below were fixed
before the first run. Networks and the rows of this suite are kept in the work folder.
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
from robustknn.attacks import PGD, Attack, AttackResult
from robustknn.classifiers import RAILS, Classifier, DAEkNN, Network, Randomized
from robustknn.datasets import DataSource, load
from robustknn.models import DigitsCNN
from robustknn.objectives import ASK, Evolved, KNNStage
from robustknn.recipes import Published, PublishedASKDef, WorstCase, WorstCaseASKDef, adversarial_references
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
GOING_ON = (
    PGD(KNNStage(ASK(n_neighbors=15)), steps=100, keep="last"),
    PGD(Evolved(), steps=20, check_every=2, start="random", keep="last"),
)
"""Attacks on RAILS that do not stop at the draw that they meet."""
EVOLVED = 40
"""Test images, the first, on which RAILS is measured: a decision of it takes 1,100 forward passes."""
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
        made["RAILS, 100 candidates"] = RAILS(references, layers=[EMBEDDING], population=100)
    return made


def measure(classifier: Classifier, source: DataSource, seed: int, of_ask_def: bool) -> dict[str, float]:
    """The figures of a classifier; of one that draws, of its examples in draws that they have not seen."""
    random = isinstance(classifier, Randomized)
    places = torch.arange(EVOLVED if random else len(source.test))
    x, y, threat = source.test.batch(places), source.test.labels[places], ThreatModel("linf", EPS)
    protocol = PublishedASKDef() if of_ask_def else Published()
    # The same suite on every 15-NN, so that a network that was trained against ASK is not searched harder than others.
    suite = WorstCaseASKDef(LAYERS) if isinstance(classifier, KNN) else WorstCase()
    attacks: list[Attack] = [protocol, suite, *(GOING_ON if isinstance(classifier, RAILS) else ())]
    results = [attack(classifier, x, y, threat, seed=seed) for attack in attacks]
    return {
        "clean": float((results[0].clean_labels == y).double().mean()),
        "published": float(robust(classifier, results[:1]).mean()),
        "worst": float(robust(classifier, results).mean()),
        "n": len(places),
    }


def robust(classifier: Classifier, results: Sequence[AttackResult]) -> Tensor:
    """How often each sample is right on the worst of its examples, (n,) in [0, 1]; 0 where it is wrong without one.

    Of a classifier that draws: on the example that fools most of ten draws, judged by ten others.
    """
    if not isinstance(classifier, Randomized):
        return torch.stack([result.robust for result in results]).all(0).double()
    y, clean = results[0].y, results[0].clean_labels
    every = torch.stack([result.x_adv for result in results])
    shares = torch.stack([classifier.fooled(x, y, draws=10, seed=2) for x in every])
    fooled = classifier.fooled(every[shares.argmax(0), torch.arange(len(y))], y, draws=10)
    return torch.where(clean == y, 1 - fooled, 0.0)


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
    suite = kept.digest(WorstCaseASKDef(LAYERS))
    for seed in args.seeds:
        for place, name in enumerate(METHODS):
            found = {}
            for kind, classifier in classifiers(name, network(name, source, args.work, seed), source).items():
                of_ask_def = name.startswith("ASK-Def") and isinstance(classifier, KNN)
                file = args.work / f"{place}-{seed}-{kind.replace(' ', '-')}-{suite}.json"
                found[kind] = kept.row(file, partial(measure, classifier, source, seed, of_ask_def))
                print(f"{name}, {kind}, seed {seed}: {found[kind]}", file=sys.stderr, flush=True)
            rows[name].append(found)
    print(table(rows))
    kept.write_record(args.results, rows=rows, eps=EPS, seeds=list(args.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
