"""DAEkNN, figure 1: DkNN and DAEkNN at every layer of an adversarially trained network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from robustknn.reproduce.bench import Bench
from robustknn.reproduce.daeknn_victim import ADVERSARIAL, ATTACKED, NO_ATTACK, Row, Victims, cells_of
from robustknn.reproduce.experiment import Cell, Experiment, Part, Presets, experiments
from robustknn.reproduce.scenes_victim import COMMON, SCENES, Scene, groups, scene_of

if TYPE_CHECKING:
    from robustknn.reports.figures import Chart

KINDS = ("DkNN", "DAEkNN", "adversarial references alone")
_OPTIONS = {**COMMON, "worst_n": 200}


@experiments.register("daeknn-fig1")
class DAEkNNFigure1(Experiment):
    """SA and AA by layer."""

    paper, table = "DAEkNN (arXiv 2108.06797)", "Figure 1"
    title = "DkNN and DAEkNN on each layer of an adversarially trained network: accuracy without attack and under it"
    data = ("mnist", "cifar10")
    presets: ClassVar[Presets] = {"cpu": _OPTIONS, "paper": _OPTIONS}

    def parts(self, bench: Bench) -> list[Part]:
        rows = rows_of(scene_of(bench))
        return Victims(bench).parts(rows, [name for name in rows if not name.startswith(KINDS[2])])

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        return cells_of(tuple(rows_of(scene_of(bench))), found)

    def draw(self, record: Mapping[str, Any]) -> list[Chart]:
        from robustknn.reproduce.tradeoff import Point, tradeoff_chart

        rows = {(r["row"], r["column"]): r for r in record["rows"]}
        places = groups(SCENES[record["data"], record["preset"]])
        lines = {
            kind: [
                Point(label, rows[f"{kind}, {label}", NO_ATTACK], rows[f"{kind}, {label}", ATTACKED])
                for label in places
            ]
            for kind in KINDS[:2]
        }
        return [tradeoff_chart("layers", f"by layer, {record['data']}", lines)]


def rows_of(scene: Scene) -> dict[str, Row]:
    """DkNN and DAEkNN by layers, with the same references in reach of both."""
    made = {}
    for label, layers in groups(scene).items():
        made[f"{KINDS[0]}, {label}"] = Row(ADVERSARIAL, layers)
        made[f"{KINDS[1]}, {label}"] = Row(ADVERSARIAL, layers, scene.hardened)
        made[f"{KINDS[2]}, {label}"] = Row(ADVERSARIAL, layers, scene.hardened, weighting="adversarial")
    return made
