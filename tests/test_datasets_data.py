"""The loaders on the real data sets."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from robustknn.datasets import DataSource, load
from robustknn.errors import InputError

pytestmark = pytest.mark.data

FIRST = {
    "mnist": ([5, 0, 4, 1, 9, 2, 1, 3, 1, 4], [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]),
    "fashion-mnist": ([9, 0, 0, 3, 0, 2, 7, 2, 5, 5], [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]),
}
FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}


def check_standard(source: DataSource, official_labels: torch.Tensor, validation: list[int]) -> None:
    assert source.calibration is not None
    assert source.validation is not None
    parts = [source.train, source.calibration, source.validation]
    ids = torch.cat([part.ids for part in parts])
    assert torch.equal(ids.sort().values, torch.arange(len(official_labels)))
    assert torch.bincount(source.calibration.labels).tolist() == [75] * 10
    assert torch.bincount(source.validation.labels).tolist() == validation
    for part in parts:
        assert torch.equal(part.labels, official_labels[part.ids])


@pytest.mark.parametrize("name", FIRST)
def test_mnist_and_fashion_mnist(data_root: Path, name: str) -> None:
    published = load(name, root=data_root, protocol="published")
    train, test = FIRST[name]
    assert (len(published.train), len(published.test)) == (60000, 10000)
    assert published.train.labels[:10].tolist() == train
    assert published.test.labels[:10].tolist() == test
    assert published.train.shape == (1, 28, 28)
    calibration = published.calibration
    assert calibration is not None
    assert (len(calibration), calibration.part) == (750, "test")
    assert set(calibration.ids.tolist()) <= set(published.test.ids.tolist())
    assert torch.bincount(calibration.labels).tolist() == [75] * 10
    # The pixels are the file's bytes, in order, and stay 8 bits in memory.
    with gzip.open(data_root / FOLDERS[name] / "raw" / "t10k-images-idx3-ubyte.gz") as file:
        raw = file.read()[16:]
    x = published.test.batch(torch.arange(10000))
    assert torch.equal(x.flatten(), torch.frombuffer(bytearray(raw), dtype=torch.uint8).float() / 255)
    assert published.train._items.data.nbytes == 60000 * 784  # type: ignore[attr-defined]
    tenth = (torch.bincount(published.train.labels) // 10).tolist()
    check_standard(load(name, root=data_root), published.train.labels, tenth)


def test_the_two_are_not_mistaken_for_each_other(data_root: Path) -> None:
    with pytest.raises(InputError, match="are 'mnist', not 'fashion-mnist'"):
        load("fashion-mnist", root=data_root / "MNIST" / "raw")


def test_cifar10_agrees_with_the_official_files_read_by_pickle(cifar_root: Path, tmp_path: Path) -> None:
    folder = cifar_root / "cifar-10-batches-py"
    # The published checksums make these files trustworthy, so that pickle may read them here.
    assert hashlib.md5((folder / "test_batch").read_bytes()).hexdigest() == "40351d587109b95175f43aff81a1287e"
    assert hashlib.md5((folder / "data_batch_3").read_bytes()).hexdigest() == "54ebc095f3ab1f0389bbae665268c751"
    source = load("cifar10", root=cifar_root, protocol="published")
    assert (len(source.train), len(source.test)) == (50000, 10000)
    for name, split, start in (("test_batch", source.test, 0), ("data_batch_3", source.train, 20000)):
        official = pickle.loads((folder / name).read_bytes(), encoding="bytes")  # noqa: S301
        positions = torch.arange(start, start + 10000)
        assert split.labels[positions].tolist() == official[b"labels"]
        pixels = np.ascontiguousarray(official[b"data"]).reshape(-1, 3, 32, 32)
        assert torch.equal(split.batch(positions), torch.from_numpy(pixels.copy()).float() / 255)
    assert source.class_names[:4] == ("airplane", "automobile", "bird", "cat")
    check_standard(load("cifar10", root=cifar_root), source.train.labels, [500] * 10)

    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.add(folder, "cifar-10-batches-py")
    packed = load("cifar10", root=tmp_path, protocol="published")
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]  # nothing was unpacked
    assert torch.equal(packed.train.labels, source.train.labels)
    assert torch.equal(packed.train._items.data, source.train._items.data)  # type: ignore[attr-defined]
