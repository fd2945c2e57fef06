"""The tables of the attack pages on the development digits: `python -m benchmarks.reproduce.attack_tables --work DIR`.

The development split is another one of scikit-learn's digits than that of any reported figure: `train_test_split(
test_size=500, random_state=100, stratify=y)`, a DigitsCNN trained 25 epochs on its 1,297 training images, which are the
references. Accuracy left on all 500 others, the mean over training seeds. What is done is kept in the work folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import kept
from robustknn import APGD, KNN, PGD, DkNN, FeatureExtractor, ReferenceSet, ThreatModel, registry
from robustknn.attacks import Attack, Square
from robustknn.classifiers import VoterClassifier
from robustknn.datasets import DataSource
from robustknn.datasets.digits import digits_split
from robustknn.models import DigitsCNN
from robustknn.objectives import ASK, AdvKNN, CrossEntropy, NeighborHinge, Objective, SoftCount
from robustknn.objectives.adaptive import Adaptive
from robustknn.objectives.rank_pair import RankPair
from robustknn.recipes import WorstCase
from robustknn.training import TrainConfig, initialise, train

LINF, L2, L1 = ThreatModel("linf", 0.15), ThreatModel("l2", 0.8), ThreatModel("l1", 2.0)
LAYERS = ("relu2", "relu3")
KINDS = ("kNN L2", "kNN cosine", "DkNN")


@dataclass(frozen=True)
class Column:
    """A classifier under a threat."""

    kind: str
    threat: ThreatModel
    k: int = 15

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.kind}, k = {self.k}, {self.threat.norm} {self.threat.eps:g}"


@dataclass(frozen=True)
class Table:
    """Attacks by name, each against each of the columns."""

    attacks: Mapping[str, Attack]
    columns: Sequence[Column]


def _named(*names: str) -> dict[str, Attack]:
    return {name: registry.attacks.create(name) for name in names}


def _pgd(objectives: Mapping[str, Objective], steps: int = 40) -> dict[str, Attack]:
    return {name: PGD(objective=objective, steps=steps) for name, objective in objectives.items()}


_EACH = [Column(kind, threat) for threat in (LINF, L2, L1) for kind in KINDS]
_TWO = [Column(kind, LINF) for kind in ("kNN L2", "DkNN")]
TABLES = {
    "gradient": Table(
        {
            "PGD, 40": PGD(),
            "PGD, 100": PGD(steps=100),
            "APGD, 40": APGD(steps=40),
            "APGD, 100": APGD(),
            "PGD, five restarts of 40": PGD(restarts=5),
            "APGD, five restarts of 40": APGD(steps=40, restarts=5),
        },
        _EACH,
    ),
    "transfer": Table(
        {
            **_named("apgd-ce", "apgd-margin", "apgd-dlr"),
            "pgd-transfer": PGD(CrossEntropy(), steps=100),
            "APGD on ASK": APGD(),
        },
        [Column(kind, threat) for threat in (LINF, L2) for kind in ("kNN L2", "DkNN")],
    ),
    "advknn": Table(
        _pgd(
            {
                "cross-entropy": CrossEntropy(),
                "published": AdvKNN.published(),
                "published, without CL": AdvKNN.published(consistency=False),
                "default": AdvKNN(),
                "default, heads without CL": AdvKNN(consistency=False),
                "ASK()": ASK(),
            },
            100,
        ),
        [Column(kind, LINF) for kind in KINDS],
    ),
    "adaptive": Table(
        {
            **_pgd({"ask": ASK(), "adaptive": Adaptive(), "rank-pair": RankPair()}),
            "hinge": PGD(objective=NeighborHinge(), check_every=1),
        },
        [Column(kind, threat, k) for threat in (LINF, ThreatModel("l2", 0.6)) for kind in KINDS for k in (3, 15, 75)],
    ),
    "objectives": Table(
        {
            **_pgd({"ASK()": ASK(), "SoftCount()": SoftCount(), "SoftCount.published()": SoftCount.published()}),
            "SoftCount(), every 3": PGD(objective=SoftCount(), check_every=3),
            "NeighborHinge(), every step": PGD(objective=NeighborHinge(), check_every=1),
            "NeighborHinge(), every 10": PGD(objective=NeighborHinge()),
            "sw1-published": registry.attacks.create("sw1-published", fixed_radius=True, steps=200),
            **_pgd({n: registry.objectives.create(n) for n in ("nearest-substitute", "class-mean", "feature-target")}),
        },
        _TWO,
    ),
    "worst case": Table(
        {strength: WorstCase(strength) for strength in ("fast", "standard")},
        [*(Column("kNN L2", LINF, k) for k in (1, 3, 15)), Column("kNN cosine", LINF), Column("DkNN", LINF, 75)],
    ),
    "square": Table(
        {
            f"{feedback}, {accept}": Square(queries=300, feedback=feedback, accept=accept)
            for feedback in ("scores", "labels")
            for accept in ("equal", "better")
        },
        [Column("kNN L2", threat) for threat in (LINF, L2, ThreatModel("l1", 4.0))],
    ),
}


def development() -> DataSource:
    """The development split."""
    train_set, test_set = digits_split(random_state=100)
    return DataSource("digits", train_set, None, None, test_set, tuple("0123456789"), protocol="development")


def classifier_of(column: Column, references: ReferenceSet) -> VoterClassifier:
    """The classifier of a column: a kNN on the last convolution, or a DkNN on the last two."""
    if column.kind == "DkNN":
        return DkNN(references, column.k)
    metric = column.kind.removeprefix("kNN ").lower()
    return KNN(references, column.k, layer=DigitsCNN.embedding_layer, metric=metric)


def measured(references: ReferenceSet, x: Tensor, y: Tensor, attack: Attack, column: Column) -> float:
    """The accuracy left."""
    found = attack(classifier_of(column, references), x, y, column.threat, batch_size=len(x))
    return float(found.robust.double().mean())


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not trained, run what has no figure yet, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.attack_tables")
    parser.add_argument("--work", type=Path, required=True, help="where networks and finished runs are kept")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-n", type=int, default=500, help="images")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    source = development()
    x, y = source.test.batch(torch.arange(args.n)), source.test.labels[: args.n]
    banks = []
    for seed in range(args.seeds):
        model, config = initialise(DigitsCNN, seed), TrainConfig(epochs=25, batch_size=64, lr=2e-3, seed=seed)
        kept.network(args.work / f"digits-{seed}.safetensors", model, partial(train, model, source, config))
        banks.append(ReferenceSet.build(FeatureExtractor(model, LAYERS), source.train))
    tables: dict[str, list[dict[str, object]]] = {}
    for title in args.tables:
        table = TABLES[title]
        print(f"\n{title}\n\n| | {' | '.join(c.name for c in table.columns)} |", flush=True)
        print(f"|---|{'---:|' * len(table.columns)}", flush=True)
        tables[title] = []
        for name, attack in table.attacks.items():
            line = []
            for column in table.columns:
                file = args.work / f"{name} {kept.digest(attack)} {column.name} n{args.n} s{args.seeds}.json"
                left = kept.row(file, lambda a=attack, c=column: [measured(b, x, y, a, c) for b in banks])
                tables[title].append({"attack": name, "column": column.name, "n": args.n, "left": left})
                line.append(f"{sum(left) / len(left):.3f}")
            print(f"| {name} | {' | '.join(line)} |", flush=True)
    kept.write_record(args.results, tables=tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
