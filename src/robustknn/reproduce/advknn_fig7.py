"""AdvKNN, figure 7: accuracy of kNN under attack against k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from robustknn.reports.figures import Chart
from robustknn.reproduce.ablated_victim import AblatedVictim
from robustknn.reproduce.advknn_victim import COMMON, DATA, KINDS, METHODS
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.experiment import WORST, Cell, Experiment, Part, Presets, experiments
from robustknn.reproduce.figures import curves_chart, point, rows_by_place

OPTIONS = {**COMMON, "few": 1000, "worst_few": 300, "head_references": 20_000, "ks": [5, 25, 75, 125]}


@experiments.register("advknn-fig7")
class AdvKNNFigure7(Experiment):
    """Accuracy against k."""

    paper, table = "AdvKNN (arXiv 1911.06591)", "Figure 7"
    title = "kNN of the third layer under FGSM and BIM, against the number k of neighbors"
    data = DATA
    presets: ClassVar[Presets] = {
        "cpu": OPTIONS,
        "paper": {**OPTIONS, "few": None, "worst_few": 1000, "head_references": None, "strength": "standard"},
    }

    def parts(self, bench: Bench) -> list[Part]:
        victim = AblatedVictim(bench)
        made = [bench.train(victim.recipe, victim.epoch_seconds)]
        for k in bench["ks"]:
            made += [
                victim.attacked(f"{kind}, {method}, k = {k}", method, kind, k=k) for method in METHODS for kind in KINDS
            ]
            made.append(victim.worst("kNN", k, bench["worst_few"]))
        return made

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        made = []
        for k in bench["ks"]:
            clean = found[f"FGSM, plain, k = {k}"]
            made.append(Cell.share(f"k = {k}", "clean", clean["clean"]["attacked"], clean["n"]))
            for method in METHODS:
                for kind in KINDS:
                    row = found[f"{kind}, {method}, k = {k}"]
                    made.append(Cell.share(f"k = {k}", f"{kind}, {method}", row["right"]["attacked"], row["n"]))
            worst = found[f"worst case, kNN, k = {k}"]
            made.append(Cell.share(f"k = {k}", WORST, worst["right"], worst["n"], WORST))
        return made

    def draw(self, record: Mapping[str, Any]) -> list[Chart]:
        rows, ks, charts = rows_by_place(record), record["options"]["ks"], []
        for kind in KINDS:
            lines = {m: [point(k, rows[f"k = {k}", f"{kind}, {m}"]) for k in ks] for m in METHODS}
            lines["worst case"] = [point(k, rows[f"k = {k}", WORST]) for k in ks]
            charts.append(curves_chart(kind.lower(), f"{kind}, {record['data']}", lines, "k"))
        return charts
