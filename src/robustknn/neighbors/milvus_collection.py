"""One collection of Milvus: rows put into it and read back, and searches, within the limits of a request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustknn.errors import InputError, IntegrityError, NotReadyError, brief
from robustknn.neighbors.base import MISSING
from robustknn.neighbors.milvus_client import Connection, load_pymilvus
from robustknn.neighbors.milvus_kinds import search_settings
from robustknn.neighbors.milvus_record import ARRAYS, METRICS, Fields, Record
from robustknn.store import StorageError

MOST_NEIGHBORS = 16384
"""How many neighbors, or rows of a query, one request may ask for."""
_MOST_QUERIES = 1024
REQUEST_BYTES = 16 * 2**20
"""What one request carries, or brings back; servers refuse more than 64 MiB."""
_HIT_BYTES = 16
_PROPERTY = "robustknn.record"
_LOOK_AGAIN = 0.25  # seconds


class Collection:
    """A collection by name, which may be there or not.

    Args:
        patience: seconds that a flush, the building of the index, or loading may take.

    Attributes:
        holds: what it holds, once that is known.
    """

    holds: Record

    def __init__(self, connection: Connection, name: str, fields: Fields, patience: float) -> None:
        self.connection, self.name, self.fields, self.patience = connection, name, fields, patience

    def _ask(self, request: str, **options: Any) -> Any:
        return self.connection.ask(request, self.name, **options)

    def _wait(self, request: str, **options: Any) -> Any:
        return self.connection.ask(request, self.name, patience=self.patience, **options)

    # ---------------------------------------------------------------------------------- what it is

    def exists(self) -> bool:
        return bool(self._ask("has_collection"))

    def kinds(self) -> dict[str, dict[str, Any]]:
        """Its fields by name, as pymilvus describes them."""
        return {field["name"]: field for field in self._ask("describe_collection")["fields"]}

    def told(self) -> Record | None:
        """What it says of itself, None where it was not built here."""
        said = (self._ask("describe_collection").get("properties") or {}).get(_PROPERTY)
        return None if said is None else Record.parse(said, self.name)

    def write(self, record: Record) -> None:
        """Let it say something else of itself."""
        self._ask("alter_collection_properties", properties={_PROPERTY: record.text()})

    def create(self, record: Record, shards: int) -> None:
        """Make it, empty."""
        pymilvus = load_pymilvus()
        kind = pymilvus.DataType
        schema = pymilvus.MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field(self.fields.id, kind.INT64, is_primary=True)
        schema.add_field(self.fields.vector, kind.FLOAT_VECTOR, dim=record.dim)
        if record.labels:
            schema.add_field(self.fields.label, kind.INT64)
        if record.payload is not None:
            element = kind[ARRAYS[getattr(torch, record.payload[0])]]
            schema.add_field(self.fields.payload, kind.ARRAY, element_type=element, max_capacity=record.width)
        properties = {_PROPERTY: record.text()}
        self._ask("create_collection", schema=schema, num_shards=shards, properties=properties)

    def prepare(self, record: Record) -> None:
        """See that it has its index and can be searched; both may be so already."""
        if not self._ask("list_indexes"):
            made = load_pymilvus().MilvusClient.prepare_index_params()
            made.add_index(
                self.fields.vector,
                index_type=record.index_type,
                metric_type=METRICS[record.metric],
                params=record.params,
            )
            self._wait("create_index", index_params=made, sync=False)
        self.load()

    def index(self) -> dict[str, Any]:
        """Its index over the vectors, as pymilvus describes it."""
        for name in self._ask("list_indexes"):
            seen = self._ask("describe_index", index_name=name)
            if seen and seen.get("field_name") == self.fields.vector:
                return dict(seen)
        raise NotReadyError(f"collection {self.name!r} has no index over {self.fields.vector!r}; create one first.")

    def load(self) -> None:
        """See that it can be searched."""
        self._wait("load_collection")

    def settle(self) -> None:
        """Wait until what was put is on disk and in the index."""
        self._wait("flush")
        until = time.monotonic() + self.patience
        while True:
            seen = self.index()
            if seen.get("state") == "Failed":
                why = brief(seen.get("index_state_fail_reason") or seen.get("reason") or "no reason given")
                raise InputError(
                    f"Milvus could not build the index of collection {self.name!r} ({why}); choose another."
                )
            if seen.get("state", "Finished") == "Finished" and not seen.get("pending_index_rows"):
                return
            if time.monotonic() > until:
                raise StorageError(
                    f"Milvus had not finished the index of collection {self.name!r} after {self.patience:g} s; raise "
                    "patience= and call build() again, or choose another index_type."
                )
            time.sleep(_LOOK_AGAIN)

    # ------------------------------------------------------------------------------------- its rows

    def count(self, first: int | None = None, last: int | None = None, strong: bool = True) -> int:
        """How many rows it holds, of ids from `first` up to and not including `last`; doubled ones count twice."""
        told = self._ask(
            "query",
            filter=self._range(first, last),
            output_fields=["count(*)"],
            consistency_level="Strong" if strong else "Session",
        )
        return int(told[0]["count(*)"])

    def _range(self, first: int | None, last: int | None) -> str:
        bounds = ((">=", first), ("<", last))
        return " and ".join(f"{self.fields.id} {sign} {bound}" for sign, bound in bounds if bound is not None)

    def ids(self, first: int, last: int) -> set[int]:
        """Which ids from `first` up to and not including `last` it holds."""
        field = self.fields.id
        told = self._ask("query", filter=self._range(first, last), output_fields=[field], consistency_level="Session")
        return {int(row[field]) for row in told}

    def trim(self, rows: int) -> None:
        """Remove rows whose ids are `rows` or more: those of an `add` that did not finish."""
        if self.count(rows):
            self._wait("delete", filter=self._range(rows, None))

    def put(self, first: int, vectors: Tensor, labels: Tensor | None, payload: Tensor | None) -> None:
        """Put rows with ids from `first` on, in the place of rows that have these ids already."""
        ids = range(first, first + len(vectors))
        columns: dict[str, Sequence[Any]] = {
            self.fields.id: ids,
            self.fields.vector: list(vectors.detach().cpu().float().numpy()),
        }
        if labels is not None and self.fields.label:
            columns[self.fields.label] = labels.tolist()
        if payload is not None and self.fields.payload:
            columns[self.fields.payload] = payload.reshape(len(payload), -1).tolist()
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self._ask("upsert", data=rows)

    def fetch(self, ids: Tensor, field: str, width: int) -> np.ndarray[Any, Any]:
        """What the rows of ids (m,) hold in a field, (m, …), of about `width` numbers a row.

        Raises:
            IntegrityError: a row is not there.
        """
        wanted, place = np.unique(ids.cpu().numpy(), return_inverse=True)
        held: list[Any] = []
        step = max(1, min(MOST_NEIGHBORS, REQUEST_BYTES // (8 * width + 16)))
        for start in range(0, len(wanted), step):
            part = wanted[start : start + step].tolist()
            told = self._ask(
                "query",
                filter=f"{self.fields.id} in {part}",
                output_fields=[self.fields.id, field],
                consistency_level="Session",
            )
            found = {row[self.fields.id]: row[field] for row in told}
            missing = [i for i in part if i not in found]
            if missing:
                raise IntegrityError(f"collection {self.name!r} holds no row {missing[0]}; build it again.")
            held += [found[i] for i in part]
        return np.asarray(held)[place]

    # --------------------------------------------------------------------------------------- search

    def search(self, queries: Tensor, m: int, given: dict[str, int], where: str = "") -> tuple[Tensor, Tensor]:
        """Keys as Milvus tells them, float64, and ids of the m nearest, (B, m) each; ∞ and −1 for a missing one.

        Args:
            queries: (B, D) float32 on the CPU.
            given: settings of the search.
            where: a filter on its fields.
        """
        if m > MOST_NEIGHBORS:
            return self._search_ranges(queries, m, given, where)
        metric, kind = self.holds.metric, self.holds.index_type
        keys = torch.full((len(queries), m), torch.inf, dtype=torch.float64)
        ids = torch.full((len(queries), m), MISSING)
        step = max(1, min(_MOST_QUERIES, REQUEST_BYTES // (_HIT_BYTES * m), REQUEST_BYTES // (4 * queries.shape[1])))
        asked = {"metric_type": METRICS[metric], "params": search_settings(kind, given, m)}
        for start in range(0, len(queries), step):
            found = self._ask(
                "search",
                data=list(queries[start : start + step].numpy()),
                anns_field=self.fields.vector,
                filter=where,
                limit=m,
                search_params=asked,
                output_fields=[self.fields.id],  # Milvus Lite sends every field otherwise
                consistency_level="Session",
            )
            for row, hits in enumerate(found, start):
                keys[row, : len(hits)] = torch.as_tensor(hits.distances, dtype=torch.float64)
                ids[row, : len(hits)] = torch.as_tensor(hits.ids, dtype=torch.int64)
        self._check_ids(ids)
        if metric != "l2":  # for L2 Milvus tells the squared distance, which is our key
            keys = float(metric == "cosine") - keys
        return keys.masked_fill_(ids < 0, torch.inf), ids

    def _search_ranges(self, queries: Tensor, m: int, given: dict[str, int], where: str) -> tuple[Tensor, Tensor]:
        """More neighbors than one request may ask for: those of every range of ids that is short enough."""
        rows = self.holds.rows
        keys = torch.full((len(queries), 0), torch.inf, dtype=torch.float64)
        ids = torch.full((len(queries), 0), MISSING)
        for first in range(0, rows, MOST_NEIGHBORS):
            last = min(first + MOST_NEIGHBORS, rows)
            within = " and ".join(part for part in (where, self._range(first, last)) if part)
            more = self.search(queries, last - first, given, within)
            keys, ids = torch.cat([keys, more[0]], 1), torch.cat([ids, more[1]], 1)
            keys, order = keys.sort(dim=1, stable=True)
            keys, ids = keys[:, :m], ids.gather(1, order)[:, :m]
        short = m - keys.shape[1]
        pad = torch.nn.functional.pad
        return pad(keys, (0, short), value=torch.inf), pad(ids, (0, short), value=MISSING)

    def _check_ids(self, ids: Tensor) -> None:
        if bool((ids >= self.holds.rows).any()):
            raise InputError(
                f"collection {self.name!r} gave the row {int(ids.max())} where it held {self.holds.rows}; something "
                "else adds to it: stop that and open it again."
            )
