"""AdvKNN, table 2: accuracy of kNN and DkNN under FGSM and BIM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from robustknn.reproduce.advknn_victim import DATA, KINDS, METHODS, PRESETS, Victim
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.experiment import WORST, Cell, Experiment, Front, Part, Presets, experiments

CLASSIFIERS = {"kNN": "knn", "DkNN": "dknn"}
AS_RELEASED = "DkNN, p-values alone"
"""The released code takes the class of the largest p-value, of tied ones the smallest number."""


@experiments.register("advknn-table2")
class AdvKNNTable2(Experiment):
    """Accuracy under attack, examples made on the kNN of the third layer."""

    paper, table = "AdvKNN (arXiv 1911.06591)", "Table 2"
    title = "kNN and DkNN under FGSM and BIM: the plain attack on the network, DkNNB, DkNNB with consistency learning"
    data = DATA
    presets: ClassVar[Presets] = PRESETS
    front: ClassVar[Front] = {
        "kNN": (("kNN", "clean"), ("kNN, plain", "BIM"), ("kNN", WORST)),
        "DkNN": (("DkNN", "clean"), ("DkNN, plain", "BIM"), ("DkNN", WORST)),
    }

    def parts(self, bench: Bench) -> list[Part]:
        victim = Victim(bench)
        attacks = [(method, kind) for method in METHODS for kind in KINDS]
        return [
            bench.train(victim.recipe, victim.epoch_seconds),
            *(victim.make(*attack) for attack in attacks),
            victim.worst("kNN"),  # before the references of all layers are in memory
            *(victim.score(*attack) for attack in (("clean", ""), *attacks)),
            victim.worst("DkNN"),
        ]

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        made = []
        for name, key in CLASSIFIERS.items():
            made += table(name, key, found)
            worst = found[f"worst case, {name}"]
            made.append(Cell.share(name, WORST, worst["right"], worst["n"], WORST))
        return made + table(AS_RELEASED, "p", found)


def table(name: str, key: str, found: Mapping[str, Any]) -> list[Cell]:
    """A classifier's numbers, as the paper lays them out."""
    clean = found["score clean"]
    made = [Cell.share(name, "clean", clean["right"][key], clean["n"])]
    for method in METHODS:
        for kind in KINDS:
            row = found[f"score {kind}, {method}"]
            made.append(Cell.share(f"{name}, {method}", kind, row["right"][key], row["n"]))
    return made
