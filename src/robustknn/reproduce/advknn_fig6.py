"""AdvKNN, figure 6: adversarial examples by the size of their perturbation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from robustknn.reports.figures import Chart
from robustknn.reproduce.ablated_victim import AblatedVictim
from robustknn.reproduce.advknn_victim import COMMON, DATA, METHODS
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.experiment import WORST, Cell, Experiment, Part, Presets, experiments
from robustknn.reproduce.figures import curves_chart, gallery_chart, packed, point, rows_by_place, unpacked

METHOD = METHODS[-1]
SHOWN, LOOKED = 6, 200
OPTIONS = {**COMMON, "few": 300, "head_references": 20_000, "radii": [0.05, 0.1, 0.15, 0.2, 0.25, 0.3]}


@experiments.register("advknn-fig6")
class AdvKNNFigure6(Experiment):
    """A gallery by norm."""

    paper, table = "AdvKNN (arXiv 1911.06591)", "Figure 6"
    title = "Examples of BIM through DkNNB with consistency learning at growing radii: what they look like, what fools"
    data = DATA
    presets: ClassVar[Presets] = {
        "cpu": OPTIONS,
        "paper": {**OPTIONS, "few": 1000, "head_references": None, "strength": "standard"},
    }

    def parts(self, bench: Bench) -> list[Part]:
        victim = AblatedVictim(bench)
        made = [bench.train(victim.recipe, victim.epoch_seconds)]
        made += [victim.attacked(_row(eps), METHOD, "BIM", eps=eps) for eps in bench["radii"]]
        return [*made, Part("gallery", 30.0, lambda folder: _gallery(victim, folder)), victim.worst("kNN")]

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        made = []
        for eps in bench["radii"]:
            row = found[_row(eps)]
            made.append(Cell.share(_row(eps), "kNN", row["right"]["attacked"], row["n"]))
            made.append(Cell.mean(_row(eps), "mean L2", row["l2"], "L2"))
        worst = found["worst case, kNN"]
        return [*made, Cell.share(f"eps {bench['eps']:g}", WORST, worst["right"], worst["n"], WORST)]

    def pictures(self, bench: Bench, found: Mapping[str, Any]) -> dict[str, Any]:
        return dict(found["gallery"])

    def draw(self, record: Mapping[str, Any]) -> list[Chart]:
        held, rows, radii = record["pictures"], rows_by_place(record), record["options"]["radii"]
        images = []
        for shown in held["rows"]:
            words = [
                f"{v}" if not i else f"{v}, {l2:.1f}"
                for i, (v, l2) in enumerate(zip(shown["decided"], shown["l2"], strict=True))
            ]
            wrong = [v != shown["label"] for v in shown["decided"]]
            images.append(list(zip(unpacked(shown["images"]), words, wrong, strict=True)))
        heads = ["clean", *(f"{eps:g}" for eps in radii)]
        said = "Under each: what the kNN decides (set off where wrong) and the L2 distance; eps above."
        gallery = gallery_chart(
            "gallery", "Images under attack at growing radii.", images, [""] * len(images), heads, said
        )
        curve = [point(eps, rows[_row(eps), "kNN"]) for eps in radii]
        marks = {"worst case": (record["options"]["eps"], rows[f"eps {record['options']['eps']:g}", WORST]["mean"])}
        return [gallery, curves_chart("eps", f"kNN, {record['data']}", {METHOD: curve}, "eps (L∞)", marks=marks)]


def _gallery(victim: AblatedVictim, _: Path) -> dict[str, Any]:
    """One image of each of some classes, the first that is right without attack, clean and at every radius."""
    split, knn, seed = victim.split, victim.knn(), victim.bench.seed
    looked = torch.arange(min(LOOKED, len(split)))
    right = knn.predict(split.batch(looked)).cpu() == split.labels[looked]
    # Where none of the first is right, nothing is left to be fooled, and any image shows as much.
    chosen = looked[right] if right.any() else looked
    first = {int(split.labels[i]): i for i in chosen.flip(0).tolist()}
    places = torch.tensor([first[y] for y in sorted(first)][:SHOWN])
    x, y = split.batch(places), split.labels[places]
    attack = victim.attack(METHOD, "BIM")
    made = [x] + [
        attack(knn, x, y, victim.threat.with_eps(eps), sample_ids=split.ids[places], seed=seed).x_adv.cpu()
        for eps in victim.bench["radii"]
    ]
    stacked = torch.stack(made, 1)
    decided = torch.stack([knn.predict(part).cpu() for part in made], 1)
    l2 = (stacked - x[:, None]).flatten(2).norm(dim=2)
    return {
        "rows": [
            {
                "label": int(y[i]),
                "decided": decided[i].tolist(),
                "l2": [round(v, 3) for v in l2[i].tolist()],
                "images": packed(stacked[i]),
            }
            for i in range(len(x))
        ]
    }


def _row(eps: float) -> str:
    return f"eps {eps:g}"
