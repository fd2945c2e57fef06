"""Images in tar archives, as webdataset writes them: `name-{000..012}.tar`, a sample being files of one name.

Members are looked up once and read by their place in the archive, so that the number of samples, their order and what
a stopped build goes on with are exact. That is why this is no iterable stream: such a one knows its length at its end,
and its order depends on how many processes read it. Nothing is unpacked to the disk; members other than images and
classes (`.pyd`, `.pth`, links) are never read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from robustknn import store
from robustknn.checks import check_positive_int
from robustknn.datasets.base import Split
from robustknn.datasets.pixels import ENDINGS, decoded, mode_of
from robustknn.datasets.sources import Source
from robustknn.errors import InputError, IntegrityError, brief, reason

CLASS_FILES = ("cls", "json", "txt")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LARGEST_CLASS_FILE = 1 << 20
_OPEN = 64
_BLOCK = 512


def shard_files(path: str | Path) -> list[Path]:
    """The archives of `part-{000..012}.tar`, of a folder (its `*.tar`, by name), or one archive.

    Raises:
        InputError: there is none, or one of a range is missing.
    """
    pieces = _RANGE.split(str(path))
    if len(pieces) > 1:
        ranges = [_range(*pieces[i + 1 : i + 3]) for i in range(0, len(pieces) - 1, 3)]
        files = [
            Path("".join(text for pair in zip(pieces[::3], (*chosen, ""), strict=True) for text in pair))
            for chosen in product(*ranges)
        ]
    else:
        files = sorted(Path(path).glob("*.tar")) if Path(path).is_dir() else [Path(path)]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None or not files:
        lacking = f"{str(missing)!r} does not exist" if files else f"{str(path)!r} holds no archive *.tar"
        raise InputError(f"{lacking}; name a folder of archives, or a range such as part-{{000..012}}.tar.")
    return files


def _range(first: str, last: str) -> list[str]:
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]


def shards(
    path: str | Path,
    *,
    size: int | None = None,
    channels: int = 3,
    image: str | None = None,
    label: str = "label",
    labels: bool | None = None,
) -> Source:
    """The images of archives, in the order of the archives and of each sample's first file in its archive.

    A sample is what the files of one name up to the first dot make: an image, and its class as a number in NAME.cls, in
    a field of NAME.json, or in NAME.txt. The same name in two archives is two samples.

    Args:
        path: see `shard_files`.
        size: side of a square; the shorter side of every image is resized to it and the middle is cut out. Without it
            all images must have one shape.
        channels: 3 for color, 1 for gray.
        image: which ending is the image ("png", "left.jpg"), where a sample has several; any image by default.
        label: the field of NAME.json.
        labels: False reads no classes. By default there are labels when every sample has a class.

    Raises:
        InputError: no archive, compressed ones, no image, a sample without image or with several, some with and some
            without a class, two members of one name.
        IntegrityError: an archive is not whole; the first image cannot be read.
    """
    files, wanted = shard_files(path), labels is not False
    index = _Index()
    digest = hashlib.sha256()
    for place, file in enumerate(files):
        for entry in _entries(file, image, label, wanted):
            index.shard.append(place)
            index.offset.append(entry.offset)
            index.size.append(entry.size)
            index.label.append(-1 if entry.label is None else entry.label)
            digest.update(f"{entry.key}\0{entry.offset} {entry.size}\n".encode(errors="surrogateescape"))
            if entry.label is None and wanted and (labels or index.label[0] >= 0):
                raise _no_class(entry.key, file)
            if entry.label is not None and index.label[0] < 0:
                raise _no_class("the first one", files[index.shard[0]])
    if not index.shard:
        raise InputError(f"{str(path)!r} holds no image ({', '.join(ENDINGS)}); check the path, or pass image=.")
    items = ShardItems(files, index, size, channels)
    known = wanted and index.label[0] >= 0
    described = {"name": "shards", "path": str(path), "files": digest.hexdigest(), "size": size, "channels": channels}
    return Source(items, np.array(index.label) if known else None, described)


class ShardItems:
    """Images by place, decoded when they are read: (B, channels, H, W) of 8 bits."""

    def __init__(self, files: list[Path], index: _Index, size: int | None, channels: int) -> None:
        mode_of(channels)
        self._files, self._size, self._channels = files, size, channels
        self._shard, self._offset = np.array(index.shard, np.int32), np.array(index.offset, np.int64)
        self._bytes = np.array(index.size, np.int64)
        self._open: OrderedDict[int, IO[bytes]] = OrderedDict()
        self.shape: tuple[int, ...] = ()
        self.shape = self._image(0).shape if size is None else (channels, check_positive_int(size, "size"), size)

    def __len__(self) -> int:
        return len(self._shard)

    def read(self, places: Tensor) -> Tensor:
        return torch.stack([torch.from_numpy(self._image(place)) for place in places.tolist()])

    def _image(self, place: int) -> np.ndarray[Any, Any]:
        shard, offset = int(self._shard[place]), int(self._offset[place])
        name = f"{self._files[shard]}, sample {place} at byte {offset}"
        try:
            file = self._file(shard)
            file.seek(offset)
            data = file.read(int(self._bytes[place]))
        except OSError as error:
            raise IntegrityError(f"archive {str(self._files[shard])!r} cannot be read: {reason(error)}.") from error
        pixels = decoded(io.BytesIO(data), name, self._size, self._channels)
        if self.shape and pixels.shape != self.shape:
            raise InputError(
                f"the image in {name} has {pixels.shape[2]} × {pixels.shape[1]} pixels where the first has "
                f"{self.shape[2]} × {self.shape[1]}; pass size= to bring all to one shape."
            )
        return pixels

    def _file(self, shard: int) -> IO[bytes]:
        """An archive, open in this process; few are at a time."""
        if shard not in self._open:
            if len(self._open) >= _OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[shard] = self._files[shard].open("rb")
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        """Without open files: another process opens its own."""
        return {**vars(self), "_open": OrderedDict()}


# ------------------------------------------------------------------------------------------- looking up


class _Index:
    """Of every sample: its archive, where its image lies there, and its class (−1 for none)."""

    def __init__(self) -> None:
        self.shard, self.offset, self.size, self.label = (array("q") for _ in range(4))  # 8 bytes a number


@dataclass
class _Entry:
    """A sample of an archive, as far as its members have been seen."""

    key: str
    offset: int = -1
    size: int = 0
    label: int | None = None
    label_rank: int = len(CLASS_FILES)


def _entries(file: Path, image: str | None, field: str, wanted: bool) -> list[_Entry]:
    """The samples of an archive, by their first member."""
    images = tuple(e[1:] for e in ENDINGS) if image is None else (image.lower().lstrip("."),)
    found: dict[str, _Entry] = {}
    seen: set[tuple[str, str]] = set()
    with file.open("rb") as raw:
        for member in _members(file, raw):
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            ending = ending.lower()
            if not stem or ending not in (*images, *CLASS_FILES):
                continue
            key = f"{folder}/{stem}" if folder else stem
            if (key, ending) in seen:
                raise InputError(f"archive {str(file)!r} holds {brief(member.name)} twice; remove one of them.")
            seen.add((key, ending))
            entry = found.setdefault(key, _Entry(key))
            if ending in images:
                if entry.offset >= 0:
                    raise InputError(
                        f"sample {brief(key)} in {str(file)!r} has several images; choose one by its ending: image=."
                    )
                entry.offset, entry.size = member.offset_data, member.size
            elif wanted and CLASS_FILES.index(ending) < entry.label_rank:
                label = _label(raw, member, ending, field, file)
                if label is not None:
                    entry.label, entry.label_rank = label, CLASS_FILES.index(ending)
    lacking = next((entry for entry in found.values() if entry.offset < 0), None)
    if lacking is not None:
        raise InputError(f"sample {brief(lacking.key)} in {str(file)!r} has no image ({', '.join(images)}); remove it.")
    return list(found.values())


def _members(file: Path, raw: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The plain files of an archive; IntegrityError unless it is whole."""
    if raw.read(2) == b"\x1f\x8b":
        raise InputError(f"{str(file)!r} is compressed; unpack it first (gunzip), images are compressed already.")
    raw.seek(0)
    total = os.fstat(raw.fileno()).st_size
    try:
        with tarfile.open(fileobj=raw, mode="r:") as archive:
            for member in archive:
                if member.isreg() and not member.issparse():
                    if member.offset_data + member.size > total:
                        raise tarfile.ReadError("unexpected end of data")
                    yield member
            # It takes a damaged header for the end of the archive; the true end is zeros, or that of the file.
            raw.seek(archive.offset)
            end = raw.read(_BLOCK)
            if any(end) or 0 < len(end) < _BLOCK:
                raise tarfile.ReadError(f"no member at byte {archive.offset}")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise IntegrityError(f"{str(file)!r} is not a whole tar archive ({reason(error)}); restore it.") from error


