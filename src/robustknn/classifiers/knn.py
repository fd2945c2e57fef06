"""k nearest neighbors on one layer of a network, or on raw inputs."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from robustknn import registry
from robustknn.checks import check_positive_int
from robustknn.classifiers.estimator import NeighborEstimator
from robustknn.errors import InputError
from robustknn.features import FeatureExtractor
from robustknn.neighbors import NeighborIndex
from robustknn.reference import ReferenceSet


@registry.classifiers.register("knn")
class KNN(NeighborEstimator):
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

    def voter_layers(self, references: ReferenceSet) -> list[str]:
        if self.layer is not None:
            return [references.layer(self.layer)]
        if len(references.layers) > 1:
            raise InputError(
                f"the references hold {len(references.layers)} layers ({', '.join(references.layers)}); "
                "choose one with layer=, or use DkNN for several."
            )
        return list(references.layers)

    def kneighbors(self, X: Any, n_neighbors: int | None = None, return_distance: bool = True) -> Any:
        """The nearest references of each input.

        Args:
            X: (N, …) inputs.
            n_neighbors: how many; the classifier's k by default.

        Returns:
            (distances (N, k), ids (N, k)), or the ids alone.
        """
        x, plain = self._input(X)
        k = check_positive_int(self.n_neighbors if n_neighbors is None else n_neighbors, "n_neighbors")
        found = self._search(x, self.voters[0], k)
        pair = (found.distances, found.ids)
        if plain:
            pair = tuple(t.cpu().numpy() for t in pair)  # type: ignore[assignment]
        return pair if return_distance else pair[1]
