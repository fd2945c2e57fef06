"""Does the adaptive objective earn its place? `python -m benchmarks.reproduce.adaptive --work DIR [--data DIR] …`.

Twelve victims; on each the same PGD (steps, random starts, seeds) climbs ASK, Sitawarin & Wagner's hinge, AdvKNN and
the adaptive objective. Neighbors are looked up every ten steps, for the hinge at every step: it lives on fresh ones.
For every victim the paired difference (adaptive minus the best of the others, by mean accuracy over the seeds) is
printed with its 95 % interval over the samples. Nothing is chosen here: radii and victims are listed below and were
fixed before the first run.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import kept
from robustknn import KNN, DkNN, FeatureExtractor, ReferenceSet, ThreatModel, rng
from robustknn.attacks import PGD
from robustknn.classifiers import VoterClassifier
from robustknn.datasets import DataSource, load
from robustknn.models import DigitsCNN, MnistCNN, load_model
from robustknn.registry import objectives
from robustknn.training import TrainConfig, initialise, train

OBJECTIVES = ("ask", "neighbor-hinge", "advknn", "adaptive")
SEEDS = (0, 1, 2)
LOOKS = {"ask": 10, "neighbor-hinge": 1, "advknn": 10, "adaptive": 10}
"""Steps between two looks for neighbors."""


@dataclass(frozen=True)
class Victim:
    """A network, a classifier over it and a threat.

    Args:
        network: "standard", or "adversarial" at `hardened` (L∞).
        layers: of a DkNN, or the one of a kNN.
        references: how many training samples.
        steps: of PGD.
    """

    data: str
    layers: tuple[str, ...]
    k: int
    metric: str
    norm: str
    eps: float
    network: str = "standard"
    hardened: float = 0.0
    references: int = 20_000
    steps: int = 40

    @property
    def name(self) -> str:
        kind = "kNN" if len(self.layers) == 1 else f"DkNN, {len(self.layers)} layers"
        trained = f", hardened at {self.hardened:g}" if self.hardened else ""
        return f"{self.data}{trained}; {kind}, k = {self.k}, {self.metric}; {self.norm} {self.eps:g}"


MNIST = MnistCNN.feature_layers
DIGITS = DigitsCNN.feature_layers
VICTIMS = (
    Victim("digits", DIGITS[2:3], 3, "l2", "linf", 0.15),
    Victim("digits", DIGITS[2:3], 15, "l2", "l2", 0.5),
    Victim("digits", DIGITS[1:3], 75, "l2", "linf", 0.15),
    Victim("digits", DIGITS[2:3], 15, "l2", "linf", 0.2, "adversarial", 0.15),
    Victim("mnist", MNIST[2:3], 15, "l2", "linf", 0.1),
    Victim("mnist", MNIST[1:3], 75, "cosine", "linf", 0.1),
    Victim("mnist", MNIST[2:3], 3, "cosine", "l2", 1.5),
    Victim("mnist", MNIST[2:3], 75, "cosine", "linf", 0.25, "adversarial", 0.2),
    Victim("mnist", MNIST[1:3], 15, "l2", "linf", 0.25, "adversarial", 0.2),
    Victim("fashion-mnist", MNIST[2:3], 15, "l2", "linf", 0.02),
    Victim("fashion-mnist", MNIST[1:3], 75, "cosine", "linf", 0.02),
    Victim("cifar10", ("avgpool",), 15, "cosine", "linf", 1 / 255, steps=20),
)


# ------------------------------------------------------------------------------------------ networks


def harden(model: nn.Module, source: DataSource, eps: float, epochs: int, n: int, seed: int) -> None:
    """Adversarial training (Madry et al., arXiv 1706.06083): PGD with 7 steps, eps growing over the first half."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    total = epochs * math.ceil(n / 128)
    for epoch in range(epochs):
        for place, rows in enumerate(rng.permutation(n, seed, "harden", epoch).split(128)):
            x, y = source.train.batch(rows), source.train.labels[rows]
            now = eps * min(1.0, 2 * (epoch * math.ceil(n / 128) + place + 1) / total)
            threat, moved = ThreatModel("linf", now), x
            model.eval()
            for _ in range(7):
                moved = moved.detach().requires_grad_(True)
                loss = nn.functional.cross_entropy(model(moved), y, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, moved)
                moved = threat.project(moved.detach() + now / 3 * gradient.sign(), x)
            model.train()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(moved), y).backward()
            optimizer.step()
    model.eval()


def network(victim: Victim, source: DataSource, data: Path, work: Path, seed: int = 0) -> nn.Module:
    """The victim's network, trained once and kept in the work folder."""
    if victim.data == "cifar10":
        return load_model("resnet20", data / "models" / "resnet20-12fca82f.th")
    small = victim.data == "digits"
    model = initialise(DigitsCNN if small else MnistCNN, seed)

    def fit() -> None:
        if victim.hardened:
            harden(model, source, victim.hardened, 25 if small else 3, min(len(source.train), 20_000), seed)
        elif small:
            train(model, source, TrainConfig(epochs=25, batch_size=64, lr=2e-3, seed=seed))
        else:
            train(model, source, TrainConfig(epochs=3, batch_size=128, lr=1e-3, seed=seed))

    return kept.network(work / f"{victim.data}-{victim.hardened:g}.safetensors", model, fit)


