"""A smoothed kNN under attacks that see its noise and that do not: `python -m benchmarks.reproduce.smoothed_attacks`.

scikit-learn's digits, L2, a 15-NN under Gaussian noise. What counts is an example that fools draws which no attack saw.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import kept
from robustknn import KNN, PGD, FeatureExtractor, ReferenceSet, ThreatModel
from robustknn.attacks import Attack, Members
from robustknn.certification import Smoothed
from robustknn.datasets import load
from robustknn.models import DigitsCNN
from robustknn.objectives import ASK, ThroughNoise
from robustknn.recipes import WorstCase, pgd_transfer
from robustknn.training import TrainConfig, initialise, train

LAYER = "relu3"
ON_BASE = "`ask` on the 15-NN without noise, transferred"
ATTACKS: dict[str, Attack] = {
    "`pgd-transfer` (the network)": pgd_transfer(),
    ON_BASE: PGD(ASK()),
    "`ThroughNoise()`": PGD(ThroughNoise()),
    "`ThroughNoise(ASK())`": PGD(ThroughNoise(ASK())),
    "`worst-case-fast`": WorstCase("fast"),
}


def measure(seed: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Share left of one network, by attack and radius."""
    source = load("digits", protocol="published")
    model = initialise(DigitsCNN, seed)
    train(model, source, TrainConfig(epochs=25, batch_size=64, lr=2e-3, seed=seed))
    knn = KNN(ReferenceSet.build(FeatureExtractor(model, [LAYER]), source.train), 15)
    smoothed = Smoothed(knn, args.sigma, args.draws)
    x, y = source.test.batch(torch.arange(args.n)), source.test.labels[: args.n]
    right = smoothed.labels(x) == y
    left: dict[str, list[float]] = {"none": [float(right.double().mean())] * len(args.eps)}
    for name, attack in ATTACKS.items():
        left[name] = []
        for eps in args.eps:
            victim = knn if name == ON_BASE else smoothed
            found = attack(victim, x, y, ThreatModel("l2", eps), seed=seed).x_adv
            fooled = smoothed.fooled(found, y, draws=args.fresh)
            left[name].append(float((right * (1 - fooled)).mean()))
    return left


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the seeds that are missing in the work folder, and print the mean of all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.smoothed_attacks")
    parser.add_argument("--work", type=Path, required=True, help="where finished seeds are kept")
    parser.add_argument("--sigma", type=float, default=0.1, help="standard deviation of the noise")
    parser.add_argument("--draws", type=int, default=100, help="of noise, a decision")
    parser.add_argument("--fresh", type=int, default=5, help="fresh seeds that judge an example")
    parser.add_argument("--eps", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0], help="L2 radii")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-n", type=int, default=200, help="test samples")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    settings = {name: getattr(args, name) for name in ("sigma", "draws", "fresh", "eps", "n")}
    made = kept.digest(Members(tuple(ATTACKS.items())))
    start = "-".join(str(value) for value in settings.values()).replace(" ", "")
    files = [args.work / f"smoothed {start} {made} seed{seed}.json" for seed in range(args.seeds)]
    found = [kept.row(file, partial(measure, seed, args)) for seed, file in enumerate(files)]
    print("| attack | " + " | ".join(f"{eps:g}" for eps in args.eps) + " |\n|---|" + "---:|" * len(args.eps))
    for name in found[0]:
        columns = zip(*(one[name] for one in found), strict=True)
        print(f"| {name} | " + " | ".join(f"{100 * statistics.mean(c):.1f}" for c in columns) + " |")
    kept.write_record(args.results, **settings, seeds=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
