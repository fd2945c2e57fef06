"""Forms of DAEkNN beside each other: `python -m benchmarks.reproduce.daeknn_forms --work DIR [--results FILE]`.

Digits, development only: networks are trained on the first 1,047 training images of the published split, which are the
references too, and the other 250 are attacked. Networks are trained by PGD (7 steps) at L∞ .15, references hardened
there, attacks at .2 (60 : 80, as the paper on MNIST); three training seeds. Networks and rows are kept in the work
folder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import kept
from robustknn import PGD, DkNN, FeatureExtractor, ReferenceSet, ThreatModel
from robustknn.attacks import Attack
from robustknn.classifiers import WAD, WAT, Classifier, DAEkNN, Network
from robustknn.classifiers.daeknn import WAT_SHARE
from robustknn.datasets import DataSource, load
from robustknn.models import DigitsCNN
from robustknn.objectives import Adaptive
from robustknn.recipes import Hardening, WorstCase, adversarial_references
from robustknn.recipes.attacks import pgd_transfer
from robustknn.training import Adversarial, Method, Standard, TrainConfig, initialise, train

TRAINED, ATTACKED, SEEDS, HELD = 0.15, 0.2, (0, 1, 2), 250
LAYERS = DigitsCNN.feature_layers[1:3]
ATTACKS: dict[str, Attack] = {
    "published": pgd_transfer(steps=10),
    "adaptive, 100 steps": PGD(Adaptive(), steps=100),
    "worst case": WorstCase(),
}


def network(method: Method, source: DataSource, file: Path, seed: int) -> nn.Module:
    """A network, trained once and kept."""
    model, config = initialise(DigitsCNN, seed), TrainConfig(epochs=30, batch_size=64, lr=2e-3, seed=seed)
    return kept.network(file, model, lambda: train(model, source, config, method=method))


def forms(source: DataSource, work: Path, seed: int) -> dict[str, Classifier]:
    """The classifiers, by name."""
    hardened = network(Adversarial(eps=TRAINED, steps=7, warmup=0.3), source, work / f"at-{seed}.safetensors", seed)
    plain = network(Standard(), source, work / f"standard-{seed}.safetensors", seed)
    features, others = FeatureExtractor(hardened, LAYERS), FeatureExtractor(plain, LAYERS)
    data = source.train
    clean, made = ReferenceSet.build(features, data), partial(adversarial_references, features, data, n_classes=10)
    same = made(ThreatModel("linf", TRAINED))
    several = [same, made(ThreatModel("linf", TRAINED / 2)), made(ThreatModel("l2", 0.8))]
    by_votes = Hardening(ThreatModel("linf", TRAINED), PGD(Adaptive(), steps=10, keep="last"))
    weak = adversarial_references(others, data, ThreatModel("linf", WAT_SHARE * TRAINED), n_classes=10)
    return {
        "its own head": Network(hardened, 10),
        "DkNN (WAD)": WAD(clean, 5),
        "DAEkNN": DAEkNN(clean, same, 5),
        "scale = mean": DAEkNN(clean, same, 5, scale="mean"),
        "weighting = released": DAEkNN(clean, same, 5, weighting="released"),
        "weighting = adversarial": DAEkNN(clean, same, 5, weighting="adversarial"),
        "three sets: Linf .15, Linf .075, L2 .8": DAEkNN(clean, several, 5),
        "references by an attack on the DkNN's votes": DAEkNN(clean, made(by_votes, classifier=DkNN(clean, 5)), 5),
        "WAT": WAT(ReferenceSet.build(others, data), weak, 5),
    }


def measure(classifier: Classifier, source: DataSource, seed: int) -> dict[str, float]:
    """The share right, clean and under every attack; the worst case is that of all of them, sample by sample."""
    x, y, threat = source.test.batch(torch.arange(HELD)), source.test.labels, ThreatModel("linf", ATTACKED)
    results = {name: attack(classifier, x, y, threat, seed=seed) for name, attack in ATTACKS.items()}
    found = {name: float(result.robust.double().mean()) for name, result in results.items()}
    every = torch.stack([result.robust for result in results.values()]).all(0)
    clean = next(iter(results.values())).clean_labels == y
    return {"clean": float(clean.double().mean()), **found, "worst case": float(every.double().mean())}


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown, mean ± standard deviation over the seeds, in %."""
    columns = ("clean", *ATTACKS)
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, found in rows.items():
        each = [[100 * seed[column] for seed in found] for column in columns]
        lines.append(
            f"| {name} | " + " | ".join(f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" for v in each) + " |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has no row in the work folder yet, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.daeknn_forms")
    parser.add_argument("--work", type=Path, required=True, help="where networks and finished rows are kept")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    whole = load("digits", protocol="published")
    n = len(whole.train) - HELD
    places = torch.arange(len(whole.train))
    source = replace(whole, train=whole.train.subset(places[:n]), test=whole.train.subset(places[n:]), validation=None)
    rows: dict[str, list[Any]] = {}
    for seed in SEEDS:
        for place, (name, classifier) in enumerate(forms(source, args.work, seed).items()):
            file = args.work / f"{place}-{seed}-{kept.digest(ATTACKS['worst case'])}.json"
            rows.setdefault(name, []).append(kept.row(file, partial(measure, classifier, source, seed)))
            print(f"{name}, seed {seed}: {rows[name][-1]}", file=sys.stderr, flush=True)
    print(table(rows))
    kept.write_record(args.results, rows=rows, trained=TRAINED, attacked=ATTACKED, n=HELD, seeds=list(SEEDS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
