"""The web-scale defense with the features of shallower and deeper layers, and of other poolings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from robustknn.reproduce.bench import Bench
from robustknn.reproduce.experiment import Cell, Experiment, Part, Presets, experiments
from robustknn.reproduce.webscale_networks_victim import FORWARD
from robustknn.reproduce.webscale_rows import WEIGHTINGS, Reader
from robustknn.reproduce.webscale_table1 import PAPER, attacked
from robustknn.reproduce.webscale_victim import PRESETS, Database, Victim

SCENE = "unseen"
OPTIONS = {"layers": ["conv_2_3", "conv_3_3", "conv_4_3", "avgpool"], "recipes": ["rmac", "rmac-bits"]}


@experiments.register("webscale-features")
class WebScaleFeatures(Experiment):
    """Accuracy by layer, and with R-MAC and bits on the main layer."""

    paper, table = PAPER, "features by layer"
    title = "The features that are compared: layers, averaged; R-MAC and its bits, on the main layer"
    data = ("cifar10",)
    presets: ClassVar[Presets] = {name: {**preset, **OPTIONS} for name, preset in PRESETS.items()}

    def parts(self, bench: Bench) -> list[Part]:
        victim = Victim(bench)
        made = [*victim.networks(SCENE), *victim.make(SCENE, curves=())]
        variants = {w: (w, bench["k"]) for w in WEIGHTINGS}
        for name, base in bases(bench).items():
            made.append(
                victim.scored(
                    f"score {name}",
                    SCENE,
                    2 * FORWARD,
                    partial(victim.shares_of, {name: base}, variants),
                    curves=(),
                    database=base.describe(),
                )
            )
        made += [attacked(victim, f"CBW-D, {name}", base, "CBW-D") for name, base in bases(bench).items()]
        return made

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        reader, made = Reader(Victim(bench), found), []
        for name in bases(bench):
            made += reader.cells(f"score {name}", {f"{w}, {name}": f"{w}, {name}" for w in WEIGHTINGS})
        return made


def bases(bench: Bench) -> dict[str, Database]:
    """The same images by different features, by name."""
    layers = {f"{layer}, average": Database(SCENE, layer=layer) for layer in bench["layers"]}
    main = bench["layer"]
    return {**layers, **{f"{main}, {r}": Database(SCENE, layer=main, recipe=r) for r in bench["recipes"]}}
