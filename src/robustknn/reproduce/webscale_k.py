"""The web-scale defense against K, from 1 to 100."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from robustknn.reports.figures import Chart
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.experiment import WORST, Cell, Experiment, Part, Presets, experiments
from robustknn.reproduce.figures import curves_chart
from robustknn.reproduce.paired import verdict
from robustknn.reproduce.webscale_networks_victim import FORWARD
from robustknn.reproduce.webscale_rows import FGSM, WEIGHTINGS, Reader, lines_of, point
from robustknn.reproduce.webscale_table1 import PAPER, attacked
from robustknn.reproduce.webscale_victim import PRESETS, SCENES, Database, Victim

OPTIONS = {"ks": [1, 2, 5, 10, 20, 50, 100], "worst_ks": [1, 10, 50, 100]}


@experiments.register("webscale-k")
class WebScaleK(Experiment):
    """Accuracy against K for every weighting."""

    paper, table = PAPER, "the number of neighbors"
    title = "K from 1 to 100, the three weightings, database of seen and of unseen images"
    data = ("cifar10",)
    presets: ClassVar[Presets] = {name: {**preset, **OPTIONS} for name, preset in PRESETS.items()}

    def parts(self, bench: Bench) -> list[Part]:
        victim = Victim(bench)
        ks = bench["ks"]
        variants = {f"{w}, K = {k}": (w, k) for w in WEIGHTINGS for k in ks}
        made = [*victim.networks(*SCENES), *victim.make(*SCENES, curves=())]
        for scene in SCENES:
            made.append(
                victim.scored(
                    f"score {scene}",
                    scene,
                    2 * FORWARD,
                    partial(victim.shares_of, {scene: Database(scene)}, variants),
                    curves=(),
                    ks=ks,
                )
            )
        for scene in SCENES:
            for k in bench["worst_ks"]:
                made.append(attacked(victim, f"CBW-D, K = {k}, {scene}", Database(scene), "CBW-D", k))
        return made

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        reader, made = Reader(Victim(bench), found), []
        for scene in SCENES:
            names = [f"{w}, K = {k}, {scene}" for k in bench["ks"] for w in WEIGHTINGS]
            made += reader.cells(f"score {scene}", {name: name for name in names})
        return made

    def pictures(self, bench: Bench, found: Mapping[str, Any]) -> dict[str, Any]:
        reader = Reader(Victim(bench), found)
        return {
            scene: {
                "curves": {column: self._curve(reader, scene, column) for column in (*FGSM, WORST)},
                "said": verdict(
                    reader.ordering(f"score {scene}", [f", K = {k}, {scene}" for k in bench["ks"] if k > 1]),
                    f"The ordering CBW-D over CBW-E over UW, database {scene}",
                ),
            }
            for scene in SCENES
        }

    def _curve(self, reader: Reader, scene: str, column: str) -> list[list[float]]:
        bench, made = reader.victim.bench, []
        for k in sorted(bench["ks"]):
            name, part = f"CBW-D, K = {k}, {scene}", f"score {scene}"
            held = reader.worst(part, name, name) if column == WORST else reader.right(part, column, name)
            made += [] if held is None else [point(k, held)]
        return made

    def draw(self, record: Mapping[str, Any]) -> list[Chart]:
        return [
            curves_chart(
                f"k-{scene}",
                f"CBW-D, {scene}",
                lines_of(shown["curves"]),
                "K, neighbors that are averaged",
                caption=shown["said"],
                log=True,
            )
            for scene, shown in record["pictures"].items()
            if scene in SCENES
        ]
