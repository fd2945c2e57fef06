"""What a database is on the disk: its description, its arrays, and the ledger of blocks that are done.

    database.json            sealed: what it is made of and with (`Description`)
    vectors-0.npy …          one array a layer, (rows, D); lengths-0.npy: (rows,), where they have unit length
    labels.npy               (rows,) int64
    payload.npy, or payload-values.npy and payload-classes.npy
    transform-0.safetensors, center-0.npy       what the extractor of that layer learned
    blocks/00000012.json     sealed: number, first row, rows, sha256 of what each array holds in these rows
    indexes/NAME/            a saved index; NAME.json, sealed: of which content and how it was built

Row i of every array belongs to reference i. A block is done when its ledger file is there and whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from robustknn import store
from robustknn._version import __version__
from robustknn.checks import check_choice, check_positive_int
from robustknn.errors import InputError, IntegrityError
from robustknn.payload import TopSoftmax

KIND, SCHEMA = "database", 1
DESCRIPTION, BLOCKS, INDEXES = "database.json", "blocks", "indexes"
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class Block:
    """Rows start .. start + rows − 1 of every array: what is made, written and checked at a time."""

    number: int
    start: int
    rows: int


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a block beside the extractor and the source.

    Attributes:
        payload: "softmax" keeps the network's softmax vectors in float32, a TopSoftmax their largest numbers.
        labels: "data" takes those that come with the data, "payload" the class of the largest payload.
        dtype: of the vectors, "float32" or "float16".
        unit: vectors are stored at unit length with their lengths beside, for a search by cosine without a copy.
        block_rows: rows of a block.
        batch_size: samples a forward pass, counted from the start of the block.
    """

    payload: str | TopSoftmax | None = "softmax"
    labels: str = "data"
    dtype: str = "float32"
    unit: bool = False
    block_rows: int = 4096
    batch_size: int = 256

    def __post_init__(self) -> None:
        if not isinstance(self.payload, TopSoftmax) and self.payload not in ("softmax", None):
            raise InputError(f"payload must be 'softmax', a TopSoftmax or None, not {self.payload!r}.")
        check_choice(self.labels, ("data", "payload"), "labels")
        check_choice(self.dtype, DTYPES, "dtype")
        check_positive_int(self.block_rows, "block_rows")
        check_positive_int(self.batch_size, "batch_size")
        if self.labels == "payload" and self.payload is None:
            raise InputError(
                "labels='payload' takes the class of the largest payload; keep one: payload='softmax' "
                "(--payload softmax)."
            )

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.payload, TopSoftmax):
            held["payload"] = {"top": self.payload.top, "tail": self.payload.tail}
        return held

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> Settings:
        """What `to_json` gave."""
        payload = held["payload"]
        return cls(**{**held, "payload": TopSoftmax(**payload) if isinstance(payload, dict) else payload})


