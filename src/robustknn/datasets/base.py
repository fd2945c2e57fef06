"""What a data set is here: labelled splits that know where their samples come from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from robustknn.checks import Bounds, check_choice, check_labels, check_positions, check_positive_int

PARTS = ("train", "test")


class Items(Protocol):
    """Where the samples of a split are kept: in memory, in a folder of images, in a torch Dataset.

    Attributes:
        shape: the shape of one sample.
    """

    shape: tuple[int, ...]

    def __len__(self) -> int: ...

    def read(self, places: Tensor) -> Tensor:
        """The samples at these places, (B, *shape), B >= 1: 8-bit pixels or floating point."""
        ...


class TensorItems:
    """Samples in memory: (n, …), 8-bit pixels or floating point. The tensor is shared, not copied."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.shape = tuple(data.shape[1:])

    def __len__(self) -> int:
        return len(self.data)

    def read(self, places: Tensor) -> Tensor:
        return self.data[places].contiguous()  # what a file gave may be a transposed view


def as_inputs(x: Tensor) -> Tensor:
    """Samples as networks take them, float32: 8-bit pixels are divided by 255."""
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


class Split(Dataset[tuple[Tensor, int]]):
    """A labelled set of samples; also a map-style torch Dataset of (x, y).

    Args:
        items: the samples, n of them; a tensor is kept as it is (8-bit pixels stay 8 bits).
        labels: (n,) class numbers.
        part: the official part the samples come from, "train" or "test".
        ids: (n,) their places in that official part; by default 0..n − 1.

    Attributes:
        labels: (n,) int64.
        part: "train" or "test".
        ids: (n,) int64. Two splits of one data source share a sample where both `part` and id agree.

    Raises:
        InputError: labels or ids are not one whole number a sample, the part has another name.
    """

    def __init__(self, items: Items | Tensor, labels: Any, part: str, ids: Any = None) -> None:
        self._items: Items = TensorItems(items) if isinstance(items, Tensor) else items
        n = len(self._items)
        self._places = torch.arange(n)
        self.labels = check_labels(labels, n, None, "labels")
        self.part = check_choice(part, PARTS, "part")
        self.ids = self._places if ids is None else check_labels(ids, n, None, "ids")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, e.g. (3, 32, 32)."""
        return self._items.shape

    def batch(self, positions: Tensor) -> Tensor:
        """The samples at these positions of the split, (B, …) float32; 8-bit pixels are divided by 255."""
        places = self._places[check_positions(positions, len(self))]
        if not len(places):
            return torch.empty(0, *self.shape)
        x = self._items.read(places)
        return as_inputs(x)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        """One sample and its label. IndexError past the end, as iteration expects."""
        position = range(len(self))[position]
        return self.batch(torch.tensor([position]))[0], int(self.labels[position])

    def subset(self, positions: Any) -> Split:
        """The samples at these positions, in this order: whole numbers (B,) or a mask (n,). Nothing is copied."""
        chosen = check_positions(positions, len(self))
        part = copy.copy(self)
        part._places, part.labels, part.ids = self._places[chosen], self.labels[chosen], self.ids[chosen]
        return part

    def first(self, n: int) -> Split:
        """The first n samples (all when there are fewer)."""
        return self.subset(torch.arange(min(check_positive_int(n, "n"), len(self))))

    def per_class(self, m: int) -> Split:
        """The first m samples of every class, in the order of the split (fewer where a class has fewer)."""
        return self.subset(rank_in_class(self.labels) < check_positive_int(m, "m"))

    def __repr__(self) -> str:
        return f"Split({len(self)} {self.part} samples of shape {self.shape})"


@dataclass(frozen=True)
class DataSource:
    """A data set, divided by a protocol (see `robustknn.datasets.protocols`).

    Attributes:
        name: what it was loaded by.
        train, calibration, validation, test: the splits; calibration and validation may be None.
        class_names: one name a class, in the order of the labels.
        bounds: the least and greatest value a sample may take, None for data without bounds (series).
        protocol: "standard", "published", or a name of the user's own.
    """

    name: str
    train: Split
    calibration: Split | None
    validation: Split | None
    test: Split
    class_names: tuple[str, ...]
    bounds: Bounds | None = (0.0, 1.0)
    protocol: str = "standard"

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)


def rank_in_class(labels: Tensor) -> Tensor:
    """How many earlier samples share each sample's label, (n,) int64."""
    order = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    return rank
