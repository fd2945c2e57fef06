"""Splits, protocols, a user's own data, and naming a data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from robustknn import registry
from robustknn.batching import Samples, batches
from robustknn.datasets import DataSource, Split, from_arrays, from_datasets, load
from robustknn.errors import InputError

GENERATOR = np.random.default_rng(0)


def arrays(counts: list[int], tests: list[int], shape: tuple[int, ...] = (1, 2, 2)) -> tuple[np.ndarray, ...]:
    """8-bit arrays with so many samples of each class, shuffled."""
    made = []
    for n in (counts, tests):
        labels = GENERATOR.permutation(np.repeat(np.arange(len(n)), n))
        made += [GENERATOR.integers(0, 256, (len(labels), *shape), dtype=np.uint8), labels]
    return tuple(made)


# ---------------------------------------------------------------------------------------------- Split


def test_pixels_of_8_bits_are_kept_and_divided_per_batch() -> None:
    data = torch.arange(256, dtype=torch.uint8).view(64, 1, 2, 2)
    split = Split(data, torch.arange(64) % 3, "test")
    x = split.batch(torch.tensor([63, 0]))
    assert x.dtype == torch.float32
    assert x[0].flatten().tolist() == [np.float32(v) / np.float32(255) for v in (252, 253, 254, 255)]
    assert x[1].flatten().tolist() == [np.float32(v) / np.float32(255) for v in (0, 1, 2, 3)]
    assert split._items.data.data_ptr() == data.data_ptr()  # type: ignore[attr-defined]
    assert split.batch(torch.tensor([], dtype=torch.int64)).shape == (0, 1, 2, 2)
    assert isinstance(split, Samples)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floats_are_handed_out_as_they_are(dtype: torch.dtype) -> None:
    split = Split(torch.tensor([[0.25, -3.0]], dtype=dtype), [0], "train")
    assert split.batch(torch.tensor([0])).tolist() == [[0.25, -3.0]]
    assert split.batch(torch.tensor([0])).dtype == torch.float32


def test_a_transposed_view_gives_contiguous_batches() -> None:
    data = np.asfortranarray(GENERATOR.integers(0, 256, (4, 5, 3, 6), dtype=np.uint8))  # H, W, C, N as MATLAB has it
    x = Split(torch.from_numpy(data.transpose(3, 2, 0, 1)), [0] * 6, "train").batch(torch.tensor([5, 2]))
    assert x.is_contiguous()
    assert np.array_equal(x.numpy()[1, 2], data[:, :, 2, 2].astype(np.float32) / np.float32(255))


def test_subsets_of_subsets_know_their_place() -> None:
    split = Split(torch.arange(10.0)[:, None], torch.arange(10) % 4, "train")
    part = split.subset([9, 7, 5, 3, 1]).subset(torch.tensor([True, False, True, True, False])).subset(range(1, 3))
    assert part.ids.tolist() == [5, 3]
    assert part.batch(torch.arange(2))[:, 0].tolist() == [5.0, 3.0]
    assert part.labels.tolist() == [1, 3]
    assert part.part == "train"
    assert len(split) == 10  # the whole is untouched
    assert split.ids.tolist() == list(range(10))


def test_ids_may_be_given() -> None:
    split = Split(torch.tensor([[4.0], [2.0], [3.0]]), [0, 1, 0], "test", ids=[40, 20, 30])
    part = split.subset([2, 0]).subset([1, 0])
    assert part.ids.tolist() == [40, 30]
    assert part.batch(torch.arange(2)).tolist() == [[4.0], [3.0]]


def test_first_and_per_class_agree_with_a_plain_loop() -> None:
    labels = GENERATOR.integers(0, 5, 200)
    labels[labels == 4] = 1  # class 4 is empty
    labels[77] = 4
    split = Split(torch.zeros(200, 1), labels, "train")
    seen: dict[int, int] = {}
    expected = []
    for position, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= 7:
            expected.append(position)
    assert split.per_class(7).ids.tolist() == expected
    assert split.first(3).ids.tolist() == [0, 1, 2]
    assert len(split.first(999)) == 200


def test_it_is_a_torch_dataset() -> None:
    split = Split(torch.arange(6, dtype=torch.uint8)[:, None], torch.arange(6) % 2, "train").subset([5, 4, 3, 2])
    loader = DataLoader(split, batch_size=3)
    (x, y), (_, y2) = loader
    assert (x * 255).flatten().tolist() == [5, 4, 3]
    assert (y.tolist(), y2.tolist()) == ([1, 0, 1], [0])
    assert y.dtype == torch.int64
    assert [label for _, label in split] == [1, 0, 1, 0]  # iteration ends by itself
    assert split[-1][0].item() == np.float32(2) / np.float32(255)
    for mine, theirs in zip(batches(split, 3), loader, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        ([3], "position 3 is outside 0..2"),
        ([-1], "position -1 is outside 0..2"),
        ([0.5], "whole numbers"),
        ([[0]], "whole numbers"),
        ([True, False], "mask of 3"),
        ("012", "array of numbers"),
    ],
)
def test_positions_that_cannot_be_are_refused(positions: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Split(torch.zeros(3, 1), [0, 0, 0], "test").subset(positions)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.zeros(3, 1), [0, 1], "train"), "2 labels for 3 samples"),
        ((torch.zeros(3, 1), [0, 1, -1], "train"), "label -1"),
        ((torch.zeros(3, 1), [0, 1, 1], "validation"), "'train', 'test'"),
        ((torch.zeros(3, 1), [0, 1, 1], "test", [1, 2]), "ids has 2"),
    ],
)
def test_splits_that_cannot_be_are_refused(arguments: tuple[object, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Split(*arguments)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ protocols


def test_standard_protocol_divides_the_training_set_class_by_class() -> None:
    x_train, y_train, x_test, y_test = arrays([2000, 123, 10, 9], [5, 4, 3, 2])
    source = from_arrays(x_train, y_train, x_test, y_test)
    assert source.calibration is not None
    assert source.validation is not None
    parts = [source.train, source.calibration, source.validation]
    ids = torch.cat([part.ids for part in parts])
    assert sorted(ids.tolist()) == list(range(len(y_train)))  # together everything, and nothing twice
    assert {part.part for part in parts} == {"train"}
    assert torch.bincount(source.calibration.labels, minlength=4).tolist() == [75, 12, 1, 0]
    assert torch.bincount(source.validation.labels, minlength=4).tolist() == [200, 12, 1, 0]
    for part in parts:
        assert part.ids.tolist() == sorted(part.ids.tolist())
        assert part.labels.tolist() == y_train[part.ids].tolist()
        assert np.array_equal((part.batch(torch.arange(len(part))) * 255).round().numpy(), x_train[part.ids])
    assert source.test.ids.tolist() == list(range(14))
    assert source.test.part == "test"
    assert source.n_classes == 4
    assert source.class_names == ("0", "1", "2", "3")
    # Random, not the first ones; the same every time.
    assert source.calibration.ids.tolist() != source.train.per_class(75).ids.tolist()
    again = from_arrays(x_train, y_train, x_test, y_test).calibration
    assert again is not None
    assert torch.equal(again.ids, source.calibration.ids)


def test_standard_protocol_is_pinned() -> None:
    """Runs are compared across versions: the drawn samples may never change."""
    source = load("digits")
    assert source.calibration is not None
    assert source.validation is not None
    assert source.calibration.ids[:8].tolist() == [7, 9, 13, 16, 30, 31, 38, 43]
    assert source.validation.ids[:8].tolist() == [2, 4, 11, 24, 25, 33, 34, 45]


def test_published_protocol_calibrates_on_the_first_test_samples_of_each_class() -> None:
    data = arrays([3, 3, 3], [400, 150, 21])
    source = from_arrays(*data, protocol="published")
    assert source.validation is None
    assert (len(source.train), len(source.test)) == (9, 571)
    assert source.calibration is not None
    assert source.calibration.part == "test"
    firsts = [np.flatnonzero(data[3] == label)[:m] for label, m in ((0, 75), (1, 75), (2, 10))]
    assert source.calibration.ids.tolist() == sorted(np.concatenate(firsts).tolist())


def test_too_few_samples_give_no_calibration_part() -> None:
    source = from_arrays(*arrays([9, 9], [1, 1]))
    assert source.calibration is None
    assert source.validation is None
    assert len(source.train) == 18


def test_digits() -> None:
    from sklearn.datasets import load_digits

    source = load("digits", protocol="published")
    assert (len(source.train), len(source.test)) == (1297, 500)
    assert source.calibration is not None
    assert torch.bincount(source.calibration.labels).tolist() == [10] * 10
    assert set(source.calibration.ids.tolist()) <= set(range(500))
    parts = [(part.batch(torch.arange(len(part))), part.labels) for part in (source.train, source.test)]
    assert parts[0][0].shape == (1297, 1, 8, 8)
    found = sorted((*(x * 16).flatten().tolist(), int(y)) for xs, ys in parts for x, y in zip(xs, ys, strict=True))
    images, labels = load_digits(return_X_y=True)
    assert found == sorted((*x.tolist(), int(y)) for x, y in zip(images, labels, strict=True))
    for label in range(10):  # stratified: 500 of 1797 of every class, to the nearest sample
        assert abs(int((parts[1][1] == label).sum()) - 500 / 1797 * (labels == label).sum()) < 1
    assert source.bounds == (0.0, 1.0)


# --------------------------------------------------------------------------------------- a user's data


def test_series_without_bounds() -> None:
    x = GENERATOR.normal(size=(20, 30)) * 100
    source = from_arrays(x, np.arange(20) % 2, x[:4], [0, 1, 0, 1], bounds=None, class_names=["flat", "peak"])
    assert source.bounds is None
    assert source.class_names == ("flat", "peak")
    assert np.array_equal(source.test.batch(torch.arange(4)).numpy(), x[:4].astype(np.float32))


FINE = (np.zeros((4, 1, 2, 2), np.float32), np.array([0, 1, 0, 1]))


@pytest.mark.parametrize(
    ("train", "test", "options", "said"),
    [
        ((FINE[0] + 2, FINE[1]), FINE, {}, r"x_train ranges over \[2, 2\]"),
        ((FINE[0] * np.nan, FINE[1]), FINE, {}, "x_train has NaN"),
        (FINE, (FINE[0].astype(np.int64), FINE[1]), {}, "x_test has dtype int64"),
        (FINE, (FINE[0][:, :, :1], FINE[1]), {}, r"\(1, 2, 2\), test samples \(1, 1, 2\)"),
        (FINE, (FINE[0], FINE[1][:3]), {}, "y_test has 3 labels for 4 samples"),
        (FINE, (FINE[0], FINE[1] * 2), {"class_names": "ab"}, "holds the label 2, outside 0..1"),
        ((FINE[0], FINE[1] * 2), FINE, {}, "class '1' of 'arrays' has no training sample"),
        (FINE, FINE, {"bounds": (1, 0)}, "bounds are"),
        (FINE, FINE, {"protocol": "mine"}, "protocol must be one of"),
        ((FINE[0].astype(np.uint8), FINE[1]), FINE, {"bounds": (-1, 1)}, "8-bit values"),
        ((FINE[0][:0].astype(np.uint8), FINE[1][:0]), FINE, {}, "at least one"),
        (("pixels", FINE[1]), FINE, {}, "x_train must be a tensor or an array"),
    ],
)
def test_arrays_that_cannot_work_are_refused(train: tuple, test: tuple, options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        from_arrays(*train, *test, **options)


class Labelled(TensorDataset):
    """A torch Dataset of three classes that counts how many samples are read, and may relabel them."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, shift: int = 0) -> None:
        super().__init__(x, y)
        self.read, self.shift = 0, shift

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        self.read += 1
        x, y = super().__getitem__(place)
        return x, (int(y) + self.shift) % 3


