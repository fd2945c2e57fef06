"""Batches of arrays, tensors, splits, data sets and loaders: every sample once, with its label."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from robustknn.batching import MIN_ROWS, Samples, batches, count, pad_rows
from robustknn.datasets import from_arrays
from robustknn.errors import InputError

N = 23
X = torch.arange(N * 6, dtype=torch.float32).view(N, 2, 3)
Y = torch.arange(N) % 4


class Items(Dataset[Any]):
    """A map-style data set whose items are made by a function."""

    def __init__(self, make: Callable[[int], Any] = lambda i: (X[i], int(Y[i])), n: int = N) -> None:
        self.make, self.n = make, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, place: int) -> Any:
        return self.make(place)


class Stream(IterableDataset[Any]):
    """A data set without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter((X[i], int(Y[i])) for i in range(N))


class Held:
    """The library's own protocol of a labelled set."""

    labels = Y

    def __len__(self) -> int:
        return N

    def batch(self, positions: Tensor) -> Tensor:
        return X[positions]


def split() -> Any:
    pixels = X / X.max()
    return from_arrays(pixels, Y, pixels, Y, protocol="published").train


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


IN_ORDER: dict[str, Callable[[], Any]] = {
    "tensors": lambda: (X, Y),
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "lists": lambda: (X.tolist(), Y.tolist()),
    "labels as floats": lambda: (X, Y.double()),
    "samples": Held,
    "tensor data set": lambda: TensorDataset(X, Y),
    "data set": Items,
    "data set of lists": lambda: Items(lambda i: [X[i], int(Y[i])]),
    "data set with more": lambda: Items(lambda i: (X[i], int(Y[i]), i)),
    "data set of arrays": lambda: Items(lambda i: (X[i].numpy(), np.int64(Y[i]))),
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=5),
    "loader with a batch sampler": lambda: DataLoader(
        Items(), batch_sampler=BatchSampler(SequentialSampler(Items()), 4, drop_last=False)
    ),
}


