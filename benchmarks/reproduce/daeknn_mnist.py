"""DAEkNN on MNIST beside its paper's tables, and what is left: `python -m benchmarks.reproduce.daeknn_mnist --help`.

    robustknn train --data mnist --protocol standard --model mnist-cnn --model-option form=unpadded \\
        --model-option dropout=0.5 --method adversarial --method-option eps=60/255 --method-option step=20/255 \\
        --method-option steps=10 --method-option warmup=0.2 --epochs 20 --precision bf16 --channels-last --out AT
    robustknn train --data mnist --protocol standard --model mnist-cnn --model-option form=unpadded \\
        --model-option dropout=0.5 --epochs 6 --precision bf16 --channels-last --out STANDARD
    python -m benchmarks.reproduce.daeknn_mnist --data DIR --adversarial AT --standard STANDARD --work DIR

The published setting (arXiv 2108.06797 and its notebooks): 2,000 references a class, k = 5, second and third
convolution, D_adv at 60/255, evaluation at 80/255 with 10 steps of 20/255 on the network's cross-entropy. Every row is
kept in the work folder when it is done.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import kept
from robustknn import PGD, DkNN, FeatureExtractor, ReferenceSet, ThreatModel, WorstCase, rng
from robustknn.attacks import Attack
from robustknn.classifiers import Classifier, DAEkNN, Network
from robustknn.datasets import load
from robustknn.models import MnistCNN, load_model
from robustknn.objectives import ASK
from robustknn.objectives.adaptive import Adaptive
from robustknn.recipes import Hardening, adversarial_references, pgd_transfer

LAYERS = MnistCNN.feature_layers
ATTACKED, HARDENED, STEP = 80 / 255, 60 / 255, 20 / 255
PUBLISHED = {
    "CNN": (99.06, 0.0),
    "AT-CNN": (98.4, 62.28),
    "DkNN": (98.78, 0.06),
    "DAEkNN": (97.9, 68.26),
}
"""Table I of the paper, MNIST: accuracy without attack and under it."""
STRENGTHS = (20, 40, 60, 80)


def plain(step: float = STEP) -> PGD:
    """The paper's attack: 10 steps from a random start, the last iterate, on the network."""
    return pgd_transfer(steps=10, absolute_step=step)


def published() -> dict[str, Attack]:
    """The column that the paper has."""
    return {"published": plain()}


def every() -> dict[str, Attack]:
    """The paper's column, two single runs that see the votes, and the worst case."""
    return {
        **published(),
        "ask-100": PGD(objective=ASK(), steps=100),
        "adaptive-100": PGD(objective=Adaptive(), steps=100),
        "worst-case": WorstCase(),
    }


class Bench:
    """Networks, references and samples, each made when first asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.source = args, load("mnist", root=args.data, protocol="standard")
        self.references = self.source.train.per_class(args.per_class)
        chosen = rng.permutation(len(self.source.test), 0, "daeknn")[: args.n].sort().values
        self.ids, self.x, self.y = chosen, self.source.test.batch(chosen), self.source.test.labels[chosen]
        self._made: dict[Any, Any] = {}

    def model(self, which: str) -> nn.Module:
        """The "adversarial" or the "standard" network."""
        place = self.args.adversarial if which == "adversarial" else self.args.standard
        return self._once(which, lambda: load_model("mnist-cnn", place, form="unpadded", dropout=0.5).eval())

    def clean(self, which: str, layers: tuple[str, ...]) -> ReferenceSet:
        """Clean references."""
        features = FeatureExtractor(self.model(which), layers)
        return self._once((which, layers), lambda: ReferenceSet.build(features, self.references))

    def hardened(self, which: str, layers: tuple[str, ...], eps: float) -> ReferenceSet:
        """D_adv: steps of a third of its radius, as the notebooks have them."""
        features = FeatureExtractor(self.model(which), layers)
        hardening = Hardening(ThreatModel("linf", eps), plain(eps / 3))
        return self._once(
            (which, layers, eps), lambda: adversarial_references(features, self.references, hardening, n_classes=10)
        )

    def dknn(self, which: str, layers: tuple[str, ...] = LAYERS[1:3]) -> DkNN:
        """The network's DkNN."""
        return DkNN(self.clean(which, layers), 5)

    def daeknn(
        self, which: str, eps: float = HARDENED, layers: tuple[str, ...] = LAYERS[1:3], **options: Any
    ) -> DAEkNN:
        """The network's DAEkNN."""
        return DAEkNN(self.clean(which, layers), self.hardened(which, layers, eps), 5, **options)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def rows(bench: Bench) -> dict[str, tuple[Callable[[], Classifier], dict[str, Attack]]]:
    """What is measured, by name: a classifier and the attacks on it."""
    made: dict[str, tuple[Callable[[], Classifier], dict[str, Attack]]] = {
        "CNN": (lambda: Network(bench.model("standard"), 10), published()),
        "AT-CNN": (lambda: Network(bench.model("adversarial"), 10), published()),
        "DkNN": (lambda: bench.dknn("standard"), published()),
        "DAEkNN": (lambda: bench.daeknn("adversarial"), every()),
        "WAD (DkNN on AT-CNN)": (lambda: bench.dknn("adversarial"), every()),
        "WAT (DAEkNN on CNN, 15/255)": (lambda: bench.daeknn("standard", 15 / 255), every()),
        'DAEkNN, scale "mean"': (lambda: bench.daeknn("adversarial", scale="mean"), every()),
        "DAEkNN, released sign": (lambda: bench.daeknn("adversarial", weighting="released"), published()),
    }
    for strength in STRENGTHS:
        name = f"DAEkNN hardened at {strength}/255"
        made[name] = (lambda s=strength: bench.daeknn("adversarial", s / 255), published())  # type: ignore[misc]
    for layer in LAYERS[:3]:
        made[f"DkNN, {layer}"] = (lambda v=layer: bench.dknn("adversarial", (v,)), published())  # type: ignore[misc]
        made[f"DAEkNN, {layer}"] = (
            lambda v=layer: bench.daeknn("adversarial", HARDENED, (v,)),  # type: ignore[misc]
            published(),
        )
    return made


