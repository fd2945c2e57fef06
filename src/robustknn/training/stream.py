"""Further training samples of every class, for losses that compare with references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustknn import rng
from robustknn.batching import Samples
from robustknn.errors import InputError


@dataclass
class ReferenceStream:
    """Random training samples by class, counted: what a step gets depends on the seed and the step alone.

    Every class is gone through in a random order of its own, anew after its last sample, so that over a run all
    samples serve equally often.

    Attributes:
        split: the training samples.
        ids: (n,) int64, theirs.
        seed: of the run.
        like: where samples go, in which type.
        augment: (x, ids, step) → x, what the run does to its samples.
    """

    split: Samples
    ids: Tensor
    seed: int
    like: Tensor
    augment: Callable[[Tensor, Tensor, int], Tensor]
    _rows: list[Tensor] = field(default_factory=list)
    _orders: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def draw(self, per_class: int, step: int, classes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`per_class` samples of each class for a step: x (C·n, …), y (C·n,), ids (C·n,), class by class.

        Args:
            classes: (C,) which; None for all.

        Raises:
            InputError: a class without a training sample.
        """
        if not self._rows:
            labels = self.split.labels
            counts = torch.bincount(labels)
            if int(counts.min()) == 0:
                raise InputError(
                    f"class {int(counts.argmin())} has no training sample, so it has no reference; add samples or "
                    "number the classes without gaps."
                )
            self._rows = list(labels.argsort(stable=True).split(counts.tolist()))
        chosen = range(len(self._rows)) if classes is None else classes.tolist()
        positions = torch.cat([self._next(c, per_class, step) for c in chosen])
        x, y = self.split.batch(positions).to(self.like), self.split.labels[positions].to(self.like.device)
        ids = self.ids[positions].to(self.like.device)
        return self.augment(x, ids, step), y, ids

    @property
    def n_classes(self) -> int:
        """How many classes the labels speak of."""
        return int(self.split.labels.max()) + 1

    def _next(self, label: int, count: int, step: int) -> Tensor:
        """The positions of a class's samples for a step."""
        rows = self._rows[label]
        served = range(step * count, (step + 1) * count)
        places = [self._order(label, i // len(rows))[i % len(rows)] for i in served]
        return rows[torch.stack(places)]

    def _order(self, label: int, turn: int) -> Tensor:
        key = (label, turn)
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != label or k[1] == turn - 1}
            self._orders[key] = rng.permutation(len(self._rows[label]), self.seed, "references", label, turn)
        return self._orders[key]
