"""Guides of long features: read where the index holds them, and copied for every sample."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.ask import LAYERS
from benchmarks.record import Figure, Result
from benchmarks.scene import Scene
from benchmarks.timing import against
from robustknn import DkNN
from robustknn.models import MnistCNN
from robustknn.objectives import Adaptive, NeighborHinge, Objective, RankPair, guides

OBJECTIVES: dict[str, Objective] = {"adaptive": Adaptive(), "rank-pair": RankPair(), "neighbor-hinge": NeighborHinge()}
WHAT = (
    "Guides of a batch at the neighbors found, the loss and its gradient with them: references read where they lie, in "
    "units of the same with copies of them. Last two convolutions of the MNIST CNN, k = 75, cosine."
)


def run(quick: bool) -> Result:
    """Measure at batches of 10 and 100."""
    repeats, n, k = (1, 200, 5) if quick else (5, 10_000, 75)
    scene = Scene.make(MnistCNN, 28, 100)
    classifier = DkNN(scene.references(LAYERS[2], n), k, metric="cosine")
    figures = []
    for batch in (10, 100):
        for name, objective in OBJECTIVES.items():
            step = one_step(objective, classifier, scene.x[:batch])
            ratio = against(lambda s=step: s(2**60), {"": lambda s=step: s(guides.LEAST_DIM)}, repeats)[""]
            figures.append(Figure.of(f"{name}, batch {batch}", ratio))
    return Result(WHAT, repeats, figures, {"references": n, "k": k})


def one_step(objective: Objective, classifier: DkNN, x: torch.Tensor) -> Callable[[int], object]:
    """Guides, loss and gradient with what is at least so long read in place."""
    bound = objective.bind(classifier)
    look = classifier.look(x, bound.requests)
    y = look.scores.argmax(1)

    def step(least: int) -> object:
        before, guides.LEAST_DIM = guides.LEAST_DIM, least
        try:
            moved = x.clone().requires_grad_(True)
            return torch.autograd.grad(bound.start(x, y, None, look).loss(moved).sum(), moved)
        finally:
            guides.LEAST_DIM = before

    return step