def measure(
    bench: Bench, name: str, make: Callable[[], Classifier], attacks: dict[str, Attack], n: int
) -> dict[str, Any]:
    """Accuracy without attack (all samples) and under each (published: all, else the first n)."""
    print(name, file=sys.stderr, flush=True)
    classifier = make()
    labels = torch.cat([classifier.labels(part) for part in bench.x.split(200)])
    row: dict[str, Any] = {"n": len(bench.y), "clean": share(labels == bench.y)}
    threat, began = ThreatModel("linf", ATTACKED), time.perf_counter()
    for label, attack in attacks.items():
        count = len(bench.y) if label == "published" else min(n, len(bench.y))
        some = slice(count)
        result = attack(classifier, bench.x[some], bench.y[some], threat, sample_ids=bench.ids[some])
        row[label] = share(result.robust)
        row[f"{label} n"], row[f"{label} s"] = count, time.perf_counter() - began
        began = time.perf_counter()
        print(f"{label}: {row[label]:.3f} ({row[f'{label} s']:.0f} s)", file=sys.stderr, flush=True)
    return row


def share(right: Tensor) -> float:
    """Of samples."""
    return float(right.double().mean())


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown, in %."""
    lines = ["| | SA | AA, published | HM | published SA / AA | ASK, 100 | adaptive, 100 | worst case |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, row in found.items():
        sa, aa = row["clean"], row["published"]
        mean = 2 * sa * aa / (sa + aa) if sa + aa else 0.0
        theirs = " / ".join(f"{v:g}" for v in PUBLISHED[name]) if name in PUBLISHED else ""
        more = [f"{100 * row[k]:.1f}" if k in row else "" for k in ("ask-100", "adaptive-100", "worst-case")]
        shown = [f"{100 * v:.1f}" for v in (sa, aa, mean)]
        lines.append(f"| {name} | {' | '.join(shown)} | {theirs} | {' | '.join(more)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the rows that are missing in the work folder, and print the table of all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.daeknn_mnist")
    parser.add_argument("--data", type=Path, required=True, help="the folder with MNIST")
    parser.add_argument("--adversarial", type=Path, required=True, help="the adversarially trained network's run")
    parser.add_argument("--standard", type=Path, required=True, help="the standard network's run")
    parser.add_argument("--work", type=Path, required=True, help="where finished rows are kept")
    parser.add_argument("--per-class", type=int, default=2000, help="references of each class")
    parser.add_argument("-n", type=int, default=1000, help="test samples of the published protocol")
    parser.add_argument("--worst", type=int, default=300, help="of these, for the attacks that see the votes")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    bench, found = Bench(args), {}
    for place, (name, made) in enumerate(rows(bench).items()):
        found[name] = kept.row(args.work / f"row-{place:02d}.json", partial(measure, bench, name, *made, args.worst))
    print(table(found))
    kept.write_record(args.results, rows=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
