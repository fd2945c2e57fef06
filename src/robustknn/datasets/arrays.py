"""Data sets from what the user has in hand: arrays, or any map-style torch Dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from robustknn.checks import Bounds, as_tensor, check_choice, check_inputs, check_labels
from robustknn.datasets.base import DataSource, Split
from robustknn.datasets.protocols import PROTOCOLS, Official, divide
from robustknn.errors import InputError

PIXELS = (0.0, 1.0)


def from_arrays(
    x_train: Any,
    y_train: Any,
    x_test: Any,
    y_test: Any,
    *,
    name: str = "arrays",
    class_names: Sequence[str] | None = None,
    bounds: Bounds | None = PIXELS,
    protocol: str = "standard",
) -> DataSource:
    """A data set from arrays or tensors.

    Args:
        x_train, x_test: (n, …) floating point inside the bounds, or 8-bit pixels (read as 0..255 → [0, 1]). They
            are kept as they are, without a copy where they are tensors.
        y_train, y_test: (n,) whole numbers 0..C − 1.
        class_names: one name a class; by default the numbers.
        bounds: the least and greatest value, None for data without bounds (series, embeddings).

    Raises:
        InputError: shapes, types, values outside the bounds, a class without training sample.
    """
    bounds = _bounds(bounds)
    splits = []
    for x, y, part in ((x_train, y_train, "train"), (x_test, y_test, "test")):
        values = as_tensor(x, f"x_{part}").cpu()
        check_values(values, bounds, f"x_{part}")
        splits.append(Split(values, check_labels(y, len(values), None, f"y_{part}"), part))
    return _official(name, splits, class_names, bounds, protocol)


def from_datasets(
    train: Any,
    test: Any,
    *,
    name: str = "datasets",
    class_names: Sequence[str] | None = None,
    bounds: Bounds | None = PIXELS,
    protocol: str = "standard",
) -> DataSource:
    """A data set from two map-style torch Datasets of (x, y), read as samples are needed.

    Labels are taken from `.targets` or `.labels` where the Dataset has one that agrees with what it yields,
    else by one pass over it. Class names are those of `.classes` unless given. See `from_arrays`.

    Raises:
        InputError: a Dataset without length or without (x, y) items, and what `from_arrays` raises.
    """
    bounds = _bounds(bounds)
    splits = []
    for dataset, part in ((train, "train"), (test, "test")):
        items = DatasetItems(dataset, bounds, f"the {part} Dataset")
        splits.append(Split(items, items.labels(), part))
    if class_names is None:
        class_names = getattr(train, "classes", None)
    return _official(name, splits, class_names, bounds, protocol)


class DatasetItems:
    """The samples of a map-style torch Dataset, read one by one."""

    def __init__(self, dataset: Any, bounds: Bounds | None, what: str) -> None:
        sized = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not sized or isinstance(dataset, IterableDataset):
            raise InputError(f"{what} is a {type(dataset).__name__} without length or items; pass a map-style one.")
        if not len(dataset):
            raise InputError(f"{what} holds no sample.")
        self._dataset, self._bounds, self._what = dataset, bounds, what
        self.shape = tuple(self._item(0)[0].shape)
        self.read(torch.tensor([0]))  # normalised or unscaled inputs are told at once

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, places: Tensor) -> Tensor:
        x = [self._item(place)[0] for place in places.tolist()]
        for place, value in zip(places.tolist(), x, strict=True):
            if value.shape != self.shape:
                raise InputError(
                    f"sample {place} of {self._what} has shape {tuple(value.shape)}, the first has {self.shape}; "
                    "give it a transform that makes them the same."
                )
        batch = torch.stack(x)
        check_values(batch, self._bounds, self._what)
        return batch

    def labels(self) -> Tensor:
        """(n,) int64."""
        n = len(self)
        for attribute in ("targets", "labels"):
            try:
                known = as_tensor(getattr(self._dataset, attribute, None), attribute)
            except InputError:
                continue
            # A target_transform, or a subclass that relabels, makes the attribute differ from the items.
            if known.shape == (n,) and all(self._label(place) == known[place] for place in {0, n // 2, n - 1}):
                return check_labels(known, n, None, f".{attribute} of {self._what}")
        return check_labels([self._label(place) for place in range(n)], n, None, f"the labels of {self._what}")

    def _item(self, place: int) -> tuple[Tensor, Any]:
        item = self._dataset[place]
        if not isinstance(item, (tuple, list)) or len(item) < 2 or not isinstance(item[0], (Tensor, np.ndarray)):
            raise InputError(
                f"{self._what} must yield (tensor, label) pairs; give it a transform that turns images into tensors."
            )
        return as_tensor(item[0], f"sample {place} of {self._what}").cpu(), item[1]

    def _label(self, place: int) -> int:
        label = self._item(place)[1]
        try:
            return int(label)
        except (TypeError, ValueError) as error:
            raise InputError(f"label {label!r} of sample {place} of {self._what} is not a whole number.") from error


def check_values(x: Tensor, bounds: Bounds | None, what: str) -> None:
    """InputError unless x is 8-bit pixels bounded by [0, 1], or finite floating point inside the bounds."""
    if x.dtype != torch.uint8:
        check_inputs(x, bounds, what)
    elif bounds != PIXELS:
        raise InputError(
            f"{what} has 8-bit values, which are read as pixels in [0, 1], but its bounds are {bounds}; convert it to "
            "floating point in the range you mean."
        )
    elif x.ndim < 2 or not len(x):
        raise InputError(f"{what} has shape {tuple(x.shape)}; pass samples (n, …), at least one.")


def _bounds(bounds: Bounds | None) -> Bounds | None:
    if bounds is None:
        return None
    low, high = map(float, bounds)
    if not low < high:
        raise InputError(f"bounds are {bounds}; pass (least, greatest), or None for data without bounds.")
    return low, high


def _official(
    name: str, splits: list[Split], class_names: Sequence[str] | None, bounds: Bounds | None, protocol: str
) -> DataSource:
    train, test = splits
    if class_names is None:
        class_names = [str(label) for label in range(1 + max(int(split.labels.max()) for split in splits))]
    official = Official(name, train, test, tuple(map(str, class_names)), bounds)
    return divide(official, check_choice(protocol, PROTOCOLS, "protocol"))
