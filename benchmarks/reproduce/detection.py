"""Credibility and neighbor distance as detectors, on scikit-learn's digits: `python -m benchmarks.reproduce.detection`.

The DkNN is calibrated on samples of its own; what is attacked are the others. Only examples that fool it count.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import kept
from robustknn import DkNN, FeatureExtractor, ReferenceSet, ThreatModel
from robustknn.attacks import PGD, Attack, Credible
from robustknn.datasets import load
from robustknn.evaluation import Detection, detect, detect_by_credibility, neighbor_distance
from robustknn.evaluation.detection import SHARES
from robustknn.models import DigitsCNN
from robustknn.recipes.attacks import pgd_transfer
from robustknn.reports.roc import roc_chart
from robustknn.training import TrainConfig, initialise, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--eps", type=float, default=0.15, help="L∞ radius")
    parser.add_argument("--neighbors", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to write the figure of the first seed")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    given = parser.parse_args()
    rows: dict[str, dict[str, object]] = {}
    torch.set_num_threads(1)
    source = load("digits", protocol="published")
    held = source.calibration
    assert held is not None
    rest = source.test.subset(~torch.isin(source.test.ids, held.ids))
    x, y = rest.batch(torch.arange(len(rest))), rest.labels
    calm = held.batch(torch.arange(len(held)))
    for seed in range(given.seeds):
        model = initialise(DigitsCNN, seed)
        train(model, source, TrainConfig(epochs=25, batch_size=64, lr=2e-3, seed=seed))
        references = ReferenceSet.build(FeatureExtractor(model, ["relu2", "relu3"]), source.train)
        dknn = DkNN(references, given.neighbors).calibrate(held)
        attacks: dict[str, Attack] = {"pgd-transfer": pgd_transfer(), "ask": PGD()}
        attacks |= {f"credible at {100 * share:g} %": Credible(share=share) for share in SHARES}
        found: dict[str, Detection] = {}
        for name, attack in attacks.items():
            result = attack(dknn, x, y, ThreatModel("linf", given.eps))
            fooled = (result.clean_labels == y) & (result.labels != y)
            examples = result.x_adv[fooled]
            scores = [neighbor_distance(dknn, part) for part in (calm, x, examples)]
            found[f"{name}, credibility"] = detect_by_credibility(dknn, x, examples)
            found[f"{name}, distance"] = detect(*scores)
        for name, one in found.items():
            points = ", ".join(f"{100 * p.detected:.1f} ({100 * p.clean_rejected:.1f})" for p in one.points)
            shares = " / ".join(f"{100 * p.share:g}" for p in one.points)
            rows.setdefault(str(seed), {})[name] = {
                "auc": one.roc.auc,
                "examples": one.n_adversarial,
                "points": [[p.share, p.detected, p.clean_rejected] for p in one.points],
            }
            print(
                f"seed {seed} {name}: AUC {one.roc.auc:.3f}; detected (clean rejected) at {shares} %: {points}; "
                f"{one.n_adversarial} examples",
                flush=True,
            )
        if given.out is not None and not seed:
            shown = {name: one for name, one in found.items() if name.startswith(("ask", "credible at 10"))}
            given.out.write_bytes(roc_chart(shown).png)
    kept.write_record(given.results, rows=rows, eps=given.eps, neighbors=given.neighbors)


if __name__ == "__main__":
    main()
