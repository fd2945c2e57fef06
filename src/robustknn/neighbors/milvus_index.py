"""Search through Milvus (the extra `milvus`): a file by Milvus Lite, a server, or a cluster, by one uri.

A collection is built here from vectors, or opened where it exists. What is put into it carries the row as its
primary key and is put by upsert, batch by batch, so that a build that was stopped at any moment, by the death of
either side, is finished by calling it again: nothing is doubled and nothing lost. The collection says in one of its
properties what it was built from, and another content is refused.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustknn import registry, store
from robustknn.checks import check_positive, check_positive_int
from robustknn.errors import InputError, NotReadyError, brief
from robustknn.neighbors.base import (
    ClassNeighbors,
    NeighborIndex,
    Neighbors,
    Vectors,
    check_beside,
    check_vectors,
    empty,
    joined,
)
from robustknn.neighbors.exact import ExactIndex, load_parts, no_index
from robustknn.neighbors.milvus_build import begin, describe, fill, find
from robustknn.neighbors.milvus_client import Connection
from robustknn.neighbors.milvus_collection import MOST_NEIGHBORS, Collection
from robustknn.neighbors.milvus_kinds import KINDS, build_settings, check_kind, settings
from robustknn.neighbors.milvus_record import Fields, Record, check_payload, content_of
from robustknn.neighbors.refine import exact_keys, in_order
from robustknn.progress import Progress, Silent

KIND, SCHEMA = "milvus-index", 1
TOKEN = "MILVUS_TOKEN"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")


@registry.indexes.register("milvus")
class MilvusIndex(NeighborIndex):
    """Nearest neighbors by Milvus: Milvus Lite in a file, a server or a cluster.

    It is never called exact, not even with index_type="FLAT": Milvus measures in float32 and does not say how far
    it was off, it may answer from segments that have not caught up with the last rows, and what it holds can change
    under this process. With the vectors at hand what it finds is measured again in float64 and ordered by (distance,
    id); what it does not find stays unfound.

    Args:
        metric: "l2", "cosine" or "ip".
        uri: the path of a Milvus Lite file, "….db", or the address of a server, "http://host:19530".
        collection: the name of the collection to build. None makes one from what it is built from.
        index_type: "FLAT", "IVF_FLAT", "IVF_SQ8", "HNSW" or "AUTOINDEX"; on a server also "IVF_PQ", "SCANN" and
            "DISKANN".
        params: of the index: nlist (4√n by default), M (16), efConstruction (200), m, nbits (8); as a mapping or as
            text, "nlist=1024 m=16". Milvus Lite goes by values of its own.
        search_params: of a search: nprobe (32 by default), ef, reorder_k, search_list.
        shards: how many shards a collection is made with.
        batch_rows: rows a request when building; by default, and at most, 16 MiB of them.
        timeout: seconds that a request may take.
        patience: seconds that a flush, the building of the index, and loading may take.
        retries: further tries when the server is not there, after 0.5, 1, 2 … seconds.
        keep_vectors: keep the tensor given to `build` (not a copy, save of unit length for cosine) to measure what
            is found, search by class, and combine. Without it all these ask Milvus.
        token: "user:password" or an API key; by default what the environment variable MILVUS_TOKEN holds.
        progress: where to report the building.

    Raises:
        MissingExtraError: pymilvus is not installed.
        InputError: what cannot be meant, by name.
    """

    exact = False
    updatable = True
    reconstructs = True
    distributed = True

    def __init__(
        self,
        metric: str = "l2",
        uri: str | Path = "",
        collection: str | None = None,
        index_type: str = "FLAT",
        params: Mapping[str, Any] | str | None = None,
        search_params: Mapping[str, Any] | str | None = None,
        shards: int = 1,
        batch_rows: int | None = None,
        timeout: float = 30.0,
        patience: float = 3600.0,
        retries: int = 3,
        keep_vectors: bool = True,
        token: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(metric)
        self._connection = Connection(uri, os.environ.get(TOKEN) if token is None else token, timeout, retries)
        self._token, self._progress = token, progress or Silent()
        if collection is not None and not (isinstance(collection, str) and _NAME.fullmatch(collection)):
            raise InputError(f"collection must be a name of letters, digits and '_', not {brief(collection)}.")
        self.index_type = check_kind(index_type, self._connection.lite)
        known = KINDS[self.index_type]
        self.search_params = settings(search_params, known.search, f"search_params of {index_type}")
        self._settings: dict[str, Any] = {
            "collection": collection,
            "params": settings(params, known.build, f"params of {index_type}"),
            "shards": check_positive_int(shards, "shards"),
            "batch_rows": None if batch_rows is None else check_positive_int(batch_rows, "batch_rows"),
            "timeout": self._connection.timeout,
            "patience": check_positive(patience, "patience"),
            "retries": self._connection.retries,
            "keep_vectors": bool(keep_vectors),
        }
        self._held: Collection | None = None
        self._plain = ExactIndex(metric)  # of the vectors, where they are at hand

    # ------------------------------------------------------------------------------------- content

    def build(self, vectors: Tensor, labels: Tensor | None = None, payload: Tensor | None = None) -> MilvusIndex:
        """Put vectors (n, D) into the collection, or what is missing of them after a build that was stopped.

        Labels and payload become fields of it.

        Raises:
            InputError: what `ExactIndex.build` refuses; float64, which Milvus cannot hold; a payload it cannot hold;
                a collection of that name that holds something else.
            StorageError: the server cannot be reached. What it holds is kept: call this again.
        """
        labels = check_vectors(vectors, labels, payload)
        made, (n, dim) = self._settings, vectors.shape
        params = build_settings(self.index_type, made["params"], n, dim)
        content, beside = content_of(vectors, labels, payload), check_payload(payload)
        record = Record(self.metric.name, dim, n, content, self.index_type, params, labels is not None, beside)
        held = self._collection(made["collection"] or record.name(), Fields())
        fresh = begin(held, record, made["shards"])
        fill(held, record, 0, (vectors, labels, payload), fresh, made["batch_rows"], self._progress)
        if made["keep_vectors"]:
            self._plain.build(vectors, labels, payload)
        return self._hold(held, record, labels, payload)

    def add(self, vectors: Tensor, labels: Tensor | None = None, payload: Tensor | None = None) -> MilvusIndex:
        """Append vectors; rows of an `add` that did not finish are removed first.

        The index keeps the settings it was built with; after the collection has grown much, build another.
        """
        held = self._here
        if not self.updatable:
            raise InputError("an opened collection is not changed from here; insert into it and open it again.")
        labels = check_vectors(vectors, labels, payload)
        if vectors.shape[1] != self.dim:
            raise InputError(f"vectors of length {vectors.shape[1]} cannot join an index of length {self.dim}.")
        if check_payload(payload) != held.holds.payload:
            raise InputError("the payload has another shape or dtype than that of the references; pass one like it.")
        both = joined(self._labels, labels, "labels"), joined(self._payload, payload, "payload")
        chain = f"{held.holds.content} {content_of(vectors, labels, payload)}"
        content = hashlib.sha256(chain.encode()).hexdigest()
        record = replace(held.holds, rows=len(self) + len(vectors), content=content)
        held.trim(len(self))
        at_once = self._settings["batch_rows"]
        fill(held, record, len(self), (vectors, labels, payload), True, at_once, self._progress)
        held.write(record)
        if len(self._plain):
            self._plain.add(vectors, labels, payload)
        return self._hold(held, record, *both)

    def _collection(self, name: str, fields: Fields) -> Collection:
        return Collection(self._connection, name, fields, self._settings["patience"])

    def _hold(self, held: Collection, record: Record, labels: Tensor | None, payload: Tensor | None) -> MilvusIndex:
        self._labels = check_beside(record.rows, labels, payload)
        held.holds = record
        self._payload, self._held = payload, held
        return self

    @classmethod
    def open(
        cls,
        uri: str | Path,
        collection: str,
        *,
        id_field: str = "id",
        vector_field: str = "vector",
        label_field: str | None = None,
        payload_field: str | None = None,
        labels: Tensor | None = None,
        payload: Tensor | None = None,
        vectors: Tensor | None = None,
        **options: Any,
    ) -> MilvusIndex:
        """Search in a collection that exists. It is used as it is and must not change while it is open.

        Its primary keys must be the rows 0..n − 1 of labels, payload and vectors, which is checked. The metric and
        the index type are those of its index.

        Args:
            id_field, vector_field, label_field, payload_field: its fields; the payload's is an ARRAY of numbers.
            labels: (n,) class numbers. Without them the search by class reads `label_field`.
            payload: (n, …) what is kept beside each reference. Without it `payload` reads `payload_field`.
            vectors: (n, D) what the collection holds, to measure what is found, and for the search by class.
            options: search_params, timeout, patience, retries and token, as for the class.

        Raises:
            InputError: no such collection or field, another kind of field, primary keys that are no rows, a metric or
                an index type that is not known here, another number of labels, payload rows or vectors.
        """
        fields = Fields(id_field, vector_field, label_field, payload_field)
        record = describe(
            cls("l2", uri, collection, **{**options, "search_params": None})._collection(collection, fields)
        )
        made = cls(record.metric, uri, collection, record.index_type, **options)
        made.updatable = False
        if vectors is not None:
            check_vectors(vectors, labels, payload)
            if tuple(vectors.shape) != (record.rows, record.dim):
                raise InputError(
                    f"vectors have shape {tuple(vectors.shape)} where the collection holds {record.rows} of length "
                    f"{record.dim}; pass those it holds, in the order of their ids."
                )
            made._plain.build(vectors, labels, payload)
        return made._hold(made._collection(collection, fields), record, labels, payload)

    @property
    def _here(self) -> Collection:
        if self._held is None:
            raise empty()
        return self._held

    def __len__(self) -> int:
        return 0 if self._held is None else self._held.holds.rows

    @property
    def dim(self) -> int:
        return self._here.holds.dim

    def attach(self, vectors: Callable[[], Vectors], labels: Tensor, payload: Tensor | None) -> None:
        super().attach(vectors, labels, payload)
        own = (self._plain.vectors, self._plain.lengths) if len(self._plain) else vectors()
        self._plain.adopt(*own, self._labels, self._payload)

    def reconstruct(self, ids: Tensor) -> Tensor:
        """The vectors of ids of any shape, from those at hand or from Milvus; zeros for −1."""
        if bool((ids >= len(self)).any()):
            raise InputError(f"id {int(ids.max())} was asked of an index that holds {len(self)} references.")
        if len(self._plain):
            return self._plain.reconstruct(ids.cpu()).to(ids.device)
        held = self._here
        rows = torch.from_numpy(held.fetch(ids.reshape(-1).clamp_min(0), held.fields.vector, self.dim)).float()
        return rows.view(*ids.shape, self.dim).to(ids.device).masked_fill_(ids[..., None] < 0, 0)

    def combine(self, ids: Tensor, weights: Tensor, unit: bool = False) -> Tensor:
        if not len(self._plain):
            return super().combine(ids, weights, unit)
        return self._plain.combine(ids.cpu(), weights.cpu(), unit).to(ids.device)

    def payload(self, ids: Tensor) -> Tensor:
        held = self._here
        if self._payload is not None or held.holds.payload is None or held.fields.payload is None:
            return super().payload(ids)
        dtype, shape = held.holds.payload
        rows = torch.from_numpy(held.fetch(ids.reshape(-1).clamp_min(0), held.fields.payload, held.holds.width))
        return rows.to(getattr(torch, dtype)).view(*ids.shape, *shape)

    # -------------------------------------------------------------------------------------- search

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> Neighbors:
        queries = self.check_queries(queries, k)
        plain = self._plain if len(self._plain) else None
        wanted = k if plain is None else max(k, min(plain.spare(k), MOST_NEIGHBORS))
        keys, ids = self._ask(queries, wanted)
        if plain is not None:
            keys = exact_keys(self.metric, plain.place(queries), plain.vectors, ids)
        keys, ids = in_order(keys, ids)
        distances = self.metric.distances(keys[:, :k]).float()
        return Neighbors(distances.to(queries.device), ids[:, :k].to(queries.device))

    @torch.no_grad()
    def search_both(self, queries: Tensor, k: int, per_class: int) -> tuple[Neighbors, ClassNeighbors]:
        """The k nearest by Milvus; the nearest of every class among the vectors at hand, else by Milvus too.

        Milvus is asked class by class, with a filter on the field of the labels.
        """
        near = self.search(queries, k)
        if len(self._plain):
            classes = self._plain.search_classes(self.check_queries(queries, k).cpu(), per_class)
        else:
            classes = self._classes(self.check_queries(queries, k), check_positive_int(per_class, "per_class"))
        return near, ClassNeighbors(classes.distances.to(queries.device), classes.ids.to(queries.device))

    def _classes(self, queries: Tensor, per_class: int) -> ClassNeighbors:
        field = self._here.fields.label
        if field is None or not self._here.holds.labels:
            raise NotReadyError("searching by class needs labels; build the index with labels=, or open it with them.")
        if self._labels is None:
            ids = torch.arange(len(self))
            self._labels = torch.from_numpy(self._here.fetch(ids, field, 1)).long()
        found = []
        for number in range(int(self._labels.max()) + 1):
            keys, ids = in_order(*self._ask(queries, min(per_class, len(self)), f"{field} == {number}"))
            found.append((self.metric.distances(keys).float(), ids))
        classes = ClassNeighbors(torch.stack([f[0] for f in found], 1), torch.stack([f[1] for f in found], 1))
        short = per_class - classes.ids.shape[2]
        pad = torch.nn.functional.pad
        return ClassNeighbors(
            pad(classes.distances, (0, short), value=torch.inf), pad(classes.ids, (0, short), value=-1)
        )

    def _ask(self, queries: Tensor, m: int, where: str = "") -> tuple[Tensor, Tensor]:
        placed = queries.to("cpu", torch.float32).contiguous()
        return self._here.search(placed, m, self.search_params, where)

    # ----------------------------------------------------------------------------------- transport

    def save(self, path: Path) -> None:
        """Write where the collection is and what it holds, with labels and payload at hand; no vectors, no token."""
        held = self._here
        meta = {
            "uri": self._connection.uri,
            "record": held.holds.text(),
            "fields": [held.fields.id, held.fields.vector, held.fields.label, held.fields.payload],
            "opened": not self.updatable,
            "search_params": self.search_params,
            "settings": {**self._settings, "collection": held.name},
        }
        with store.artifact(Path(path), KIND, SCHEMA, meta) as folder:
            for name, tensor in (("labels", self._labels), ("payload", self._payload)):
                if tensor is not None:
                    store.save_array(folder / f"{name}.npy", tensor)

    @classmethod
    def load(cls, path: Path) -> MilvusIndex:
        """Read what `save` wrote and connect to the collection; a token comes from MILVUS_TOKEN.

        Raises:
            IntegrityError: a file is missing, truncated or altered; the collection is gone or holds something else.
            StorageError: the server cannot be reached.
        """
        manifest = store.read_manifest(Path(path), KIND, SCHEMA)
        parts, meta = load_parts(manifest, mapped=False), manifest.meta
        try:
            name = meta["settings"]["collection"]
            record = Record.parse(meta["record"], name)
            made = cls(
                record.metric,
                meta["uri"],
                index_type=record.index_type,
                search_params=meta["search_params"],
                **meta["settings"],
            )
            held = made._collection(name, Fields(*meta["fields"]))
            made.updatable = not meta["opened"]
            made._hold(held, record, parts["labels"], parts["payload"])
        except (InputError, KeyError, TypeError) as error:
            raise no_index(manifest, error) from error
        find(held, record, meta["opened"])
        return made

    def to(self, device: torch.device | str) -> MilvusIndex:
        """Nothing moves: Milvus searches where it runs, and results go to the device of the queries."""
        torch.device(device)
        return self

    def close(self) -> None:
        """Let go of the server; Milvus Lite ends, and another process can open its file. A search connects again."""
        self._connection.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> MilvusIndex:
        """Another index over the same collection, with its own connection."""
        given: dict[str, Any] = {"index_type": self.index_type, "search_params": self.search_params, **self._settings}
        made = type(self)(self.metric.name, self._connection.uri, token=self._token, progress=self._progress, **given)
        made.updatable = self.updatable
        if self._held is None:
            return made
        if len(self._plain):
            made._plain.adopt(self._plain.vectors, self._plain.lengths, self._labels, self._payload)
        held = made._collection(self._held.name, self._held.fields)
        return made._hold(held, self._held.holds, self._labels, self._payload)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError("a Milvus index is not pickled; write it with save(path) and read it with load(path).")
