"""What a Milvus collection says of itself, and how what is kept beside vectors is laid out in it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from robustknn import store
from robustknn.checks import check_finite
from robustknn.errors import InputError, IntegrityError

METRICS = {"l2": "L2", "ip": "IP", "cosine": "COSINE"}
_LONGEST_ARRAY = 4096  # what an ARRAY field may hold

# How numbers that are no vectors are kept in an ARRAY field.
ARRAYS = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), "FLOAT"),
    torch.float64: "DOUBLE",
    **dict.fromkeys((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64), "INT64"),
}


@dataclass(frozen=True)
class Record:
    """What a collection that was built here holds, as it says itself in one of its properties.

    Attributes:
        content: a sha256 of vectors, labels and payload.
        params: of the index.
        labels: whether it has a field of labels.
        payload: (dtype, shape of a row), or None.
    """

    metric: str
    dim: int
    rows: int
    content: str
    index_type: str
    params: dict[str, int]
    labels: bool
    payload: tuple[str, list[int]] | None

    @property
    def width(self) -> int:
        """How many numbers the payload of a reference has."""
        return 0 if self.payload is None else torch.Size(self.payload[1]).numel()

    def name(self) -> str:
        """A name for a collection of this."""
        return f"robustknn_{hashlib.sha256(self.text().encode()).hexdigest()[:16]}"

    def text(self) -> str:
        """This as JSON."""
        return json.dumps({"schema": 1, **asdict(self)}, sort_keys=True)

    @classmethod
    def parse(cls, text: str, name: str) -> Record:
        """What `text` made."""
        try:
            held = json.loads(text)
            if held.pop("schema") != 1:
                raise ValueError
            held["payload"] = held["payload"] and tuple(held["payload"])
            return cls(**held)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise IntegrityError(
                f"the record of collection {name!r} is not one that this version writes; build it again elsewhere."
            ) from error


@dataclass(frozen=True)
class Fields:
    """The names of a collection's fields; None for one that is not to be used."""

    id: str = "id"
    vector: str = "vector"
    label: str | None = "label"
    payload: str | None = "payload"


def content_of(vectors: Tensor, labels: Tensor | None, payload: Tensor | None) -> str:
    """A sha256 of what is indexed; InputError for vectors that Milvus cannot hold."""
    if vectors.dtype == torch.float64:
        raise InputError(
            "Milvus holds float32 and these references are float64; pass vectors.float(), or use index='exact'."
        )
    check_finite(vectors, "the references")
    parts = {"vectors": vectors, "labels": labels, "payload": payload}
    return store.fingerprint_tensors({name: tensor for name, tensor in parts.items() if tensor is not None})


def check_payload(payload: Tensor | None) -> tuple[str, list[int]] | None:
    """(dtype, shape of a row) of a payload that an ARRAY field can hold; InputError for another."""
    if payload is None:
        return None
    if not isinstance(payload, Tensor):
        raise InputError(f"the payload kept in Milvus is a tensor (n, M), not {type(payload).__name__}; leave it out.")
    shape, dtype = payload.shape[1:], str(payload.dtype).removeprefix("torch.")
    if payload.dtype not in ARRAYS or not 1 <= shape.numel() <= _LONGEST_ARRAY:
        raise InputError(
            f"Milvus keeps 1 to {_LONGEST_ARRAY} real numbers beside a reference, not {list(shape)} of {dtype}; keep "
            "the largest probabilities only, or no payload."
        )
    return dtype, list(shape)
