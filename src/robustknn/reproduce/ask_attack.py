"""ASK-Atk beside the attacks before it on the same DkNN, as compared and at full strength: by layer, radius, steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from robustknn import registry
from robustknn.config import to_config
from robustknn.datasets import Split
from robustknn.reproduce.ask_victim import ADV, COMPARED, FULL, NETWORK, OURS, SW1, SW2, Attacked, chosen
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.daeknn_victim import ADVERSARIAL
from robustknn.reproduce.experiment import WORST, Cell, Experiment, Part, Presets, experiments
from robustknn.reproduce.scenes_victim import COMMON, SCENES, Scene, groups, scene_of, worst_case
from robustknn.reproduce.worst_victim import truths, worst_part

if TYPE_CHECKING:
    from robustknn.reports.figures import Chart

NO_ATTACK, LEAD = "no attack", "ASK's lead over"
STEPS = (1, 2, 5, 10, 20, 50, 100)
CLEAN = "clean"
_RADII = {"mnist": (40 / 255, 60 / 255, 80 / 255, 100 / 255), "cifar10": (2 / 255, 4 / 255, 8 / 255, 12 / 255)}
"""By data set; the layers are compared at the third."""
_SIZES = {("mnist", "cpu"): 500, ("cifar10", "cpu"): 150}
_OPTIONS = {**COMMON, "worst_n": 500, "steps_n": 100, "most_steps": STEPS[-1]}


@experiments.register("ask-attack")
class ASKAttack(Experiment):
    """How much of ASK's lead is its objective, and how much the settings of the others."""

    paper, table = "ASK (arXiv 2106.14300)", "ASK-Atk"
    title = "ASK-Atk and the attacks before it on the same DkNN, as its authors compared them and at full strength"
    data = ("cifar10", "mnist")
    presets: ClassVar[Presets] = {"cpu": _OPTIONS, "paper": {**_OPTIONS, "steps_n": 1000}}

    def parts(self, bench: Bench) -> list[Part]:
        victims, scene = Attacked(bench), scene_of(bench)
        n = min(bench["n"] or _SIZES.get((bench.settings.data, bench.settings.preset), 5000), victims.n)
        made = victims.train(ADVERSARIAL)
        main_layers, main = _main(bench.settings.data, scene)
        for label, layers in groups(scene).items():
            for eps in _RADII[bench.settings.data] if layers == main_layers else (main,):
                for name, steps in COMPARED.items():
                    key = _key(name, label, eps)
                    made.append(victims.measure(key, name, layers, eps, n, steps, full=False))
                    made.append(victims.measure(f"{key}, full", name, layers, eps, n, FULL, full=True))
            made.append(_worst(victims, label, layers, main, n))
        few = min(bench["steps_n"], n)
        for name in COMPARED:
            for steps in _steps(bench["most_steps"]):
                for full in (False, True):
                    key = _steps_key(name, steps, full)
                    made.append(victims.measure(key, name, main_layers, main, few, steps, full))
        return made

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        scene, made = scene_of(bench), []
        main_layers, main = _main(bench.settings.data, scene)
        columns = [
            (label, eps)
            for label, layers in groups(scene).items()
            for eps in (_RADII[bench.settings.data] if layers == main_layers else (main,))
        ]
        for label, eps in columns:
            column, row = _column(label, eps), found[_key(OURS, label, eps)]
            made.append(Cell.share(NO_ATTACK, column, row[CLEAN], row["n"]))
            for end in ("", ", full"):
                for name in COMPARED:
                    row = found[_key(name, label, eps) + end]
                    said = name if not end else f"{name}, {FULL} steps"
                    made.append(Cell.share(said, column, row["right"], row["n"]))
            made += _leads(found, label, eps)
        for label in groups(scene):
            right = _worst_of_all(found, label, main)
            made.append(Cell.share(f"DkNN, {label}", WORST, int(right.sum()), len(right), WORST))
        return made

    def pictures(self, bench: Bench, found: Mapping[str, Any]) -> dict[str, Any]:
        steps = _steps(bench["most_steps"])
        return {
            "steps": {
                f"{name}{', full strength' if full else ''}": [
                    [t, found[_steps_key(name, t, full)]["right"], found[_steps_key(name, t, full)]["n"]] for t in steps
                ]
                for full in (False, True)
                for name in COMPARED
            }
        }

    def draw(self, record: Mapping[str, Any]) -> list[Chart]:
        from robustknn.evaluation.metrics import wilson
        from robustknn.reproduce.figures import curves_chart, point, rows_by_place

        data, rows = record["data"], rows_by_place(record)
        scene = SCENES[data, record["preset"]]
        layers, main = _main(data, scene)
        label = next(said for said, held in groups(scene).items() if held == layers)
        radii = {
            "as compared": {name: name for name in COMPARED},
            f"{FULL} steps": {name: f"{name}, {FULL} steps" for name in COMPARED},
        }
        charts = []
        for place, (said, of) in enumerate(radii.items()):
            lines = {
                name: [point(255 * eps, rows[row, _column(label, eps)]) for eps in _RADII[data]]
                for name, row in of.items()
            }
            charts.append(curves_chart(f"radius-{place}", f"{label}, {said}", lines, "radius, of 255"))
        for place, end in enumerate(("", ", full strength")):
            lines = {
                name: [
                    (t, 1 - right / n, (1 - wilson(right, n)[1], 1 - wilson(right, n)[0]))
                    for t, right, n in record["pictures"]["steps"][name + end]
                ]
                for name in COMPARED
            }
            title = f"{_column(label, main)}{end or ', as compared'}"
            look: dict[str, Any] = {"log": True, "y_label": "wrong, % of samples"}
            charts.append(curves_chart(f"steps-{place}", title, lines, "steps", **look))
        return charts


