"""Inverted lists on a disk: built in blocks, gone on with after a kill, moved, and never believed when damaged."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mutate
import numpy as np
import pytest
import torch
from torch import Tensor

from robustknn import KNN, FeatureExtractor, ReferenceSet, store
from robustknn.errors import InputError, IntegrityError
from robustknn.neighbors import load_index, make_index
from robustknn.neighbors import on_disk as on_disk_module

faiss = pytest.importorskip("faiss")

pytestmark = pytest.mark.skipif(not hasattr(faiss, "OnDiskInvertedLists"), reason="left out: faiss has none here")

KINDS = ("ivf-flat-disk", "ivf-sq8-disk")
METRICS = ("l2", "cosine", "ip")
N, D, K = 3000, 24, 20


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CENTERS = 2 * draw(0, 12, D)
LABELS = torch.arange(N) % 12
VECTORS = CENTERS[LABELS] + 0.5 * draw(1, N, D)
QUERIES = CENTERS[torch.arange(40) % 12] + 0.5 * draw(2, 40, D)


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.ids, other.ids) and torch.equal(one.distances, other.distances)


def make(kind: str, path: Path, metric: str = "l2", **options: Any) -> Any:
    text = "".join(f",{key}={value}" for key, value in options.items())
    return make_index(f"{kind}:path={path}{text}", metric)


def distances(metric: str, ids: Tensor) -> np.ndarray[Any, Any]:
    rows, q = VECTORS.double()[ids], QUERIES.double()[:, None]
    if metric == "l2":
        return (rows - q).norm(dim=2).numpy()
    if metric == "ip":
        return -(rows * q).sum(2).numpy()
    return 1 - torch.cosine_similarity(rows, q.expand_as(rows), dim=2).numpy()


def nearest(metric: str) -> Tensor:
    every = torch.arange(N).repeat(len(QUERIES), 1)
    return torch.from_numpy(np.argsort(distances(metric, every), axis=1, kind="stable")[:, :K].copy())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_what_the_same_lists_in_memory_find(kind: str, metric: str, tmp_path: Path) -> None:
    index = make(kind, tmp_path / "i", metric, block_rows=700, nprobe=5).build(VECTORS, LABELS, draw(9, N, 2))
    found = index.search(QUERIES, K)
    in_memory: Any = make_index(f"{kind.removesuffix('-disk')}:nprobe=5", metric).build(VECTORS)
    assert same(found, in_memory.search(QUERIES, K))
    np.testing.assert_allclose(found.distances, distances(metric, found.ids), rtol=1e-6, atol=1e-6)
    recall = (found.ids[:, :, None] == nearest(metric)[:, None, :]).any(2).double().mean()
    assert 0.3 < recall <= 1
    assert (index.exact, index.updatable, index.reconstructs, len(index), index.dim) == (False, False, True, N, D)
    assert torch.equal(index.payload(torch.tensor([5])), draw(9, N, 2)[[5]])
    assert index.search_classes(QUERIES, 2).ids.shape == (40, 12, 2)
    assert {p.name for p in (tmp_path / "i").iterdir()} == {
        "manifest.json",
        "index.faiss",
        "lists.ivfdata",
        "marks.npy",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["i"]


def test_it_is_opened_where_it_was_built_and_where_it_was_moved(tmp_path: Path) -> None:
    want = make("ivf-flat-disk", tmp_path / "i", block_rows=1000).build(VECTORS).search(QUERIES, K)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "i").rename(tmp_path / "deep" / "er" / "j")
    loaded: Any = make_index(str(tmp_path / "deep" / "er" / "j"), "l2")
    loaded.attach(lambda: (VECTORS, None), LABELS, None)
    assert same(loaded.search(QUERIES, K), want)
    loaded.nprobe = 1
    assert not same(loaded.search(QUERIES, K), want)
    twin = copy.deepcopy(loaded)
    assert same(twin.search(QUERIES, K), loaded.search(QUERIES, K))
    loaded.save(tmp_path / "copy", with_vectors=False)
    loaded.save(tmp_path / "deep" / "er" / "j", with_vectors=False)  # where it is
    shutil.rmtree(tmp_path / "deep")
    again: Any = load_index(tmp_path / "copy")
    again.attach(lambda: (VECTORS, None), LABELS, None)
    assert same(again.search(QUERIES, K), want)


def test_what_is_written_names_no_folder(tmp_path: Path) -> None:
    make("ivf-sq8-disk", tmp_path / "i").build(VECTORS)
    for path in (tmp_path / "i").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


def test_a_build_that_exists_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = make("ivf-flat-disk", tmp_path / "i").build(VECTORS).search(QUERIES, K)
    monkeypatch.setattr(on_disk_module.OnDiskIndex, "_write_index", lambda *_: pytest.fail("built again"))
    assert same(make("ivf-flat-disk", tmp_path / "i", nprobe=32).build(VECTORS).search(QUERIES, K), want)
    for other in (VECTORS + 1, VECTORS[:2000]):
        with pytest.raises(InputError, match="holds an index of other vectors, or with other settings"):
            make("ivf-flat-disk", tmp_path / "i").build(other)
    with pytest.raises(InputError, match="other settings"):
        make("ivf-flat-disk", tmp_path / "i", nlist=11).build(VECTORS)
    with pytest.raises(IntegrityError, match="not a ivf-sq8-disk-index"):
        make("ivf-sq8-disk", tmp_path / "i").build(VECTORS)


# ------------------------------------------------------------------------------------------- stopped builds


class StoppedError(Exception):
    pass


def stop_after(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, done = on_disk_module.OnDiskIndex._write_block, []

    def write(self: Any, *args: Any) -> None:
        if len(done) == blocks:
            raise StoppedError
        plain(self, *args)
        done.append(args)

    monkeypatch.setattr(on_disk_module.OnDiskIndex, "_write_block", write)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [0, 1, 4])
def test_a_stopped_build_goes_on(kind: str, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = make(kind, tmp_path / "whole", block_rows=650, nprobe=3).build(VECTORS).search(QUERIES, K)
    with monkeypatch.context() as patch:
        stop_after(blocks, patch)
        with pytest.raises(StoppedError):
            make(kind, tmp_path / "i", block_rows=650, nprobe=3).build(VECTORS)
    work = tmp_path / "i.building"
    assert len(list(work.glob("block-*.json"))) == blocks
    times = {path: path.stat().st_mtime_ns for path in work.iterdir()}
    with monkeypatch.context() as patch:
        stop_after(4 - blocks, patch)
        with pytest.raises(StoppedError):
            make(kind, tmp_path / "i", nprobe=3).build(VECTORS)  # the blocks stay as large as they were begun
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())  # nothing is made twice
    index = make(kind, tmp_path / "i", block_rows=650, nprobe=3).build(VECTORS)
    assert same(index.search(QUERIES, K), want)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i", "whole"]
    lists = [(tmp_path / name / "lists.ivfdata").read_bytes() for name in ("i", "whole")]
    assert lists[0] == lists[1]


KILLED = """
import os, signal, sys, torch
import numpy as np
from pathlib import Path
from robustknn.neighbors import make_index, on_disk
plain, done = on_disk._write, []
def write(index, path):
    plain(index, path)
    done.append(path)
    if len(done) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
