"""What is kept beside references as class probabilities: checks, arg max, and the M largest of many classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from robustknn.checks import check_choice, check_positive_int
from robustknn.errors import InputError

TAILS = ("spread", "drop")
TOLERANCE = 2e-3
"""By how much a row of probabilities may miss the sum of one: that of a thousand numbers in half precision."""
_ROWS = 16384


@dataclass(frozen=True)
class TopPayload:
    """The M largest class probabilities of each of n references in half precision, and a rule for the others.

    What M numbers leave of the sum of one is, by `tail`: "spread" evenly over the other C − M classes; or "drop", the
    M are scaled to sum to one. With M = C all are kept and the rule has nothing to do.

    Attributes:
        values: (n, M) float16, descending.
        classes: (n, M) int16 (int32 above 32,767 classes), whose they are; of equal ones the smaller number first.
        n_classes: C.
        tail: the rule.
    """

    values: Tensor
    classes: Tensor
    n_classes: int
    tail: str = "spread"

    @classmethod
    def encode(cls, probabilities: Tensor, top: int = 20, tail: str = "spread") -> TopPayload:
        """Keep the `top` largest (all of fewer classes) of probabilities (n, C).

        Raises:
            InputError: not (n, C), M below one, an unknown rule.
        """
        check_positive_int(top, "top")
        check_choice(tail, TAILS, "tail")
        if probabilities.ndim != 2:
            raise InputError(f"class probabilities have shape (n, C), not {tuple(probabilities.shape)}.")
        n_classes = probabilities.shape[1]
        ordered = probabilities.detach().sort(dim=1, descending=True, stable=True)
        kind = torch.int16 if n_classes <= torch.iinfo(torch.int16).max else torch.int32
        kept = ordered.values[:, :top].to(torch.float16)
        return cls(kept.contiguous(), ordered.indices[:, :top].to(kind).contiguous(), n_classes, tail)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, C)."""
        return len(self.values), self.n_classes

    def rows(self, ids: Tensor) -> Tensor:
        """The probabilities of references of any shape, (*ids.shape, C) float32; those of reference 0 for −1."""
        flat = ids.clamp_min(0).reshape(-1).to(self.values.device)
        values, classes = self.values[flat].float(), self.classes[flat].long()
        total = values.sum(1, keepdim=True)
        others = self.n_classes - values.shape[1]
        if self.tail == "spread" and others:
            # Half precision may round the kept ones up to a sum above one.
            rest = (1 - total).clamp_min(0)
            dense = (rest / others).expand(-1, self.n_classes).contiguous()
            total = total + rest
        else:
            dense = values.new_zeros(len(flat), self.n_classes)
        dense = dense.scatter_(1, classes, values) / total.clamp_min(torch.finfo(torch.float32).tiny)
        return dense.view(*ids.shape, self.n_classes)

    def to(self, device: torch.device | str) -> TopPayload:
        """A copy on a device."""
        return replace(self, values=self.values.to(device), classes=self.classes.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored, by name."""
        return {"payload-values": self.values, "payload-classes": self.classes}

    def settings(self) -> dict[str, Any]:
        """The rest, as JSON."""
        return {"n_classes": self.n_classes, "tail": self.tail}


@dataclass(frozen=True)
class TopSoftmax:
    """The M largest of a network's softmax vector: what `ReferenceSet.build(payload=TopSoftmax(20))` keeps.

    Args:
        top: M.
        tail: see `TopPayload`.
    """

    top: int = 20
    tail: str = "spread"

    def __post_init__(self) -> None:
        check_positive_int(self.top, "top")
        check_choice(self.tail, TAILS, "tail")

    def __call__(self, output: Any) -> TopPayload:
        return TopPayload.encode(softmax(output), self.top, self.tail)


def softmax(output: Any) -> Tensor:
    """The softmax of a model's class scores (N, C); InputError when it returns something else."""
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise InputError("payload='softmax' needs a model that returns class scores (N, C); pass a callable instead.")
    return nn.functional.softmax(output, dim=1)


def _chunks(payload: Tensor | TopPayload) -> Iterator[tuple[int, Tensor]]:
    """(first id, rows) of the whole payload, a piece at a time."""
    for start in range(0, len(payload), _ROWS):
        if isinstance(payload, TopPayload):
            yield start, payload.rows(torch.arange(start, min(start + _ROWS, len(payload))))
        else:
            yield start, payload[start : start + _ROWS]


def check_probabilities(payload: Tensor | TopPayload | None) -> int:
    """C of a payload of class probabilities (n, C).

    Raises:
        InputError: there is none, or a row is negative, not finite, or does not sum to one.
    """
    if payload is None:
        raise InputError(
            "the references carry no class probabilities; build them with payload='softmax' (or TopSoftmax(20))."
        )
    if isinstance(payload, Tensor) and (payload.ndim != 2 or not payload.is_floating_point()):
        raise InputError(
            f"the payload has shape {tuple(payload.shape)} and dtype {payload.dtype}; class probabilities are "
            "floating point (n, C)."
        )
    for start, held in _chunks(payload):
        rows = held.to(torch.promote_types(held.dtype, torch.float32))
        # What is not a number is in no range.
        right = (rows >= 0).all(1) & ((rows.sum(1) - 1).abs() <= TOLERANCE)
        if not bool(right.all()):
            bad = start + int((~right).nonzero()[0])
            raise InputError(
                f"the payload of reference {bad} is no probability vector (a negative or non-finite number, or a sum "
                "other than one); keep softmax vectors, not logits."
            )
    return int(payload.shape[1])


def likeliest(payload: Tensor | TopPayload) -> Tensor:
    """The class of the largest probability of every reference, (n,) int64; of equal ones the smallest number."""
    found = [(rows >= rows.amax(1, keepdim=True)).to(torch.uint8).argmax(1) for _, rows in _chunks(payload)]
    return torch.cat(found)


def labels_of(payload: Tensor | TopPayload | None, n_classes: int | None) -> tuple[Tensor, int]:
    """Labels (n,) and number of classes of references that came without labels.

    Raises:
        InputError: no class probabilities, or another number of classes than `n_classes`.
    """
    if payload is None:
        raise InputError("references without labels need class probabilities; build them with payload='softmax'.")
    width = check_probabilities(payload)
    if n_classes not in (None, width):
        raise InputError(f"n_classes = {n_classes}, but the payload has {width} classes; leave it out.")
    return likeliest(payload).cpu(), width


def tensors_of(payload: Tensor | TopPayload | None) -> dict[str, Tensor]:
    """What of a payload is stored and hashed, by name."""
    if isinstance(payload, TopPayload):
        return payload.tensors()
    return {} if payload is None else {"payload": payload}


def settings_of(payload: Tensor | TopPayload | None) -> dict[str, Any]:
    """What is to be said of a payload that is not stored whole."""
    return {"payload": payload.settings()} if isinstance(payload, TopPayload) else {}
