"""The files of a run directory: no damaged one is taken for a whole one, and none breaks its reader."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mutate import damaged, flips, mutations, put, replaced, truncations
from torch import nn

from robustknn import KNN, FeatureExtractor, IntegrityError, ReferenceSet, ThreatModel, store
from robustknn.attacks import FGSM
from robustknn.evaluation import Cell, Options, RunDirectory, evaluate, finish, read_summary
from robustknn.objectives import CrossEntropy
from robustknn.reports import write_report

COPIES = 10_000
ATTACKED = Cell("knn", "a", 0.5)
NUMBERS = (b"null", b"-1", b"1e999", b"NaN", b'"run"', b'"tensors"', b"{", b"}", b"[", b"]", b"F64", b"I64", b"BOOL")


def make(out: Path, seed: int = 0) -> RunDirectory:
    """A run of one batch a cell, as small as a run can be that has every kind of file."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    x, y = torch.rand(8, 2), torch.arange(8) % 2
    references = ReferenceSet.build(FeatureExtractor(net, ["1"]), (x, y), keep_images=True)
    run = evaluate(
        KNN(references, 3),
        (x[:3], y[:3]),
        attacks={"a": FGSM(CrossEntropy())},
        threat=ThreatModel("linf", 0.5),
        out=out,
        options=Options(seed=seed, examples=2, controls=0),
    )
    finish(run)
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, never altered."""
    return make(tmp_path_factory.mktemp("formats") / "run").path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> RunDirectory:
    """A copy of it, to be altered."""
    shutil.copytree(made, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


BATCH = "cells/knn/a@0.5/00000000-00000002"
READERS: dict[str, Callable[[RunDirectory], Any]] = {
    "run.json": lambda run: run.header,
    "environment.json": lambda run: run.environment,
    f"{BATCH}.json": lambda run: run.rows(ATTACKED),
    f"{BATCH}.time": lambda run: run.seconds(ATTACKED),
    f"{BATCH}.safetensors": lambda run: run.tensors(ATTACKED),
    "gallery.json": lambda run: run.gallery(),
    "gallery.safetensors": lambda run: run.gallery(),
    "summary.json": read_summary,
}
"""What reads each kind of file. `rows.parquet` is written for others and never read here."""


def test_every_kind_of_file_is_tested(made: Path) -> None:
    kept = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    same_kind = {p for p in kept if p.startswith("cells/knn/clean/")}
    assert kept - same_kind - {"rows.parquet"} == READERS.keys()
    for name, read in READERS.items():
        assert read(RunDirectory(made)), name


@pytest.mark.parametrize("name", READERS)
def test_no_damaged_copy_is_accepted(run: RunDirectory, name: str) -> None:
    read, path, accepted = READERS[name], run.path / name, []
    whole = path.read_bytes()
    for data in mutations(whole, COPIES, seed=1, splices=NUMBERS):
        put(path, data)
        try:
            accepted.append((data, read(RunDirectory(run.path))))
        except IntegrityError:
            continue
    assert accepted == []
    put(path, whole)
    assert read(RunDirectory(run.path))


@pytest.mark.parametrize("name", READERS)
def test_no_missing_end_and_no_single_bit_is_overlooked(run: RunDirectory, name: str) -> None:
    read, path = READERS[name], run.path / name
    whole = path.read_bytes()
    every = [*truncations(whole), *flips(whole)]
    for data in every[:: max(1, len(every) // 3000)]:
        put(path, data)
        with pytest.raises(IntegrityError):
            read(RunDirectory(run.path))


@pytest.mark.parametrize("name", READERS)
def test_no_other_file_is_taken_for_it(run: RunDirectory, name: str, tmp_path: Path) -> None:
    others = [p for p in run.path.rglob("*") if p.is_file() and p != run.path / name]
    for other in others:
        if name.endswith(".time") and other.suffix == ".time":
            continue  # clock times are of no account
        with replaced(run.path / name, other.read_bytes()), pytest.raises(IntegrityError):
            READERS[name](RunDirectory(run.path))
    (run.path / name).unlink()
    (run.path / name).mkdir()
    if not name.endswith(".time"):
        with pytest.raises(IntegrityError):
            READERS[name](RunDirectory(run.path))


def test_damage_anywhere_is_seen_by_who_reads_everything(run: RunDirectory) -> None:
    (run.path / "rows.parquet").unlink()
    for path in damaged(run.path, 2000, seed=5):
        fresh = RunDirectory(run.path)
        with pytest.raises(IntegrityError):  # noqa: PT012  (any of them)
            read_summary(fresh)
            fresh.gallery()
            for cell in fresh.cells:
                fresh.tensors(cell)
                fresh.seconds(cell)
            _ = fresh.environment
            raise AssertionError(path)


def test_tensor_files_without_a_seal_are_whole_or_refused(made: Path, tmp_path: Path) -> None:
    """`store.load_tensors` by itself: a header or a size that was altered raises IntegrityError and nothing else."""
    for name in (f"{BATCH}.safetensors", "gallery.safetensors"):
        path, refused = tmp_path / "x.safetensors", 0
        for data in mutations((made / name).read_bytes(), COPIES // 2, seed=2, splices=NUMBERS):
            put(path, data)
            try:
                store.load_tensors(path)
            except IntegrityError:
                refused += 1
        assert refused > COPIES // 5


# --------------------------------------------------------------------------------------- another run's


def test_files_of_another_run_are_refused(run: RunDirectory, tmp_path: Path) -> None:
    other = make(tmp_path / "other", seed=1)
    assert other.key != run.key
    for names, read in (
        ([f"{BATCH}.json", f"{BATCH}.safetensors"], READERS[f"{BATCH}.json"]),
        (["gallery.json", "gallery.safetensors"], READERS["gallery.json"]),
    ):
        for name in names:
            shutil.copy(other.path / name, run.path / name)
        with pytest.raises(IntegrityError, match="belongs to another run"):
            read(RunDirectory(run.path))
    with pytest.raises(IntegrityError, match="belongs to another run or another cell; remove it"):
        make(run.path)
    (run.path / f"{BATCH}.json").unlink()
    make(run.path)
    for read in READERS.values():
        assert read(RunDirectory(run.path))


def test_files_of_another_run_are_refused_by_the_report(run: RunDirectory, tmp_path: Path) -> None:
    other = make(tmp_path / "other", seed=1)
    with (
        replaced(run.path / "summary.json", (other.path / "summary.json").read_bytes()),
        pytest.raises(IntegrityError, match="is of another run"),
    ):
        write_report(run.path)
    (run.path / "gallery.json").unlink()
    with pytest.raises(IntegrityError, match="has no seal"):
        write_report(run.path)
    assert not (run.path / "report.html").exists()


# --------------------------------------------------------------------------------- the gallery's seal


def test_the_gallery_is_sealed_and_written_again(run: RunDirectory, made: Path) -> None:
    tensors, seal = run.path / "gallery.safetensors", run.path / "gallery.json"
    content = store.read_sealed(seal)
    assert content == {"run": run.key, "tensors": store.sha256_file(tensors)}
    before = {p: p.read_bytes() for p in (tensors, seal)}

    def spoil(how: str) -> None:
        if how == "no seal":  # killed between the two
            seal.unlink()
        elif how == "no tensors":
            tensors.unlink()
        elif how == "altered":
            put(tensors, before[tensors][:-1] + b"\1")
        else:
            put(seal, before[seal][:-4])

    for how, message in (
        ("no seal", "has no seal; run the same evaluation again"),
        ("no tensors", "is missing or altered; run the same evaluation again"),
        ("altered", "is missing or altered; run the same evaluation again"),
        ("seal altered", "truncated or altered"),
    ):
        spoil(how)
        with pytest.raises(IntegrityError, match=message):
            RunDirectory(run.path).gallery()
        make(run.path)
        assert {p: p.read_bytes() for p in before} == before, how
    tensors.unlink()
    seal.unlink()
    assert RunDirectory(run.path).gallery() == {}  # as in a run that shows none


def test_tensors_of_the_gallery_come_before_its_seal(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for function in ("write_sealed", "save_tensors"):
        fresh = RunDirectory(run.path)
        (run.path / "gallery.json").unlink(missing_ok=True)
        _ = fresh.key
        with monkeypatch.context() as patched:
            patched.setattr(store, function, stop)
            with pytest.raises(KeyboardInterrupt):
                fresh.write_gallery({"ids 0": torch.arange(3)})
        assert not (run.path / "gallery.json").exists()
        with pytest.raises(IntegrityError, match="has no seal"):
            fresh.gallery()


# ------------------------------------------------------------------------------------------ made from rows


def test_the_table_is_made_from_the_rows_and_never_read(run: RunDirectory) -> None:
    whole = (run.path / "rows.parquet").read_bytes()
    for data in mutations(whole, 5, seed=3):
        put(run.path / "rows.parquet", data)
        page = write_report(run.path).read_bytes()
        finish(RunDirectory(run.path))
        assert (run.path / "rows.parquet").read_bytes() == whole
        assert write_report(run.path).read_bytes() == page
