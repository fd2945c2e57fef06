"""AdvKNN, table 3: examples made on one network, scored on another, LeNet-5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from robustknn.reports.figures import Chart
from robustknn.reproduce.advknn_table2 import AS_RELEASED
from robustknn.reproduce.advknn_victim import DATA, DECIDED, KINDS, METHODS, PRESETS, Victim
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.experiment import WORST, Cell, Experiment, Part, Presets, experiments
from robustknn.reproduce.figures import matrix_chart, rows_by_place


@experiments.register("advknn-table3")
class AdvKNNTable3(Experiment):
    """Transfer to LeNet-5."""

    paper, table = "AdvKNN (arXiv 1911.06591)", "Table 3"
    title = "Transfer to LeNet-5: its network, kNN and DkNN on examples made on the other network and on its kNN"
    data = DATA
    presets: ClassVar[Presets] = PRESETS

    def parts(self, bench: Bench) -> list[Part]:
        source = Victim(bench)
        other = Victim(bench, "lenet5", source=source)
        attacks = [(method, kind) for method in METHODS for kind in KINDS]
        return [
            bench.train(source.recipe, source.epoch_seconds),
            bench.train(other.recipe, source.epoch_seconds / 2),
            *(source.make(*attack) for attack in attacks),
            *(other.score(*attack) for attack in (("clean", ""), *attacks)),
            other.worst("kNN"),
            other.worst("DkNN"),
        ]

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        made = []
        for name, key in {**DECIDED, AS_RELEASED: "p"}.items():
            clean = found["score clean"]
            made.append(Cell.share(name, "clean", clean["right"][key], clean["n"]))
            for kind in KINDS:
                for method in METHODS:
                    row = found[f"score {kind}, {method}"]
                    made.append(Cell.share(name, f"{kind}, {method}", row["right"][key], row["n"]))
            if f"worst case, {name}" in found:
                worst = found[f"worst case, {name}"]
                made.append(Cell.share(name, WORST, worst["right"], worst["n"], WORST))
        return made

    def draw(self, record: Mapping[str, Any]) -> list[Chart]:
        rows = rows_by_place(record)
        columns = ["clean", *(f"{kind}, {method}" for kind in KINDS for method in METHODS)]
        shares = {column: {name: rows[name, column]["mean"] for name in DECIDED} for column in columns}
        return [matrix_chart("transfer", shares, rows["DNN", "clean"]["n"])]
