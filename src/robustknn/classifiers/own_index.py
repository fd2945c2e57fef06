"""From an encoder, a faiss index and labels to a classifier: without images, and without copying the vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustknn.checks import as_tensor
from robustknn.classifiers.knn import KNN
from robustknn.errors import InputError
from robustknn.features import FeatureExtractor
from robustknn.neighbors import FaissIndex
from robustknn.reference import ReferenceSet


def knn_from_index(
    encoder: nn.Module | FeatureExtractor,
    index: Any,
    labels: Any,
    n_neighbors: int = 5,
    *,
    metric: str | None = None,
    vectors: Any = None,
) -> KNN:
    """The classifier that an encoder and a faiss index make: the majority label of the k nearest vectors.

    It searches with the index as it is. A flat index is exact and its vectors are used where they lie, nothing is
    copied. Another kind decides by what it finds; attacks on it want `allow_approximate=True`, and the vectors
    themselves: those given, or what the index gives back (an IVF or HNSW index of flat vectors does), which is a copy.

    Args:
        encoder: maps a batch of inputs (N, …) to the vectors that were indexed (N, D), or an extractor of one layer.
        index: a filled faiss.Index whose ids are the rows of labels and vectors.
        labels: (n,) class numbers of the indexed vectors.
        n_neighbors: k.
        metric: "l2", "ip" or "cosine" (an inner-product index over vectors of unit length; the encoder's output need
            not have it). None takes what the index searches by.
        vectors: (n, D) what was indexed, for an index that is not flat: a tensor or an array, which may be mapped from
            a file; it is used as it is if it can be written to (`np.load(…, mmap_mode="c")`), else copied.

    Raises:
        InputError: what does not fit together, by name.
        MissingExtraError: faiss is not installed.
    """
    features = encoder if isinstance(encoder, FeatureExtractor) else FeatureExtractor(encoder)
    given = None if vectors is None else as_tensor(vectors, "vectors")
    wrapped = FaissIndex.wrap(index, metric)
    if wrapped.exact:
        if given is not None:
            raise InputError("a flat faiss index holds its vectors; leave vectors= out.")
        given = torch.from_numpy(np.asarray(_Rows(index)))
    elif given is None:
        given = _given_back(wrapped)
    references = ReferenceSet.from_vectors(given, labels, features=features)
    return KNN(references, n_neighbors, metric=wrapped.metric.name, index=wrapped)


def _given_back(index: FaissIndex) -> Tensor:
    """All vectors of an index that is not flat."""
    if not index.reconstructs:
        raise InputError("this faiss index does not give its vectors back; pass what was indexed as vectors=.")
    return index.reconstruct(torch.arange(len(index)))


class _Rows:
    """The vectors of a flat faiss index where they lie; an array made of this keeps the index alive."""

    def __init__(self, index: Any) -> None:
        self.index = index
        data = (int(index.get_xb()), False)
        self.__array_interface__ = {"version": 3, "typestr": "<f4", "shape": (index.ntotal, index.d), "data": data}
