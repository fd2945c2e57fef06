"""Classifiers whose neighbors are found in one layer of a network, or among raw inputs."""

from __future__ import annotations

from typing import Any

from robustknn.checks import check_positive_int
from robustknn.classifiers.estimator import NeighborEstimator
from robustknn.errors import InputError
from robustknn.reference import ReferenceSet


class OneLayer(NeighborEstimator):
    """Base of classifiers with one voter. Subclasses have a parameter `layer`, which may be left out when there is one.

    Raises:
        InputError: several layers and none chosen.
    """

    layer: str | None

    def voter_layers(self, references: ReferenceSet) -> list[str]:
        if self.layer is not None:
            return [references.layer(self.layer)]
        if len(references.layers) > 1:
            raise InputError(
                f"the references hold {len(references.layers)} layers ({', '.join(references.layers)}); "
                "choose one (layer=, --layer), or use DkNN for several."
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
