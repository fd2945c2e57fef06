"""faiss itself: the guarded import, its process-wide settings, and what its indexes can and cannot do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustknn.errors import InputError, needs, reason
from robustknn.neighbors.base import Metric

_BLAS_THRESHOLD = "distance_compute_blas_threshold"
# From so many queries on a matrix product is faster than going through the references query by query.
_BLAS_QUERIES = 6


def load_faiss() -> Any:
    """The faiss module; MissingExtraError where it cannot be imported."""
    with needs("faiss-cpu", "faiss"):
        import faiss
    return faiss


@contextmanager
def settings(faiss: Any, queries: int, most_threads: int | None = None) -> Iterator[None]:
    """faiss's process-wide settings as a search of so many queries needs them, for this block only."""
    threads, threshold = faiss.omp_get_max_threads(), getattr(faiss.cvar, _BLAS_THRESHOLD)
    try:
        faiss.omp_set_num_threads(min(torch.get_num_threads(), most_threads or torch.get_num_threads()))
        if threshold > 1000 and queries >= _BLAS_QUERIES:
            setattr(faiss.cvar, _BLAS_THRESHOLD, 1)
        yield
    finally:
        faiss.omp_set_num_threads(threads)
        setattr(faiss.cvar, _BLAS_THRESHOLD, threshold)


def as_float32(vectors: Tensor) -> Tensor:
    """Vectors as faiss takes them; a type that float32 cannot hold is refused rather than rounded."""
    if vectors.dtype == torch.float64:
        raise InputError(
            "faiss holds float32 and these references are float64; pass vectors.float(), or use index='exact'."
        )
    return vectors.detach().to("cpu", torch.float32).contiguous()


def new_flat(metric: Metric, dim: int) -> Any:
    """An empty flat faiss index."""
    return (load_faiss().IndexFlatL2 if metric.name == "l2" else load_faiss().IndexFlatIP)(dim)


def is_flat(faiss: Any, index: Any) -> bool:
    """Whether an index holds its vectors one after another, uncompressed; kinds derived from these do not."""
    return type(index) in (faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexFlatIP)


def gives_back(faiss: Any, index: Any) -> bool:
    """Whether an index that is not flat gives its vectors back unchanged."""
    kinds = ("IndexIVFFlat", "IndexHNSWFlat", "IndexNSGFlat")
    if type(index) not in [getattr(faiss, kind) for kind in kinds if hasattr(faiss, kind)]:
        return False
    try:
        index.reconstruct_batch(np.zeros(1, np.int64))
    except (RuntimeError, AttributeError):
        return False
    return True


def metric_of(faiss: Any, index: Any, metric: str | None) -> str:
    """The metric to search a user's index by; InputError where it is no faiss index or searches by another."""
    if not isinstance(index, faiss.Index):
        raise InputError(f"wrap() takes a faiss.Index, not {type(index).__name__}; binary indexes are not searched.")
    if not index.is_trained or not index.ntotal:
        raise InputError("the faiss index is empty or untrained; train it and add vectors before wrapping it.")
    own = {faiss.METRIC_L2: "l2", faiss.METRIC_INNER_PRODUCT: "ip"}.get(index.metric_type)
    if own is None:
        raise InputError("the faiss index searches neither by L2 nor by inner product; no other metric is known here.")
    wanted = metric or own
    if own != {"cosine": "ip"}.get(wanted, wanted):
        known = "'l2'" if own == "l2" else "'ip', or 'cosine' if its vectors have unit length"
        raise InputError(f"the faiss index cannot be searched by metric {wanted!r}; pass metric={known}.")
    return wanted


def refuse_lists_elsewhere(faiss: Any, index: Any) -> None:
    """InputError for an index whose lists are on disk: what it would write is not the whole of it."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None and isinstance(faiss.downcast_InvertedLists(ivf.invlists), faiss.OnDiskInvertedLists):
        raise InputError("the lists of this faiss index lie in a file of their own; keep its files instead of save().")


def reason_of(error: BaseException) -> str:
    """What faiss says went wrong, without the places in its source that it says it at."""
    return reason(RuntimeError(re.split(r"at \S+:\d+: ", str(error))[-1]))