on_disk._write = write
vectors = torch.from_numpy(np.load(sys.argv[1]))
make_index(f"ivf-flat-disk:block_rows=700,path={sys.argv[2]}", "l2").build(vectors)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="left out: no SIGKILL")
@pytest.mark.parametrize("written", [1, 2, 4, 7])
def test_a_killed_build_goes_on(written: int, tmp_path: Path) -> None:
    """Killed in the middle of writing the trained index, a block, or the merged one."""
    np.save(tmp_path / "v.npy", VECTORS.numpy())
    command = [sys.executable, "-c", KILLED, str(tmp_path / "v.npy"), str(tmp_path / "i"), str(written)]
    assert subprocess.run(command, check=False, timeout=120, capture_output=True).returncode == -9
    assert not (tmp_path / "i").exists()
    index = make("ivf-flat-disk", tmp_path / "i", block_rows=700).build(VECTORS)
    want: Any = make_index("ivf-flat", "l2").build(VECTORS)
    for nprobe in (2, 32):
        index.nprobe = want.nprobe = nprobe
        assert same(index.search(QUERIES, K), want.search(QUERIES, K))
    assert len(index) == N


def test_blocks_of_another_build_are_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(StoppedError):
            make("ivf-flat-disk", tmp_path / "i", block_rows=650).build(VECTORS)
    for other in (VECTORS + 1, VECTORS[:2999]):
        with pytest.raises(InputError, match="holds the blocks of another build"):
            make("ivf-flat-disk", tmp_path / "i", block_rows=650).build(other)
    with pytest.raises(InputError, match="other settings"):
        make("ivf-flat-disk", tmp_path / "i", block_rows=650, seed=4).build(VECTORS)


