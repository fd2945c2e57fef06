"""Search indexes kept with a database: built over its mapped vectors, and known to be of what they were built over."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from robustknn import store
from robustknn.database.layout import INDEXES
from robustknn.errors import InputError, IntegrityError
from robustknn.neighbors import ExactIndex, make_index
from robustknn.neighbors.auto import AutoIndex
from robustknn.neighbors.base import NeighborIndex
from robustknn.neighbors.on_disk import OnDiskIndex
from robustknn.neighbors.trained import TrainedIndex
from robustknn.progress import Progress
from robustknn.reference import ReferenceSet


@dataclass(frozen=True)
class IndexRecord:
    """What is noted beside an index.

    Attributes:
        name: of its folder under `indexes/`.
        spec: as `make_index` takes it.
        rows: how many references it holds.
        database: the fingerprint of the database it was built over.
    """

    name: str
    spec: str
    metric: str
    layer: str
    rows: int
    database: str


def index_folder(folder: Path, name: str) -> Path:
    """Where an index of a database lies."""
    return folder / INDEXES / name


def record_file(folder: Path, name: str) -> Path:
    """Where it is noted what an index was built over."""
    return folder / INDEXES / f"{name}.json"


def read_records(folder: Path) -> list[IndexRecord]:
    """The indexes of a database, by name, but for those whose note cannot be read (see `damaged_notes`)."""
    return [record for record in map(_record, _notes(folder)) if isinstance(record, IndexRecord)]


def damaged_notes(folder: Path) -> dict[str, str]:
    """By name of an index: what is wrong with the note of what it was built over, and what to do."""
    return {note.stem: held for note in _notes(folder) if isinstance(held := _record(note), str)}


def _notes(folder: Path) -> list[Path]:
    return sorted((folder / INDEXES).glob("*.json"))


def _record(note: Path) -> IndexRecord | str:
    try:
        return IndexRecord(**store.read_sealed(note))
    except (IntegrityError, TypeError):
        return f"the note {str(note)!r} of an index is altered; remove it and build the index again."


def _is_whole(path: Path) -> bool:
    try:
        store.check_artifact(path)
    except IntegrityError:
        return False
    return True


def build_index(folder: Path, record: IndexRecord, references: ReferenceSet, progress: Progress | None) -> None:
    """Build the index a record names, unless it is there and whole; one of that name over other content gives way.

    Nothing is built where "auto" chooses exact search, which reads the database's own vectors.

    Raises:
        InputError: "exact"; another index has the name; what the engine refuses.
    """
    if Path(record.name).name != record.name or record.name.startswith("."):
        raise InputError(f"{record.name!r} cannot name an index; choose a name without slashes: name=.")
    held = next((r for r in read_records(folder) if r.name == record.name), None)
    path = index_folder(folder, record.name)
    if held == record and _is_whole(path):
        return
    if held is not None and (held.spec, held.metric, held.layer) != (record.spec, record.metric, record.layer):
        raise InputError(
            f"index {held.name!r} was built as {held.spec!r} by {held.metric} over {held.layer!r}; give this one "
            "another name."
        )
    engine = _engine(record, references, path)
    if engine is None:
        return
    with store.disk("replace", path):
        if path.exists():  # of a database that was changed since, or of a build that was stopped before its note
            record_file(folder, record.name).unlink(missing_ok=True)
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    _fill(engine, record, references, path, progress)
    store.write_sealed(record_file(folder, record.name), vars(record))


def _engine(record: IndexRecord, references: ReferenceSet, path: Path) -> NeighborIndex | None:
    """The engine, not built yet; None where "auto" chose exact search, which needs no index (and said so)."""
    asked = make_index(record.spec, record.metric)
    if isinstance(asked, AutoIndex):
        asked.path = asked.path or str(path)
    engine = asked.resolved(len(references), references.dim(record.layer))
    if isinstance(engine, ExactIndex):
        if isinstance(asked, AutoIndex):
            return None
        raise InputError("exact search needs no index: it reads the database's own vectors; search with index='exact'.")
    if isinstance(engine, OnDiskIndex):
        engine.path = path
    return engine


def _fill(
    engine: NeighborIndex, record: IndexRecord, references: ReferenceSet, path: Path, progress: Progress | None
) -> None:
    """Build over the vectors where they lie, and save what the database does not have already."""
    vectors = references.vectors(record.layer, engine.metric.unit)[0]
    if isinstance(engine, TrainedIndex):
        engine.build(vectors, references.labels, progress=progress)
        if not isinstance(engine, OnDiskIndex):
            engine.save(path, with_vectors=False)
        return
    payload = references.stored_payload
    engine.build(vectors, references.labels, payload if isinstance(payload, Tensor) else None)
    engine.save(path)
