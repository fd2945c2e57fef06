"""An attack of one's own.

robustknn attack --plugin examples/own_attack.py --attack noise --attack-option tries=20 …
"""

from dataclasses import dataclass

import torch

from robustknn import registry
from robustknn.attacks import Attack, Job


@registry.attacks.register("noise")
@dataclass(frozen=True)
class Noise(Attack):
    """The best of several random points of the ball."""

    tries: int = 10

    def run(self, job: Job) -> None:
        rows = torch.arange(len(job.x), device=job.x.device)
        job.begin(job.look(job.x, rows)[0])  # the decision on the clean inputs
        for i in range(self.tries):
            x = job.threat.random_start(job.x, job.ids, job.seed, "noise", i)
            job.offer(x, rows, job.look(x, rows)[0])  # kept where it is better, by the hard decision
