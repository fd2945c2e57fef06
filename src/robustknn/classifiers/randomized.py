"""Classifiers that draw random numbers: the same draw again for who asks again, and others to judge examples by."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor

from robustknn import rng
from robustknn.checks import check_positive_int, check_whole
from robustknn.classifiers.base import Classifier
from robustknn.classifiers.rules import TIE
from robustknn.errors import InputError

SURE = 0.5
"""By how much another class must lead, in scores, for an attack to be done with a sample where draws decide: a narrow
win is one of the draws that it met, and lost in others."""


def numbered(x: Tensor, sample_ids: Tensor | None) -> Tensor:
    """What the random numbers of inputs x (N, …) are counted from, (N,): 0..N − 1 where nothing is given.

    Raises:
        InputError: another number of ids than of inputs.
    """
    if sample_ids is None:
        return torch.arange(len(x), device=x.device)
    if len(sample_ids) != len(x):
        raise InputError(f"there are {len(sample_ids)} sample_ids for {len(x)} inputs; pass one for each.")
    return sample_ids.to(x.device)


class Randomized(Classifier):
    """A classifier whose random numbers are counted from (seed, sample id).

    The same sample gets the same draw in every batch, so an attack that asks again and again with one id meets one
    draw and may fit it. `fooled` says what comes of its examples in draws that nobody has seen.

    Attributes:
        seed: of all draws.
    """

    seed: int

    @property
    def random(self) -> bool:
        """Whether another seed can change a decision."""
        return True

    @property
    def enough(self) -> float:
        return SURE if self.random else TIE

    def with_seed(self, seed: int) -> Self:
        """The same classifier with other random numbers."""
        other = copy.copy(self)
        other.seed = check_whole(seed, "seed")
        return other

    def fooled(self, x: Any, y: Any, sample_ids: Tensor | None = None, *, draws: int = 10, seed: int = 1) -> Tensor:
        """In which share of fresh draws each input is decided wrongly beyond a tie, (N,) float64.

        One minus its mean over adversarial examples is the accuracy under attack that does not depend on the draw
        which the attack saw.

        Args:
            x: (N, …) inputs.
            y: (N,) their true classes.
            sample_ids: as in `scores`.
            draws: how many times the whole classifier draws anew.
            seed: of these draws; other ones than those of `self.seed` for every value.
        """
        x = self.place(x)
        y = self.numbers(y, len(x)).to(x.device)
        fooled = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for fresh in self.redrawn(draws, seed):
            fooled += fresh.lead(fresh.scores(x, sample_ids), y) < -TIE
        return fooled / draws

    def redrawn(self, draws: int, seed: int = 1) -> Iterator[Self]:
        """The classifier with random numbers that are not its own, as often as `draws` says; see `fooled`."""
        for draw in range(check_positive_int(draws, "draws")):
            yield self.with_seed(rng.derive(self.seed, "fresh", check_whole(seed, "seed"), draw))
