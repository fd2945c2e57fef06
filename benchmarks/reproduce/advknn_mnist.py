"""AdvKNN on MNIST beside its Table 2: `python -m benchmarks.reproduce.advknn_mnist CHECKPOINT [--data DIR] …`.

The network and its training, k = 75, cosine, all 60,000 training images as references, L∞ eps .25, FGSM and BIM
(100 steps of .01) are the paper's (arXiv 1911.06591); the images attacked are drawn from the 9,250 test images that
did not calibrate. Examples are made on the kNN of the third layer and scored by kNN and DkNN.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import cpu, versions
from robustknn import KNN, DkNN, FeatureExtractor, ReferenceSet, ThreatModel, rng, store
from robustknn.attacks import BIM, FGSM, PGD, Attack
from robustknn.classifiers import decide
from robustknn.datasets import load
from robustknn.evaluation.experiment import calibration_overlap
from robustknn.models import load_model
from robustknn.objectives import CrossEntropy, Objective
from robustknn.objectives.advknn import AdvKNN

PUBLISHED = {
    "plain": (44.48, 2.14, 54.90, 16.80),
    "DkNNB": (15.79, 1.42, 28.57, 6.49),
    "DkNNB + CL": (15.28, 1.03, 28.08, 5.97),
}
"""Table 2, MNIST: kNN under FGSM and BIM, DkNN under FGSM and BIM; per cent."""
LAYERS = ("relu1", "relu2", "relu3", "fc")
COLUMNS = ("kNN FGSM", "kNN BIM", "DkNN FGSM", "DkNN BIM", "p FGSM", "p BIM")


class Bench:
    """The victim, the images, and what was found so far (written after every row)."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        source = load("mnist", root=args.data, protocol="published")
        model = load_model("mnist-cnn", args.checkpoint)
        held = torch.ones(len(source.test), dtype=torch.bool)
        held[calibration_overlap(source, source.test)] = False
        free = held.nonzero()[:, 0]
        chosen = free[rng.permutation(len(free), args.seed, "advknn-mnist")[: args.n].sort().values]
        self.x, self.y = source.test.batch(chosen), source.test.labels[chosen]
        train = source.train if args.references is None else source.train.first(args.references)
        self.references = ReferenceSet.build(FeatureExtractor(model, LAYERS), train)
        self.knn = self.knn_of(75)
        self.dknn = DkNN(self.references, 75, metric="cosine").calibrate(source.calibration)
        self.threat = ThreatModel("linf", 0.25)
        self.rows: dict[str, dict[str, Any]] = {}

    def knn_of(self, k: int) -> KNN:
        return KNN(self.references, k, layer="relu3", metric="cosine")

    def examples(self, attack: Attack, classifier: Any, n: int) -> Tensor:
        return attack(classifier, self.x[:n], self.y[:n], self.threat, seed=self.args.seed).x_adv

    def score(self, x: Tensor, knn: KNN | None = None, dknn: bool = True) -> list[float]:
        """Per cent right: kNN, DkNN, and DkNN by arg max p with ties to the smallest number (as was released)."""
        y = self.y[: len(x)]
        found = [self.right((knn or self.knn).predict(x), y)]
        if dknn:
            alpha = torch.cat([self.dknn.nonconformity(part) for part in x.split(256)])
            found += [self.right(alpha.argmin(1), y), self.right(decide(self.dknn._p_values(alpha)), y)]
        return found

    @staticmethod
    def right(labels: Tensor, y: Tensor) -> float:
        return round(100 * float((labels == y).double().mean()), 2)

    def record(self, part: str, name: str, values: dict[str, Any], began: float) -> None:
        values["seconds"] = round(time.monotonic() - began, 1)
        self.rows.setdefault(part, {})[name] = values
        print(f"[{part}] {name}: {values}", file=sys.stderr, flush=True)
        content = {
            "what": "AdvKNN on MNIST, per cent right, beside Table 2 of arXiv 1911.06591",
            "command": "python -m benchmarks.reproduce.advknn_mnist CHECKPOINT",
            "versions": versions(),
            "cpu": cpu(),
            "threads": torch.get_num_threads(),
            "settings": {k: v for k, v in vars(self.args).items() if k not in ("checkpoint", "data", "out")},
            "published": PUBLISHED,
            "rows": self.rows,
        }
        store.write_text(self.args.out, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    # ------------------------------------------------------------------------------------- the parts

    def row(
        self, part: str, name: str, objective: Objective, classifier: Any = None, n: int | None = None, knn: Any = None
    ) -> None:
        """FGSM and BIM by one objective."""
        began, n = time.monotonic(), n or self.args.n
        classifier = classifier or self.knn
        values: dict[str, Any] = {"n": n}
        for kind, attack in (("FGSM", FGSM(objective)), ("BIM", BIM(objective, steps=100, absolute_step=0.01))):
            found = self.score(self.examples(attack, classifier, n), knn, dknn=knn is None)
            values |= {f"{column} {kind}": v for column, v in zip(("kNN", "DkNN", "p"), found, strict=False)}
        self.record(part, name, values, began)

    def table(self) -> None:
        began = time.monotonic()
        self.record("table", "clean", dict(zip(("kNN", "DkNN", "p"), self.score(self.x), strict=True)), began)
        self.row("table", "plain", CrossEntropy())
        self.row("table", "DkNNB + CL", AdvKNN.published())
        self.row("table", "DkNNB", AdvKNN.published(consistency=False))

    def strong(self) -> None:
        """The default attack on the kNN, and what BIM gives when the layers of DkNN are attacked together."""
        began, n = time.monotonic(), self.args.few
        attack = PGD(AdvKNN())
        self.record("strong", "advknn, kNN", {"n": n, "kNN": self.score(self.examples(attack, self.knn, n))[0]}, began)
        objective = AdvKNN.published(max_references=self.args.few_references)
        self.row("strong", "DkNNB + CL, all layers", objective, self.dknn, n)

    def ablate_k(self) -> None:
        for k in (5, 25, 75, 125):
            knn = self.knn_of(k)
            for name, objective in (
                ("plain", CrossEntropy()),
                ("DkNNB", AdvKNN.published(consistency=False, max_references=self.args.few_references)),
                ("DkNNB + CL", AdvKNN.published(max_references=self.args.few_references)),
            ):
                self.row("k", f"k = {k}, {name}", objective, knn, self.args.few, knn)

    def ablate_layers(self) -> None:
        for layer in reversed(LAYERS):
            for name, consistency in (("DkNNB", False), ("DkNNB + CL", True)):
                objective = AdvKNN.published(
                    layers=(layer,), consistency=consistency, max_references=self.args.few_references
                )
                self.row("layers", f"{layer}, {name}", objective, self.dknn, self.args.few)

    def markdown(self) -> str:
        lines = []
        for part, rows in self.rows.items():
            lines += ["", f"**{part}** (published in parentheses)", "", f"| attack | n | {' | '.join(COLUMNS)} |"]
            lines.append("|---|---:|" + "---:|" * len(COLUMNS))
            for name, values in rows.items():
                printed = dict(zip(COLUMNS, PUBLISHED.get(name, ()), strict=False)) if part == "table" else {}
                cells = [f"{values.get(c, '')}" + (f" ({printed[c]})" if c in printed else "") for c in COLUMNS]
                if COLUMNS[0] not in values:
                    cells = [f"{k} {v}" for k, v in values.items() if k not in ("n", "seconds")]
                    cells += [""] * (len(COLUMNS) - len(cells))
                lines.append(f"| {name} | {values.get('n', self.args.n)} | {' | '.join(cells)} |")
        return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for, print their tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.advknn_mnist", description=__doc__)
    parser.add_argument("checkpoint", help="of `robustknn train --data mnist --protocol published --model mnist-cnn …`")
    parser.add_argument("--data", default=os.environ.get("ROBUSTKNN_DATA"), help="the folder of the data sets")
    parser.add_argument("--parts", default="table,strong,k,layers", help="which tables, by name")
    parser.add_argument("--n", type=int, default=1000, help="images of the main table")
    parser.add_argument("--few", type=int, default=300, help="images of the others")
    parser.add_argument("--few-references", type=int, default=5000, help="references that heads learn from in those")
    parser.add_argument("--references", type=int, help="the first so many training images; all when left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "advknn_mnist.json")
    args = parser.parse_args(argv)
    bench = Bench(args)
    parts = {"table": bench.table, "strong": bench.strong, "k": bench.ablate_k, "layers": bench.ablate_layers}
    for part in args.parts.split(","):
        parts[part]()
    print(bench.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
