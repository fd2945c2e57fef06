"""What features of a database are fitted on: samples spread over the whole source and read alone."""

from __future__ import annotations

import torch
from torch import Tensor

from robustknn import rng
from robustknn.batching import Samples
from robustknn.checks import check_positive_int
from robustknn.features import FeatureExtractor
from robustknn.fitting import with_projection
from robustknn.progress import Progress


def fit_projection(
    features: FeatureExtractor,
    source: Samples,
    n_components: int,
    *,
    whiten: bool = False,
    sample: int = 10_000,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> FeatureExtractor:
    """The extractor whose layers go through PCA, fitted on one sample of each of so many equal stretches of a source.

    Args:
        n_components: of every layer.
        whiten: scale the components to unit variance.
        sample: how many samples are read; all where there are fewer.

    Raises:
        InputError: fewer samples than components (see `Projection.fit`).
    """
    few = spread(source, sample, seed)
    return with_projection(
        features, few, n_components, whiten=whiten, sample=len(few), batch_size=batch_size, progress=progress
    )


def spread(source: Samples, sample: int = 10_000, seed: int = 0) -> Samples:
    """One sample of each of so many equal stretches of a source, without labels; all where there are fewer."""
    n = len(source)
    return _Few(source, rng.one_a_stretch(n, min(n, check_positive_int(sample, "sample")), seed, "sample of features"))


class _Few:
    """The samples at some places, whose labels are not looked at."""

    def __init__(self, source: Samples, places: Tensor) -> None:
        self._source, self._places = source, places
        self.labels = torch.zeros_like(places)

    def __len__(self) -> int:
        return len(self._places)

    def batch(self, positions: Tensor) -> Tensor:
        return self._source.batch(self._places[positions])
