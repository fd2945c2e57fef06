"""A database of references on the disk: opened in a moment, searched without reading it into memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robustknn import store
from robustknn.database.arrays import array_file, row_bytes, writing
from robustknn.database.extract import Executor
from robustknn.database.fill import drop_unfinished, fill
from robustknn.database.indexes import IndexRecord, build_index, damaged_notes, index_folder, read_records
from robustknn.database.layout import Block, Description, Part, is_database, notes
from robustknn.database.verify import problems
from robustknn.datasets.sources import as_source
from robustknn.errors import InputError, NotReadyError
from robustknn.features import FeatureExtractor
from robustknn.payload import TopPayload
from robustknn.progress import Progress, Silent
from robustknn.reference import ReferenceSet, restored_extractor


class Database:
    """References that `build_database` wrote: row-aligned arrays in a folder, made block by block.

    Open it with `Database.open(path)`. What counts are the parts whose blocks are all done: an addition that was
    stopped in the middle changes nothing until it is finished.

    Attributes:
        path: the folder.
        description: what `database.json` says.
    """

    def __init__(self, path: Path, description: Description) -> None:
        self.path, self.description = path, description

    @classmethod
    def open(cls, path: str | Path) -> Database:
        """The database in a folder, whole or not.

        Raises:
            InputError: there is none.
            IntegrityError: its description is altered, or of another version.
        """
        if not is_database(path):
            raise InputError(f"{str(path)!r} holds no database; build one with: robustknn index build.")
        return cls(Path(path), Description.read(Path(path)))

    # -------------------------------------------------------------------------------------- content

    @cached_property
    def _ledger(self) -> dict[int, dict[str, str] | None]:
        return {block.number: hashes for block, hashes in notes(self.path, self.description.blocks())}

    @property
    def missing(self) -> list[Block]:
        """The blocks that are not done."""
        return [block for block in self.description.blocks() if self._ledger[block.number] is None]

    @property
    def parts(self) -> Sequence[Part]:
        """The parts that count: all, without a last addition that is not finished.

        Raises:
            NotReadyError: there are none, or a block in the middle is missing.
        """
        parts, missing = self.description.parts, self.missing
        if not missing:
            return parts
        if len(parts) > 1 and missing[0].number >= parts[-1].first:
            return parts[:-1]
        raise NotReadyError(
            f"the database in {str(self.path)!r} lacks {len(missing)} of {len(self.description.blocks())} blocks; run "
            "the command that built it again, which makes these."
        )

    def __len__(self) -> int:
        return self.parts[-1].stop

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers, in order."""
        return self.description.layers

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return self.parts[-1].n_classes

    def fingerprint(self) -> str:
        """A sha256 of what the arrays hold and what they were made with, from the ledger."""
        content = {
            **self.description.meta(),
            "n_classes": self.n_classes,
            "payload": self.description.payload,
            "unit": self.description.settings.unit,
            "labels": self.description.settings.labels,
            "blocks": [self._ledger[block.number] for block in self.description.blocks(self.parts)],
        }
        return store.fingerprint_config(content)

    # ---------------------------------------------------------------------------------------- using

    def extractor(self, features: FeatureExtractor | nn.Module) -> FeatureExtractor:
        """The extractor that made the vectors, around the bare model; or one that is given, when it is the same.

        Raises:
            IntegrityError: another model or other preprocessing; what the extractor learned is missing or altered.
        """
        return restored_extractor(self.path, self.description.meta(), features)

    def references(self, features: FeatureExtractor | nn.Module | None = None) -> ReferenceSet:
        """The references over the mapped arrays: nothing is read until it is needed, nothing is kept in memory.

        Args:
            features: the model, or an extractor of it; without either nothing but vectors can be searched for.

        Raises:
            IntegrityError: see `extractor`; an array is missing, truncated or of another shape.
            NotReadyError: the database is not finished.
            InputError: a class has no reference.
        """
        settings = self.description.settings
        places = dict(enumerate(self.layers))
        lengths = {layer: self._array(f"lengths-{place}") for place, layer in places.items()} if settings.unit else {}
        return ReferenceSet.over(
            {layer: self._array(f"vectors-{place}") for place, layer in places.items()},
            self._array("labels"),
            lengths=lengths,
            content=self.fingerprint(),
            n_classes=self.n_classes,
            payload=self._payload(),
            features=None if features is None else self.extractor(features),
            model_fingerprint=self.description.model_fingerprint,
            preprocessing=self.description.preprocessing,
            labelled=settings.labels == "data",
        )

    def _array(self, name: str) -> Tensor:
        return store.load_array(array_file(self.path, name), mapped=True, rows=len(self))

    def _payload(self) -> Tensor | TopPayload | None:
        if self.description.payload is not None:
            values, classes = (self._array(f"payload-{part}") for part in ("values", "classes"))
            return TopPayload(values, classes, **self.description.payload)
        return self._array("payload") if "payload" in self.description.arrays else None

    # ------------------------------------------------------------------------------------- changing

    def add(
        self,
        features: FeatureExtractor | nn.Module,
        source: Any,
        *,
        n_classes: int | None = None,
        executor: Executor | None = None,
        progress: Progress | None = None,
    ) -> Database:
        """Append the references of a further source; going on with one that was stopped, and nothing of one that is in.

        Args:
            features: the model, or the extractor.
            source: see `build_database`. Each source is in a database once: adding it again changes nothing.

        Raises:
            ResumeError: the addition of another source is not finished; finish it, or `drop_unfinished`.
            InputError, IntegrityError, StorageError: see `build_database`.
        """
        fill(
            self.path,
            self.extractor(features),
            as_source(source),
            n_classes,
            executor=executor,
            progress=progress,
            new=True,
        )
        return Database.open(self.path)

    def drop_unfinished(self) -> Database:
        """The database without a last addition that is not finished.

        Raises:
            InputError: all is finished, or nothing ever was.
        """
        drop_unfinished(self.path)
        return Database.open(self.path)

    # ------------------------------------------------------------------------------------- searching

    def build_index(
        self,
        spec: str,
        metric: str = "l2",
        *,
        layer: str | None = None,
        name: str | None = None,
        progress: Progress | None = None,
    ) -> IndexRecord:
        """Build an engine over the mapped vectors and keep it in the folder; nothing if it is there and up to date.

        Args:
            spec: the engine ("ivf-sq8", "ivf-flat:nprobe=64"), as `make_index` takes it; nothing is built where
                "auto" chooses exact search.
            metric: "l2", "cosine" or "ip".
            layer: whose vectors; may be left out when there is one.
            name: what the index is called; by default the engine's name.

        Raises:
            InputError: "exact", which needs no index; another index has the name; what the engine refuses.
            NotReadyError: the database is not finished.
        """
        references = self.references()
        if layer is None and len(self.layers) > 1:
            raise InputError(f"the database holds {len(self.layers)} layers ({', '.join(self.layers)}); choose one.")
        chosen = references.layer(layer or self.layers[0])
        record = IndexRecord(name or spec.partition(":")[0], spec, metric, chosen, len(self), self.fingerprint())
        with writing(self.path):
            build_index(self.path, record, references, progress)
        return record

    def indexes(self) -> list[IndexRecord]:
        """The indexes in the folder, by name; `current(record)` says which are of what the database holds now."""
        return read_records(self.path)

    def current(self, record: IndexRecord) -> bool:
        """Whether an index was built over what the database holds now."""
        return record.database == self.fingerprint()

    def _is_stale(self, record: IndexRecord) -> bool:
        try:
            return not self.current(record)
        except NotReadyError:
            return True

    def index_spec(self, text: str) -> str:
        """What `make_index` takes for an index of this database by name; any other text is given back.

        Raises:
            InputError: the index was built before the database was changed.
        """
        damaged = damaged_notes(self.path).get(text)
        if damaged is not None:
            raise InputError(damaged)
        record = next((record for record in self.indexes() if record.name == text), None)
        if record is None:
            return text
        if not self.current(record):
            raise InputError(
                f"index {text!r} was built over other references than the database holds now; build it again: "
                f"robustknn index build {self.path} --index {record.spec}."
            )
        return str(index_folder(self.path, record.name))

    def verify(
        self, features: FeatureExtractor | nn.Module | None = None, progress: Progress | None = None
    ) -> list[str]:
        """Read everything and say what is not as it was written, a sentence each; nothing when all is well.

        Args:
            features: the model (or extractor) that the database is to be of.
        """
        found = list(problems(self.path, self.description, features, progress or Silent()))
        return found + (self._stale() if not found else [])

    def _stale(self) -> list[str]:
        return [
            f"index {record.name!r} was built over other content than the database holds now; build it again."
            for record in self.indexes()
            if not self.current(record)
        ]

    def describe(self) -> dict[str, Any]:
        """What the database is, as JSON: rows, layers and dimensions, bytes, blocks, payload, sources."""
        said, missing = self.description, self.missing
        return {
            "path": str(self.path),
            "rows": said.rows,
            "classes": said.parts[-1].n_classes,
            "layers": {layer: said.arrays[f"vectors-{place}"].row[0] for place, layer in enumerate(said.layers)},
            **said.settings.to_json(),
            "bytes": sum(row_bytes(array) for array in said.arrays.values()) * said.rows,
            "blocks": {"done": len(said.blocks()) - len(missing), "missing": len(missing)},
            "model": said.model_fingerprint,
            "options": said.options,
            "parts": [{"rows": part.rows, **part.source} for part in said.parts],
            "indexes": [{**vars(r), "stale": self._is_stale(r)} for r in self.indexes()],
            "damaged_indexes": list(damaged_notes(self.path)),
        }