@pytest.mark.parametrize("attribute", ["targets", "labels", None])
@pytest.mark.parametrize("shift", [0, 1])
def test_labels_of_a_torch_dataset(attribute: str | None, shift: int) -> None:
    """`.targets` spares a pass, and is not believed when the items say otherwise (a target transform)."""
    x, y = torch.rand(50, 1, 2, 2), torch.arange(50) % 3
    data = Labelled(x, y, shift)
    if attribute:
        setattr(data, attribute, y.tolist())
    train = from_datasets(data, data, protocol="published").train
    assert train.labels.tolist() == ((y + shift) % 3).tolist()
    assert (data.read < 20) == (attribute is not None and not shift)
    assert torch.equal(train.batch(torch.tensor([7, 3])), x[[7, 3]])


def test_class_names_of_a_torch_dataset() -> None:
    data = Labelled(torch.rand(4, 3), torch.tensor([0, 1, 1, 0]))
    data.classes = ["cat", "dog"]
    assert from_datasets(data, data).class_names == ("cat", "dog")


class Stream(IterableDataset):
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return iter([(torch.zeros(1, 2, 2), 0)] * 3)


class Images(torch.utils.data.Dataset):
    """Yields what it is told to."""

    def __init__(self, *items: object) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> object:
        return self.items[place]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Stream(), "map-style"),
        (7, "map-style"),
        (Images(), "no sample"),
        (Images("ab"), "transform that turns images into tensors"),
        (Images((torch.full((1, 2, 2), -0.42), 0)), r"outside the bounds \[0, 1\]"),
        (Images((torch.zeros(1, 2, 2), "cat")), "label 'cat' of sample 0"),
        (Images((torch.zeros(1, 2, 2, dtype=torch.int64), 0)), "dtype int64"),
    ],
)
def test_torch_datasets_that_cannot_work_are_refused(data: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        from_datasets(data, data)


def test_a_sample_of_another_shape_is_named_when_it_is_read() -> None:
    data = Images((torch.zeros(1, 2, 2), 0), (torch.zeros(1, 2, 3), 0))
    split = from_datasets(data, data, protocol="published").train
    with pytest.raises(InputError, match=r"sample 1 of the train Dataset has shape \(1, 2, 3\)"):
        split.batch(torch.arange(2))


# ------------------------------------------------------------------------------------------------ load

PLUGIN = """
import numpy as np, torch
from torch.utils.data import TensorDataset
from robustknn.datasets import from_arrays
X, Y = np.zeros((40, 1, 2, 2), np.float32), np.arange(40) % 2
def arrays(n=40): return X[:n], Y[:n], X, Y
def datasets(): return [TensorDataset(torch.tensor(X), torch.tensor(Y))] * 2
def source(protocol): return from_arrays(X, Y, X, Y, protocol=protocol, name="mine")
def fixed(): return from_arrays(X, Y, X, Y)
def anything(root, **options): raise KeyError(f"{root} {options}")
def nothing(): return None
number = 3
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"plugin_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize("function", ["arrays", "datasets", "source"])
@pytest.mark.parametrize("protocol", ["standard", "published"])
def test_a_users_function_is_loaded(plugin: str, function: str, protocol: str) -> None:
    source = load(f"{plugin}:{function}", protocol=protocol)
    assert isinstance(source, DataSource)
    assert source.protocol == protocol
    assert source.name == ("mine" if function == "source" else f"{plugin}:{function}")
    assert len(source.train) == {"standard": 32, "published": 40}[protocol]
    assert source.test.shape == (1, 2, 2)


def test_options_reach_a_users_function(plugin: str) -> None:
    assert len(load(f"{plugin}:arrays", n=10, protocol="published").train) == 10


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mnits", {}, "unknown data set 'mnits'; did you mean 'mnist'"),
        ("", {}, "unknown data set"),
        ("no/such/folder", {}, "folder 'no/such/folder' does not exist"),
        ("digits", {"size": 3}, "unknown option of data set 'digits': 'size'"),
        ("digits", {"protocol": "best"}, "protocol must be one of 'standard', 'published'"),
        ("{}:array", {}, "did you mean 'arrays'"),
        ("{}:arrays", {"m": 3}, "did you mean 'n'|known: n"),
        ("{}:fixed", {"protocol": "published"}, "divided by the protocol 'standard', not 'published'"),
        ("{}:anything", {"root": "here", "k": 1}, "KeyError: \"here {'k': 1}\""),
        ("{}:nothing", {}, "gave a NoneType; return a DataSource"),
        ("{}:number", {}, "is a int; name a function"),
        ("no_such_module_at_all:f", {}, "failed to import"),
    ],
)
def test_loads_that_cannot_work_are_refused(plugin: str, name: str, options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load(name.format(plugin), **options)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "svhn"])
def test_missing_files_are_explained(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROBUSTKNN_DATA", raising=False)
    with pytest.raises(InputError, match=r"no folder is known; set .* ROBUSTKNN_DATA or --data-root"):
        load(name)
    monkeypatch.setenv("ROBUSTKNN_DATA", str(tmp_path))
    with pytest.raises(InputError) as refused:
        load(name)
    said = str(refused.value)
    assert str(tmp_path) in said
    assert "is not in" in said
    for word in ("ROBUSTKNN_DATA", "--data-root", "download=True"):
        assert word in said
    assert "\n" not in said


def test_every_name_has_a_summary() -> None:
    entries = {entry.name: entry.summary for entry in registry.datasets}
    assert {"digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn"} <= set(entries)
    assert all(len(summary) > 20 for summary in entries.values())


def test_a_users_own_registered_set_is_an_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "digits" in registry.datasets
    monkeypatch.setattr(registry.datasets, "_entries", dict(registry.datasets._entries))
    registry.datasets.register("two-points")(lambda: (*FINE, *FINE))
    assert load("two-points").n_classes == 2