@pytest.mark.parametrize("name", ["block-00000001.faiss", "block-00000001.json", "trained.faiss", "build.json"])
def test_a_damaged_block_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(StoppedError):
            make("ivf-flat-disk", tmp_path / "i", block_rows=650).build(VECTORS)
    file = tmp_path / "i.building" / name
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:], b""):
        file.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=r"i\.building"):
            make("ivf-flat-disk", tmp_path / "i", block_rows=650).build(VECTORS)
        assert not (tmp_path / "i").exists()
    if name.startswith("block"):  # what the sentence says
        file.with_suffix(".json").unlink()
        file.with_suffix(".faiss").unlink()
    else:
        file.write_bytes(whole)
    make("ivf-flat-disk", tmp_path / "i", block_rows=650).build(VECTORS)


# ------------------------------------------------------------------------------------------------- damage


def test_no_damaged_index_is_opened(tmp_path: Path) -> None:
    make("ivf-flat-disk", tmp_path / "i", nlist=4).build(VECTORS[:90])
    for path in mutate.damaged(tmp_path / "i", 600, seed=3):
        with pytest.raises(IntegrityError):
            on_disk_module.IVFFlatDiskIndex.load(tmp_path / "i", verify=True)
        if path.name != "lists.ivfdata":
            with pytest.raises(IntegrityError):
                load_index(tmp_path / "i")


def test_lists_are_not_read_when_they_are_opened(tmp_path: Path) -> None:
    """Their size is checked; what is in them only where it is asked for."""
    make("ivf-flat-disk", tmp_path / "i").build(VECTORS)
    lists = tmp_path / "i" / "lists.ivfdata"
    whole = lists.read_bytes()
    lists.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    assert len(load_index(tmp_path / "i")) == N
    with pytest.raises(IntegrityError, match="is altered"):
        on_disk_module.IVFFlatDiskIndex.load(tmp_path / "i", verify=True)
    lists.write_bytes(whole[:-8])
    with pytest.raises(IntegrityError, match="it is truncated or altered"):
        load_index(tmp_path / "i")


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="say where the lists shall lie: ivf-flat-disk:path=FOLDER"):
        make_index("ivf-flat-disk", "l2").build(VECTORS)
    index = make("ivf-flat-disk", tmp_path / "i").build(VECTORS)
    with pytest.raises(InputError, match="does not grow; build it again"):
        index.add(VECTORS)
    with pytest.raises(InputError, match="with_vectors=False"):
        index.save(tmp_path / "j", with_vectors=True)
    broken = VECTORS.clone()
    broken[2345, 1] = torch.nan
    with pytest.raises(InputError, match="first in sample 2345"):
        make("ivf-flat-disk", tmp_path / "k", block_rows=500).build(broken)


def test_a_classifier_over_files(tmp_path: Path) -> None:
    store.save_array(tmp_path / "v.npy", VECTORS)
    features = FeatureExtractor(torch.nn.Identity())
    references = ReferenceSet.from_vectors(store.load_array(tmp_path / "v.npy", mapped=True), LABELS, features=features)
    spec = f"ivf-sq8-disk:path={tmp_path / 'i'}"
    built = KNN(references, 5, index=spec).predict(QUERIES)
    assert torch.equal(KNN(references, 5, index=spec).predict(QUERIES), built)
    assert torch.equal(KNN(references, 5, index=str(tmp_path / "i")).predict(QUERIES), built)
    assert torch.equal(KNN(references, 5).predict(QUERIES), built)


MEMORY = """
import sys, torch
from pathlib import Path
from robustknn import store
from robustknn.neighbors import make_index, load_index
torch.set_num_threads(1)

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

folder = Path(sys.argv[1])
small = torch.randn(4000, 64)
make_index(f"ivf-flat-disk:path={folder / 'small'}", "l2").build(small).search(small[:50], 20)
vectors = store.load_array(folder / "v.npy", mapped=True)
before, peak = anonymous(), [0.0]

class Watch:
    def start(self, what, total, done=0): pass
    def advance(self, amount=1): peak[0] = max(peak[0], anonymous() - before)
    def stop(self): pass

index = make_index(f"ivf-flat-disk:path={folder / 'i'},memory_mb=32,nlist=300,train_size=20000", "l2")
index.build(vectors, progress=Watch())
built = anonymous() - before
for part in vectors[::2000].split(50):
    index.search(part, 20)
print(peak[0], built, anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="left out: reads the memory in use from /proc")
def test_neither_building_nor_searching_takes_more_memory_than_it_may(tmp_path: Path) -> None:
    n = 800_000  # 195 MiB, and as much again in the lists
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((n, 64), np.float32))
    answer = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], check=True, capture_output=True, text=True, timeout=600
    )
    peak, built, searched = map(float, answer.stdout.split("\n")[-2].split())
    assert peak < 2 * 32 + 24
    assert built < 24
    assert searched < 48
