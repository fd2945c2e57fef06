"""Batches of anything that holds samples, and the least batch a network is run on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from robustknn.checks import as_tensor, check_labels
from robustknn.errors import InputError, reason

MIN_ROWS = 16
"""Smaller batches are padded to this many rows before a network sees them. CPU kernels choose another order of
summation for a handful of rows (measured: below 4 a thread); from here on a sample's features and gradients
are the same to the last bit in every batch, so that results do not depend on how samples were batched."""

_COLLATION = ("default_collate: ", "stack expects each tensor to be equal size")
"""What torch says when a DataLoader meets items that it cannot stack."""


@runtime_checkable
class Samples(Protocol):
    """A labelled set of samples that hands out batches of given positions (see `robustknn.datasets.Split`)."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Tensor:
        """Class numbers, (n,) int64."""
        ...

    def batch(self, positions: Tensor) -> Tensor:
        """The samples at these positions, (B, …) floating point."""
        ...


def pad_rows(x: Tensor) -> Tensor:
    """The batch with its first row repeated up to MIN_ROWS; the caller drops the extra rows again."""
    missing = MIN_ROWS - len(x)
    return x if missing <= 0 else torch.cat([x, x[:1].expand(missing, *x.shape[1:])])


def count(data: Any) -> int:
    """How many samples `data` holds.

    Raises:
        InputError: it cannot say (an iterable data set of unknown length), or not all would be handed out.
    """
    try:
        if isinstance(data, tuple) and data:
            return len(data[0])
        if isinstance(data, torch.utils.data.DataLoader):
            sampler = data.batch_sampler
            if sampler is None:
                raise InputError("the loader makes no batches (batch_size=None); build it with a batch size.")
            if getattr(sampler, "drop_last", False):
                raise InputError("the loader drops its last batch; build it with drop_last=False.")
            data = getattr(sampler, "sampler", data.sampler)
        return len(data)
    except TypeError as error:
        raise InputError(
            f"{type(data).__name__} does not know its length; pass arrays (x, y), a map-style Dataset or a "
            "DataLoader over one."
        ) from error


def batches(data: Any, batch_size: int, labelled: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, y) batches, in order, of a pair of arrays, a split, a torch Dataset or a DataLoader.

    Args:
        labelled: whether labels are wanted. If not, data may come without, as an array of inputs or a data set of
            inputs alone, and y means nothing.

    Raises:
        InputError: `data` is nothing of these, or does not hold inputs of one shape with one label each.
    """
    if not labelled and (isinstance(data, (Tensor, np.ndarray)) or (isinstance(data, tuple) and len(data) == 2)):
        x = as_tensor(data[0] if isinstance(data, tuple) else data, "x")
        data = x, torch.zeros(len(x), dtype=torch.int64)
    if isinstance(data, tuple) and len(data) == 2:
        x = torch.atleast_1d(as_tensor(data[0], "x"))
        y = check_labels(data[1], len(x), None)
        for start in range(0, len(x), batch_size):
            yield x[start : start + batch_size], y[start : start + batch_size]
    elif isinstance(data, Samples):
        labels = data.labels
        for positions in torch.arange(len(data)).split(batch_size):
            yield data.batch(positions), labels[positions]
    elif isinstance(data, torch.utils.data.DataLoader):
        try:
            for item in data:
                yield _pair(item, labelled)
        except (TypeError, RuntimeError) as error:
            if not any(words in str(error) for words in _COLLATION):
                raise
            raise InputError(
                f"the data set's items cannot be put in batches ({reason(error)}); let it return tensors of one shape "
                "(torchvision: transform=ToTensor(), after a Resize where sizes differ)."
            ) from error
    elif isinstance(data, torch.utils.data.Dataset):
        yield from batches(torch.utils.data.DataLoader(data, batch_size=batch_size), batch_size, labelled)
    else:
        raise InputError(
            f"cannot take batches from {type(data).__name__}; pass arrays (x, y), a torch Dataset or a DataLoader."
        )


def _pair(item: Any, labelled: bool) -> tuple[Tensor, Tensor]:
    if not labelled:
        inputs = item[0] if isinstance(item, (tuple, list)) and item else item
        item = (inputs, torch.zeros(len(inputs), dtype=torch.int64)) if isinstance(inputs, Tensor) else None
    if not isinstance(item, (tuple, list)) or len(item) < 2 or not isinstance(item[0], Tensor):
        raise InputError("the loader must yield (inputs, labels) pairs of tensors.")
    return item[0], check_labels(item[1], len(item[0]), None)
