"""Transforms of features that are learned from a sample: PCA, R-MAC with whitened regions, bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustknn import rng
from robustknn.batching import batches, count
from robustknn.checks import check_inputs, check_positive_int
from robustknn.errors import InputError
from robustknn.features import FeatureExtractor
from robustknn.progress import Progress, Silent
from robustknn.transforms import Projection, RegionalMax, Signs, Transform, regional_maxima


@torch.no_grad()
def sample_features(
    features: FeatureExtractor,
    data: Any,
    sample: int = 10_000,
    *,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Features of a random choice of the data, {layer: (n, D)}: n = `sample`, or all where there are fewer.

    Args:
        data: anything that `ReferenceSet.build` takes, with labels (which are not looked at) or without.
    """
    n = count(data)
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[rng.permutation(n, seed, "sample of features")[: check_positive_int(sample, "sample")]] = True
    found: dict[str, list[Tensor]] = {layer: [] for layer in features.layers}
    start, progress = 0, progress or Silent()
    progress.start("sampling features", n)
    try:
        for x, _ in batches(data, check_positive_int(batch_size, "batch_size"), labelled=False):
            wanted = x[chosen[start : start + len(x)].to(x.device)]
            start += len(x)
            if len(wanted):
                for layer, value in features(features.place(check_inputs(wanted, what="the sample"))).items():
                    found[layer].append(value)
            progress.advance(len(x))
    finally:
        progress.stop()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def with_projection(
    features: FeatureExtractor, data: Any, n_components: int, *, whiten: bool = False, **sampling: Any
) -> FeatureExtractor:
    """The extractor whose layers go through PCA, fitted on a sample of the data; after transforms they have already.

    Args:
        n_components: of every layer.
        whiten: scale the components to unit variance.
        sampling: see `sample_features`.

    Raises:
        InputError: fewer samples than components (see `Projection.fit`).
    """
    bare = _unnormalized(features)
    found = sample_features(bare, data, **sampling)
    return _extended(features, {k: Projection.fit(v, n_components, whiten=whiten) for k, v in found.items()})


def with_signs(features: FeatureExtractor, data: Any, **sampling: Any) -> FeatureExtractor:
    """The extractor whose layers give one bit a number, centered on the mean of a sample of the data."""
    found = sample_features(_unnormalized(features), data, **sampling)
    return _extended(features, {k: Signs.fit(v) for k, v in found.items()})


def with_rmac(
    features: FeatureExtractor,
    data: Any = None,
    *,
    levels: int = 3,
    whiten: int | None = None,
    **sampling: Any,
) -> FeatureExtractor:
    """The extractor whose convolutional layers are pooled by R-MAC.

    Args:
        features: reads the maps themselves (pool="flatten", no transform).
        data: where the whitening of regions is learned; needless without.
        levels: the scales of regions.
        whiten: to how many whitened components the vectors of regions are reduced; None leaves them as they are.

    Raises:
        InputError: layers that are pooled or transformed already, no convolution, whitening without data.
    """
    if set(features.pool.values()) != {"flatten"} or features.transform:
        raise InputError("R-MAC pools the maps of a convolution; pass an extractor with pool='flatten' and no more.")
    made: dict[str, Transform] = {layer: RegionalMax(levels) for layer in features.layers}
    if whiten is not None:
        if data is None:
            raise InputError("whitening is learned from data; pass it.")
        seen: dict[str, Transform] = {layer: _Regions(levels) for layer in features.layers}
        found = sample_features(FeatureExtractor(features.model, features.layers, transform=seen), data, **sampling)
        for layer, rows in found.items():
            regions = seen[layer]
            assert isinstance(regions, _Regions)
            projection = Projection.fit(rows.view(-1, regions.channels), whiten, whiten=True)
            made[layer] = RegionalMax(levels, projection)
    return features.transformed(made)


class _Regions(RegionalMax):
    """The maxima of all regions side by side, and of how many numbers each consists."""

    kind = "regions"
    channels = 0

    def __call__(self, value: Tensor) -> Tensor:
        maxima = regional_maxima(value, self.levels)
        object.__setattr__(self, "channels", maxima.shape[2])
        return maxima


def _unnormalized(features: FeatureExtractor) -> FeatureExtractor:
    """The same before normalising and centering, which come after transforms."""
    return FeatureExtractor(features.model, features.layers, pool=features.pool, transform=features.transform)


def _extended(features: FeatureExtractor, more: dict[str, Any]) -> FeatureExtractor:
    """The extractor with further transforms after those it has."""
    held = features.transform
    return features.transformed({k: held[k].then(v) if k in held else v for k, v in more.items()})
