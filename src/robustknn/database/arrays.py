"""Arrays that grow and are written in place, a block at a time, by the one process that builds.

They are written to, never mapped for writing: a full disk is then an error in words instead of a killed process.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from robustknn import store
from robustknn.database.extract import Rows
from robustknn.database.layout import Array, Block
from robustknn.errors import InputError, ResumeError

_LOCK = ".lock"


def array_file(folder: Path, name: str) -> Path:
    """The file of an array."""
    return folder / f"{name}.npy"


def row_bytes(array: Array) -> int:
    """Bytes of a row."""
    return math.prod(array.row) * np.dtype(array.dtype).itemsize


def place_of(array: Array, block: Block) -> tuple[int, int]:
    """(first byte, bytes) of a block in the file of an array."""
    header = len(store.array_header(array.dtype, (block.start, *array.row)))
    return header + block.start * row_bytes(array), block.rows * row_bytes(array)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the right to write a database; ResumeError while another process holds it. It ends with the process."""
    with ExitStack() as stack:
        with store.disk("write", folder):
            folder.mkdir(parents=True, exist_ok=True)
            if os.name != "nt":
                import fcntl

                handle = stack.enter_context((folder / _LOCK).open("wb"))
                try:
                    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: forked processes would inherit it
                except (BlockingIOError, PermissionError) as error:
                    raise ResumeError(
                        f"another process is writing to {str(folder)!r}; wait until it is done, or stop it."
                    ) from error
        yield


class Writer:
    """The arrays of a database, open for writing, with room for all rows.

    Raises:
        StorageError: the disk has no room for them; nothing is lost.
    """

    def __init__(self, folder: Path, arrays: Mapping[str, Array], rows: int) -> None:
        self._folder, self._arrays = folder, arrays
        self._stack = ExitStack()
        self._files: dict[str, BinaryIO] = {}
        with store.disk("write", folder):
            self._check_room(rows)
            for name, array in arrays.items():
                self._files[name] = self._opened(name, array, rows)

    def _check_room(self, rows: int) -> None:
        wanted = 0
        for name, array in self._arrays.items():
            file = array_file(self._folder, name)
            held = os.stat(file).st_blocks * 512 if os.name != "nt" and file.exists() else 0
            wanted += max(0, rows * row_bytes(array) - held)
        free = shutil.disk_usage(self._folder).free
        if wanted > free:
            raise store.StorageError(
                f"{str(self._folder)!r} needs {size(wanted)} more and its disk has {size(free)} left; make room, or "
                "choose another folder; what was finished before is kept."
            )

    def _opened(self, name: str, array: Array, rows: int) -> BinaryIO:
        path = array_file(self._folder, name)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        file: Any = self._stack.enter_context(os.fdopen(handle, "r+b", buffering=0))
        header = store.array_header(array.dtype, (rows, *array.row))
        file.truncate(len(header) + rows * row_bytes(array))
        file.seek(0)
        _write(file, memoryview(header))
        return file  # type: ignore[no-any-return]

    def write(self, block: Block, rows: Rows) -> dict[str, str]:
        """Write a block and flush it to the disk; returns the sha256 of its bytes in every array.

        Raises:
            InputError: the rows are not those of the arrays (another shape or type), or not as many.
            StorageError: the disk refused.
        """
        if rows.keys() != self._arrays.keys():
            raise InputError(f"block {block.number} has {sorted(rows)}, the database keeps {sorted(self._arrays)}.")
        data = {name: _bytes_of(name, rows[name].contiguous().numpy(), self._arrays[name], block) for name in rows}
        with store.disk("write", self._folder):
            for name, held in data.items():
                file = self._files[name]
                file.seek(place_of(self._arrays[name], block)[0])
                _write(file, held)
            for file in self._files.values():
                os.fsync(file.fileno())
        return {name: hashlib.sha256(held).hexdigest() for name, held in data.items()}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _bytes_of(name: str, value: np.ndarray[Any, Any], array: Array, block: Block) -> memoryview:
    if value.shape != (block.rows, *array.row) or value.dtype.str != array.dtype:
        raise InputError(
            f"{name} of block {block.number} has shape {value.shape} and type {value.dtype} where the database keeps "
            f"{(block.rows, *array.row)} of {np.dtype(array.dtype)}; give all samples one size."
        )
    return value.reshape(-1).view(np.uint8).data


def _write(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def size(n: int) -> str:
    """A number of bytes as people say it."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            break
        n /= 1000  # type: ignore[assignment]
    return f"{n} bytes" if unit == "bytes" else f"{n:.1f} {unit}"