@pytest.mark.parametrize("size", [1, 4, N, 100])
@pytest.mark.parametrize("what", IN_ORDER)
def test_every_sample_comes_once_with_its_label(what: str, size: int) -> None:
    data = IN_ORDER[what]()
    assert count(data) == N
    parts = list(batches(data, size))
    assert torch.equal(torch.cat([x for x, _ in parts]).float(), X)
    labels = torch.cat([y for _, y in parts])
    assert labels.dtype == torch.int64
    assert torch.equal(labels, Y)
    if "loader" not in what:
        assert [len(x) for x, _ in parts] == [size] * (N // size) + [N % size] * bool(N % size)


def test_a_loader_may_work_in_another_process() -> None:
    parts = list(batches(DataLoader(TensorDataset(X, Y), batch_size=9, num_workers=1), 5))
    assert [len(x) for x, _ in parts] == [9, 9, 5]
    assert torch.equal(torch.cat([x for x, _ in parts]), X)


def test_a_split_is_a_set_of_samples() -> None:
    data = split()
    assert isinstance(data, Samples)
    assert count(data) == N
    parts = list(batches(data, 5))
    torch.testing.assert_close(torch.cat([x for x, _ in parts]), X / X.max())
    assert torch.equal(torch.cat([y for _, y in parts]), Y)


SHUFFLED: dict[str, tuple[Callable[[], Any], int]] = {
    "shuffled": (lambda: DataLoader(Items(), batch_size=5, shuffle=True, generator=seeded()), N),
    "random sampler": (
        lambda: DataLoader(Items(), batch_size=5, sampler=RandomSampler(Items(), generator=seeded())),
        N,
    ),
    "subset sampler": (lambda: DataLoader(Items(), batch_size=5, sampler=SubsetRandomSampler([1, 3, 5, 7])), 4),
    "batch sampler": (
        lambda: DataLoader(Items(), batch_sampler=BatchSampler(SubsetRandomSampler([2, 4, 8]), 2, drop_last=False)),
        3,
    ),
}


@pytest.mark.parametrize("what", SHUFFLED)
def test_a_shuffled_loader_keeps_inputs_and_labels_together(what: str) -> None:
    make, n = SHUFFLED[what]
    assert count(make()) == n
    parts = list(batches(make(), 5))
    x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    places = (x[:, 0, 0] / 6).long()
    assert torch.equal(y, Y[places])
    assert torch.equal(x, X[places])
    assert len(places.unique()) == len(places) == n


REFUSED_LENGTHS: dict[str, tuple[Callable[[], Any], str]] = {
    "stream": (
        Stream,
        "Stream does not know its length; pass arrays (x, y), a map-style Dataset or a DataLoader over one.",
    ),
    "loader of a stream": (lambda: DataLoader(Stream(), batch_size=4), "does not know its length"),
    "dropped": (
        lambda: DataLoader(Items(), batch_size=4, drop_last=True),
        "the loader drops its last batch; build it with drop_last=False.",
    ),
    "dropped by the sampler": (
        lambda: DataLoader(Items(), batch_sampler=BatchSampler(SequentialSampler(Items()), 4, drop_last=True)),
        "the loader drops its last batch; build it with drop_last=False.",
    ),
    "no batches": (
        lambda: DataLoader(Items(), batch_size=None),
        "the loader makes no batches (batch_size=None); build it with a batch size.",
    ),
    "nothing": (lambda: None, "NoneType does not know its length"),
    "a generator": (lambda: (i for i in range(3)), "generator does not know its length"),
    "a number in a pair": (lambda: (5, 5), "tuple does not know its length"),
    "a tensor without samples": (lambda: (torch.tensor(1.0), Y), "tuple does not know its length"),
}


@pytest.mark.parametrize("what", REFUSED_LENGTHS)
def test_what_cannot_be_counted_is_one_sentence(what: str) -> None:
    make, said = REFUSED_LENGTHS[what]
    with pytest.raises(InputError) as caught:
        count(make())
    assert said in str(caught.value)
    check_sentence(str(caught.value))


def check_sentence(text: str) -> None:
    assert "\n" not in text
    assert len(text) < 300
    assert text.endswith(".")


def fails(_: int) -> Any:
    raise TypeError("a mistake in the user's own code")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no pair": (lambda: (X,), "cannot take batches from tuple; pass arrays (x, y), a torch Dataset or a DataLoader."),
    "three": (lambda: (X, Y, Y), "cannot take batches from tuple"),
    "nothing": (lambda: (), "cannot take batches from tuple"),
    "a list": (lambda: [X, Y], "cannot take batches from list"),
    "a tensor": (lambda: X, "cannot take batches from Tensor"),
    "text": (lambda: "data", "cannot take batches from str"),
    "too few labels": (lambda: (X, Y[:-1]), "y has 22 labels for 23 samples; pass one label a sample."),
    "too many labels": (lambda: (X, torch.cat([Y, Y])), "y has 46 labels for 23 samples"),
    "one-hot labels": (lambda: (X, torch.eye(4)[Y]), "y has shape (23, 4); pass one class number a sample"),
    "fractions": (lambda: (X, Y + 0.5), "class labels are integers 0..C-1."),
    "text as labels": (lambda: (X, ["cat"] * N), "y must be a tensor or an array of numbers, not list."),
    "text as inputs": (lambda: (["a"] * N, Y), "x must be a tensor or an array of numbers, not list."),
    "negative labels": (lambda: (X, Y - 1), "y holds the label -1, outside 0..; map labels to 0..C-1 first."),
    "a number": (lambda: (5, [0, 1]), "y has 2 labels for 1 samples"),
    "items without labels": (lambda: Items(lambda i: X[i]), "the loader must yield (inputs, labels) pairs of tensors."),
    "items of one": (lambda: Items(lambda i: (X[i],)), "the loader must yield (inputs, labels) pairs of tensors."),
    "items as tables": (lambda: Items(lambda i: {"x": X[i], "y": 1}), "the loader must yield (inputs, labels) pairs"),
    "text in items": (lambda: Items(lambda i: ("a", 1)), "the loader must yield (inputs, labels) pairs of tensors."),
    "labels of items": (lambda: Items(lambda i: (X[i], torch.eye(4)[Y[i]])), "y has shape (6, 4)"),
    "named labels": (lambda: Items(lambda i: (X[i], "cat")), "y must be a tensor or an array of numbers"),
    "pictures": (
        lambda: Items(lambda i: (object(), 1)),
        "cannot be put in batches (default_collate: batch must contain tensors, numpy arrays, numbers, dicts or lists; "
        "found <class 'object'>); let it return tensors of one shape",
    ),
    "different sizes": (
        lambda: Items(lambda i: (torch.zeros(i + 1), 1)),
        "cannot be put in batches (stack expects each tensor to be equal size",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_gives_no_batches_is_one_sentence(what: str) -> None:
    make, said = REFUSED[what]
    with pytest.raises(InputError) as caught:
        list(batches(make(), 6))
    assert said in str(caught.value)
    check_sentence(str(caught.value))


def test_mistakes_in_a_data_sets_own_code_are_left_as_they_are() -> None:
    with pytest.raises(TypeError, match="a mistake in the user's own code"):
        list(batches(Items(fails), 6))


@pytest.mark.parametrize("n", [1, 2, MIN_ROWS - 1, MIN_ROWS, MIN_ROWS + 1])
def test_small_batches_are_padded_with_their_first_row(n: int) -> None:
    x = torch.rand(n, 3, 2)
    padded = pad_rows(x)
    assert len(padded) == max(n, MIN_ROWS)
    assert torch.equal(padded[:n], x)
    assert bool((padded[n:] == x[0]).all())
    assert (padded is x) == (n >= MIN_ROWS)
