"""The IDX format of MNIST and its kin, read strictly: every byte is accounted for."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from robustknn.errors import IntegrityError
from robustknn.store import StorageError

MAX_BYTES = 1 << 31
"""A file that announces more is refused; the largest set of this kind (EMNIST by class) has 0.5 GiB."""
_UNSIGNED_BYTES = 8
_CHUNK = 1 << 20


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The content of an IDX file of unsigned bytes, plain or (by its name) gzipped.

    Args:
        path: the file.
        dimensions: how many dimensions it must have: 3 for images (n, H, W), 1 for labels (n,).

    Returns:
        uint8. Memory grows with what is really there, and never beyond what the header announces.

    Raises:
        IntegrityError: another type or number of dimensions, an empty or absurd size, too few or too many bytes,
            a damaged gzip stream.
        StorageError: the disk refused.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _read(file, path, dimensions)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise IntegrityError(f"{str(path)!r} is not a whole gzip file ({error}); get it again.") from error
    except OSError as error:
        raise StorageError(f"cannot read {str(path)!r}: {error.strerror or error}.") from error


def _read(file: gzip.GzipFile | BufferedReader, path: Path, dimensions: int) -> Tensor:
    header = file.read(4 + 4 * dimensions)
    magic = bytes((0, 0, _UNSIGNED_BYTES, dimensions))
    if header[:4] != magic:
        raise IntegrityError(
            f"{str(path)!r} begins with {header[:4].hex(' ')!r} where an IDX file of bytes with {dimensions} "
            f"dimensions has {magic.hex(' ')!r}; get it again."
        )
    if len(header) < 4 + 4 * dimensions:
        raise IntegrityError(f"{str(path)!r} ends inside its header; get it again.")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    size = math.prod(shape)
    if not 0 < size <= MAX_BYTES:
        raise IntegrityError(f"{str(path)!r} announces the shape {shape}, which no file of its kind has; get it again.")
    content = bytearray()
    while chunk := file.read(min(_CHUNK, size + 1 - len(content))):
        content += chunk
    if len(content) < size:
        raise IntegrityError(f"{str(path)!r} is truncated: {len(content)} of {size} bytes are there; get it again.")
    if len(content) > size:
        raise IntegrityError(f"{str(path)!r} goes on after the {size} bytes that its header announces; get it again.")
    return torch.frombuffer(content, dtype=torch.uint8).view(shape)
