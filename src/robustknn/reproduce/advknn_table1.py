"""AdvKNN, section 4: accuracy without attack of the network, of DkNNB, kNN and DkNN."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from robustknn.reproduce.advknn_victim import DATA, DECIDED, PRESETS, Victim
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.experiment import WORST, Cell, Experiment, Part, Presets, experiments


@experiments.register("advknn-table1")
class AdvKNNTable1(Experiment):
    """Accuracy without attack."""

    paper, table = "AdvKNN (arXiv 1911.06591)", "Table 1"
    title = "Accuracy without attack: the network, DkNNB in the place of the kNN, kNN and DkNN"
    data = DATA
    presets: ClassVar[Presets] = PRESETS

    def parts(self, bench: Bench) -> list[Part]:
        victim = Victim(bench)
        return [
            bench.train(victim.recipe, victim.epoch_seconds),
            victim.heads_part(),
            Part("DkNNB", 5.0, lambda folder: self._head(victim, folder)),
            victim.worst("DNN"),
            victim.worst("kNN"),
            victim.score("clean"),
            victim.worst("DkNN"),
        ]

    def _head(self, victim: Victim, _: Path) -> dict[str, int]:
        """How often DkNNB itself is right."""
        head, split = victim.head(), victim.split
        right = 0
        for rows in victim.blocks():
            features = victim.references(victim.layer).extractor()(split.batch(rows).to(victim.bench.device))
            right += int((head(features[victim.layer]).argmax(1).cpu() == split.labels[rows]).sum())
        return {"n": len(split), "right": right}

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        clean, head = found["score clean"], found["DkNNB"]
        made = [Cell.share(name, "clean", clean["right"][key], clean["n"]) for name, key in DECIDED.items()]
        made.append(Cell.share("DkNNB", "clean", head["right"], head["n"]))
        worst = {name: found[f"worst case, {name}"] for name in DECIDED}
        return made + [Cell.share(name, WORST, row["right"], row["n"], WORST) for name, row in worst.items()]
