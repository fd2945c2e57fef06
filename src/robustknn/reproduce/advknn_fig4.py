"""AdvKNN, figure 4: accuracy of DkNN against the mean L2 distance, by the layer attacked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from robustknn.reports.figures import Chart
from robustknn.reproduce.ablated_victim import SITAWARIN, AblatedVictim
from robustknn.reproduce.advknn_victim import COMMON, DATA
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.experiment import WORST, Cell, Experiment, Part, Presets, experiments
from robustknn.reproduce.figures import curves_chart, point, rows_by_place
from robustknn.reproduce.papers import published

LAYERS = ("relu1", "relu2", "relu3", "fc")
METHOD = "DkNNB + CL"
FOOLED = "mean L2, fooled"
"""A search for the nearest example leaves a sample where it was when it fails."""
OPTIONS = {
    **COMMON,
    "few": 300,
    "sw_n": 100,
    "sw_steps": 1000,
    "head_references": 5000,
    "radii": [0.05, 0.1, 0.15, 0.2, 0.25],
}


@experiments.register("advknn-fig4")
class AdvKNNFigure4(Experiment):
    """Accuracy against mean L2, by layer."""

    paper, table = "AdvKNN (arXiv 1911.06591)", "Figure 4"
    title = "DkNN and kNN under BIM through one layer's DkNNB, against mean L2, and Sitawarin & Wagner's attack"
    data = DATA
    presets: ClassVar[Presets] = {
        "cpu": OPTIONS,
        "paper": {**OPTIONS, "few": None, "sw_n": 1000, "head_references": None, "strength": "standard"},
    }

    def parts(self, bench: Bench) -> list[Part]:
        victim = AblatedVictim(bench)
        made = [bench.train(victim.recipe, victim.epoch_seconds)]
        for layer in LAYERS:
            for eps in bench["radii"]:
                made.append(victim.attacked(_row(layer, eps), METHOD, "BIM", layers=(layer,), eps=eps))
        return [*made, victim.sitawarin_part(), victim.worst("DkNN")]

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        made = []
        for layer in LAYERS:
            for eps in bench["radii"]:
                name, row = _row(layer, eps), found[_row(layer, eps)]
                made.append(Cell.share(name, "DkNN", row["right"]["attacked"], row["n"]))
                made.append(Cell.share(name, "kNN", row["right"]["knn"], row["n"]))
                made.append(Cell.mean(name, "mean L2", row["l2"], "L2"))
        row = found[SITAWARIN]
        made.append(Cell.share(SITAWARIN, "DkNN", row["right"], row["n"]))
        made += [Cell.mean(SITAWARIN, FOOLED, row["fooled_l2"], "L2")] if row["fooled_l2"] else []
        worst = found["worst case, DkNN"]
        return [*made, Cell.share(f"DkNN, eps {bench['eps']:g}", WORST, worst["right"], worst["n"], WORST)]

    def draw(self, record: Mapping[str, Any]) -> list[Chart]:
        rows, radii = rows_by_place(record), record["options"]["radii"]
        printed = published("advknn-fig4", record["data"])
        marks = {
            f"{name}, published": (printed[row, column], printed[row, "DkNN"])
            for name, row, column in (("AdvKNN", _row("relu3", 0.25), "mean L2"), (SITAWARIN, SITAWARIN, FOOLED))
            if (row, "DkNN") in printed
        }
        charts = []
        for classifier in ("DkNN", "kNN"):
            lines = {
                f"layer {layer}": [
                    point(rows[_row(layer, e), "mean L2"]["mean"], rows[_row(layer, e), classifier]) for e in radii
                ]
                for layer in LAYERS
            }
            if classifier == "DkNN" and (SITAWARIN, FOOLED) in rows:
                lines[SITAWARIN] = [point(rows[SITAWARIN, FOOLED]["mean"], rows[SITAWARIN, "DkNN"])]
            title = f"{classifier}, {record['data']}"
            said = marks if classifier == "DkNN" else {}
            charts.append(curves_chart(classifier.lower(), title, lines, "mean L2 distance", marks=said))
        return charts


def _row(layer: str, eps: float) -> str:
    return f"{layer}, eps {eps:g}"
