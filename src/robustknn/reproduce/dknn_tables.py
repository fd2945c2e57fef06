"""DkNN, tables 1 and 2: the network and its DkNN without attack, and under attacks made on the network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustknn.evaluation.metrics import wilson
from robustknn.recipes.carlini_wagner import cw_l2
from robustknn.reports.figures import Chart
from robustknn.reproduce.advknn_victim import COMMON, KINDS, Victim
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.blocks import by_block
from robustknn.reproduce.experiment import WORST, Cell, Experiment, Front, Part, Presets, experiments
from robustknn.reproduce.figures import curves_chart
from robustknn.threat import ThreatModel

CLASSIFIERS = {"DNN": "network", "DkNN": "dknn"}
CW = "C&W"
BINS = 10
_CW_SECONDS, _BLOCK = 6.0, 50  # of a sample on two cores, 9 searches of 1,000 steps at most
OPTIONS = {**COMMON, "epochs": 6, "batch_size": 500, "cw_n": 200, "cw_steps": 1000}


@experiments.register("dknn-tables")
class DkNNTables(Experiment):
    """DkNN without attack and under transferred attacks, and how credibility tells right from wrong."""

    paper, table = "DkNN (arXiv 1803.04765)", "Tables 1 and 2"
    title = "The network and its DkNN without attack and under attacks on the network, and accuracy by credibility"
    data = ("mnist", "svhn", "fashion-mnist")
    presets: ClassVar[Presets] = {
        "cpu": OPTIONS,
        "paper": {**OPTIONS, "cw_n": 1000, "strength": "standard"},
    }
    front: ClassVar[Front] = {"DkNN, its own paper": (("DkNN", "clean"), ("DkNN", "BIM"), ("DkNN", WORST))}

    def parts(self, bench: Bench) -> list[Part]:
        victim = Victim(bench, form="unpadded")
        attacks = [("plain", kind) for kind in KINDS]
        n = min(bench["cw_n"], victim.scored)
        return [
            bench.train(victim.recipe, victim.epoch_seconds),
            *(victim.make(*attack) for attack in attacks),
            *(victim.score(*attack) for attack in (("clean", ""), *attacks)),
            Part(CW, n * _CW_SECONDS * bench["cw_steps"] / 1000, lambda folder: _carlini_wagner(victim, folder, n)),
            Part("reliability", 5.0, lambda folder: _reliability(victim, folder)),
            victim.worst("DkNN"),
        ]

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        made = []
        for name, key in CLASSIFIERS.items():
            for column, row in (
                ("clean", "score clean"),
                *((kind, f"score {kind}, plain") for kind in KINDS),
                (CW, CW),
            ):
                made.append(Cell.share(name, column, found[row]["right"][key], found[row]["n"]))
        worst = found["worst case, DkNN"]
        return [*made, Cell.share("DkNN", WORST, worst["right"], worst["n"], WORST)]

    def pictures(self, bench: Bench, found: Mapping[str, Any]) -> dict[str, Any]:
        return {"reliability": found["reliability"]}

    def draw(self, record: Mapping[str, Any]) -> list[Chart]:
        points = [
            ((held["low"] + held["high"]) / 2, held["right"] / held["n"], wilson(held["right"], held["n"]))
            for held in record["pictures"]["reliability"]
            if held["n"]
        ]
        title = f"Reliability, {record['data']}"
        lines = {"DkNN, no attack": points}
        return [
            curves_chart("reliability", title, lines, "credibility", caption=self._said(record), y_label="right, %")
        ]

    def _said(self, record: Mapping[str, Any]) -> str:
        held = record["pictures"]["reliability"]
        sizes = ", ".join(f"{bin_['n']:,}" for bin_ in held)
        return f"Images by tenths of credibility: {sizes} of {held[0]['of']:,}."


def _carlini_wagner(victim: Victim, folder: Path, n: int) -> dict[str, Any]:
    """Carlini & Wagner's attack on the network, L2 without bound: what the network and the DkNN still have right."""
    split = victim.split
    everywhere = float(torch.tensor(split.shape).prod()) ** 0.5
    attack = cw_l2(steps=victim.bench["cw_steps"])

    def measure(rows: Tensor) -> Mapping[str, Tensor]:
        network = victim.classifier("DNN")
        x, y, threat = split.batch(rows), split.labels[rows], ThreatModel("l2", everywhere)
        found = attack(network, x, y, threat, sample_ids=split.ids[rows], seed=victim.bench.seed)
        return {"network": found.labels.cpu() == y, "dknn": victim.dknn.predict(found.x_adv).cpu() == y}

    rows = by_block(folder, min(n, len(split)), _BLOCK, measure, victim.bench.progress, CW)
    return {"n": len(rows["dknn"]), "right": {name: int(value.sum()) for name, value in rows.items()}}


def _reliability(victim: Victim, _: Path) -> list[dict[str, Any]]:
    """Clean images by credibility: how many, and how many of them are right."""
    held = victim.scores("clean")
    place = (held["credibility"] * BINS).long().clamp(max=BINS - 1)
    right = held["dknn"] == held["label"]
    return [
        {
            "low": b / BINS,
            "high": (b + 1) / BINS,
            "n": int((place == b).sum()),
            "right": int(right[place == b].sum()),
            "of": len(place),
        }
        for b in range(BINS)
    ]
