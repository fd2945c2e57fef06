"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): 32 × 32 colour images in the official Python files."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustknn.checks import check_labels
from robustknn.datasets.base import Split
from robustknn.datasets.files import Form, find_files
from robustknn.datasets.pickles import Array, read_pickle
from robustknn.datasets.protocols import Official
from robustknn.errors import InputError, IntegrityError
from robustknn.progress import Progress
from robustknn.registry import datasets
from robustknn.store import StorageError

MAX_BYTES = 1 << 28
"""More than either archive unpacks to (0.17 GiB each); what goes on after it is refused."""


@dataclass(frozen=True)
class _Layout:
    """How one of the two sets is laid out."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str
    n_classes: int


_CIFAR10 = _Layout(
    "cifar-10-batches-py",
    "cifar-10-python.tar.gz",
    tuple(f"data_batch_{i}" for i in range(1, 6)),
    "test_batch",
    "batches.meta",
    "labels",
    "label_names",
    10,
)
_CIFAR100 = _Layout(
    "cifar-100-python",
    "cifar-100-python.tar.gz",
    ("train",),
    "test",
    "meta",
    "fine_labels",
    "fine_label_names",
    100,
)


@datasets.register("cifar10")
def cifar10(root: Path | None = None, download: bool = False, progress: Progress | None = None) -> Official:
    """Animals and vehicles, 50,000 / 10,000 colour images of 32 × 32 in 10 classes."""
    return _load("cifar10", _CIFAR10, root, download, progress)


@datasets.register("cifar100")
def cifar100(root: Path | None = None, download: bool = False, progress: Progress | None = None) -> Official:
    """Objects and animals, 50,000 / 10,000 colour images of 32 × 32 in 100 classes."""
    return _load("cifar100", _CIFAR100, root, download, progress)


def _load(name: str, layout: _Layout, root: Path | None, download: bool, progress: Progress | None) -> Official:
    names = (*layout.train, layout.test, layout.meta)
    unpacked = Form((layout.folder, f"{name}/{layout.folder}"), names)
    packed = Form(("", name), (layout.archive,))
    form, paths = find_files(name, root, [unpacked, packed], download, progress)
    files = _in_archive(paths[0], layout.folder, names) if form is packed else _in_folder(paths)
    read = {path.name: (path, read_pickle(data, str(path))) for path, data in files}
    train = _split([read[batch] for batch in layout.train], "train", layout)
    test = _split([read[layout.test]], "test", layout)
    return Official(name, train, test, _class_names(*read[layout.meta], layout))


def _split(batches: list[tuple[Path, dict[str, Any]]], part: str, layout: _Layout) -> Split:
    images: list[Array] = []
    labels: list[Any] = []
    for path, content in batches:
        data = content.pop("data", None)
        found = content.get(layout.labels)
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072:
            raise IntegrityError(f"{str(path)!r} has no array 'data' of (n, 3072) pixels; get it again.")
        if type(found) is not list or len(found) != len(data) or not all(type(label) is int for label in found):
            raise IntegrityError(f"{str(path)!r} has no list {layout.labels!r} of {len(data)} numbers; get it again.")
        try:
            check_labels(found or [0], None, layout.n_classes, f"{layout.labels!r} of {str(path)!r}")
        except InputError as error:
            raise IntegrityError(f"{error} Get the file again.") from error
        images.append(data)
        labels += found
    return Split(torch.from_numpy(np.concatenate(images)).view(-1, 3, 32, 32), torch.tensor(labels), part)


def _class_names(path: Path, content: dict[str, Any], layout: _Layout) -> tuple[str, ...]:
    names = content.get(layout.names)
    if type(names) is not list or [type(n) in (bytes, str) for n in names] != [True] * layout.n_classes:
        raise IntegrityError(f"{str(path)!r} has no list {layout.names!r} of {layout.n_classes} names; get it again.")
    return tuple(name.decode("latin-1") if isinstance(name, bytes) else name for name in names)


def _in_folder(paths: list[Path]) -> Iterator[tuple[Path, bytes]]:
    for path in paths:
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise StorageError(f"cannot read {str(path)!r}: {error.strerror or error}.") from error
        if len(data) > MAX_BYTES:
            raise IntegrityError(f"{str(path)!r} is larger than any CIFAR file; get it again.")
        yield path, data


def _in_archive(archive: Path, folder: str, names: tuple[str, ...]) -> Iterator[tuple[Path, bytes]]:
    """The files in a .tar.gz, in the order they come, without unpacking anything to the disk."""
    wanted = {f"{folder}/{name}" for name in names}
    try:
        with _Bounded(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    name = member.name.removeprefix("./")
                    content = tar.extractfile(member) if name in wanted and member.isfile() else None
                    if content is not None:
                        wanted.remove(name)
                        yield archive / name, content.read()
            while stream.read(1 << 20):  # the checksum is at the very end
                pass
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{str(archive)!r} is not a whole .tar.gz ({error}); get it again.") from error
    except OSError as error:
        raise StorageError(f"cannot read {str(archive)!r}: {error.strerror or error}.") from error
    if wanted:
        raise IntegrityError(f"{str(archive)!r} lacks {min(wanted)!r}; get it again.")


class _Bounded(gzip.GzipFile):
    """A gunzipped file that refuses to be longer than any CIFAR archive: a small one can unpack to terabytes."""

    _length = 0

    def read(self, size: int | None = -1) -> bytes:
        chunk = super().read(size)
        self._length += len(chunk)
        if self._length > MAX_BYTES:
            raise IntegrityError(f"{str(self.name)!r} unpacks to more than any CIFAR archive does; get it again.")
        return chunk