# ------------------------------------------------------------------------------------------- figures


def measure(victim: Victim, args: argparse.Namespace) -> dict[str, Any]:
    """Robust accuracy of every objective on one victim, and the paired difference."""
    root = args.cifar if victim.data == "cifar10" else args.data
    source = load(victim.data, root=root, protocol="published")
    model = network(victim, source, args.data, args.work)
    source_train = source.train.first(min(victim.references, len(source.train)))
    references = ReferenceSet.build(FeatureExtractor(model, victim.layers), source_train)
    classifier: VoterClassifier
    if len(victim.layers) == 1:
        classifier = KNN(references, victim.k, metric=victim.metric)
    else:
        classifier = DkNN(references, victim.k, metric=victim.metric)
    test = source.test
    chosen = rng.permutation(len(test), 0, "adaptive")[: args.n].sort().values
    x, y = test.batch(chosen), test.labels[chosen]
    robust, seconds, passes = {}, {}, {}
    clean = 0.0
    for name in OBJECTIVES:
        objective, began = objectives.create(name), time.perf_counter()
        per_seed = []
        for seed in SEEDS:
            attack = PGD(objective=objective, steps=victim.steps, start="random", check_every=LOOKS[name])
            result = attack(classifier, x, y, ThreatModel(victim.norm, victim.eps), seed=seed, sample_ids=chosen)
            per_seed.append(result.robust)
            clean = float((result.clean_labels == y).double().mean())
        robust[name] = torch.stack(per_seed).double()  # (seeds, N)
        seconds[name] = time.perf_counter() - began
        passes[name] = float(result.gradient_passes.double().mean())
    accuracy = {name: float(r.mean()) for name, r in robust.items()}
    others = {name: a for name, a in accuracy.items() if name != "adaptive"}
    best = min(others, key=lambda name: others[name])
    low, high = interval(robust["adaptive"].mean(0) - robust[best].mean(0))
    return {
        "victim": victim.name,
        "n": len(y),
        "clean": clean,
        "accuracy": accuracy,
        "per_seed": {name: r.mean(1).tolist() for name, r in robust.items()},
        "best_other": best,
        "difference": accuracy["adaptive"] - accuracy[best],
        "interval": [low, high],
        "seconds": seconds,
        "gradient_passes": passes,
    }


def interval(difference: Tensor) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences over samples, by the normal approximation."""
    mean = float(difference.mean())
    half = 1.96 * float(difference.std()) / math.sqrt(len(difference))
    return mean - half, mean + half


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown table of what was measured."""
    head = "| victim | n | clean | " + " | ".join(OBJECTIVES) + " | adaptive − best other, points [95 %] |"
    lines = [head, "|---" * (len(OBJECTIVES) + 4) + "|"]
    for r in rows:
        values = " | ".join(f"{100 * r['accuracy'][o]:.1f}" for o in OBJECTIVES)
        low, high = (100 * v for v in r["interval"])
        gap = f"{100 * r['difference']:+.1f} [{low:+.1f}, {high:+.1f}] ({r['best_other']})"
        lines.append(f"| {r['victim']} | {r['n']} | {100 * r['clean']:.1f} | {values} | {gap} |")
    return "\n".join(lines)


def shown(number: int, args: argparse.Namespace) -> dict[str, Any]:
    """A victim's figures, printed as soon as they are there."""
    found = measure(VICTIMS[number - 1], args)
    print(table([found]).splitlines()[-1], flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the victims that have no result in the work folder yet, and print the table of all that have."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.adaptive")
    parser.add_argument("--data", type=Path, required=True, help="the folder with MNIST, FashionMNIST and models")
    parser.add_argument("--cifar", type=Path, help="the folder with cifar-10-batches-py; --data by default")
    parser.add_argument("--work", type=Path, required=True, help="where networks and finished victims are kept")
    parser.add_argument("--victims", type=int, nargs="*", default=range(1, len(VICTIMS) + 1), help="1 to 12")
    parser.add_argument("-n", type=int, default=1000, help="test samples (all that there are, when fewer)")
    parser.add_argument("--results", type=Path, help="where to write adaptive.json")
    args = parser.parse_args(argv)
    args.cifar = args.cifar or args.data
    args.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in args.victims:
        rows.append(kept.row(args.work / f"victim-{number:02d}-n{args.n}.json", partial(shown, number, args)))
    print(table(rows))
    median = statistics.median(r["difference"] for r in rows)
    print(f"median difference: {100 * median:+.2f} points; seeds {SEEDS}")
    kept.write_record(args.results, victims=rows, seeds=SEEDS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
