"""The web-scale defense: three weightings, databases of growing size, black-box, gray-box and database known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor

from robustknn.classifiers import Network
from robustknn.reports.figures import Chart
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.experiment import WORST, Cell, Experiment, Front, Part, Presets, experiments
from robustknn.reproduce.figures import curves_chart
from robustknn.reproduce.paired import Pair, verdict
from robustknn.reproduce.webscale_networks_victim import FORWARD
from robustknn.reproduce.webscale_rows import FGSM, WEIGHTINGS, Reader, lines_of, point
from robustknn.reproduce.webscale_victim import PRESETS, SCENES, WORST_CASE, Database, Decide, Victim

ALL, MIXED = "unseen, all", "unseen, all and as many of no class"
PAPER = "Web-scale nearest-neighbor defense (arXiv 1903.01612)"
DISSIMILARITY = "normalized L2 dissimilarity"
KINDS = ("FGSM", "PGD")
"""Attacks that have a curve."""


@experiments.register("webscale-table1")
class WebScaleTable1(Experiment):
    """UW, CBW-E and CBW-D over databases of growing size."""

    paper, table = PAPER, "Table 1"
    title = "The three weightings over databases of growing size, black-box, gray-box and with the database known"
    data = ("cifar10",)
    presets: ClassVar[Presets] = PRESETS
    front: ClassVar[Front] = {
        "no defense": (("network, seen", "clean"), ("network, seen", "gray FGSM"), ("network, seen", WORST)),
        **{
            f"retrieval, {w}": ((f"{w}, seen", "clean"), (f"{w}, seen", "gray FGSM"), (f"{w}, seen", WORST))
            for w in WEIGHTINGS
        },
    }

    def parts(self, bench: Bench) -> list[Part]:
        victim = Victim(bench)
        _ = victim.clothes  # where they are not there, that is said before the work
        made = [*victim.networks(*SCENES), *victim.make(*SCENES, curves=KINDS)]
        for scene in SCENES:
            held = databases(victim, scene)
            each = FORWARD * (2 + len(held) / 4)
            decider, sizes = decide(victim, scene), bench["sizes"]
            made.append(victim.scored(f"score {scene}", scene, each, decider, curves=KINDS, sizes=sizes))
        for scene in SCENES:
            made.append(victim.worst(f"network, {scene}", scene, partial(network, victim, scene), attacked="network"))
            for name, base in databases(victim, scene).items():
                for weighting in WEIGHTINGS if name in ("seen", ALL) else WEIGHTINGS[-1:]:
                    made.append(attacked(victim, f"{weighting}, {name}", base, weighting))
        return made

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        reader, made = Reader(Victim(bench), found), []
        for scene in SCENES:
            made += reader.cells(f"score {scene}", {f"network, {scene}": "network"})
            names = [f"{w}, {name}" for name in databases(reader.victim, scene) for w in WEIGHTINGS]
            made += reader.cells(f"score {scene}", {name: name for name in names})
        return made + [pair.cell() for pair in (*ordering(reader), *growth(reader))]

    def pictures(self, bench: Bench, found: Mapping[str, Any]) -> dict[str, Any]:
        reader = Reader(Victim(bench), found)
        curves = {
            f"{scene}, {who}-box {kind}": {
                shown: reader.curve(f"score {scene}", name, who, scene, kind)
                for shown, name in (
                    ("network", "network"),
                    *((w, f"{w}, {'seen' if scene == 'seen' else ALL}") for w in WEIGHTINGS),
                )
            }
            for scene in SCENES
            for who in ("black", "gray")
            for kind in KINDS
        }
        return {"curves": curves, "sizes": by_size(reader), "said": said(reader)}

    def draw(self, record: Mapping[str, Any]) -> list[Chart]:
        shown = record["pictures"]
        made = []
        for name, curves in shown["curves"].items():
            title = name if "box" in name else f"{name}-box FGSM"  # records from before PGD had a curve
            stem = f"dissimilarity-{name.replace(', ', '-').replace(' ', '-')}"
            made.append(curves_chart(stem, title, lines_of(curves), DISSIMILARITY, caption=_apart(curves)))
        size, caption = "images in the database", " ".join(shown["said"])
        return [*made, curves_chart("size", "CBW-D, unseen", lines_of(shown["sizes"]), size, caption=caption, log=True)]


def _apart(curves: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """How far the weightings are from the undefended network: lines that coincide are hard to tell apart."""
    shares = {name: [100 * right / n for _, right, n in points] for name, points in curves.items()}
    plain = shares.pop("network")
    gaps = [other - one for held in shares.values() for one, other in zip(plain, held, strict=True)]
    return f"The weightings are between {min(gaps):+.1f} and {max(gaps):+.1f} points from the network along the curves."


def databases(victim: Victim, scene: str) -> dict[str, Database]:
    """The databases of a scene, by name, from the smallest."""
    if scene == "seen":
        return {"seen": Database("seen")}
    sizes = {f"unseen, {size:,}": Database("unseen", size) for size in victim.bench["sizes"]}
    return {**sizes, ALL: Database("unseen"), MIXED: Database("unseen", mixed=True)}


def network(victim: Victim, scene: str) -> Network:
    """The undefended network."""
    return Network(victim.network(scene), victim.bench.source().n_classes)


def decide(victim: Victim, scene: str) -> Callable[[], Decide]:
    """The network and every weighting over every database of a scene."""

    def make() -> Decide:
        plain = network(victim, scene)
        every = victim.shares_of(databases(victim, scene), {w: (w, victim.bench["k"]) for w in WEIGHTINGS})

        def both(x: Tensor, ids: Tensor) -> dict[str, Tensor]:
            return {"network": plain.labels(x), **every(x, ids)}

        return both

    return make


def attacked(victim: Victim, name: str, base: Database, weighting: str, k: int | None = None) -> Part:
    """The worst case of the defense over a database, the same work for every table."""
    said = {"attacked": "retrieval", "database": base.describe(), "weighting": weighting, "k": k or victim.bench["k"]}
    make = partial(victim.retrieval, base, weighting, k)
    return victim.worst(name, base.scene, make, WORST_CASE, **said, **victim.embedding())


def ordering(reader: Reader) -> list[Pair]:
    """The weightings on every database."""
    return [
        pair
        for scene in SCENES
        for pair in reader.ordering(f"score {scene}", [f", {name}" for name in databases(reader.victim, scene)])
    ]


def growth(reader: Reader) -> list[Pair]:
    """Every database of unseen images against the next smaller one, CBW-D."""
    names = [f"{WEIGHTINGS[-1]}, {name}" for name in databases(reader.victim, "unseen") if name != MIXED]
    return [pair for less, more in pairwise(names) for pair in reader.pairs("score unseen", more, less)]


def said(reader: Reader) -> list[str]:
    """How the paper's ordering and growth came out."""
    return [
        verdict(ordering(reader), "The ordering CBW-D over CBW-E over UW"),
        verdict(growth(reader), "The gain of a larger database (CBW-D)"),
    ]


def by_size(reader: Reader) -> dict[str, list[list[float]]]:
    """CBW-D against the size of the database: points (size, right, n)."""
    victim = reader.victim
    curves: dict[str, list[list[float]]] = {}
    held = {name: base for name, base in databases(victim, "unseen").items() if not base.mixed}
    whole = len(victim.images("unseen"))
    for column in (*FGSM, WORST):
        curves[column] = []
        for name, base in held.items():
            full = f"{WEIGHTINGS[-1]}, {name}"
            got = reader.worst("score unseen", full, full) if column == WORST else None
            got = reader.right("score unseen", column, full) if got is None else got
            curves[column].append(point(min(base.size or whole, whole), got))
    return curves
