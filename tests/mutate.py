"""Damage to files, for tests that no damaged file is taken for a whole one and none crashes its reader.

for data in mutations(path.read_bytes(), 1000, seed=1):       # any bytes
for name in damaged(folder, 1000, seed=1):                    # the files of a folder, one damaged at a time
with replaced(path, data): ...                                # other content for a while
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_NUMBERS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff" * 8, b"\xff" * 7 + b"\x7f")


def flip(data: bytearray, draw: random.Random) -> None:
    """One bit the other way."""
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def overwrite(data: bytearray, draw: random.Random) -> None:
    """One byte, or a number that sizes are often checked badly for."""
    at, new = draw.randrange(len(data)), draw.choice((bytes([draw.randrange(256)]), *_NUMBERS))
    data[at : at + len(new)] = new


def truncate(data: bytearray, draw: random.Random) -> None:
    """The end is missing."""
    del data[draw.randrange(len(data)) :]


def cut(data: bytearray, draw: random.Random) -> None:
    """A piece inside is missing."""
    at = draw.randrange(len(data))
    del data[at : at + draw.randrange(1, 17)]


def splice(data: bytearray, draw: random.Random) -> None:
    """A piece of the file once more, elsewhere."""
    start = draw.randrange(len(data))
    piece = data[start : start + draw.randrange(1, 64)]
    at = draw.randrange(len(data) + 1)
    data[at:at] = piece


def extend(data: bytearray, draw: random.Random) -> None:
    """Something after the end."""
    data += draw.choice((b"\0", b" ", b"\n", draw.randbytes(draw.randrange(1, 64)), bytes(data[: 1 << 12])))


def swap(data: bytearray, draw: random.Random) -> None:
    """Two pieces of equal length change places."""
    length = draw.randrange(1, min(16, len(data)) + 1)
    a, b = (draw.randrange(len(data) - length + 1) for _ in range(2))
    data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]


KINDS: tuple[Callable[[bytearray, random.Random], None], ...] = (flip, overwrite, truncate, cut, splice, extend, swap)


def mutations(whole: bytes, count: int, seed: int, splices: Sequence[bytes] = ()) -> Iterator[bytes]:
    """`count` damaged copies, none equal to `whole`, the same in every run.

    Args:
        whole: the content of a file.
        count: how many copies; nearly half have one damage, the others two to twenty.
        seed: of the choice.
        splices: pieces to put in somewhere, such as numbers and names the format gives a meaning.
    """
    draw = random.Random(seed)
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 1, 2, 3, 6, 20))):
            if splices and draw.random() < 0.2:
                at = draw.randrange(len(data) + 1)
                data[at : at + draw.choice((0, 0, 4))] = draw.choice(splices)
            elif data:
                draw.choice(KINDS)(data, draw)
        yield bytes(data) if data != whole else whole + b"\0"


def flips(whole: bytes) -> Iterator[bytes]:
    """Every copy with a single bit the other way."""
    for at in range(8 * len(whole)):
        data = bytearray(whole)
        data[at // 8] ^= 1 << at % 8
        yield bytes(data)


def truncations(whole: bytes) -> Iterator[bytes]:
    """Every copy whose end is missing, from the empty one on."""
    return (whole[:length] for length in range(len(whole)))


def put(path: Path, data: bytes) -> None:
    """Give a file this content. Not by truncating it first, which makes some file systems wait for the disk."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(data)
        file.truncate()


@contextmanager
def replaced(path: Path, data: bytes) -> Iterator[Path]:
    """A file with other content for a while."""
    whole = path.read_bytes()
    put(path, data)
    try:
        yield path
    finally:
        put(path, whole)


def damaged(folder: Path, count: int, seed: int, splices: Sequence[bytes] = ()) -> Iterator[Path]:
    """Damage one file of a folder at a time, each in turn, `count` times in all; yields the damaged file's path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    each = {path: mutations(path.read_bytes(), count, seed + place, splices) for place, path in enumerate(files)}
    for turn in range(count):
        path = files[turn % len(files)]
        with replaced(path, next(each[path])):
            yield path
