"""From samples to the rows of a block: a pure function of extractor, source, block and settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from robustknn.batching import Samples
from robustknn.checks import check_finite, check_inputs
from robustknn.database.layout import Block, Settings
from robustknn.errors import InputError
from robustknn.features import FeatureExtractor
from robustknn.neighbors.exact import normalize_
from robustknn.payload import TopPayload, likeliest, softmax, tensors_of

Rows = dict[str, Tensor]
"""What a block holds, by the name of the array: (rows, …) each, on the CPU."""
Executor = Callable[[FeatureExtractor, Samples, Sequence[Block], Settings, int], Iterator[tuple[Block, Rows]]]
"""Makes blocks, in any order: (features, source, todo, settings, offset) → (block, rows).

Row `offset` of the database is position 0 of the source. Every executor calls `extract_block`, or `extract` on the
inputs of `pieces`: so a block has the same bytes whoever makes it.
"""


def pieces(block: Block, settings: Settings, offset: int = 0) -> list[Tensor]:
    """The positions in the source of the batches that a block is made of, in order."""
    start = block.start - offset
    return list(torch.arange(start, start + block.rows).split(settings.batch_size))


def extract_block(
    features: FeatureExtractor, source: Samples, block: Block, settings: Settings, offset: int = 0
) -> Rows:
    """Run the network over the samples of a block.

    Args:
        features: the extractor; it runs where its model is.
        source: has `batch(positions)`, and `labels` unless the settings take those of the payload.
        offset: the row of the database that position 0 of the source fills.

    Returns:
        {"vectors-0": (rows, D) a layer, "lengths-0": (rows,) where vectors are stored at unit length,
        "labels": (rows,) int64, "payload" or "payload-values" and "payload-classes": (rows, M)}, on the CPU.

    Raises:
        InputError: samples or features that are not finite, or not of one shape; vectors beyond half precision.
        IntegrityError: a sample cannot be read.
    """
    positions = pieces(block, settings, offset)
    inputs = (source.batch(p) for p in positions)
    return extract(features, inputs, labels_of(source, positions, settings), settings, block)


def labels_of(source: Samples, positions: list[Tensor], settings: Settings) -> Tensor | None:
    """The labels that come with the samples at these positions, None where they are not wanted."""
    return None if settings.labels == "payload" else source.labels[torch.cat(positions)]


@torch.inference_mode(False)
@torch.no_grad()
def extract(
    features: FeatureExtractor, inputs: Iterable[Tensor], labels: Tensor | None, settings: Settings, block: Block
) -> Rows:
    """The rows of a block from its batches of inputs, in order; labels (rows,), None where they are the payload's."""
    found: dict[str, list[Tensor]] = {}
    what = f"block {block.number} (rows {block.start} to {block.start + block.rows - 1})"
    for given in inputs:
        x = check_inputs(given, what=what)
        vectors, output = features.with_output(features.place(x))
        rows: Rows = {}
        for place, layer in enumerate(features.layers):
            rows |= _stored(vectors[layer].cpu(), place, settings, f"layer {layer!r} of {what}")
        payload = payload_of(output, settings)
        rows |= {name: value.cpu() for name, value in tensors_of(payload).items()}
        if labels is None and payload is not None:
            rows["labels"] = likeliest(payload).cpu()
        for name, value in rows.items():
            found.setdefault(name, []).append(value)
    made = {name: _joined(parts, f"{name} of {what}") for name, parts in found.items()}
    return made if labels is None else {**made, "labels": labels.to("cpu", torch.int64)}


def payload_of(output: object, settings: Settings) -> Tensor | TopPayload | None:
    """What the settings keep of a network's output."""
    if settings.payload is None:
        return None
    return softmax(output).float() if isinstance(settings.payload, str) else settings.payload(output)


def _stored(value: Tensor, place: int, settings: Settings, what: str) -> Rows:
    """A layer's vectors as they are stored, and their lengths where they get unit length."""
    check_finite(value, what)
    vectors = value.float().clone(memory_format=torch.contiguous_format)  # the network may have given its output itself
    lengths = {f"lengths-{place}": normalize_(vectors)} if settings.unit else {}
    if settings.dtype == "float16":
        vectors = vectors.half()
        if not bool(torch.isfinite(vectors).all()):
            raise InputError(f"{what} has numbers beyond half precision; store it as float32, or at unit length.")
    return {f"vectors-{place}": vectors, **lengths}


def _joined(parts: list[Tensor], what: str) -> Tensor:
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) > 1:
        raise InputError(f"{what} has shapes {shapes[0]} and {shapes[1]} a sample; give all samples one size.")
    return torch.cat(parts)
