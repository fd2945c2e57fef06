"""A voter: one layer's features, a labelled reference set, an index, k and a metric."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustknn import registry
from robustknn.classifiers.rules import Votes
from robustknn.errors import InputError
from robustknn.neighbors import ExactIndex, NeighborIndex, Neighbors
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
    def make(cls, references: ReferenceSet, layer: str, n_neighbors: int, metric: str, index: str = "exact") -> Voter:
        """A voter over a layer of a reference set.

        Args:
            metric: "l2", "cosine" or "ip".
            index: the name of a registered engine. The exact engine searches the set's own storage.

        Raises:
            InputError: unknown layer, metric or engine; k < 1 or above the number of references.
        """
        layer = references.layer(layer)
        if n_neighbors > len(references):
            raise InputError(
                f"n_neighbors = {n_neighbors} exceeds the {len(references)} references; lower it or add references."
            )
        engine = registry.indexes.create(index, metric=metric)
        if isinstance(engine, ExactIndex):
            vectors, lengths = references.vectors(layer, engine.metric.unit)
            engine.adopt(vectors, lengths, references.labels, references.stored_payload)
        else:
            engine.build(references.vectors(layer)[0], references.labels, references.stored_payload)
        return cls(layer, references, engine, n_neighbors)

    @property
    def metric(self) -> str:
        """The name of the metric."""
        return self.index.metric.name

    def labels_of(self, ids: Tensor) -> Tensor:
        """Labels of references of any shape; 0 for a missing one, whose weight must be 0."""
        labels = self.references.labels
        return labels[ids.clamp_min(0).to(labels.device)].to(ids.device)

    def votes(self, neighbors: Neighbors) -> Votes:
        """The hard votes of the k nearest: weight 1 each, 0 for a missing neighbor."""
        near = neighbors.first(self.n_neighbors)
        payload = None
        if self.references.stored_payload is not None:
            payload = self.index.payload(near.ids)
        weights = (near.ids >= 0).to(torch.float64)
        return Votes(weights, near.distances.double(), self.labels_of(near.ids), self.n_neighbors, payload)
