"""k nearest neighbors on one layer of a network, or on raw inputs."""

from __future__ import annotations

from types import MappingProxyType

from robustknn import registry
from robustknn.classifiers.one_layer import OneLayer
from robustknn.features import FeatureExtractor
from robustknn.neighbors import NeighborIndex
from robustknn.reference import ReferenceSet


@registry.classifiers.register("knn")
class KNN(OneLayer):
    """The majority label of the k nearest references in the feature space of one layer.

    Args:
        references: the labelled references; or None, and `fit(X, y)` makes them.
        n_neighbors: k.
        metric: "l2", "cosine" or "ip" (inner product).
        layer: which of the references' layers; may be left out when there is one.
        features: the extractor for `fit`; None compares raw inputs, flattened.
        index: the search engine, by name (`robustknn list indexes`), or an index of one's own over the references.
        batch_size: samples a forward pass in `predict` and its kin.

    Raises:
        InputError: k < 1 or above the number of references, unknown metric, layer or engine.
    """

    registered = "knn"
    # AdvKNN (arXiv 1911.06591), section 4: steps of 0.01 at eps 0.25, on the network.
    published_attack = MappingProxyType({"name": "bim-transfer", "steps": 100, "step": 0.04})

    def __init__(
        self,
        references: ReferenceSet | None = None,
        n_neighbors: int = 5,
        *,
        metric: str = "l2",
        layer: str | None = None,
        features: FeatureExtractor | None = None,
        index: str | NeighborIndex = "exact",
        batch_size: int = 256,
    ) -> None:
        self.references = references
        self.n_neighbors = n_neighbors
        self.metric = metric
        self.layer = layer
        self.features = features
        self.index = index
        self.batch_size = batch_size
        super().__init__()