def _label(raw: IO[bytes], member: tarfile.TarInfo, ending: str, field: str, file: Path) -> int | None:
    """The class in a member; None for text, or JSON without the field."""
    if member.size > _LARGEST_CLASS_FILE:
        raise InputError(f"{brief(member.name)} in {str(file)!r} has {member.size} bytes and is to be a class number.")
    place = raw.tell()
    raw.seek(member.offset_data)
    text = raw.read(member.size).decode(errors="replace")
    raw.seek(place)
    try:
        value = json.loads(text) if ending == "json" else text.strip()
        if ending == "json":
            value = value.get(field) if isinstance(value, dict) else None
        number = re.fullmatch(r"\d{1,18}", str(value)) if not isinstance(value, bool) else None
    except (ValueError, RecursionError):
        number, value = None, text
    if number is not None:
        return int(number[0])
    if ending == "txt" or value is None:
        return None
    raise InputError(
        f"{brief(member.name)} in {str(file)!r} holds {brief(value)}, not a class number 0..C-1; number the classes, "
        "or read the archives without (labels=False; --image-option labels=false)."
    )


def _no_class(key: str, file: Path) -> InputError:
    shown = key if " " in key else f"sample {brief(key)}"
    return InputError(
        f"{shown} in {str(file)!r} has no class where others have one; add its .cls, or read the archives without "
        "(labels=False; --image-option labels=false)."
    )


