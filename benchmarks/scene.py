"""What the attack benchmarks share: a random network, random images, the bare loop and ours without its searches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from robustknn import FeatureExtractor, ReferenceSet, ThreatModel
from robustknn.attacks import PGD, Job
from robustknn.classifiers import Look, Request, VoterClassifier
from robustknn.objectives import Objective
from robustknn.recipes.attacks import pgd_transfer

EPS = 0.1


@dataclass(frozen=True)
class Scene:
    """A network with random weights and a batch of random images to attack. The same in every run."""

    net: nn.Module
    x: Tensor
    y: Tensor

    @classmethod
    def make(cls, network: Callable[[], nn.Module], size: int, batch: int) -> Scene:
        """Images are size × size."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return cls(network().eval(), torch.rand(batch, 1, size, size), torch.arange(batch) % 10)

    def references(self, layers: Sequence[str], n: int) -> ReferenceSet:
        """Features of n random images in ten classes."""
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(n, *self.x.shape[1:], generator=generator)
        return ReferenceSet.build(FeatureExtractor(self.net, layers), (images, torch.arange(n) % 10))

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel("linf", EPS)


def bare_loop(scene: Scene, steps: int) -> Callable[[], Tensor]:
    """PGD on cross-entropy as one writes it in torch, from a start that is drawn beforehand."""
    x, y, net, size = scene.x, scene.y, scene.net, 2.5 * EPS / steps
    start = scene.threat.random_start(x, torch.arange(len(x)), 0, "restart", 0)

    def loop() -> Tensor:
        moved = start
        for _ in range(steps):
            moved = moved.detach().requires_grad_(True)
            loss = nn.functional.cross_entropy(net(moved), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + size * gradient.sign()
            moved = (x + (moved - x).clamp(-EPS, EPS)).clamp(0, 1)
        return moved

    return loop


class Blind(Job):
    """A job that answers every look with the first: what is left of an attack are its steps."""

    seen: tuple[Tensor, Look]

    def look(self, x_adv: Tensor, rows: Tensor, requests: Sequence[Request] = ()) -> tuple[Tensor, Look | None]:
        return self.seen


class Attacked:
    """Our PGD (the settings of `pgd-transfer`) with some objective, cut into its steps and its searches."""

    def __init__(self, scene: Scene, classifier: VoterClassifier, objective: Objective | None, steps: int) -> None:
        plain = pgd_transfer(steps=steps)
        self.attack = plain if objective is None else PGD(**{**vars(plain), "objective": objective})
        self.bound = self.attack.objective.bind(classifier)
        self.rows = torch.arange(len(scene.x))
        self.job = Blind(classifier, scene.x, scene.y, None, self.rows, scene.threat, 0, False)
        self.job.seen = self.look(self.bound.requests)
        self.batch = self.start()

    def look(self, requests: Sequence[Request]) -> tuple[Tensor, Look]:
        """The hard decision, with the neighbors that were requested."""
        scores, look = Job.look(self.job, self.job.x, self.rows, requests)
        return scores, cast(Look, look)

    def start(self) -> object:
        """The objective on this batch, from the neighbors of the look taken first."""
        return self.bound.start(self.job.x, self.job.y, None, self.job.seen[1])

    def steps(self) -> Tensor:
        """All steps of the attack, from drawing the start to holding the last iterate, and no search."""
        self.attack._climb(self.job, self.batch, self.bound.requests, 0, self.rows)
        return self.job.best

    def round(self) -> Tensor:
        """What the attack does between two lookups: guides at the neighbors found, and all steps."""
        self.batch = self.start()
        return self.steps()

    def searches(self) -> None:
        """What the attack does besides: look at the inputs, gather the guides, look at the examples found."""
        self.job.seen = self.look(self.bound.requests)
        self.start()
        self.look(())
