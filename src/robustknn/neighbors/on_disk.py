"""Inverted lists that lie in a file: built in blocks, merged, and searched without being read into memory.

A build keeps a folder beside the index it makes, `PATH.building`: the trained empty index, and one file for every
block of rows with a sealed note of its checksum. A block counts when its note is there, so that a build that was killed
goes on with the next one. When all are there they are merged into the artifact at PATH, and the folder is removed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from robustknn import registry, store
from robustknn.checks import check_positive_int
from robustknn.errors import InputError, IntegrityError
from robustknn.neighbors.base import check_vectors
from robustknn.neighbors.faiss_kinds import IVFIndex
from robustknn.neighbors.faiss_module import load_faiss, reason_of
from robustknn.neighbors.faiss_rows import Marks
from robustknn.neighbors.trained import INDEX, MARKS, SCHEMA
from robustknn.progress import Progress, Silent

LISTS = "lists.ivfdata"
_PLAN, _TRAINED = "build.json", "trained.faiss"


class OnDiskIndex(IVFIndex):
    """Inverted lists in a file. `build` writes the index to `path`, or opens it there if it was built before.

    The lists are read where a search needs them; what the system keeps of the file in its cache is not this process's
    memory. While the index is built its blocks need as much space on the disk again as the lists.

    Args:
        path: the folder the index is written to, needed by `build`.
        block_rows: vectors a block; None takes as many as take a quarter of `memory_mb`.
        metric, nlist, nprobe, rerank, seed, train_size, memory_mb: as for `IVFIndex`.
    """

    updatable = False

    def __init__(
        self,
        metric: str = "l2",
        path: str | Path = "",
        nlist: int | None = None,
        nprobe: int | None = None,
        rerank: int | None = None,
        seed: int = 0,
        train_size: int | None = None,
        block_rows: int | None = None,
        memory_mb: int = 256,
    ) -> None:
        super().__init__(metric, nlist, nprobe, rerank, seed, train_size, memory_mb)
        self.updatable = False
        self.path = Path(path) if str(path) else None
        self.block_rows = None if block_rows is None else check_positive_int(block_rows, "block_rows")

    # ------------------------------------------------------------------------------------- building

    def build(
        self,
        vectors: Tensor,
        labels: Tensor | None = None,
        payload: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Write the index of vectors (n, D) to `path`, going on where a build that was stopped ended.

        Labels and payload are held in memory for this object alone; the index on the disk has neither.

        Raises:
            InputError: what `TrainedIndex.build` refuses; no `path`, or one that holds an index of other vectors or
                settings.
            IntegrityError: a block on the disk was altered.
        """
        labels = check_vectors(vectors, labels, payload)
        path = self._folder()
        vectors = vectors.detach().cpu()
        self._marks = Marks.of(vectors)
        if not path.exists():
            self._write_index(path, vectors, progress or Silent())
        made = self.load(path)
        if made.plan() != self.plan() or made._marks is None:
            raise InputError(
                f"{str(path)!r} holds an index of other vectors, or with other settings; remove it or choose another "
                "path."
            )
        made._marks.check(self.metric, vectors, len(made))
        self._plain.hold(vectors, None, labels, payload)
        self._hold(made._index, labels, payload)
        return self

    def _folder(self) -> Path:
        if self.path is None:
            raise InputError(f"say where the lists shall lie: {self.name}:path=FOLDER, or path= in Python.")
        if not hasattr(load_faiss(), "OnDiskInvertedLists"):
            raise InputError("this faiss keeps no lists on a disk (on Windows none does); use 'ivf-sq8' or 'ivf-flat'.")
        return self.path

    def plan(self) -> dict[str, Any]:
        """What decides the lists, as JSON: two builds with the same are the same."""
        if self._marks is None:
            raise InputError("an index without vectors has no plan; build or load it first.")
        free = ("nprobe", "rerank", "path", "block_rows", "memory_mb")
        kept = {k: v for k, v in super().options().items() if k not in free}
        return {"engine": self.name, "metric": self.metric.name, **kept, "rows": self._marks.digest()}

    def options(self) -> dict[str, Any]:
        return {k: v for k, v in super().options().items() if k != "path"}

    def _write_index(self, path: Path, vectors: Tensor, progress: Progress) -> None:
        work = path.with_name(path.name + ".building")
        store.remove_partials(work)
        step = self._begin(work, vectors)
        starts = range(0, len(vectors), step)
        done = [start for number, start in enumerate(starts) if _noted(work, number)]
        progress.start("indexing", len(vectors), sum(min(step, len(vectors) - start) for start in done))
        try:
            for number, start in enumerate(starts):
                if not _noted(work, number):
                    part = vectors[start : start + step]
                    self._write_block(work, number, start, part)
                    progress.advance(len(part))
        finally:
            progress.stop()
        self._merge(path, work, len(starts), len(vectors))
        shutil.rmtree(work, ignore_errors=True)

    def _begin(self, work: Path, vectors: Tensor) -> int:
        """Train, or find that it was done, for the same vectors and settings; returns the rows of a block."""
        n, dim = vectors.shape
        mine = {**self.plan(), "n": n, "dim": dim}
        if (work / _PLAN).exists():
            said = store.read_sealed(work / _PLAN)
            if {k: v for k, v in said.items() if k not in ("trained", "step")} != mine:
                raise InputError(
                    f"{str(work)!r} holds the blocks of another build (other vectors or other settings); go on with "
                    "those, or remove the folder."
                )
            _check(work / _TRAINED, said["trained"])
            return int(said["step"])
        index = self._trained(vectors)
        step = self.block_rows or max(1, self.memory_mb * 2**20 // (4 * (index.code_size + 8)))
        with store.atomic_path(work / _TRAINED) as partial:
            _write(index, partial)
        store.write_sealed(work / _PLAN, {**mine, "step": step, "trained": _sum(work / _TRAINED)})
        return step

    def _write_block(self, work: Path, number: int, start: int, vectors: Tensor) -> None:
        index = load_faiss().read_index(str(work / _TRAINED), 0)
        self._add_rows(index, vectors, first=start)
        with store.atomic_path(_block(work, number)) as partial:
            _write(index, partial)
        said = {"number": number, "start": start, "rows": len(vectors), **_sum(_block(work, number))}
        store.write_sealed(_block(work, number).with_suffix(".json"), said)

    def _merge(self, path: Path, work: Path, blocks: int, n: int) -> None:
        assert self._marks is not None
        faiss = load_faiss()
        for number in range(blocks):
            _check(_block(work, number), store.read_sealed(_block(work, number).with_suffix(".json")))
        meta = {"metric": self.metric.name, "options": self.options(), "marked": self._marks.ids}
        with store.artifact(path, f"{self.name}-index", SCHEMA, meta) as folder:
            store.save_array(folder / MARKS, self._marks.rows)
            whole = faiss.read_index(str(work / _TRAINED), 0)
            # Mapped, which suits lists that a file holds in the plain form: only what is copied is read.
            parts = [faiss.read_index(str(_block(work, number)), faiss.IO_FLAG_MMAP) for number in range(blocks)]
            lists = faiss.OnDiskInvertedLists(whole.nlist, whole.code_size, str(folder / LISTS))
            held = faiss.InvertedListsPtrVector()
            for part in parts:
                held.push_back(part.invlists)
            whole.ntotal = lists.merge_from_multiple(held.data(), held.size(), False)
            whole.replace_invlists(lists, True)
            lists.this.disown()  # it belongs to the index now
            if whole.ntotal != n:
                raise IntegrityError(f"{str(work)!r} holds {whole.ntotal} of {n} vectors; remove it and build again.")
            lists.filename = LISTS  # which folder it is in is known when it is opened
            _write(whole, folder / INDEX)
            del whole, parts, held, lists  # unmapped, before the files are sealed and get their names

    # ----------------------------------------------------------------------------------- transport

    def save(self, path: Path, with_vectors: bool = False) -> None:
        """Copy the index's folder to `path`; nothing happens where that is its own folder."""
        if with_vectors:
            raise InputError("lists on a disk are kept beside vectors on a disk; save them with with_vectors=False.")
        if self._index is None or self.path is None:
            super().save(path)
        elif Path(path).resolve() != self.path.resolve():
            manifest = store.read_manifest(self.path, f"{self.name}-index", SCHEMA)
            with store.artifact(Path(path), manifest.kind, SCHEMA, manifest.meta) as folder:
                for name in manifest.files:
                    shutil.copyfile(self.path / name, folder / name)

    @classmethod
    def load(cls, path: Path, verify: bool = False) -> Self:
        """Open an index that was built, wherever its folder was moved; its vectors are given by `attach`.

        Args:
            verify: read the lists, to see that they are as they were written; otherwise only their size is checked.

        Raises:
            IntegrityError: a file is missing, truncated or altered.
        """
        kind = f"{registry.indexes.name_of(cls)}-index"
        manifest = store.read_manifest(Path(path), kind, SCHEMA, unread=() if verify else (LISTS,))
        made = cls._of(manifest)
        made.path = Path(path)
        return made

    @staticmethod
    def _read(manifest: store.Manifest) -> Any:
        faiss = load_faiss()
        # Never with IO_FLAG_MMAP: lists on a disk are mapped as it is, and with that flag a search would crash.
        index = faiss.read_index(str(manifest.file(INDEX)), faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_SKIP_IVF_DATA)
        lists = faiss.downcast_InvertedLists(index.invlists)
        if not isinstance(lists, faiss.OnDiskInvertedLists) or lists.totsize != manifest.files[LISTS]["bytes"]:
            raise InputError("its lists are not those that faiss's file speaks of")
        lists.filename = str(manifest.file(LISTS))
        lists.do_mmap()
        return index

    def _twin(self) -> Any:
        assert self.path is not None
        return self.load(self.path)._index


def _block(work: Path, number: int) -> Path:
    return work / f"block-{number:08d}.faiss"


def _noted(work: Path, number: int) -> bool:
    return _block(work, number).with_suffix(".json").exists()


def _write(index: Any, path: Path) -> None:
    try:
        load_faiss().write_index(index, str(path))
    except RuntimeError as error:
        raise store.StorageError(
            f"cannot write {str(path.parent)!r}: {reason_of(error)}; what was finished before is kept."
        ) from error


def _sum(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256_of_file": store.sha256_file(path)}


def _check(path: Path, said: dict[str, Any]) -> None:
    """IntegrityError for a file of a build that is not as it was noted."""
    try:
        found: dict[str, Any] = _sum(path)
    except OSError:
        found = {}
    if found != {key: said.get(key) for key in ("bytes", "sha256_of_file")}:
        raise IntegrityError(
            f"{str(path)!r} is missing or altered; remove it and its .json and build again (the other blocks are kept)."
        )


@registry.indexes.register("ivf-flat-disk")
class IVFFlatDiskIndex(OnDiskIndex):
    """Inverted lists of whole vectors in a file, for more than fits in memory; needs path=."""

    code = "Flat"


@registry.indexes.register("ivf-sq8-disk")
class IVFSQ8DiskIndex(OnDiskIndex):
    """Inverted lists of vectors in 8 bits a number in a file, a quarter of the disk of ivf-flat-disk; needs path=."""

    code = "SQ8"
    rerank_default = 2