def _main(data: str, scene: Scene) -> tuple[tuple[int, ...], float]:
    """The layers at which radii and steps are compared, and the radius at which layers are."""
    return (scene.voting[-1],), _RADII[data][2]


def _column(label: str, eps: float) -> str:
    return f"{label}, {255 * eps:g}/255"


def _key(name: str, label: str, eps: float) -> str:
    return f"{name} on {_column(label, eps)}"


def _steps_key(name: str, steps: int, full: bool) -> str:
    return f"{name}, {steps} steps{', full' if full else ''}"


def _steps(most: int) -> tuple[int, ...]:
    return tuple(t for t in STEPS if t <= most)


def _leads(found: Mapping[str, Any], label: str, eps: float) -> list[Cell]:
    """By how many points ASK lowers accuracy more than the best of the others."""
    made = []
    for said, end, others in (
        ("AdvKNN and S&W 1, as compared", "", (ADV, SW1)),
        ("all others, as compared", "", (NETWORK, ADV, SW1, SW2)),
        (f"AdvKNN and S&W, {FULL} steps each", ", full", (ADV, SW1, SW2)),
    ):
        right = {name: found[_key(name, label, eps) + end]["right"] for name in (OURS, *others)}
        n = found[_key(OURS, label, eps) + end]["n"]
        best = min(right[name] for name in others)
        made.append(Cell(f"{LEAD} {said}", _column(label, eps), 100 * (best - right[OURS]) / n, n, unit="points"))
    return made


def _worst(victims: Attacked, label: str, layers: tuple[int, ...], eps: float, n: int) -> Part:
    """The worst case of a group of layers, on images that the rows of the table have too."""
    bench = victims.bench
    n, attack = min(bench["worst_n"], n), worst_case(bench, victims.scene)
    wanted = {"attack": to_config(attack, registry.attacks), "worst_n": n, "of": victims.n, "eps": eps}
    folder = victims.folder("worst-case", layers, **wanted)
    threat = victims.threat.with_eps(eps)

    def split() -> Split:
        return victims.split.subset(chosen(len(victims.split), n))

    return worst_part(
        bench, label, lambda: victims.dknn(layers), split, threat, attack, n, folder, victims.worst_seconds
    )


def _worst_of_all(found: Mapping[str, Any], label: str, eps: float) -> Tensor:
    """What is right (n,) under the worst case and under every row of the table on the same DkNN at that radius."""
    worst = found[f"worst case, {label}"]
    right = truths(worst["flags"])
    for name in COMPARED:
        for end in ("", ", full"):
            row = found[_key(name, label, eps) + end]
            places, shared = chosen(row["of"], row["n"]), chosen(row["of"], worst["n"])
            right = right & truths(row["flags"])[torch.isin(places, shared)]
    return right