@dataclass(frozen=True)
class Array:
    """One of the arrays: NumPy's code of its element type, and the shape of a row."""

    dtype: str
    row: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What one call added: a source, and the rows it fills.

    Attributes:
        first: the number of its first block.
        n_classes: classes of the references up to its end.
    """

    source: dict[str, Any]
    start: int
    rows: int
    first: int
    n_classes: int

    @property
    def stop(self) -> int:
        """The row after its last."""
        return self.start + self.rows

    def blocks(self, block_rows: int) -> list[Block]:
        """Its blocks: whole ones, and a shorter last one."""
        starts = range(self.start, self.stop, block_rows)
        return [Block(self.first + i, at, min(block_rows, self.stop - at)) for i, at in enumerate(starts)]


@dataclass(frozen=True)
class Description:
    """What `database.json` says.

    Attributes:
        layers: names of the layers, in the order of the arrays.
        arrays: every array, by the name of its file.
        payload: what is to be said of a payload that is not stored whole (see `TopPayload.settings`), or None.
        options: what the caller wants to be the same when the building goes on, as JSON.
    """

    layers: tuple[str, ...]
    arrays: dict[str, Array]
    settings: Settings
    payload: dict[str, Any] | None
    model_fingerprint: str
    preprocessing: dict[str, Any]
    options: dict[str, Any]
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """The rows of all parts, done or not."""
        return self.parts[-1].stop

    def blocks(self, parts: Sequence[Part] | None = None) -> list[Block]:
        """The blocks of some parts, of all by default."""
        chosen = self.parts if parts is None else parts
        return list(chain.from_iterable(part.blocks(self.settings.block_rows) for part in chosen))

    def meta(self) -> dict[str, Any]:
        """What is compared with an extractor, in the terms of a saved reference set."""
        return {
            "layers": list(self.layers),
            "model_fingerprint": self.model_fingerprint,
            "preprocessing": self.preprocessing,
        }

    def write(self, folder: Path) -> None:
        """Write `database.json`."""
        content = {
            "format": store.FORMAT,
            "kind": KIND,
            "schema": SCHEMA,
            "version": __version__,
            **self.meta(),
            "arrays": {name: {"dtype": a.dtype, "row": list(a.row)} for name, a in self.arrays.items()},
            "settings": self.settings.to_json(),
            "payload": self.payload,
            "options": self.options,
            "parts": [vars(part) for part in self.parts],
            "rows": self.rows,
        }
        store.write_sealed(folder / DESCRIPTION, content)

    @classmethod
    def read(cls, folder: Path) -> Description:
        """The description of the database in a folder.

        Raises:
            IntegrityError: there is none, it is altered, or of another version.
        """
        held = store.read_sealed(folder / DESCRIPTION)
        if (held.get("format"), held.get("kind"), held.get("schema")) != (store.FORMAT, KIND, SCHEMA):
            raise IntegrityError(f"{str(folder)!r} is no database that this version reads; check the path.")
        try:
            return cls(
                tuple(held["layers"]),
                {name: Array(a["dtype"], tuple(a["row"])) for name, a in held["arrays"].items()},
                Settings.from_json(held["settings"]),
                held["payload"],
                held["model_fingerprint"],
                held["preprocessing"],
                held["options"],
                tuple(Part(**part) for part in held["parts"]),
            )
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise IntegrityError(f"{str(folder)!r} has a description without contents; build it again.") from error

    def with_part(self, source: dict[str, Any], n_classes: int) -> Description:
        """The same with a further part at the end."""
        part = Part(source, self.rows, source["rows"], len(self.blocks()), max(n_classes, self.parts[-1].n_classes))
        return replace(self, parts=(*self.parts, part))


def is_database(path: str | Path) -> bool:
    """Whether a folder holds a database, whole or not."""
    return (Path(path) / DESCRIPTION).is_file()


# -------------------------------------------------------------------------------------------- ledger


def ledger_file(folder: Path, block: Block) -> Path:
    """Where a block is noted as done."""
    return folder / BLOCKS / f"{block.number:08d}.json"


def note(folder: Path, block: Block, hashes: Mapping[str, str]) -> None:
    """Write that a block is done: `hashes` are the sha256 of its bytes in every array."""
    store.write_sealed(ledger_file(folder, block), {**vars(block), "arrays": dict(hashes)})


def noted(folder: Path, block: Block) -> dict[str, str] | None:
    """The hashes of a block that is done; None for one that is not, or whose ledger file is damaged."""
    try:
        held = store.read_sealed(ledger_file(folder, block))
    except IntegrityError:
        return None
    right = all(held.get(key) == value for key, value in vars(block).items()) and isinstance(held.get("arrays"), dict)
    return held["arrays"] if right else None


def notes(folder: Path, blocks: Sequence[Block]) -> Iterator[tuple[Block, dict[str, str] | None]]:
    """Every block with its hashes, None for one that is not done."""
    for block in blocks:
        yield block, noted(folder, block)