# ---------------------------------------------------------------------------------------------- writing


def write_shards(split: Split | Source, folder: str | Path, per_shard: int, name: str = "part") -> list[Path]:
    """Write samples (n, 1 or 3, H, W) as archives of `per_shard` images (PNG, 8 bits) with their classes.

    Returns:
        the archives, NAME-000000.tar, …; each appears whole or not at all.
    """
    from PIL import Image

    files = []
    for number, positions in enumerate(torch.arange(len(split)).split(check_positive_int(per_shard, "per_shard"))):
        files.append(Path(folder) / f"{name}-{number:06d}.tar")
        with store.atomic_path(files[-1]) as partial, tarfile.open(partial, "w") as archive:
            for position, sample in zip(positions.tolist(), split.batch(positions), strict=True):
                if sample.ndim != 3 or sample.shape[0] not in (1, 3):
                    raise InputError(f"images have shape (1 or 3, H, W), not {tuple(sample.shape)}.")
                pixels = (sample.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(2).numpy()
                data = io.BytesIO()
                Image.fromarray(pixels).save(data, "PNG")
                _put(archive, f"{position:08d}.png", data.getvalue())
                if split.labels is not None:
                    _put(archive, f"{position:08d}.cls", str(int(split.labels[position])).encode())
    return files


def _put(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
