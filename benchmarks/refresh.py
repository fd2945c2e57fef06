"""What it costs an attack to look neighbors up anew, and the memory of an attack over a million references."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks.memory import GB, peak_memory
from benchmarks.record import Figure, Result
from benchmarks.timing import against
from robustknn import KNN, PGD, FeatureExtractor, ReferenceSet, ThreatModel
from robustknn.objectives import (
    ASK,
    Adaptive,
    BatchObjective,
    BoundObjective,
    NeighborHinge,
    Objective,
    RankPair,
)

OBJECTIVES: dict[str, Objective] = {
    "ask": ASK(),
    "adaptive": Adaptive(),
    "rank-pair": RankPair(),
    "neighbor-hinge": NeighborHinge(),
}
K, CLASSES = 15, 10
BOUND, FACTOR, BUDGET = 1.3, 1.3, 0.8
WHAT = (
    "A step's look at where 100 inputs are now (the hard decision, the neighbors and those of every class, guides "
    "gathered anew), 50,000 references of 512 numbers in ten classes, k = 15, in units of the bare search for the same "
    "neighbors, and of that for the k nearest without the classes; and the peak memory of an attack (ASK, five steps, "
    "neighbors anew in each) over a million references."
)


def classifier(n: int, dim: int) -> KNN:
    """Random references of raw inputs: the network costs nothing."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % CLASSES
    centers = torch.rand(CLASSES, dim, generator=generator)
    vectors = torch.empty(n, dim)
    for rows in torch.arange(n).split(50_000):  # in parts, so that making them is not the peak
        vectors[rows] = (centers[labels[rows]] + torch.rand(len(rows), dim, generator=generator)) / 2
    return KNN(ReferenceSet.from_vectors(vectors, labels, features=FeatureExtractor(nn.Flatten())), K)


def run(quick: bool) -> Result:
    """Time the looks, then measure memory in a process of its own."""
    repeats, n, dim, many = (1, 2_000, 32, 5_000) if quick else (9, 50_000, 512, 1_000_000)
    victim = classifier(n, dim)
    x, y = torch.rand(100, dim, generator=torch.Generator().manual_seed(1)), torch.arange(100) % CLASSES
    figures = []
    for name, objective in OBJECTIVES.items():
        bound = objective.bind(victim)
        batch = bound.start(x, y, None, victim.look(x, bound.requests))

        def nearest() -> object:
            return victim.voters[0].index.search(x, K)

        def search(bound: BoundObjective = bound) -> object:
            (request,) = bound.requests
            return request.voter.index.search_both(x, max(K, request.nearest), request.per_class)

        def refresh(bound: BoundObjective = bound, batch: BatchObjective = batch) -> None:
            batch.update(None, victim.look(x, bound.requests))

        same = against(search, {name: refresh}, repeats)[name]
        figures.append(Figure.of(f"{name}, in units of the search for the same neighbors", same, BOUND))
        alone = against(nearest, {name: refresh}, repeats)[name]
        figures.append(Figure.of(f"{name}, in units of the search for the k nearest alone", alone))
    command = [sys.executable, "-m", "benchmarks.refresh", str(many)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    size, peak = many * DIM * 4 / GB, int(done.stdout) / GB
    figures += [
        Figure(
            f"{many:,} references: peak / ({FACTOR} × references + {BUDGET} GB)",
            peak / (FACTOR * size + BUDGET),
            bound=1.0,
        ),
        Figure("peak, GB", peak),
        Figure("references, GB", size),
    ]
    return Result(WHAT, repeats, figures, {"references": n, "dim": dim, "k": K})


DIM = 256


def attack(n: int) -> None:
    """What is measured."""
    torch.set_num_threads(1)
    x = torch.rand(100, DIM, generator=torch.Generator().manual_seed(1))
    PGD(steps=5, check_every=1)(classifier(n, DIM), x, torch.arange(100) % CLASSES, ThreatModel("linf", 0.05))


if __name__ == "__main__":
    attack(int(sys.argv[1]))
    print(peak_memory())
