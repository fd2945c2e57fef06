"""AdvKNN, figure 3: the nearest references of an image before and after the attack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from robustknn.reports.figures import Chart
from robustknn.reproduce.advknn_victim import DATA, METHODS, PRESETS, Victim
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.experiment import WORST, Cell, Experiment, Part, Presets, bootstrap, experiments
from robustknn.reproduce.figures import gallery_chart, packed, unpacked

STATES = ("clean", *METHODS)
SHOWN, NEAREST, COUNTED = 3, 5, 2000


@experiments.register("advknn-fig3")
class AdvKNNFigure3(Experiment):
    """Neighbors of clean and attacked images."""

    paper, table = "AdvKNN (arXiv 1911.06591)", "Figure 3"
    title = "Nearest references of an image, clean and under BIM, and how many of the k are of its class"
    data = DATA
    presets: ClassVar[Presets] = PRESETS

    def parts(self, bench: Bench) -> list[Part]:
        victim = Victim(bench)
        return [
            bench.train(victim.recipe, victim.epoch_seconds),
            *(victim.make(method, "BIM") for method in METHODS),
            Part("neighbors", 60.0, lambda folder: _neighbors(victim, folder)),
            victim.worst("kNN"),
        ]

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        made = []
        for state in STATES:
            row = found["neighbors"]["votes"][state]
            mean, low, high, n = row
            made.append(Cell(state, "of its class among the k nearest", mean, n, (low, high)))
        worst = found["worst case, kNN"]
        return [*made, Cell.share("kNN", WORST, worst["right"], worst["n"], WORST)]

    def pictures(self, bench: Bench, found: Mapping[str, Any]) -> dict[str, Any]:
        return {"samples": found["neighbors"]["samples"]}

    def draw(self, record: Mapping[str, Any]) -> list[Chart]:
        charts = []
        for place, sample in enumerate(record["pictures"]["samples"]):
            rows = []
            for state in STATES:
                images, labels = unpacked(sample[state]["images"]), sample[state]["labels"]
                words = [f"→ {sample[state]['decided']}", *map(str, labels)]
                wrong = [sample[state]["decided"] != sample["label"], *(v != sample["label"] for v in labels)]
                rows.append(list(zip(images, words, wrong, strict=True)))
            heads = ["image", *(f"nearest {i + 1}" if not i else str(i + 1) for i in range(NEAREST))]
            title = f"Image {place + 1}, of class {sample['label']}, and its nearest references, clean and attacked."
            names = [state.replace("DkNNB + CL", "+ CL") for state in STATES]
            charts.append(gallery_chart(f"neighbors{place}", title, rows, names, heads))
        return charts


def _neighbors(victim: Victim, _: Path) -> dict[str, Any]:
    """Votes of the true class by state, and some images with their neighbors."""
    knn, split, source = victim.knn(), victim.split, victim.bench.source()
    n = min(COUNTED, len(split))
    made = {state: victim.examples(state, "BIM")[:n] for state in STATES}
    votes: dict[str, Any] = {}
    for state, x in made.items():
        share = torch.cat([knn.predict_proba(part) for part in x.split(500)]).cpu()
        own = share.gather(1, split.labels[:n, None])[:, 0]
        votes[state] = [*bootstrap((100 * own).tolist()), n]
    fooled = torch.stack([knn.predict(x).cpu() != split.labels[:n] for x in made.values()])
    candidates = (~fooled[0] & fooled[-1]).nonzero()[:, 0].tolist() or [0]
    firsts = {int(split.labels[place]): place for place in reversed(candidates)}  # of every class
    chosen = sorted(firsts.values())[:SHOWN]
    samples = []
    for place in chosen:
        sample: dict[str, Any] = {"label": int(split.labels[place])}
        for state, x in made.items():
            one = x[place : place + 1]
            ids = knn.kneighbors(one, NEAREST)[1][0].cpu()
            sample[state] = {
                "decided": int(knn.predict(one)[0]),
                "images": packed(torch.cat([one, source.train.batch(ids)])),
                "labels": source.train.labels[ids].tolist(),
            }
        samples.append(sample)
    return {"votes": votes, "samples": samples}
