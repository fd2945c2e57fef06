"""A voter: one layer's features, a labelled reference set, an index, k and a metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustknn.classifiers.rules import Votes
from robustknn.errors import InputError
from robustknn.neighbors import ExactIndex, NeighborIndex, Neighbors, make_index
from robustknn.payload import TopPayload
from robustknn.reference import ReferenceSet


@dataclass(frozen=True, eq=False)
class Voter:
    """The k nearest references of one layer's feature vote with their labels.

    Attributes:
        layer: the layer whose features are compared.
        references: the labelled references.
        index: the engine that finds them.
        n_neighbors: k.
    """

    layer: str
    references: ReferenceSet
    index: NeighborIndex
    n_neighbors: int

    @classmethod
    def make(
        cls,
        references: ReferenceSet,
        layer: str,
        n_neighbors: int,
        metric: str,
        index: str | NeighborIndex = "exact",
    ) -> Voter:
        """A voter over a layer of a reference set.

        Args:
            metric: "l2", "cosine" or "ip".
            index: a registered engine ("exact", "ivf-flat:nprobe=64") or the path of a saved index, as `make_index`
                takes them, or an index of one's own over these references, in their order. The exact engine searches
                the set's own storage.

        Raises:
            InputError: unknown layer, metric or engine; k < 1 or above the number of references; an index of
                something else than these references, or by another metric.
        """
        layer, payload = references.layer(layer), references.stored_payload
        kept = payload if isinstance(payload, Tensor) else None  # what is encoded the voter reads itself
        if n_neighbors > len(references):
            raise InputError(
                f"n_neighbors = {n_neighbors} exceeds the {len(references)} references; lower it or add references."
            )
        if isinstance(index, str):
            index = make_index(index, metric)
            if not len(index):
                engine = index.resolved(len(references), references.dim(layer))
                # At unit length for cosine, whatever the engine: its exact twin searches the same storage.
                vectors, lengths = references.vectors(layer, engine.metric.unit)
                if isinstance(engine, ExactIndex):
                    engine.adopt(vectors, lengths, references.labels, kept)
                else:
                    engine.build(vectors, references.labels, kept)
                return cls(layer, references, engine, n_neighbors)
        _check_own(index, references, layer, metric)
        unit = index.metric.unit
        index.attach(lambda: references.vectors(layer, unit), references.labels, kept)
        return cls(layer, references, index, n_neighbors)

    @property
    def metric(self) -> str:
        """The name of the metric."""
        return self.index.metric.name

    def labels_of(self, ids: Tensor) -> Tensor:
        """Labels of references of any shape; 0 for a missing one, whose weight must be 0."""
        labels = self.references.labels
        return labels[ids.clamp_min(0).to(labels.device)].to(ids.device)

    def payload_of(self, ids: Tensor) -> Tensor | None:
        """The payload of references of any shape, (*ids.shape, M), that of id 0 for a missing one; None without any."""
        held = self.references.stored_payload
        if held is None:
            return None
        return held.rows(ids).to(ids.device) if isinstance(held, TopPayload) else self.index.payload(ids)

    def votes(self, neighbors: Neighbors) -> Votes:
        """The hard votes of the k nearest: weight 1 each, 0 for a missing neighbor."""
        near = neighbors.first(self.n_neighbors)
        weights = (near.ids >= 0).to(torch.float64)
        labels, payload = self.labels_of(near.ids), self.payload_of(near.ids)
        return Votes(weights, near.distances.double(), labels, self.n_neighbors, payload)


def _check_own(index: Any, references: ReferenceSet, layer: str, metric: str) -> None:
    """Refuse an index that does not search these references by this metric."""
    if not isinstance(index, NeighborIndex):
        raise InputError(
            f"index must be the name of an engine or a NeighborIndex, not {type(index).__name__}; wrap a faiss index "
            "with FaissIndex.wrap(index)."
        )
    if index.metric.name != metric:
        hint = f"pass metric={index.metric.name!r}"
        if (index.metric.name, metric) == ("ip", "cosine"):
            hint = "wrap it with FaissIndex.wrap(index, metric='cosine') if its vectors have unit length, else " + hint
        raise InputError(f"the index searches by {index.metric.name!r}, the classifier by {metric!r}; {hint}.")
    if (len(index), index.dim) != (len(references), references.dim(layer)):
        raise InputError(
            f"the index holds {len(index)} vectors of length {index.dim}, layer {layer!r} of the references "
            f"{len(references)} of length {references.dim(layer)}; build it over these references."
        )
    if index.reconstructs:
        some = torch.arange(0, len(index), max(1, len(index) // 16))
        held, expected = index.reconstruct(some).double(), references.rows(layer, some).double().cpu()
        if metric == "cosine":
            held, expected = nn.functional.normalize(held, dim=1), nn.functional.normalize(expected, dim=1)
        if not torch.allclose(held.cpu(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise InputError(
                f"the index holds other vectors than layer {layer!r} of the references; build it over these "
                "references, in their order."
            )
