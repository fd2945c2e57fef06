"""What every objective costs beside the least that any could: the same loop that gathers its guides and multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, cast

from torch import Tensor

from benchmarks.ask import LAYERS
from benchmarks.record import Figure, Result
from benchmarks.scene import Attacked, Scene
from benchmarks.timing import against
from robustknn import DkNN
from robustknn.classifiers import Look, VoterClassifier
from robustknn.classifiers.voters import Voter
from robustknn.models import MnistCNN
from robustknn.objectives import (
    ASK,
    Adaptive,
    AdvKNN,
    BatchObjective,
    ClassMean,
    FeatureTarget,
    NearestSubstitute,
    NeighborHinge,
    Objective,
    RankPair,
    SoftCount,
)
from robustknn.objectives.guides import Gathered, Guides, InPlace, Rows, products

OBJECTIVES: dict[str, Objective] = {
    "ask": ASK(),
    "ask, instance-wise": ASK(kind="instance-wise", loss="cross-entropy"),
    "adaptive": Adaptive(),
    "adaptive, rival": Adaptive(loss="rival"),
    "rank-pair": RankPair(),
    "soft-count": SoftCount(),
    "neighbor-hinge": NeighborHinge(),
    "nearest-substitute": NearestSubstitute(),
    "feature-target": FeatureTarget(),
    "class-mean": ClassMean(),
    "advknn": AdvKNN(max_references=500),
}
CHOSEN_ONCE = ("feature-target", "class-mean", "advknn")
"""Those whose guides stay: choosing them is no part of what comes between two lookups."""
BOUND = 1.2
WHAT = (
    "Guides at the neighbors found and the ten steps of PGD until they are looked up anew (searches stubbed out), last "
    "two convolutions of the MNIST CNN, k = 75, cosine, in units of the same loop that gathers these guides once and "
    "whose loss is the sum of their products with the features. The guides of class-mean are a mean a sample, those of "
    "advknn the weights of its heads, the same for all samples."
)


class Bare(BatchObjective):
    """The sum of the products of features and guides: no less can be done with guides of each sample."""

    def __init__(self, classifier: VoterClassifier, guides: Sequence[Guides | Tensor]) -> None:
        self.classifier = classifier
        self.guides = [
            g if isinstance(g, Tensor) else gathered(v, g.rows) for v, g in zip(classifier.voters, guides, strict=True)
        ]

    def loss(self, x: Tensor) -> Tensor:
        features = self.classifier.read(x, [v.layer for v in self.classifier.voters])
        total = x.new_zeros(len(x))
        for voter, guides in zip(self.classifier.voters, self.guides, strict=True):
            z = features[voter.layer].to(guides)
            total = total + (z @ guides.T if guides.ndim == 2 else products(guides, z)).sum(1)
        return total

    def update(self, kept: Tensor | None, look: Look | None) -> None:
        pass


class Floor(Attacked):
    """The same loop over `Bare`, with the guides that an objective would have."""

    def __init__(self, scene: Scene, classifier: VoterClassifier, objective: Objective, steps: int) -> None:
        super().__init__(scene, classifier, objective, steps)
        self.guides = shared_of(objective, self) or guides_of(self.batch)
        self.batch = Bare(classifier, self.guides)

    def round(self) -> Tensor:
        self.batch = Bare(self.job.classifier, self.guides)
        return self.steps()


def shared_of(objective: Objective, attacked: Attacked) -> list[Guides | Tensor]:
    """What stands in the place of guides: the weights (C, D) of heads, or a mean a sample, (N, 1, D)."""
    if isinstance(objective, AdvKNN):
        return [head.weight for head in cast(Any, attacked.bound).heads]
    if isinstance(objective, ClassMean):
        return [goal.mean[:, None] for goal in cast(Any, attacked.batch)._parts]
    return []


def gathered(voter: Voter, rows: Rows) -> Tensor:
    """Copies of guides, (N, G, D)."""
    return rows.vectors.clone() if isinstance(rows, Gathered) else voter.index.reconstruct_unit(cast(InPlace, rows).ids)


def guides_of(value: Any) -> list[Guides]:
    """The guides that a batch objective holds, in the order of its voters."""
    if isinstance(value, Guides):
        return [value]
    if isinstance(value, (list, tuple)):
        return [g for item in value for g in guides_of(item)]
    if isinstance(value, BatchObjective):
        return guides_of(list(vars(value).values()))
    if is_dataclass(value) and not isinstance(value, type):
        return [g for field in fields(value) for g in guides_of(getattr(value, field.name))]
    return []


def run(quick: bool) -> Result:
    """Time every objective that has guides."""
    repeats, steps, n = (1, 2, 200) if quick else (5, 10, 10_000)
    scene = Scene.make(MnistCNN, 28, 16 if quick else 100)
    classifier = DkNN(scene.references(LAYERS[2], n), 5 if quick else 75, metric="cosine")
    figures = []
    for name, objective in OBJECTIVES.items():
        ours = Attacked(scene, classifier, objective, steps)
        floor = Floor(scene, classifier, objective, steps)
        count = sum(g.shape[-2] if isinstance(g, Tensor) else g.squares.shape[1] for g in floor.guides)
        between = [made.steps if name in CHOSEN_ONCE else made.round for made in (floor, ours)]
        ratio = against(between[0], {name: between[1]}, repeats)[name]
        figures.append(Figure.of(f"{name} ({count} guides a sample)", ratio, BOUND))
    return Result(WHAT, repeats, figures, {"steps": steps, "batch": len(scene.x), "references": n})
