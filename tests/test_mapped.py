"""Exact search of references on a disk: the same as in memory, without becoming memory of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from robustknn import KNN, ReferenceSet, store
from robustknn.errors import InputError
from robustknn.neighbors import ExactIndex
from robustknn.neighbors import exact as exact_module

METRICS = ("l2", "cosine", "ip")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mapped(path: Path, vectors: Tensor) -> Tensor:
    store.save_array(path, vectors)
    return store.load_array(path, mapped=True)


VECTORS = (draw(0, 1500, 14) + 1) * 10 ** (2 * torch.rand(1500, 1, generator=torch.Generator().manual_seed(1)) - 1)
VECTORS[7] = 0
LABELS = torch.arange(1500) % 6
QUERIES = draw(2, 25, 14)


def nearest(metric: str, vectors: Tensor, queries: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and distances of a float64 brute-force search over the vectors as they came."""
    r, q = vectors.double().numpy(), queries.double().numpy()
    if metric == "l2":
        keys = np.stack([np.sqrt(((row - r) ** 2).sum(1)) for row in q])
    elif metric == "ip":
        keys = -(q @ r.T)
    else:
        lengths = np.linalg.norm(r, axis=1) * np.linalg.norm(q, axis=1)[:, None]
        keys = 1 - np.where(lengths > 0, q @ r.T / np.where(lengths > 0, lengths, 1), 0)
    ids = np.argsort(keys, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(keys, ids, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
def test_the_same_as_brute_force(
    metric: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_module, "_LEAST_ROWS", 1)
    monkeypatch.setattr(exact_module, "_CHUNK_ROWS", 400)
    held = VECTORS.to(dtype)
    vectors = mapped(tmp_path / "v.npy", held)
    for index in (ExactIndex(metric).build(vectors, LABELS), ExactIndex(metric).adopt(vectors, None, LABELS)):
        assert index.vectors.data_ptr() == vectors.data_ptr()
        found = index.search(QUERIES, 30)
        ids, distances = nearest(metric, held, QUERIES, 30)
        assert np.array_equal(found.ids.numpy(), ids)
        np.testing.assert_allclose(found.distances.numpy(), distances, rtol=1e-6, atol=1e-6)
    by_class = index.search_classes(QUERIES, 3)
    for c in range(6):  # found by float32 scores
        want = nearest(metric, held[torch.eq(LABELS, c)], QUERIES, 3)[1]
        np.testing.assert_allclose(by_class.distances[:, c].double(), want, atol=5e-3)
    ids = torch.tensor([[3, -1], [1499, 0]])
    rows = held[ids.clamp_min(0)].masked_fill((ids < 0)[..., None], 0)
    assert torch.equal(index.reconstruct(ids), rows)
    np.testing.assert_allclose(
        index.reconstruct_unit(ids).double(), torch.nn.functional.normalize(rows.double(), dim=2), atol=1e-6
    )
    weights = torch.rand(2, 2, generator=torch.Generator().manual_seed(3))
    for unit in (False, True):
        used = torch.nn.functional.normalize(rows.double(), dim=2) if unit else rows.double()
        want_sum = (used * weights.double()[..., None]).sum(1)
        np.testing.assert_allclose(index.combine(ids, weights, unit).double(), want_sum, rtol=1e-4, atol=1e-5)
    assert np.array_equal(np.load(tmp_path / "v.npy"), held.numpy())


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1.0, 1e18, 1e36])
def test_cosine_of_vectors_of_any_length(scale: float) -> None:
    vectors = draw(0, 700, 9) * scale
    found = ExactIndex("cosine").adopt(vectors, None, None).search(draw(1, 12, 9), 40)
    ids, distances = nearest("cosine", vectors, draw(1, 12, 9), 40)
    assert np.array_equal(found.ids.numpy(), ids)
    np.testing.assert_allclose(found.distances.numpy(), distances, rtol=1e-6, atol=1e-6)


def test_directions_that_nearly_agree_are_told_apart() -> None:
    vectors = (1000 + draw(0, 3000, 20)) * (1 + torch.rand(3000, 1, generator=torch.Generator().manual_seed(1)))
    queries = 1000 + draw(2, 10, 20)
    found = ExactIndex("cosine").adopt(vectors, None, None).search(queries, 15)
    assert np.array_equal(found.ids.numpy(), nearest("cosine", vectors, queries, 15)[0])


def test_saved_and_added_to_as_it_came(tmp_path: Path) -> None:
    index = ExactIndex("cosine").build(mapped(tmp_path / "v.npy", VECTORS), LABELS)
    index.save(tmp_path / "index")
    again = ExactIndex.load(tmp_path / "index", mapped=True)
    assert again.raw
    assert torch.equal(again.search(QUERIES, 9).ids, index.search(QUERIES, 9).ids)
    more = draw(5, 30, 14)
    index.add(more, LABELS[:30])
    assert np.array_equal(
        index.search(QUERIES, 9).ids.numpy(), nearest("cosine", torch.cat([VECTORS, more]), QUERIES, 9)[0]
    )


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = VECTORS.half()
    broken[1234, 3] = torch.inf
    vectors = mapped(tmp_path / "v.npy", broken)
    for metric in METRICS:
        with pytest.raises(InputError, match="first in sample 1234"):
            ExactIndex(metric).build(vectors)
    with pytest.raises(InputError, match="first in sample 1234"):
        ReferenceSet.from_vectors(vectors, LABELS)


def test_what_is_mapped_is_known_as_long_as_it_is(tmp_path: Path) -> None:
    vectors = mapped(tmp_path / "v.npy", VECTORS)
    assert store.is_mapped(vectors)
    assert store.is_mapped(vectors[100:].detach())
    assert not store.is_mapped(vectors.clone())
    assert not store.is_mapped(store.load_array(tmp_path / "v.npy"))


@pytest.mark.parametrize("metric", METRICS)
def test_a_classifier_over_mapped_references(metric: str, tmp_path: Path) -> None:
    vectors = mapped(tmp_path / "v.npy", VECTORS[8:])
    references = ReferenceSet.from_vectors(vectors, LABELS[8:])
    voter = KNN(references, 7, metric=metric).voters[0]
    assert voter.index.vectors.data_ptr() == vectors.data_ptr()  # type: ignore[attr-defined]
    found = voter.index.search(QUERIES, 7)
    assert np.array_equal(found.ids.numpy(), nearest(metric, VECTORS[8:], QUERIES, 7)[0])


MEMORY = """
import sys, torch
torch.set_num_threads(1)
from robustknn import KNN, ReferenceSet, store
from robustknn.neighbors import ExactIndex

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

path, metric = sys.argv[1:]
small = torch.randn(3000, 32)
ExactIndex(metric, memory_mb=32).adopt(small, None, torch.arange(3000) % 10).search_both(torch.randn(256, 32), 20, 2)
vectors = store.load_array(path, mapped=True)
before = anonymous()
voter = KNN(ReferenceSet.from_vectors(vectors, torch.arange(len(vectors)) % 10), 20, metric=metric).voters[0]
voter.index.memory_mb = 32
voter.index.search(torch.randn(256, vectors.shape[1]), 20)
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="left out: reads the memory in use from /proc")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_the_file_does_not_become_memory(metric: str, dtype: type, tmp_path: Path) -> None:
    n, d = 400_000, 256 if dtype is np.float16 else 128  # 195 MiB
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((n, d), np.float32).astype(dtype))
    answer = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "v.npy"), metric],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    # Labels, and up to 16 bytes a reference for the search; the working memory.
    assert float(answer.stdout) < n * 24 / 2**20 + 32 + 16
