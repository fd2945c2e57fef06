"""DAEkNN, table II: what each of its parts brings, and what the released weights do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from robustknn.reproduce.bench import Bench
from robustknn.reproduce.daeknn_victim import ADVERSARIAL, STANDARD, Row, Victims, cells_of
from robustknn.reproduce.experiment import Cell, Experiment, Part, Presets, experiments
from robustknn.reproduce.scenes_victim import COMMON, Scene, scene_of


@experiments.register("daeknn-table2")
class DAEkNNTable2(Experiment):
    """WAT leaves adversarial training out, WAD the adversarial references."""

    paper, table = "DAEkNN (arXiv 2108.06797)", "Table II"
    title = "DAEkNN without adversarial training (WAT), without adversarial references (WAD), and with other weights"
    data = ("cifar10", "mnist")
    presets: ClassVar[Presets] = {"cpu": COMMON, "paper": COMMON}

    def parts(self, bench: Bench) -> list[Part]:
        rows = rows_of(scene_of(bench))
        return Victims(bench).parts(rows, tuple(rows))

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        return cells_of(tuple(rows_of(scene_of(bench))), found)


def rows_of(scene: Scene) -> dict[str, Row]:
    """The rows of the paper, and three more."""
    voting, eps = scene.voting, scene.hardened
    return {
        "DkNN": Row(STANDARD, voting),
        "WAT": Row(STANDARD, voting, scene.weakened),
        "WAD": Row(ADVERSARIAL, voting),
        "DAEkNN": Row(ADVERSARIAL, voting, eps),
        "DAEkNN, adversarial references alone": Row(ADVERSARIAL, voting, eps, weighting="adversarial"),
        "DAEkNN, weights of the released code": Row(ADVERSARIAL, voting, eps, weighting="released"),
        "DAEkNN, distances divided by their mean": Row(ADVERSARIAL, voting, eps, scale="mean"),
    }
