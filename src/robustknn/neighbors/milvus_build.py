"""What becomes a collection to search in: one built from vectors, gone on with, found again, or a user's own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robustknn.errors import InputError, IntegrityError, NotReadyError, unknown_name
from robustknn.neighbors.milvus_collection import MOST_NEIGHBORS, REQUEST_BYTES, Collection
from robustknn.neighbors.milvus_kinds import check_kind
from robustknn.neighbors.milvus_record import METRICS, Record
from robustknn.progress import Progress
from robustknn.store import StorageError, fingerprint_tensors

_SAMPLE = 16
_WINDOWS, _WINDOW = 64, 1024
_ELEMENTS = {"FLOAT": "float32", "DOUBLE": "float64", **dict.fromkeys(("INT8", "INT16", "INT32", "INT64"), "int64")}


# ---------------------------------------------------------------------------------------- building


def begin(held: Collection, record: Record, shards: int) -> bool:
    """See that the collection is there, is meant for this and can be searched; whether it was made just now.

    Raises:
        InputError: it holds something else.
    """
    fresh = not held.exists()
    if fresh:
        held.create(record, shards)
    else:
        _check_same(held, record)
    held.prepare(record)
    if not fresh:
        held.trim(record.rows)
    return fresh


def _check_same(held: Collection, record: Record) -> None:
    told = held.told()
    if told is None:
        raise InputError(
            f"collection {held.name!r} was not built by this library; choose another name, or search in it with "
            "MilvusIndex.open."
        )
    if told == record:
        return
    for what, one, other in (
        ("vectors of length", told.dim, record.dim),
        ("the metric", told.metric, record.metric),
        ("the index type", told.index_type, record.index_type),
        ("index settings", told.params, record.params),
        ("a number of references of", told.rows, record.rows),
    ):
        if one != other:
            raise InputError(
                f"collection {held.name!r} was built with {what} {one}, not {other}; choose another name, or drop it."
            )
    raise InputError(
        f"collection {held.name!r} was built from other vectors, labels or payload; choose another name, or drop it."
    )


def fill(
    held: Collection,
    record: Record,
    start: int,
    content: tuple[Tensor, Tensor | None, Tensor | None],
    fresh: bool,
    rows_at_once: int | None,
    progress: Progress,
) -> None:
    """Put the rows from `start` on, or what is not there of them, and wait until the index has them.

    Args:
        content: vectors (n, D), labels and payload.
        fresh: that none of them is there.
    """
    vectors, labels, payload = content
    progress.start("inserting into Milvus", len(vectors))
    try:
        for first, last in _batches(len(vectors), _batch_rows(record, rows_at_once)):
            if fresh or held.count(start + first, start + last, strong=False) != last - first:
                parts = [None if t is None else t[first:last] for t in (labels, payload)]
                held.put(start + first, vectors[first:last], *parts)
            progress.advance(last - first)
    finally:
        progress.stop()
    held.settle()
    found = held.count()
    if found != record.rows:
        raise StorageError(
            f"collection {held.name!r} holds {found} rows after {record.rows} were put into it; do the same "
            "again, which puts what is missing."
        )


def _batch_rows(record: Record, given: int | None) -> int:
    """How many rows go into one request."""
    fitting = max(1, min(MOST_NEIGHBORS, REQUEST_BYTES // (4 * (record.dim + 2 + 2 * record.width))))
    return fitting if given is None else min(given, fitting)


def _batches(n: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, n, step):
        yield first, min(first + step, n)


# ----------------------------------------------------------------------------------------- finding


def find(held: Collection, record: Record, opened: bool) -> None:
    """See that a collection still is what it was.

    Raises:
        IntegrityError: it is gone or holds something else.
    """
    if not held.exists():
        raise IntegrityError(f"collection {held.name!r} is not at {held.connection.uri!r} any more; build it again.")
    try:
        now = describe(held) if opened else held.told()
    except (InputError, NotReadyError) as error:
        raise IntegrityError(f"collection {held.name!r} has changed: {error}") from error
    if now != record:
        raise IntegrityError(f"collection {held.name!r} holds something else than when it was saved; build it again.")
    held.load()
    found = held.count()
    if found != record.rows:
        raise IntegrityError(
            f"collection {held.name!r} holds {found} rows where {record.rows} were saved; build it again with the same "
            "vectors, which mends it."
        )


def describe(held: Collection) -> Record:
    """What a user's collection holds, checked.

    Raises:
        InputError: it is not there, lacks a field, is searched by a metric or an index that is not known here, or its
            primary keys are not 0..n − 1.
        NotReadyError: it has no index, or no row.
    """
    if not held.exists():
        raise InputError(f"there is no collection {held.name!r} at {held.connection.uri!r}; correct the name.")
    fields, known = held.fields, held.kinds()
    for name in (fields.id, fields.vector, fields.label, fields.payload):
        if name is not None and name not in known:
            raise unknown_name(f"field of collection {held.name!r}:", name, known)
    _check_type(held, fields.id, known, "INT64", "the primary key", bool(known[fields.id].get("is_primary")))
    _check_type(held, fields.vector, known, "FLOAT_VECTOR", "the vectors")
    if fields.label is not None:
        _check_type(held, fields.label, known, "INT64", "the labels")
    index = held.index()
    metric = {theirs: ours for ours, theirs in METRICS.items()}.get(index.get("metric_type", ""))
    if metric is None:
        raise InputError(
            f"collection {held.name!r} is searched by {index.get('metric_type')}; known here are L2, IP and COSINE."
        )
    held.load()
    rows, dim = held.count(), int(known[fields.vector]["params"]["dim"])
    _check_rows(held, rows)
    payload = None if fields.payload is None else _payload(held, known[fields.payload], fields.payload)
    content = "sample " + fingerprint_tensors({"rows": _sample(held, rows, dim)})
    kind = check_kind(index.get("index_type"), lite=False)
    return Record(metric, dim, rows, content, kind, {}, fields.label is not None, payload)


def _check_type(
    held: Collection, name: str, known: dict[str, dict[str, object]], kind: str, what: str, holds: bool = True
) -> None:
    found = getattr(known[name]["type"], "name", str(known[name]["type"]))
    if found != kind or not holds:
        raise InputError(
            f"field {name!r} of collection {held.name!r} cannot be {what}, which need a field of type {kind}; name "
            "another one."
        )


def _payload(held: Collection, field: dict[str, object], name: str) -> tuple[str, list[int]]:
    element = getattr(field.get("element_type"), "name", "")
    if element not in _ELEMENTS:
        raise InputError(
            f"field {name!r} of collection {held.name!r} is no ARRAY of numbers; name another payload_field."
        )
    row = held.fetch(torch.zeros(1, dtype=torch.int64), name, 1)
    return _ELEMENTS[element], list(row.shape[1:])


def _check_rows(held: Collection, rows: int) -> None:
    """Refuse a collection whose primary keys are not 0..n − 1: by their number, and by looking at some of them."""
    if not rows:
        raise NotReadyError(f"collection {held.name!r} holds no row; insert into it first.")
    step = max(_WINDOW, -(-rows // _WINDOWS))
    right = held.count(0, rows) == rows
    for first in range(0, rows if right else 0, step):
        last = min(first + _WINDOW, rows)
        right = right and len(held.ids(first, last)) == last - first
    if not right:
        raise InputError(
            f"the primary keys of collection {held.name!r} are not the numbers 0..{rows - 1}, once each; insert "
            "the rows with these numbers as keys."
        )


def _sample(held: Collection, rows: int, dim: int) -> torch.Tensor:
    ids = torch.arange(0, rows, -(-rows // _SAMPLE))
    return torch.from_numpy(held.fetch(ids, held.fields.vector, dim)).float()
