"""An index from one line of text, and the one that is chosen."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robustknn import KNN, ReferenceSet, store
from robustknn.errors import InputError, IntegrityError
from robustknn.neighbors import AutoIndex, ExactIndex, choose, load_index, make_index
from robustknn.neighbors import auto as auto_module

GB = 10**9


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VECTORS, QUERIES, LABELS = draw(0, 900, 10), draw(1, 8, 10), torch.arange(900) % 3


# ------------------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize(
    ("n", "dim", "memory", "engine"),
    [
        (1, 1, 1, "exact"),
        (1_000_000, 250, 0, "exact"),  # 2.5e8 numbers, to the last
        (1_000_000, 251, 8 * GB, "ivf-flat"),
        (250_000_001, 1, 100 * GB, "ivf-flat"),
        (10_000_000, 256, 2 * 10_000_000 * 1032, "ivf-flat"),  # lists of 4·256 + 8 bytes a vector: half of it
        (10_000_000, 256, 2 * 10_000_000 * 1032 - 2, "ivf-sq8-disk"),
        (50_000_000_000, 256, 1000 * GB, "ivf-sq8-disk"),
    ],
)
def test_chosen_by_size_and_memory(n: int, dim: int, memory: int, engine: str) -> None:
    choice = choose(n, dim, memory)
    assert choice.spec == engine
    assert choice.reason.startswith(f"{n:,} × {dim} numbers")
    assert choice.reason.endswith(".")
    assert ("approximate" in choice.reason) == (engine != "exact")


def test_the_memory_of_this_machine() -> None:
    assert 2**28 < auto_module.memory_of_machine() < 2**50


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_module, "EXACT_NUMBERS", 5000)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_it_chooses_the_exact_engine_and_says_so(metric: str) -> None:
    auto = AutoIndex(metric)
    with pytest.warns(UserWarning, match="index auto chose exact: 900 × 10 numbers are few enough") as said:
        assert auto.build(VECTORS, LABELS, VECTORS[:, :2]) is auto
    assert len(said) == 1
    assert auto.chosen is not None
    assert auto.chosen.spec == "exact"
    want = ExactIndex(metric).build(VECTORS, LABELS)
    assert (auto.exact, auto.differentiable, auto.updatable, len(auto), auto.dim) == (True, True, True, 900, 10)
    ids = torch.tensor([[1, 2]])
    assert torch.equal(auto.search(QUERIES, 5).ids, want.search(QUERIES, 5).ids)
    assert torch.equal(auto.search_classes(QUERIES, 5).ids, want.search_classes(QUERIES, 5).ids)
    assert torch.equal(auto.reconstruct(ids), want.reconstruct(ids))
    assert torch.equal(auto.reconstruct_unit(ids), want.reconstruct_unit(ids))
    assert torch.equal(auto.combine(ids, torch.ones(1, 2)), want.combine(ids, torch.ones(1, 2)))
    assert torch.equal(auto.payload(ids), VECTORS[ids, :2])
    assert len(auto.add(VECTORS[:3], LABELS[:3], VECTORS[:3, :2])) == 903


def test_it_chooses_lists_in_memory(small: None, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    with pytest.warns(UserWarning, match="chose ivf-flat: .* it is approximate"):
        auto = AutoIndex().build(VECTORS, LABELS)
    assert (auto.exact, auto.differentiable) == (False, False)
    auto.save(tmp_path / "a")
    assert type(AutoIndex.load(tmp_path / "a")).__name__ == "IVFFlatIndex"


def test_it_chooses_the_disk_and_wants_to_know_where(small: None, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    big = draw(0, 30_000, 10)  # lists of 1.44 MB, a MiB of memory
    with pytest.raises(InputError, match=r"auto chose ivf-sq8-disk: .*; say where, as in auto:path=FOLDER\."):
        make_index("auto:ram_mb=1", "l2").build(big)
    with pytest.warns(UserWarning, match="ivf-sq8-disk"):
        made: Any = make_index(f"auto:ram_mb=1,path={tmp_path / 'i'}", "l2").build(big)
    assert made.search(QUERIES, 3).ids.shape == (8, 3)
    assert (tmp_path / "i" / "lists.ivfdata").is_file()


def test_a_classifier_takes_what_was_chosen(small: None) -> None:
    pytest.importorskip("faiss")
    references = ReferenceSet.from_vectors(VECTORS, LABELS)
    with pytest.warns(UserWarning, match="index auto chose ivf-flat"):
        index = KNN(references, 5, index="auto").voters[0].index
    assert (type(index).__name__, index.exact) == ("IVFFlatIndex", False)
    assert index.chosen is not None
    few = ReferenceSet.from_vectors(VECTORS[:300], LABELS[:300])
    with pytest.warns(UserWarning, match="index auto chose exact"):
        assert KNN(few, 5, index="auto").voters[0].index.exact


# ------------------------------------------------------------------------------------------------ one line


def test_a_name_and_its_settings() -> None:
    index: Any = make_index("exact", "cosine")
    assert (type(index), index.metric.name, len(index)) == (ExactIndex, "cosine", 0)
    index = make_index("exact:precision=bfloat16,memory_mb=7", "ip")
    assert (index.precision, index.memory_mb) == ("bfloat16", 7)
    assert make_index("auto:ram_mb=none", "l2").ram_mb is None  # type: ignore[attr-defined]


def test_settings_of_every_kind() -> None:
    pytest.importorskip("faiss")
    index: Any = make_index("hnsw: deterministic=false , neighbors=8", "l2")
    assert (index.deterministic, index.neighbors) == (False, 8)
    index = make_index("ivf-flat-disk:path=/a:b/c=d,nlist=9", "l2")
    assert (str(index.path), index.nlist) == ("/a:b/c=d", 9)


MISTAKES = {
    "exac": "unknown index 'exac'; did you mean 'exact'?",
    "": "unknown index ''; known: auto, ",
    "exact:memory=5": "unknown option of index 'exact': 'memory'; did you mean 'memory_mb'",
    "exact:memory_mb": "'memory_mb' in index 'exact:memory_mb' is no setting; write name:key=value",
    "exact:memory_mb=5,memory_mb=6": "each key once",
    "exact:metric=ip": "the metric is an option of its own",
    "exact:memory_mb=x": "memory_mb must be a whole number of at least 1, not 'x'.",
    "exact:memory_mb=1.5": "memory_mb must be a whole number",
    "no/such/folder": "'no/such/folder' holds no saved index; give a folder with a manifest.json, or the name",
    ".": "'.' holds no saved index",
}


@pytest.mark.parametrize("spec", MISTAKES)
def test_mistakes_are_told_in_one_sentence(spec: str) -> None:
    with pytest.raises(InputError) as error:
        make_index(spec, "l2")
    assert MISTAKES[spec] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_path_and_what_is_there(tmp_path: Path) -> None:
    ExactIndex("cosine").build(VECTORS, LABELS).save(tmp_path / "exact")
    assert type(make_index(str(tmp_path / "exact"), "cosine")) is ExactIndex
    with pytest.raises(InputError, match="searches by 'cosine', not by 'l2'; pass metric='cosine'"):
        make_index(str(tmp_path / "exact"), "l2")
    with store.artifact(tmp_path / "other", "references", 1, {}):
        pass
    with store.artifact(tmp_path / "stranger", "nobody-index", 1, {}):
        pass
    for name in ("other", "stranger"):
        with pytest.raises(IntegrityError, match="is no index of an engine known here"):
            load_index(tmp_path / name)
    manifest = tmp_path / "exact" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-3])
    with pytest.raises(IntegrityError, match="truncated or altered"):
        make_index(str(tmp_path / "exact"), "cosine")


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("kind", ["exact", "faiss"])
def test_a_classifier_over_a_saved_index(kind: str, metric: str, tmp_path: Path) -> None:
    if kind == "faiss":
        pytest.importorskip("faiss")
    make_index(kind, metric).build(VECTORS).save(tmp_path / "i")
    references = ReferenceSet.from_vectors(VECTORS, LABELS)
    found = KNN(references, 5, metric=metric, index=str(tmp_path / "i")).voters[0].index.search(QUERIES, 5)
    assert torch.equal(found.ids, KNN(references, 5, metric=metric).voters[0].index.search(QUERIES, 5).ids)
    for other in (VECTORS.flip(0), VECTORS[:800]):
        others = ReferenceSet.from_vectors(other, LABELS[: len(other)])
        with pytest.raises(InputError, match="build it over these references"):
            _ = KNN(others, 5, metric=metric, index=str(tmp_path / "i")).voters


def test_nothing_is_said_where_nothing_was_chosen() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_index("exact", "l2").build(VECTORS)
