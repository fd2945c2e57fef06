"""DAEkNN, figure 3: accuracy against the hardening strength of its adversarial references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from robustknn.reproduce.bench import Bench
from robustknn.reproduce.daeknn_victim import ADVERSARIAL, ATTACKED, NO_ATTACK, Row, Victims, cells_of
from robustknn.reproduce.experiment import WORST, Cell, Experiment, Part, Presets, experiments
from robustknn.reproduce.scenes_victim import COMMON, SCENES, Scene, groups, scene_of

if TYPE_CHECKING:
    from robustknn.reports.figures import Chart

_OPTIONS = {**COMMON, "worst_n": 200}


@experiments.register("daeknn-fig3")
class DAEkNNFigure3(Experiment):
    """SA and AA by the radius of the adversarial references."""

    paper, table = "DAEkNN (arXiv 2108.06797)", "Figure 3"
    title = "DAEkNN against the hardening strength, the radius at which its adversarial references were made"
    data = ("mnist", "cifar10")
    presets: ClassVar[Presets] = {"cpu": _OPTIONS, "paper": _OPTIONS}

    def parts(self, bench: Bench) -> list[Part]:
        scene = scene_of(bench)
        rows = rows_of(scene)
        return Victims(bench).parts(rows, [name for name in rows if name.startswith(f"DAEkNN, {both(scene)}, ")])

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        return cells_of(tuple(rows_of(scene_of(bench))), found)

    def draw(self, record: Mapping[str, Any]) -> list[Chart]:
        from robustknn.reproduce.figures import curves_chart, point, rows_by_place

        scene, rows = SCENES[record["data"], record["preset"]], rows_by_place(record)
        columns = {"no attack": NO_ATTACK, "PGD on the network": ATTACKED, WORST: WORST}
        lines = {
            said: [point(255 * eps, rows[called(both(scene), eps), column]) for eps in scene.strengths]
            for said, column in columns.items()
        }
        title = f"DAEkNN, {both(scene)}, {record['data']}"
        return [curves_chart("strength", title, lines, "hardening strength, of 255")]


def both(scene: Scene) -> str:
    """What the layers of the tables are called."""
    return list(groups(scene))[-1]


def called(layers: str, eps: float) -> str:
    """The name of a row."""
    return f"DAEkNN, {layers}, {255 * eps:g}/255"


def rows_of(scene: Scene) -> dict[str, Row]:
    """The layers of the tables, and the last of them alone as in the authors' notebooks, at every strength."""
    last = scene.voting[-1]
    made = {called(both(scene), eps): Row(ADVERSARIAL, scene.voting, eps) for eps in scene.strengths}
    return made | {called(f"layer {last + 1}", eps): Row(ADVERSARIAL, (last,), eps) for eps in scene.strengths}
