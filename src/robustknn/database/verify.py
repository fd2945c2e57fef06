"""Whether a database is what was written: every block of every array, the extractor, the indexes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from robustknn import store
from robustknn.database.arrays import array_file, place_of, row_bytes
from robustknn.database.indexes import damaged_notes, index_folder, read_records
from robustknn.database.layout import BLOCKS, INDEXES, Array, Block, Description, ledger_file, noted
from robustknn.errors import IntegrityError, reason
from robustknn.features import FeatureExtractor
from robustknn.progress import Progress
from robustknn.reference import learned, restored_extractor

_CHUNK = 1 << 22


def problems(
    folder: Path, description: Description, features: FeatureExtractor | nn.Module | None, progress: Progress
) -> Iterator[str]:
    """What is wrong with a database, a sentence each; arrays are read block by block."""
    meta = description.meta()
    yield from _said(lambda: learned(folder, meta))
    if features is not None:
        yield from _said(lambda: restored_extractor(folder, meta, features))
    for name, array in description.arrays.items():
        yield from file_problems(folder, name, array, description.rows)
    progress.start("verifying", description.rows)
    try:
        for block in description.blocks():
            yield from _block_problems(folder, description, block)
            progress.advance(block.rows)
    finally:
        progress.stop()
    yield from _index_problems(folder)


def _said(check: Callable[[], object]) -> Iterator[str]:
    """What a check has to say."""
    try:
        check()
    except IntegrityError as error:
        yield str(error)


def file_problems(folder: Path, name: str, array: Array, rows: int) -> Iterator[str]:
    """What is wrong with an array as a whole: missing, cut off, another header."""
    remedy = f"remove {BLOCKS}/ and run the command that built it again, which makes all blocks anew."
    file, header = array_file(folder, name), store.array_header(array.dtype, (rows, *array.row))
    expected = len(header) + rows * row_bytes(array)
    try:
        held = file.stat().st_size
        with file.open("rb") as opened:
            begins = opened.read(len(header))
    except OSError as error:
        yield f"{file.name} cannot be read: {reason(error)}; {remedy}"
        return
    if held != expected:
        yield f"{file.name} has {held} bytes where {expected} were written; it is truncated or altered: {remedy}"
    if begins != header:
        yield f"{file.name} has another header than was written; it is altered, or of another database: {remedy}"


def _block_problems(folder: Path, description: Description, block: Block) -> Iterator[str]:
    rows = f"block {block.number} (rows {block.start} to {block.start + block.rows - 1})"
    note = ledger_file(folder, block)
    hashes = noted(folder, block)
    if hashes is None:
        what = "its ledger file is altered" if note.exists() else "it was not made, or its ledger file is gone"
        yield f"{rows} is missing: {what}; run the command that built it again, which makes it."
        return
    for name, array in description.arrays.items():
        try:
            same = _hash_of(folder, name, array, block) == hashes.get(name)
        except OSError:
            continue  # said of the file as a whole
        if not same:
            yield (
                f"{rows} of {name}.npy is altered; remove blocks/{note.name} and run the command that built it again, "
                "which makes the block anew."
            )


def _hash_of(folder: Path, name: str, array: Array, block: Block) -> str:
    place, left = place_of(array, block)
    digest = hashlib.sha256()
    with array_file(folder, name).open("rb") as file:
        file.seek(place)
        while left and (chunk := file.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _index_problems(folder: Path) -> Iterator[str]:
    damaged = damaged_notes(folder)
    yield from damaged.values()
    known = {record.name for record in read_records(folder)} | set(damaged)
    # Those of an index that is being built begin with a dot or end in ".building".
    there = {d.name for d in (folder / INDEXES).glob("[!.]*") if d.is_dir() and d.suffix != ".building"}
    for name in sorted(known | there):
        if name not in known:
            yield f"index {name!r} lacks the note of what it was built over; remove it, or build it again."
        if name not in damaged:
            yield from _said(lambda name=name: store.check_artifact(index_folder(folder, name)))  # type: ignore[misc]
