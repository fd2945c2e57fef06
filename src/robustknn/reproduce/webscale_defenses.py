"""The web-scale defense beside input transformations, every one attacked as it decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from robustknn.classifiers import JPEG, BitDepth, Classifier, RandomCrop, TotalVariation, Transformed
from robustknn.reports.figures import Chart
from robustknn.reproduce.bench import Bench
from robustknn.reproduce.experiment import WORST, Cell, Experiment, Front, Part, Presets, experiments
from robustknn.reproduce.figures import curves_chart
from robustknn.reproduce.webscale_networks_victim import FORWARD
from robustknn.reproduce.webscale_rows import Reader, lines_of
from robustknn.reproduce.webscale_table1 import DISSIMILARITY, PAPER, attacked, network
from robustknn.reproduce.webscale_victim import PRESETS, Database, Decide, Victim

SCENE, RETRIEVAL = "seen", "retrieval, CBW-D"
OPTIONS = {"quality": 75, "bits": 3, "weight": 0.03, "crop": 28, "draws": 10}


@experiments.register("webscale-defenses")
class WebScaleDefenses(Experiment):
    """Retrieval beside JPEG, fewer bits, total variation and random crops."""

    paper, table = PAPER, "comparison with input transformations"
    title = "Retrieval beside JPEG, fewer bits, total variation and random crops, also attacked by BPDA and EOT"
    data = ("cifar10",)
    presets: ClassVar[Presets] = {name: {**preset, **OPTIONS} for name, preset in PRESETS.items()}
    front: ClassVar[Front] = {
        name: ((name, "clean"), (name, "gray FGSM"), (name, WORST))
        for name in ("JPEG", "fewer bits", "total variation", "random crops")
    }

    def parts(self, bench: Bench) -> list[Part]:
        victim = Victim(bench)
        settings = {name: bench[name] for name in OPTIONS}
        scored = victim.scored("score", SCENE, FORWARD * (8 + bench["draws"]), decide(victim), **settings)
        made = [*victim.networks(SCENE), *victim.make(SCENE), scored]
        made.append(victim.worst("network", SCENE, partial(network, victim, SCENE), attacked="network"))
        for name, transform in transforms(bench).items():
            said: dict[str, Any] = {
                "attacked": "transform",
                "transform": type(transform).__name__,
                **asdict(transform),
                "draws": draws(bench, transform),
            }
            cost = 0.054 * draws(bench, transform) if transform.random else 0.25
            made.append(victim.worst(name, SCENE, partial(transformed, victim, transform), cost, **said))
        return [*made, attacked(victim, RETRIEVAL, Database(SCENE), "CBW-D")]

    def cells(self, bench: Bench, found: Mapping[str, Any]) -> list[Cell]:
        names = ["network", *transforms(bench), RETRIEVAL]
        return Reader(Victim(bench), found).cells("score", {name: name for name in names})

    def pictures(self, bench: Bench, found: Mapping[str, Any]) -> dict[str, Any]:
        reader = Reader(Victim(bench), found)
        names = ["network", *transforms(bench), RETRIEVAL]
        return {who: {name: reader.curve("score", name, who, SCENE) for name in names} for who in ("black", "gray")}

    def draw(self, record: Mapping[str, Any]) -> list[Chart]:
        return [
            curves_chart(f"dissimilarity-{who}", f"{who}-box FGSM", lines_of(record["pictures"][who]), DISSIMILARITY)
            for who in ("black", "gray")
        ]


def transforms(bench: Bench) -> dict[str, JPEG | BitDepth | TotalVariation | RandomCrop]:
    """The transformations, by name."""
    return {
        "JPEG": JPEG(bench["quality"]),
        "fewer bits": BitDepth(bench["bits"]),
        "total variation": TotalVariation(bench["weight"]),
        "random crops": RandomCrop(bench["crop"]),
    }


def draws(bench: Bench, transform: JPEG | BitDepth | TotalVariation | RandomCrop) -> int:
    """How many decide."""
    return int(bench["draws"]) if transform.random else 1


def transformed(victim: Victim, transform: JPEG | BitDepth | TotalVariation | RandomCrop) -> Transformed:
    """The network behind a transformation."""
    bench = victim.bench
    model, n_classes = victim.network(SCENE), bench.source().n_classes
    return Transformed(model, n_classes, transform, draws=draws(bench, transform), seed=bench.seed)


def decide(victim: Victim) -> Callable[[], Decide]:
    """The network, the transformations and retrieval."""

    def make() -> Decide:
        held: dict[str, Classifier] = {"network": network(victim, SCENE)}
        held |= {name: transformed(victim, t) for name, t in transforms(victim.bench).items()}
        held[RETRIEVAL] = victim.retrieval(Database(SCENE), "CBW-D")

        def every(x: Tensor, ids: Tensor) -> dict[str, Tensor]:
            return {name: classifier.labels(x, ids) for name, classifier in held.items()}

        return every

    return make
