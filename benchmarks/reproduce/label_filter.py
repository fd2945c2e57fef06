"""Deep kNN label filtering on scikit-learn's digits with wrong labels: `python -m benchmarks.reproduce.label_filter`.

Networks trained on noisy, filtered and clean labels, and on the right ones of the noisy labels; three seeds.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import kept
from robustknn.datasets import Split, load
from robustknn.models import DigitsCNN
from robustknn.training import TrainConfig, accuracy, filter_labels, initialise, train, with_symmetric_noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.3, help="of the labels that are wrong")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument(
        "--preliminary", type=int, nargs="+", default=[5, 25], help="epochs of the network that filters"
    )
    parser.add_argument("--neighbors", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    given = parser.parse_args()
    rows: dict[str, dict[str, dict[str, float]]] = {}
    torch.set_num_threads(1)
    source = replace(load("digits", protocol="published"), validation=None)

    def fit(split: Split, seed: int, epochs: int) -> DigitsCNN:
        model = initialise(DigitsCNN, seed)
        config = TrainConfig(epochs=epochs, batch_size=64, lr=2e-3, seed=seed)
        train(model, replace(source, train=split), config)
        assert isinstance(model, DigitsCNN)
        return model

    print(f"{len(source.train)} training and {len(source.test)} test digits, {given.share:.0%} wrong labels")
    for seed in range(given.seeds):
        noisy = with_symmetric_noise(source.train, given.share, source.n_classes, seed)
        wrong = noisy.labels != source.train.labels
        for name, split in (("noisy", noisy), ("clean", source.train), ("right ones", source.train.subset(~wrong))):
            right = accuracy(fit(split, seed, given.epochs), source.test)
            rows.setdefault(str(seed), {})[name] = {"right": right}
            print(f"seed {seed} {name}: {right:.3f}", flush=True)
        for epochs in given.preliminary:
            found = filter_labels(fit(noisy, seed, epochs), noisy, given.neighbors)
            right = accuracy(fit(found.split, seed, given.epochs), source.test)
            missed, lost = int((found.kept & wrong).sum()), int((~found.kept & ~wrong).sum())
            rows[str(seed)][f"filtered after {epochs} epochs"] = {
                "right": right,
                "kept": len(found.split),
                "wrong labels": int(wrong.sum()),
                "wrong labels kept": missed,
                "right labels lost": lost,
            }
            print(
                f"seed {seed} filtered after {epochs} epochs: {right:.3f}; kept {len(found.split)}, of them {missed} "
                f"of {int(wrong.sum())} wrong labels; {lost} right labels lost",
                flush=True,
            )
    kept.write_record(given.results, rows=rows, share=given.share, epochs=given.epochs, neighbors=given.neighbors)


if __name__ == "__main__":
    main()
