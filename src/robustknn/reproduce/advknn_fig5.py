"""AdvKNN, figure 5: credibility of clean and attacked images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from robustknn.reports.figures import Chart
from robustknn.reproduce.ablated_victim import SITAWARIN, AblatedVictim
from robustknn.reproduce.advknn_victim import COMMON, DATA, KINDS, METHODS
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.experiment import WORST, Cell, Experiment, Part, Presets, bootstrap, experiments
from robustknn.reproduce.figures import histogram, histogram_chart

METHOD = METHODS[-1]
THRESHOLD = 0.5
EDGES = [i / 20 for i in range(21)]
LENGTHS = [i / 4 for i in range(33)]
OPTIONS = {**COMMON, "sw_n": 100, "sw_steps": 1000}


@experiments.register("advknn-fig5")
class AdvKNNFigure5(Experiment):
    """Credibility, clean and attacked."""

    paper, table = "AdvKNN (arXiv 1911.06591)", "Figure 5"
    title = "Credibility of DkNN on clean and attacked images, and what a threshold of .5 detects and loses"
    data = DATA
    presets: ClassVar[Presets] = {
        "cpu": OPTIONS,
        "paper": {**OPTIONS, "sw_n": 1000, "strength": "standard"},
    }

    def parts(self, bench: Bench) -> list[Part]:
        victim = AblatedVictim(bench)
        return [
            bench.train(victim.recipe, victim.epoch_seconds),
            *(victim.make(METHOD, kind) for kind in KINDS),
            *(victim.score(*of) for of in (("clean", ""), *((METHOD, kind) for kind in KINDS))),
            victim.sitawarin_part(),
            Part("credibility", 30.0, lambda folder: _summary(victim, folder)),
            victim.worst("DkNN"),
            victim.worst("DkNN, credible"),
        ]

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        made = []
        for name, row in _rows(found):
            mean, low, high = row["credibility"]
            made.append(Cell(name, "mean credibility", mean, row["n"], (low, high), unit="credibility"))
            made.append(Cell.share(name, "below 0.5", row["below"], row["n"]))
            if name != "clean":
                mean, low, high = row["l2"]
                made.append(Cell(name, "mean L2", mean, row["n"], (low, high), unit="L2"))
        for name, key in (("DkNN", "DkNN"), ("DkNN that rejects below 0.5", "DkNN, credible")):
            worst = found[f"worst case, {key}"]
            made.append(Cell.share(name, WORST, worst["right"], worst["n"], WORST))
        return made

    def pictures(self, bench: Bench, found: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "credibility": {name: row["histogram"] for name, row in _rows(found)},
            "l2": {name: row["lengths"] for name, row in _rows(found) if name != "clean"},
        }

    def draw(self, record: Mapping[str, Any]) -> list[Chart]:
        held, data = record["pictures"], record["data"]
        return [
            histogram_chart("credibility", f"Credibility, {data}", held["credibility"], EDGES, "credibility"),
            histogram_chart("l2", f"Examples that fool, {data}", held["l2"], LENGTHS, "L2 distance", filled=False),
        ]


def _rows(found: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What was summarized, in order; sealed files know none."""
    held, order = found["credibility"], ("clean", *(f"{METHOD}, {kind}" for kind in KINDS), SITAWARIN)
    return [(name, held[name]) for name in order if name in held]


def _summary(victim: AblatedVictim, _: Path) -> dict[str, Any]:
    """By what was done: images (attacked ones where they fool DkNN), their credibility and L2 distance."""
    clean = victim.scores("clean")
    made = {"clean": clean}
    made |= {f"{METHOD}, {kind}": {**victim.scores(METHOD, kind), "clean": clean["dknn"]} for kind in KINDS}
    made[SITAWARIN] = victim.sitawarin()
    found = {}
    for name, held in made.items():
        label = held["label"]
        kept = label >= 0 if name == "clean" else (held["clean"] == label) & (held["dknn"] != label)
        if bool(kept.any()):
            credibility, l2 = held["credibility"][kept], held["l2"][kept]
            found[name] = {
                "n": int(kept.sum()),
                "credibility": list(bootstrap(credibility.tolist())),
                "l2": list(bootstrap(l2.tolist())),
                "below": int((credibility < THRESHOLD).sum()),
                "histogram": histogram(credibility, EDGES),
                "lengths": histogram(l2, LENGTHS),
            }
    return found
