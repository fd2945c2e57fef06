"""RAILS on scikit-learn's digits, attacked blind and knowing it: `python -m benchmarks.reproduce.rails`.

Every example is judged by fresh draws, which no attack has seen.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks import kept
from robustknn import KNN, FeatureExtractor, ReferenceSet, ThreatModel
from robustknn.attacks import PGD, Attack
from robustknn.classifiers import RAILS, Classifier
from robustknn.datasets import load
from robustknn.models import DigitsCNN
from robustknn.objectives import Evolved
from robustknn.recipes.attacks import pgd_transfer
from robustknn.training import TrainConfig, initialise, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--eps", type=float, default=0.15, help="L∞ radius")
    parser.add_argument("--population", type=int, default=1000)
    parser.add_argument("--attacked", type=int, default=200, help="population that the evolved attack looks at")
    parser.add_argument("--draws", type=int, default=3, help="fresh draws that judge")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    given = parser.parse_args()
    rows: dict[str, dict[str, dict[str, float]]] = {}
    torch.set_num_threads(1)
    source = load("digits", protocol="published")
    part = source.test.subset(torch.arange(len(source.test) - given.samples, len(source.test)))
    x, y, threat = part.batch(torch.arange(len(part))), part.labels, ThreatModel("linf", given.eps)
    for seed in given.seeds:
        model = initialise(DigitsCNN, seed)
        train(model, source, TrainConfig(epochs=25, batch_size=64, lr=2e-3, seed=seed))
        references = ReferenceSet.build(FeatureExtractor(model, ["relu3"]), source.train, keep_images=True)
        rails = RAILS(references, population=given.population)
        stage = rails.knn_stage()
        small = RAILS(references, population=given.attacked)
        evolved = {"objective": Evolved(), "keep": "last", "steps": 20, "check_every": 2}
        attacks: dict[str, tuple[Classifier, Attack]] = {
            "PGD on the network": (stage, pgd_transfer()),
            "ASK on the kNN stage": (stage, PGD()),
            "ASK on 15 neighbors, last iterate": (KNN(references, 15), PGD(keep="last", steps=100)),
            "evolved": (small, PGD(**evolved)),
            "evolved, random start": (small, PGD(**evolved, start="random")),
        }
        examples = {"none": x}
        spent = {"none": 0.0}
        for name, (victim, attack) in attacks.items():
            began = time.perf_counter()
            examples[name] = attack(victim, x, y, threat).x_adv
            spent[name] = time.perf_counter() - began
        # Of every sample's examples, the one that fools most draws: other draws than those that judge.
        shares = torch.stack([rails.fooled(e, y, draws=given.draws, seed=2) for e in examples.values()])
        every = torch.stack(list(examples.values()))
        examples["worst of these"] = every[shares.argmax(0), torch.arange(len(x))]
        for name, found in examples.items():
            with torch.no_grad():
                network = float((model(found).argmax(1) == y).double().mean())
            neighbors = float((stage.labels(found) == y).double().mean())
            fresh = 1 - float(rails.fooled(found, y, draws=given.draws).mean())
            rows.setdefault(str(seed), {})[name] = {"network": network, "stage": neighbors, "rails": fresh}
            print(
                f"seed {seed} {name}: network {network:.3f}, kNN stage {neighbors:.3f}, RAILS {fresh:.3f} "
                f"({spent.get(name, 0):.0f} s to attack)",
                flush=True,
            )
    settings = {key: value for key, value in vars(given).items() if key != "results"}
    kept.write_record(given.results, rows=rows, settings=settings)


if __name__ == "__main__":
    main()
