"""Images to make a database of: labelled or not, in the order of their positions, read as they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from robustknn import store
from robustknn.batching import Samples
from robustknn.checks import as_tensor, check_labels, check_positions
from robustknn.datasets.arrays import DatasetItems, check_values
from robustknn.datasets.base import Items, Split, TensorItems, as_inputs
from robustknn.errors import InputError

_LOOKED_AT = 3


class Source:
    """Samples by position: what a database is built from.

    It can be sent to other processes, which read by themselves.

    Attributes:
        labels: (n,) int64, or None.
        described: what it is, as JSON: `name`, `path` where it has one, and what identifies the content.
    """

    def __init__(self, items: Items, labels: Any, described: Mapping[str, Any]) -> None:
        self._items = items
        self.labels = None if labels is None else check_labels(labels, len(items), None, "labels")
        self.described = dict(described)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, e.g. (3, 32, 32)."""
        return self._items.shape

    def batch(self, positions: Tensor) -> Tensor:
        """The samples at these positions, (B, …) float32; 8-bit pixels are divided by 255."""
        return as_inputs(self._items.read(check_positions(positions, len(self))))

    def __repr__(self) -> str:
        return f"Source({len(self)} samples of shape {self.shape}, {self.described.get('name')})"


def as_source(data: Any, labelled: bool = True) -> Any:
    """Anything that holds samples as something with `len`, `labels` ((n,) or None) and `batch(positions)`.

    Args:
        data: a Source or a split, which are used as they are; arrays (x, y), or x alone; a map-style torch Dataset
            of (x, y). Pixels are 8 bits, or floating point in the model's range.
        labelled: whether labels are wanted; for those of a Dataset every item may have to be read.

    Raises:
        InputError: it is nothing of these, or holds no sample.
    """
    if isinstance(data, (Source, Split, Samples)):
        return data
    if isinstance(data, (Tensor, np.ndarray)):
        return Source(_in_memory(data), None, {"name": "arrays"})
    if isinstance(data, tuple) and len(data) == 2:
        return Source(_in_memory(data[0]), data[1], {"name": "arrays"})
    if isinstance(data, Dataset):
        items = DatasetItems(data, None, "the Dataset")
        return Source(items, items.labels() if labelled else None, {"name": type(data).__name__})
    raise InputError(
        f"a database is made of arrays (x, y), a split, a source such as hugging_face(data), or a map-style torch "
        f"Dataset, not of {type(data).__name__}."
    )


def _in_memory(x: Any) -> TensorItems:
    values = as_tensor(x, "x").cpu()
    check_values(values, (0.0, 1.0) if values.dtype == torch.uint8 else None, "x")
    return TensorItems(values)


def describe(source: Any) -> dict[str, Any]:
    """What a source is, as JSON: `path` says where it was, all else tells it from another.

    The labels are hashed whole, of the samples the first, the middle and the last.
    """
    n = len(source)
    places = torch.linspace(0, n - 1, min(n, _LOOKED_AT)).long()
    labels = source.labels
    return {
        "name": type(source).__name__,
        **getattr(source, "described", {}),
        "rows": n,
        "labels": None if labels is None else store.fingerprint_tensors({"labels": labels}),
        "samples": store.fingerprint_tensors({"samples": source.batch(places)}),
    }
