"""DAEkNN as its network is trained on.

`python -m benchmarks.reproduce.daeknn_training --network RUN --data DIR --work DIR`.

The preset `cpu` trains the network of arXiv 2108.06797 adversarially at 60/255 for 20 epochs, and at 80/255 it is less
robust than the published one. Here it goes on: five epochs at the same learning rate, each with a fresh optimizer, and,
from the 20th again, eight in which the learning rate falls to 0 by a cosine. After each: the network's accuracy at both
radii. After the 20th, the 24th and the last of the eight: DAEkNN with references hardened at 60 and at 80/255 under the
protocol of the paper on all test images of MNIST and, on a counted random choice of 300, under the attacks that see the
classifier: one run of 100 steps each, and the worst case.

`--network` is the folder that `robustknn train` gave (docs/results/daeknn-table1.md names the command; `reproduce`
keeps it under `models`). What is done is kept in the work folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import kept
from robustknn import ASK, FeatureExtractor, ReferenceSet, ThreatModel, rng
from robustknn.attacks import APGD, Attack
from robustknn.classifiers import Classifier, DAEkNN, Network
from robustknn.datasets import DataSource, load
from robustknn.models import load_model
from robustknn.objectives import Adaptive
from robustknn.progress import Console
from robustknn.recipes import Hardening, WorstCase, adversarial_references
from robustknn.recipes.attacks import pgd_transfer
from robustknn.training import Adversarial, TrainConfig, train

FIRST, LAST, SHOWN = 20, 25, (20, 24)
FALLING = "8 epochs of a falling learning rate"
METHOD = Adversarial(eps=60 / 255, step=20 / 255, steps=10)
LAYERS = ("relu2", "relu3")
TRAINED, ATTACKED = 60 / 255, 80 / 255
N = 300
PROTOCOL = pgd_transfer(steps=10, absolute_step=20 / 255)
STRONG: dict[str, Attack] = {
    "ASK, 100 steps": APGD(ASK(), steps=100),
    "adaptive, 100 steps": APGD(Adaptive(), steps=100),
    "worst case": WorstCase("standard"),
}


def on_with(network: nn.Module, source: DataSource, **settings: Any) -> None:
    """Train on, with a fresh optimizer."""
    config = TrainConfig(precision="bf16", channels_last=True, **settings)
    train(network, source, config, method=METHOD, progress=Console())
    network.eval()


class Rows:
    """What was measured, kept file by file."""

    def __init__(self, work: Path, source: DataSource) -> None:
        self.work, self.source, self.found = work, source, dict[str, dict[str, float]]()
        self.x, self.y = source.test.batch(torch.arange(len(source.test))), source.test.labels

    def measure(self, name: str, column: str, right: Callable[[], Tensor]) -> None:
        """The share of right decisions."""
        file = self.work / f"{name}, {column}.json".replace("/", "-")
        share = kept.row(file, lambda: float(right().double().mean()))
        self.found.setdefault(name, {})[column] = share
        print(f"{name}, {column}: {share:.4f}", flush=True)

    def right(self, classifier: Classifier, x: Tensor) -> Tensor:
        """Whether it is right on each of these test images, clean or attacked."""
        labels = torch.cat([classifier.labels(classifier.place(part)) for part in x.split(500)])
        return labels == self.y

    def stage(self, name: str, network: nn.Module, defended: bool) -> None:
        """The network itself and, where it is asked for, DAEkNN on it with both hardening strengths."""
        victim, ids = Network(network, 10), self.source.test.ids

        @cache
        def examples(eps: float) -> Tensor:
            threat = ThreatModel("linf", eps)
            return PROTOCOL(victim, self.x, self.y, threat, sample_ids=ids, batch_size=500).x_adv

        self.measure(name, "the network, SA", lambda: self.right(victim, self.x))
        for eps in (TRAINED, ATTACKED):
            said = f"the network, AA at {255 * eps:g}/255"
            self.measure(name, said, lambda eps=eps: self.right(victim, examples(eps)))  # type: ignore[misc]
        if not defended:
            return

        # 2,000 references a class, as in the paper.
        features, images = FeatureExtractor(network, LAYERS), self.source.train.per_class(2000)
        clean = cache(lambda: ReferenceSet.build(features, images, n_classes=10, progress=Console()))
        some = rng.permutation(len(self.y), 0, "worst case")[:N].sort().values

        @cache
        def defense(eps: float) -> DAEkNN:
            hardening = Hardening(ThreatModel("linf", eps), PROTOCOL)
            made = adversarial_references(features, images, hardening, n_classes=10, progress=Console())
            return DAEkNN(clean(), made, 5)

        def robust(attack: Attack, eps: float) -> Tensor:
            x, y, threat = self.x[some], self.y[some], ThreatModel("linf", ATTACKED)
            return attack(defense(eps), x, y, threat, sample_ids=ids[some], batch_size=50).robust

        for eps in (TRAINED, ATTACKED):
            said = f"DAEkNN hardened at {255 * eps:g}/255"
            self.measure(name, f"{said}, SA", lambda eps=eps: self.right(defense(eps), self.x))  # type: ignore[misc]
            self.measure(name, f"{said}, AA", lambda eps=eps: self.right(defense(eps), examples(ATTACKED)))  # type: ignore[misc]
            for called, attack in STRONG.items():
                self.measure(name, f"{said}, {called}", partial(robust, attack, eps))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has no row in the work folder yet, and print all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.daeknn_training")
    parser.add_argument("--network", type=Path, required=True, help="the run of 20 epochs that is gone on with")
    parser.add_argument("--data", required=True, help="the folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="where networks and finished rows are kept")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    source = load("mnist", root=args.data, protocol="standard")
    rows = Rows(args.work, source)

    def start() -> nn.Module:
        return load_model("mnist-cnn", args.network, form="unpadded", dropout=0.5).eval()

    network = start()
    for epoch in range(FIRST, LAST + 1):
        if epoch > FIRST:
            file = args.work / f"epoch-{epoch}.safetensors"
            kept.network(file, network, lambda e=epoch: on_with(network, source, epochs=1, seed=e))  # type: ignore[misc]
        rows.stage(f"{epoch} epochs", network, defended=epoch in SHOWN)
    last = start()
    kept.network(
        args.work / "falling.safetensors", last, lambda: on_with(last, source, epochs=8, schedule="cosine", seed=0)
    )
    rows.stage(FALLING, last, defended=True)
    kept.write_record(args.results, rows=rows.found, n=len(rows.y), n_strong=N, seed=0, eps=ATTACKED, trained=TRAINED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
