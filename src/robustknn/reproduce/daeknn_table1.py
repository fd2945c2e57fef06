"""DAEkNN, table I: the network, adversarial training, DkNN and DAEkNN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from robustknn.reproduce.bench import Bench
from robustknn.reproduce.daeknn_victim import ADVERSARIAL, ATTACKED, NO_ATTACK, STANDARD, Row, Victims, cells_of
from robustknn.reproduce.experiment import WORST, Cell, Experiment, Front, Part, Presets, experiments
from robustknn.reproduce.scenes_victim import COMMON, scene_of

NAMES = ("CNN", "AT-CNN", "DkNN", "DAEkNN")


@experiments.register("daeknn-table1")
class DAEkNNTable1(Experiment):
    """SA, AA and HM of four classifiers."""

    paper, table = "DAEkNN (arXiv 2108.06797)", "Table I"
    title = "Accuracy without attack (SA), under PGD made on the network (AA), and their harmonic mean (HM)"
    data = ("mnist", "cifar10")
    presets: ClassVar[Presets] = {"cpu": COMMON, "paper": COMMON}
    front: ClassVar[Front] = {name: ((name, NO_ATTACK), (name, ATTACKED), (name, WORST)) for name in NAMES}

    def parts(self, bench: Bench) -> list[Part]:
        scene = scene_of(bench)
        voting, eps = scene.voting, scene.hardened
        rows = (Row(STANDARD), Row(ADVERSARIAL), Row(STANDARD, voting), Row(ADVERSARIAL, voting, eps))
        return Victims(bench).parts(dict(zip(NAMES, rows, strict=True)), NAMES)

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        return cells_of(NAMES, found)
