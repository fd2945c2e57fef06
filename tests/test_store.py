"""Storage: whole or not at all, whatever kills the writer, fills the disk or damages the files afterwards."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutate import damaged, flips, mutations, put, replaced, truncations
from torch import Tensor

from robustknn import store
from robustknn.errors import InputError, IntegrityError, RobustKNNError
from robustknn.store import StorageError

KIND, SCHEMA = "test", 3
JSON: dict[str, Any] = {
    "text": 'naïve ∞ 数据 \u2028 "quoted" \\ \t',
    "numbers": [0, -1, 2**53 + 1, 10**300, 0.1, -0.0, 5e-324, 1.7976931348623157e308],
    "nested": {"a": {"b": [[], {}, [None, True, False]]}, "": 1},
}
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    assert "Traceback" not in text
    return text


def raised(work: Callable[[], object]) -> RobustKNNError | None:
    """The error of ours that the work ended in; any other is a failure of the test."""
    try:
        work()
    except RobustKNNError as error:
        return error
    return None


def tensors(value: float) -> dict[str, Tensor]:
    return {"a": torch.full((20, 3), value), "b": torch.arange(5)}


def write_artifact(path: Path, value: float, overwrite: bool = True) -> None:
    """An artifact with one file of every sort, whose content tells which version it is."""
    with store.artifact(path, KIND, SCHEMA, {"value": value}, overwrite) as folder:
        store.save_array(folder / "array.npy", torch.full((50,), value))
        store.save_tensors(folder / "tensors.safetensors", tensors(value))
        store.write_sealed(folder / "more.json", {"value": value})


def read_artifact(path: Path) -> float:
    """The version of an artifact; every part must be of that version."""
    manifest = store.read_manifest(path, KIND, SCHEMA)
    value = float(manifest.meta["value"])
    assert torch.equal(store.load_array(manifest.file("array.npy")), torch.full((50,), value))
    held = store.load_tensors(manifest.file("tensors.safetensors"))
    assert held.keys() == tensors(value).keys()
    assert all(torch.equal(held[k], v) for k, v in tensors(value).items())
    assert store.read_sealed(manifest.file("more.json")) == {"value": value}
    return value


def left_over(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob(".*")]


# -------------------------------------------------------------------------------------- what is written


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "file"
    for data in (b"", b"first", bytes(range(256)) * 5000):
        store.write_bytes(path, data)
        assert path.read_bytes() == data
    store.write_text(path, "ß\n")
    assert path.read_bytes() == b"\xc3\x9f\n"
    assert store.sha256_file(path) == hashlib.sha256(b"\xc3\x9f\n").hexdigest()
    assert not left_over(tmp_path)


def test_an_unfinished_file_never_appears(tmp_path: Path) -> None:
    store.write_bytes(tmp_path / "file", b"old")
    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)), store.atomic_path(tmp_path / "file") as partial:  # noqa: PT012
            partial.write_bytes(b"ne")
            raise error
    assert (tmp_path / "file").read_bytes() == b"old"
    assert not left_over(tmp_path)


@pytest.mark.parametrize("pretty", [True, False])
def test_sealed_json_holds_a_checksum_of_its_content(pretty: bool, tmp_path: Path) -> None:
    path = tmp_path / "sealed.json"
    store.write_sealed(path, JSON, pretty=pretty)
    assert store.read_sealed(path) == JSON
    assert str(store.read_sealed(path)["numbers"][5]) == "-0.0"
    held = json.loads(path.read_text(encoding="utf-8"))
    seal = held.pop("sha256")
    plain = json.dumps(held, sort_keys=True, ensure_ascii=False, separators=(",", ":")) + "\n"
    assert seal == hashlib.sha256(plain.encode()).hexdigest()


def test_sealed_json_of_big_values(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    content = {"text": "ü" * 1_000_000, "list": list(range(100_000)), "deep": deep, "digits": 10**4000}
    store.write_sealed(tmp_path / "big.json", content, pretty=False)
    assert store.read_sealed(tmp_path / "big.json") == content


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({2: "b", 10: "a", 1: {3: 0, 20: 1}}, {"2": "b", "10": "a", "1": {"3": 0, "20": 1}}),
        ({"t": (1, (2,))}, {"t": [1, [2]]}),
        ({"t": np.float64(0.5)}, {"t": 0.5}),
        ({True: 1, False: 0}, {"true": 1, "false": 0}),
        ({None: 1}, {"null": 1}),
    ],
)
def test_what_json_words_differently_is_read_back_in_its_words(
    given: dict[Any, Any], read: dict[str, Any], tmp_path: Path
) -> None:
    store.write_sealed(tmp_path / "a.json", given)
    assert store.read_sealed(tmp_path / "a.json") == read


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "content",
    [
        {"x": float("nan")},
        {"x": [float("inf")]},
        {float("nan"): 1},
        {"x": torch.ones(2)},
        {"x": np.float32(1)},
        {"x": b"bytes"},
        {"x": {1, 2}},
        {1: "a", "1": "b"},
        {(1, 2): "a"},
        {"x": "\udcff"},
        {"\ud800": 1},
        {"x": 10**5000},
        {"x": nested(100_000)},
        {"sha256": "of mine"},
    ],
    ids=range(14),
)
def test_what_json_cannot_hold_is_refused_before_anything_is_written(content: dict[Any, Any], tmp_path: Path) -> None:
    store.write_sealed(tmp_path / "a.json", {"old": 1})
    with pytest.raises(InputError) as caught:
        store.write_sealed(tmp_path / "a.json", content)
    assert len(one_sentence(caught.value)) < 300
    assert store.read_sealed(tmp_path / "a.json") == {"old": 1}


def test_artifacts_are_written_read_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "données ✓ 数据" / "a b.c"
    for value in (1.0, 2.0, 3.0):
        write_artifact(path, value)
        assert read_artifact(path) == value
    assert sorted(p.name for p in path.iterdir()) == [
        "array.npy",
        "manifest.json",
        "more.json",
        "tensors.safetensors",
    ]
    assert not left_over(tmp_path)
    manifest = store.read_manifest(path, KIND, SCHEMA)
    for name, said in manifest.files.items():
        data = (path / name).read_bytes()
        assert said == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with pytest.raises(IntegrityError, match=r"lists no file 'other'; make the test again\.$"):
        manifest.file("other")


def test_meta_may_be_filled_while_the_artifact_is_written(tmp_path: Path) -> None:
    meta: dict[str, Any] = {}
    with store.artifact(tmp_path / "a", KIND, SCHEMA, meta):
        meta["found"] = 7
    assert store.read_manifest(tmp_path / "a", KIND, SCHEMA).meta == {"found": 7}


def test_a_name_that_is_not_utf8_is_a_name(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    big_artifact(path, 1.0)
    assert read_big_artifact(path) == 1.0
    (path / "array.npy").unlink()
    with pytest.raises(IntegrityError) as caught:
        read_big_artifact(path)
    one_sentence(caught.value).encode()
    # The library that reads safetensors takes no such names, and says so.
    store.save_tensors(path / "x", tensors(1.0))
    with pytest.raises(IntegrityError, match="is not valid UTF-8"):
        store.load_tensors(path / "x")


def test_an_artifact_behind_a_link_is_replaced_where_it_is(tmp_path: Path) -> None:
    write_artifact(tmp_path / "there", 1.0)
    (tmp_path / "here").symlink_to(tmp_path / "there", target_is_directory=True)
    for value in (2.0, 3.0):
        write_artifact(tmp_path / "here", value)
        assert read_artifact(tmp_path / "there") == read_artifact(tmp_path / "here") == value
    assert (tmp_path / "here").is_symlink()
    assert not left_over(tmp_path)


# ------------------------------------------------------------------------------------ tensors and arrays


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (2, 3, 4)], ids=str)
def test_tensors_and_arrays_come_back_as_they_were(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(max(1, int(np.prod(shape)))).to(dtype)[: int(np.prod(shape))].reshape(shape)
    store.save_array(tmp_path / "a.npy", tensor)
    assert np.array_equal(np.load(tmp_path / "a.npy"), tensor.numpy())  # as NumPy reads it
    store.save_tensors(tmp_path / "a.safetensors", {"x": tensor})
    for read in (
        store.load_array(tmp_path / "a.npy"),
        store.load_array(tmp_path / "a.npy", mapped=True),
        store.load_tensors(tmp_path / "a.safetensors")["x"],
    ):
        assert read.dtype == dtype
        assert read.shape == shape
        assert torch.equal(read, tensor)


def test_bfloat16_goes_into_safetensors_only(tmp_path: Path) -> None:
    tensor = torch.rand(4).bfloat16()
    store.save_tensors(tmp_path / "a.safetensors", {"x": tensor})
    assert torch.equal(store.load_tensors(tmp_path / "a.safetensors")["x"], tensor)
    with pytest.raises(InputError, match=r"a \.npy file cannot hold bfloat16; convert it with \.float\(\) first\.$"):
        store.save_array(tmp_path / "a.npy", tensor)


def test_tensors_of_any_layout_are_written_row_by_row(tmp_path: Path) -> None:
    base = torch.rand(4, 6, requires_grad=True)
    for place, tensor in enumerate((base.T, base[:, ::2], base[1:3], base[:1].expand(5, 6))):
        store.save_array(tmp_path / f"{place}.npy", tensor)
        assert torch.equal(store.load_array(tmp_path / f"{place}.npy"), tensor.detach())
    # The same tensor twice, and views of one memory (tied weights; an example that was not changed).
    given = {"a": base, "b": base, "part": base[1:3], "turned": base.T}
    store.save_tensors(tmp_path / "a.safetensors", given)
    held = store.load_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(held[name], value.detach()) for name, value in given.items())


def test_a_mapped_array_can_be_written_to_without_changing_the_file(tmp_path: Path) -> None:
    store.save_array(tmp_path / "a.npy", torch.zeros(5))
    store.load_array(tmp_path / "a.npy", mapped=True).fill_(1.0)
    assert torch.equal(store.load_array(tmp_path / "a.npy"), torch.zeros(5))


# ----------------------------------------------------------------------------------------- fingerprints


def test_fingerprints_tell_apart_whatever_differs() -> None:
    x = torch.arange(6, dtype=torch.float32)
    sets: list[Mapping[str, Tensor]] = [
        {},
        {"a": x},
        {"b": x},
        {"a": x.view(2, 3)},
        {"a": x.view(3, 2)},
        {"a": x.double()},
        {"a": x.to(torch.int32)},
        {"a": x + 1e-6},
        {"a": x[:5]},
        {"a": x[:0]},
        {"a": x, "b": x},
        {"a": x[:3], "b": x[3:]},
        {"a": x.bfloat16()},
        {"a": x.bool()},
        {"a": torch.tensor(1.0)},
    ]
    found = [store.fingerprint_tensors(s) for s in sets] + [store.fingerprint_tensors({"a": x}, "more")]
    assert len(set(found)) == len(found)
    assert store.fingerprint_tensors({"b": x, "a": x}) == store.fingerprint_tensors({"a": x.clone(), "b": x})
    turned = torch.rand(3, 4).T
    assert store.fingerprint_tensors({"a": turned}) == store.fingerprint_tensors({"a": turned.contiguous()})
    assert store.fingerprint_config({"a": 1, "b": (2,)}) == store.fingerprint_config({"b": [2], "a": 1})
    assert store.fingerprint_config({"a": 1}) != store.fingerprint_config({"a": "1"})
    with pytest.raises(InputError, match="cannot be written as JSON"):
        store.fingerprint_config({"a": float("nan")})


# -------------------------------------------------------------------------------------------- refusals


def not_ours(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


def foreign_manifest(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text('{"name": "a web page", "files": {}}')


def with_notes(path: Path) -> None:
    write_artifact(path, 1.0)
    (path / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("make", "overwrite", "said"),
    [
        (lambda path: write_artifact(path, 1.0), False, "exists; choose another path or allow overwriting it"),
        (not_ours, False, "exists; choose another path"),
        (not_ours, True, "is not a whole artifact of ours, so it is not overwritten; remove it yourself"),
        (foreign_manifest, True, "is not a whole artifact of ours"),
        (with_notes, True, "holds 'notes.txt', which is no part of the artifact"),
        (lambda path: path.mkdir(), True, "is not a whole artifact of ours"),
        (lambda path: path.write_text("a file"), True, "is not a whole artifact of ours"),
    ],
)
def test_what_is_not_ours_is_never_overwritten(
    make: Callable[[Path], None], overwrite: bool, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "place"
    make(path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=said) as caught:
        write_artifact(path, 2.0, overwrite)
    one_sentence(caught.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("kind", "schema", "said"),
    [
        ("other", SCHEMA, "holds 'test', not a other artifact"),
        (KIND, SCHEMA + 1, "has schema 3, this version reads 4; make the test again"),
    ],
)
def test_an_artifact_of_another_kind_or_schema_is_refused(kind: str, schema: int, said: str, tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", 1.0)
    with pytest.raises(IntegrityError, match=said) as caught:
        store.read_manifest(tmp_path / "a", kind, schema)
    one_sentence(caught.value)


PLACES: dict[str, Callable[[Path], Path]] = {
    "a folder that is a file": lambda tmp: tmp / "file" / "x",
    "a folder": lambda tmp: tmp / "folder",
    "a name too long": lambda tmp: tmp / ("x" * 300),
    "no name": lambda _: Path("/"),
}
WRITERS: dict[str, Callable[[Path], None]] = {
    "bytes": lambda path: store.write_bytes(path, b"x"),
    "text": lambda path: store.write_text(path, "x"),
    "sealed": lambda path: store.write_sealed(path, {}),
    "tensors": lambda path: store.save_tensors(path, tensors(1.0)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("writer", WRITERS)
def test_where_nothing_can_be_written_one_sentence_says_so(writer: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "held").write_text("x")
    with pytest.raises(StorageError, match=r"^cannot write '") as caught:
        WRITERS[writer](PLACES[place](tmp_path))
    one_sentence(caught.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder", "held"]


@pytest.mark.parametrize("place", ["a folder that is a file", "a name too long"])
def test_where_no_artifact_can_be_written_one_sentence_says_so(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError) as caught:
        write_artifact(PLACES[place](tmp_path), 1.0)
    one_sentence(caught.value)


@contextmanager
def files_below(limit: int) -> Iterator[None]:
    """The kernel refuses to let a file grow beyond `limit` bytes, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


BIG: dict[str, tuple[Callable[[Path, float], None], Callable[[Path], Any]]] = {
    "bytes": (lambda path, v: store.write_bytes(path, bytes([int(v)]) * 100_000), lambda path: path.read_bytes()[0]),
    "sealed": (
        lambda path, v: store.write_sealed(path, {"v": v, "fill": "x" * 100_000}),
        lambda path: store.read_sealed(path)["v"],
    ),
    "tensors": (
        lambda path, v: store.save_tensors(path, {"x": torch.full((30_000,), v)}),
        lambda path: float(store.load_tensors(path)["x"].mean()),
    ),
}


def big_artifact(path: Path, value: float) -> None:
    with store.artifact(path, KIND, SCHEMA, {"value": value}, overwrite=True) as folder:
        store.save_array(folder / "array.npy", torch.full((30_000,), value))


def read_big_artifact(path: Path) -> float:
    return float(store.load_array(store.read_manifest(path, KIND, SCHEMA).file("array.npy")).mean())


BIG["artifact"] = big_artifact, read_big_artifact


@pytest.mark.parametrize("limit", [0, 1, 200, 4096, 99_999])
@pytest.mark.parametrize("what", BIG)
def test_a_full_disk_leaves_the_old_content(what: str, limit: int, tmp_path: Path) -> None:
    write, read = BIG[what]
    write(tmp_path / "x", 1.0)
    with files_below(limit), pytest.raises(StorageError, match=r"; what was finished before is kept\.$") as caught:
        write(tmp_path / "x", 2.0)
    assert "large" in one_sentence(caught.value)  # the kernel's words: "File too large"
    assert read(tmp_path / "x") == 1.0
    assert not left_over(tmp_path)
    write(tmp_path / "x", 2.0)
    assert read(tmp_path / "x") == 2.0


# ------------------------------------------------------------------------------- faults at every single step


class Faults:
    """Makes the n-th call of the steps that touch the disk fail, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.calls, self.fail_at, self.number = 0, 0, number
        for holder, name in (
            (os, "replace"),
            (os, "fsync"),
            (os, "open"),
            (Path, "open"),
            (Path, "mkdir"),
            (Path, "write_bytes"),
            (Path, "iterdir"),
        ):
            monkeypatch.setattr(holder, name, self._wrapped(getattr(holder, name)))

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at:
                raise OSError(self.number, os.strerror(self.number))
            return real(*args, **options)

        return step


WRITES: dict[str, tuple[Callable[[Path, float], None], Callable[[Path], Any]]] = {
    "bytes": (lambda path, v: store.write_bytes(path, bytes([int(v)]) * 100), lambda path: path.read_bytes()[0]),
    "sealed": (
        lambda path, v: store.write_sealed(path, {"v": v}),
        lambda path: store.read_sealed(path)["v"],
    ),
    "tensors": (
        lambda path, v: store.save_tensors(path, tensors(v)),
        lambda path: float(store.load_tensors(path)["a"][0, 0]),
    ),
    "artifact": (write_artifact, read_artifact),
}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("what", WRITES)
def test_a_fault_at_any_step_leaves_old_or_new_and_one_sentence(
    what: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = WRITES[what]
    path = tmp_path / "x"
    write(path, 1.0)
    faults = Faults(monkeypatch, number)
    n, kept, before = 0, 0, 1.0
    while True:
        n += 1
        faults.calls, faults.fail_at = 0, n
        refusal = raised(lambda n=n: write(path, float(n + 1)))  # type: ignore[misc]
        faults.fail_at = 0
        if refusal is None:
            break
        said = one_sentence(refusal)
        if isinstance(refusal, StorageError):
            assert said.endswith("; what was finished before is kept.")
            assert os.strerror(number) in said
        else:  # the old artifact could not be read to see whether it may be replaced
            assert isinstance(refusal, InputError)
            assert "so it is not overwritten" in said
        assert path.exists()  # for those who look before they read
        found = read(path)
        assert found in (before, n + 1)
        kept, before = kept + (found == before), found
        # The old artifact may stay aside until the next write; unfinished files never stay.
        assert {p.name for p in tmp_path.iterdir()} <= {"x", ".x.old"}
    assert n - 1 >= {"artifact": 15}.get(what, 5)  # so many steps were there to fail
    assert kept >= n - 5  # only the last steps, the flushing of the folder, come after the new name
    assert read(path) == n + 1
    write(path, 99.0)
    assert read(path) == 99
    assert not left_over(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_fault_while_reading_is_one_sentence(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_artifact(tmp_path / "a", 1.0)
    steps = {"open": Path.open, "stat": Path.stat, "read_bytes": Path.read_bytes, "lstat": Path.lstat}
    for name, real in steps.items():
        failed = 0
        for n in range(1, 40):
            calls = 0

            def step(*args: Any, real: Any = real, n: int = n, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == n:
                    raise OSError(number, os.strerror(number))
                return real(*args, **options)

            with monkeypatch.context() as patch:
                patch.setattr(Path, name, step)
                refusal = raised(lambda: read_artifact(tmp_path / "a"))
            if refusal is not None:
                failed += 1
                assert isinstance(refusal, (IntegrityError, StorageError))
                assert os.strerror(number) in one_sentence(refusal)
        assert failed, name
    assert read_artifact(tmp_path / "a") == 1.0


# ------------------------------------------------------------------------------------- killed at any moment


KILLED = r'''
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from robustknn import store
from robustknn.errors import RobustKNNError
torch.set_num_threads(1)

def write_file(path, value):
    store.write_bytes(path, bytes([value % 256]) * 200_000)

def read_file(path):
    data = path.read_bytes()
    assert len(data) == 200_000 and len(set(data)) == 1, (len(data), len(set(data)))
    return data[0]

def write_sealed(path, value):
    store.write_sealed(path, {"value": value, "fill": [value] * 5000}, pretty=False)

def read_sealed(path):
    content = store.read_sealed(path)
    assert content["fill"] == [content["value"]] * 5000
    return content["value"]

def write_artifact(path, value):
    with store.artifact(path, "test", 1, {"value": value}, overwrite=True) as folder:
        store.save_array(folder / "a.npy", torch.full((20_000,), float(value)))
        store.save_tensors(folder / "b.safetensors", {"b": torch.full((100,), float(value))})

def read_artifact(path):
    manifest = store.read_manifest(path, "test", 1)
    value = manifest.meta["value"]
    a, b = store.load_array(manifest.file("a.npy")), store.load_tensors(manifest.file("b.safetensors"))["b"]
    assert bool((a == value).all()) and bool((b == value).all())
    return value

KINDS = {"file": (write_file, read_file), "sealed": (write_sealed, read_sealed),
         "artifact": (write_artifact, read_artifact)}

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid

def at_random_moments(folder, rounds, seed):
    """SIGKILL a process that overwrites in a loop; what is there afterwards must be whole."""
    draw = random.Random(seed)
    for kind, (write, read) in KINDS.items():
        path = folder / kind
        began = time.monotonic()
        write(path, 0)
        once = time.monotonic() - began
        standing, between = 0, 0
        for turn in range(rounds):
            done, told = os.pipe()
            def work():
                for value in range(1, 200):
                    write(path, (standing + value) % 250)
                    os.write(told, b"x")
            pid, waited = child(work), draw.randrange(3)
            for _ in range(waited):
                os.read(done, 1)
            time.sleep(draw.uniform(0, 2 * once))
            os.kill(pid, signal.SIGKILL)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
            os.close(told)
            finished = waited + len(os.read(done, 1000))
            os.close(done)
            # What was finished counts, and of the next it is all or nothing.
            found = read(path)
            assert found in ((standing + finished) % 250, (standing + finished + 1) % 250), (found, standing, finished)
            standing = found
            between += bool(list(folder.glob(".*")))
        write(path, 7)
        assert read(path) == 7
        store.remove_partials(folder)
        assert [p.name for p in folder.iterdir()] == [kind], list(folder.iterdir())
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(kind, between)

def at_every_step(folder):
    """Die (os._exit: no cleaning up) just before the n-th step that touches the disk, for every n."""
    for kind, (write, read) in KINDS.items():
        path = folder / kind
        write(path, 1)
        n, value, new = 0, 1, 0
        while True:
            n += 1
            def work():
                count = 0
                def wrapped(real):
                    def step(*args, **options):
                        nonlocal count
                        count += 1
                        if count == n:
                            os._exit(9)
                        return real(*args, **options)
                    return step
                for holder, name in ((os, "replace"), (os, "fsync"), (os, "open"), (os, "rmdir"), (os, "unlink"),
                                     (Path, "open"), (Path, "mkdir"), (Path, "write_bytes"), (shutil, "rmtree")):
                    setattr(holder, name, wrapped(getattr(holder, name)))
                write(path, n % 250 + 2)
            status = os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1])
            assert status in (0, 9), status
            found = read(path)
            assert found in (value, n % 250 + 2), (found, value, n)
            new += found != value
            value = found
            if status == 0:
                assert found == n % 250 + 2
                break
        assert n > 5
        store.remove_partials(folder)
        assert [p.name for p in folder.iterdir()] == [kind], (n, list(folder.iterdir()))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(kind, n, new)

def without_rights(folder):
    """A folder that may be read but not written."""
    for kind, (write, _) in KINDS.items():
        write(folder / kind, 5)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    def work():
        if os.geteuid() == 0:
            os.setuid(65534)
        for kind, (write, read) in KINDS.items():
            assert read(folder / kind) == 5
            for target in (folder / kind, folder / "new" / kind):
                try:
                    write(target, 6)
                except store.StorageError as error:
                    assert "Permission denied" in str(error) and "\n" not in str(error), error
                else:
                    raise AssertionError(target)
            assert read(folder / kind) == 5
    status = os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1])
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    assert status == 0, status
    print("read", sorted(p.name for p in folder.iterdir()))

folder = Path(sys.argv[2])
{"moments": lambda: at_random_moments(folder, int(sys.argv[3]), int(sys.argv[4])),
 "steps": lambda: at_every_step(folder), "rights": lambda: without_rights(folder)}[sys.argv[1]]()
'''


def run_script(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("rounds", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_writer_killed_at_random_moments_leaves_a_whole_version(rounds: int, tmp_path: Path) -> None:
    lines = run_script("moments", tmp_path, rounds, 0).splitlines()
    assert [line.split()[0] for line in lines] == ["file", "sealed", "artifact"]
    assert sum(int(line.split()[1]) for line in lines)  # some kills came while something was half written


def test_a_writer_killed_before_any_step_leaves_a_whole_version(tmp_path: Path) -> None:
    assert [line.split()[0] for line in run_script("steps", tmp_path).splitlines()] == ["file", "sealed", "artifact"]


def test_a_read_only_folder_can_be_read() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        Path(folder).chmod(0o755)
        (Path(folder) / "closed").mkdir()
        assert run_script("rights", Path(folder) / "closed") == "read ['artifact', 'file', 'sealed']\n"


def test_a_reader_beside_a_writer_sees_whole_files_only(tmp_path: Path) -> None:
    path, stop, wrong = tmp_path / "x", threading.Event(), []
    store.write_bytes(path, b"\0" * 300_000)
    read = 0

    def watch() -> None:
        nonlocal read
        while not stop.is_set():
            data = path.read_bytes()
            read += 1
            if len(data) != 300_000 or len(set(data)) != 1:
                wrong.append(len(data))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for i in range(150):
            store.write_bytes(path, bytes([i]) * 300_000)
    finally:
        stop.set()
        watcher.join()
    assert read > 20
    assert not wrong


def stopped_between_the_renames(folder: Path) -> Path:
    """What a process that died between the two renames of an overwrite leaves: the old artifact, stepped aside."""
    write_artifact(folder / "a", 1.0)
    os.replace(folder / "a", folder / ".a.old")
    shutil.copytree(folder / ".a.old", folder / ".a.12345.partial")
    return folder / "a"


def test_the_old_artifact_is_taken_back_when_it_is_read(tmp_path: Path) -> None:
    path = stopped_between_the_renames(tmp_path)
    assert read_artifact(path) == 1.0
    store.remove_partials(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_the_old_artifact_is_not_lost_when_a_new_one_is_written_without_leave(tmp_path: Path) -> None:
    path = stopped_between_the_renames(tmp_path)
    with pytest.raises(InputError, match="exists; choose another path"):
        write_artifact(path, 2.0, overwrite=False)
    assert read_artifact(path) == 1.0
    write_artifact(path, 3.0)
    assert read_artifact(path) == 3.0


def test_what_a_process_that_died_after_the_renames_left_does_not_stop_the_next(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", 1.0)
    shutil.copytree(tmp_path / "a", tmp_path / ".a.old")
    (tmp_path / ".a.old" / "manifest.json").unlink()  # half deleted
    for value in (2.0, 3.0):
        write_artifact(tmp_path / "a", value)
        assert read_artifact(tmp_path / "a") == value
    assert not left_over(tmp_path)


def test_of_two_writers_of_a_new_artifact_the_later_is_refused(tmp_path: Path) -> None:
    def later() -> None:
        with store.artifact(tmp_path / "a", KIND, SCHEMA, {}):
            write_artifact(tmp_path / "quick", 1.0)  # another process, whose temporary folder has another name
            os.replace(tmp_path / "quick", tmp_path / "a")

    with pytest.raises(InputError, match="exists; choose another path"):
        later()
    assert read_artifact(tmp_path / "a") == 1.0
    assert not left_over(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="left out: needs /proc to name what is flushed")
def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that loses power after the rename must not find an empty file under the new name."""
    events: list[tuple[str, str]] = []
    replace, fsync = os.replace, os.fsync

    def noted_replace(source: Path, target: Path) -> None:
        events.append(("named", Path(target).name))
        replace(source, target)

    def noted_fsync(handle: int) -> None:
        events.append(("flushed", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    store.write_bytes(tmp_path / "file", b"x")
    partial = f".file.{os.getpid()}.partial"
    assert events == [("flushed", partial), ("named", "file"), ("flushed", tmp_path.name)]
    events.clear()
    write_artifact(tmp_path / "a", 1.0)
    folder = f".a.{os.getpid()}.partial"
    flushed = [name for what, name in events[: events.index(("named", "a"))] if what == "flushed"]
    assert {"array.npy", "tensors.safetensors", "more.json", folder} <= set(flushed)
    assert events[events.index(("named", "manifest.json")) - 1][0] == "flushed"
    assert flushed[-1] == folder  # the names in the folder, after the last of its files
    assert events[-1] == ("flushed", tmp_path.name)


def test_left_over_temporary_files_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "b" / ".x.1.partial").mkdir(parents=True)
    (tmp_path / "b" / ".x.1.partial" / ".y.1.partial").write_text("")
    (tmp_path / ".c.7.partial").write_text("")
    (tmp_path / "kept.partial").write_text("")
    (tmp_path / ".hidden").write_text("")
    (tmp_path / ".link.1.partial").symlink_to(tmp_path / "b", target_is_directory=True)
    store.remove_partials(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".hidden", "b", "kept.partial"]


# ------------------------------------------------------------------------------------------ damaged sealed JSON


WORDS = (
    b" ", b"\n", b"\t", b"\r\n", b"\xef\xbb\xbf", b"\xff", b"\x00", b"\\u0041", b"\xed\xa0\x80", b"\\ud800",
    b"NaN", b"Infinity", b"-0", b"1e999", b"0" * 50, b"9" * 5000, b"1.0", b"[" * 20, b"{\"a\":" * 2000, b"null",
    b"true", b'"value": 1,', b'"value":2,', b'"sha256": "",', b'"text": "other",', b",", b"]", b"}", b"//",
)  # fmt: skip


def refused(path: Path, data: bytes) -> None:
    put(path, data)
    with pytest.raises(IntegrityError) as caught:
        store.read_sealed(path)
    one_sentence(caught.value)


@pytest.mark.parametrize(
    "count", [10_000, pytest.param(200_000, marks=pytest.mark.slow)], ids=["10 thousand", "200 thousand"]
)
def test_no_damaged_sealed_file_is_accepted(count: int, tmp_path: Path) -> None:
    for place, pretty in enumerate((True, False)):
        whole = store.sealed_bytes(JSON | {"value": 1}, pretty=pretty)
        for data in mutations(whole, count // 2, seed=place, splices=WORDS):
            refused(tmp_path / "a.json", data)
    refused(tmp_path / "a.json", b"")


def test_no_flipped_bit_and_no_missing_end_is_accepted(tmp_path: Path) -> None:
    whole = store.sealed_bytes({"a": [1, 2.5, "é"]}, pretty=False)
    for data in (*flips(whole), *truncations(whole)):
        refused(tmp_path / "a.json", data)


SEALED = store.sealed_bytes({"a": 1, "b": [1, {"c": "text"}]}, pretty=False)


def resealed(content: str) -> bytes:
    """A file whose checksum fits its content, but which was not written by us."""
    digest = hashlib.sha256((content + "\n").encode()).hexdigest()
    return (content[:-1] + f',"sha256":"{digest}"' + "}\n").encode()


def test_resealing_makes_files_that_are_accepted_when_nothing_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(resealed('{"a":1,"b":[1,{"c":"text"}]}'))
    assert store.read_sealed(tmp_path / "a.json") == {"a": 1, "b": [1, {"c": "text"}]}


@pytest.mark.parametrize(
    "data",
    [
        SEALED.rstrip(b"\n"),
        SEALED + b"\n",
        b" " + SEALED,
        SEALED.replace(b",", b", "),
        SEALED.replace(b"text", b"\\u0074ext"),
        SEALED.replace(b'"a":1', b'"a":1.0'),
        SEALED.replace(b'"a":1', b'"a":1,"a":1'),
        SEALED.replace(b'"a":1', b'"a":2,"a":1'),
        SEALED.replace(b'{"c":"text"}', b'{"c":"text","c":"text"}'),
        SEALED.upper(),
        SEALED.decode().encode("utf-16"),
        SEALED.decode().encode("utf-32"),
        b"\xef\xbb\xbf" + SEALED,
        SEALED * 2,
        SEALED[1:],
        json.dumps(json.loads(SEALED), indent=2).encode(),
        json.dumps(dict(reversed(json.loads(SEALED).items()))).encode(),
        json.dumps([[k, v] for k, v in json.loads(SEALED).items()]).encode(),
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"a":NaN,"sha256":""}',
        b'{"a":' + b"9" * 100_000 + b',"sha256":""}',
        b'{"sha256":null}',
        b'{"sha256":{}}',
        b"{}",
        b"null",
        b"3",
        b'"sha256"',
        b'["sha256"]',
        b'[["sha256","x"]]',
        b"\x80\x04}.",
        resealed('{"a":NaN}'),
        resealed('{"a":1e999}'),
        resealed('{"a":1,"a":2}'),
        resealed('{"b":1,"a":2}'),
        resealed('{"a": 1}'),
        resealed('{"a":1.00}'),
        resealed('{"a":"\\u0041"}'),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_no_file_that_means_the_same_or_worse_is_accepted(data: bytes, tmp_path: Path) -> None:
    refused(tmp_path / "a.json", data)


def test_a_sealed_file_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none", tmp_path / "pipe", tmp_path / "none" / "none", tmp_path / ("x" * 300)):
        with pytest.raises(IntegrityError) as caught:
            store.read_sealed(path)
        one_sentence(caught.value)


# --------------------------------------------------------------------------------------------- damaged artifacts


NPY_WORDS = (
    b"O",
    b"|O",
    b"'<f4'",
    b"'>f4'",
    b"'<f8'",
    b"'<c16'",
    b"'|V9'",
    b"True",
    b"(50,)",
    b"(-1,)",
    b"(99999999999,)",
)
SAFE_WORDS = (b'"F64"', b'"F8_E4M3"', b'"BF16"', b"[0,240]", b"[0,99999999]", b"[[", b'"__metadata__":{},')


@pytest.mark.parametrize(
    "count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)], ids=["10 thousand", "100 thousand"]
)
def test_no_damaged_artifact_is_accepted(count: int, tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", 1.0)
    files = set()
    for path in damaged(tmp_path / "a", count, seed=0, splices=(*WORDS, *NPY_WORDS, *SAFE_WORDS)):
        files.add(path.name)
        with pytest.raises(IntegrityError) as caught:
            store.read_manifest(tmp_path / "a", KIND, SCHEMA)
        one_sentence(caught.value)
    assert files == {"array.npy", "tensors.safetensors", "more.json", "manifest.json"}
    assert read_artifact(tmp_path / "a") == 1.0


def unlink(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def hollow_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent.parent / "nowhere")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def other(path: Path) -> None:
    shutil.copy(path.parent.parent / "b" / path.name, path)


def neighbor(path: Path) -> None:
    names = sorted(p.name for p in path.parent.iterdir())
    shutil.copy(path.parent / names[names.index(path.name) - 1], path)


@pytest.mark.parametrize("name", ["array.npy", "tensors.safetensors", "more.json", "manifest.json"])
@pytest.mark.parametrize("damage", [unlink, empty, link, hollow_link, loop, folder, pipe, other, neighbor])
def test_missing_linked_and_exchanged_files_are_noticed(
    damage: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    write_artifact(tmp_path / "a", 1.0)
    write_artifact(tmp_path / "b", 2.0)
    damage(tmp_path / "a" / name)
    with pytest.raises(IntegrityError) as caught:
        store.read_manifest(tmp_path / "a", KIND, SCHEMA)
    one_sentence(caught.value)
    assert read_artifact(tmp_path / "b") == 2.0


def test_a_file_the_manifest_does_not_list_is_never_handed_out(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", 1.0)
    shutil.copy(tmp_path / "a" / "array.npy", tmp_path / "a" / "extra.npy")
    assert read_artifact(tmp_path / "a") == 1.0
    with pytest.raises(IntegrityError, match=r"lists no file 'extra\.npy'"):
        store.read_manifest(tmp_path / "a", KIND, SCHEMA).file("extra.npy")


def test_without_verification_a_wrong_size_is_still_noticed(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", 1.0)
    data = (tmp_path / "a" / "array.npy").read_bytes()
    with (
        replaced(tmp_path / "a" / "array.npy", data[:-1]),
        pytest.raises(IntegrityError, match="327 bytes where 328 were written"),
    ):
        store.read_manifest(tmp_path / "a", KIND, SCHEMA, verify=False)
    with replaced(tmp_path / "a" / "array.npy", data[:-1] + b"\x01"):
        store.read_manifest(tmp_path / "a", KIND, SCHEMA, verify=False)
        with pytest.raises(IntegrityError, match="is altered"):
            store.read_manifest(tmp_path / "a", KIND, SCHEMA)


SECRET = b"not for you"
SAID = {"bytes": len(SECRET), "sha256": hashlib.sha256(SECRET).hexdigest()}


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "../../{parent}/secret",
        "{tmp}/secret",
        "sub/secret",
        "./secret2",
        "sub/../secret2",
        "secret2/",
        "secret2/.",
        "..",
        ".",
        "",
        "/",
        "link",
        "folder",
        "no\0name",
        "x" * 300,
        "~/secret",
    ],
    ids=lambda name: ascii(name)[:20],
)
def test_a_manifest_with_a_valid_seal_cannot_point_elsewhere(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    (path / "sub").mkdir(parents=True)
    (path / "folder").mkdir()
    for place in (tmp_path / "secret", path / "secret2", path / "sub" / "secret"):
        place.write_bytes(SECRET)
    (path / "link").symlink_to(tmp_path / "secret")
    name = name.format(tmp=tmp_path, parent=tmp_path.name)
    header = {"format": store.FORMAT, "kind": KIND, "schema": SCHEMA, "version": "0", "meta": {}}
    store.write_sealed(path / "manifest.json", {**header, "files": {name: SAID}})
    with pytest.raises(IntegrityError) as caught:
        store.read_manifest(path, KIND, SCHEMA)
    one_sentence(caught.value)
    # The same with an honest name is accepted, so that it is the name that was refused.
    store.write_sealed(path / "manifest.json", {**header, "files": {"secret2": SAID}})
    assert store.read_manifest(path, KIND, SCHEMA).file("secret2").read_bytes() == SECRET


GOOD: dict[str, Any] = {"format": "robustknn", "kind": KIND, "schema": SCHEMA, "meta": {}, "files": {"f": SAID}}


@pytest.mark.parametrize(
    "change",
    [
        *({key: value} for key in GOOD for value in (None, 0, "x", [], ["f"], {"a": 1}) if value != GOOD[key]),
        *({"files": {"f": said}} for said in (None, [], "x", {}, {"bytes": 11}, {**SAID, "bytes": "11"})),
        {"files": {"f": {**SAID, "sha256": None}}},
        {"files": {"f": {**SAID, "sha256": SAID["sha256"].upper()}}},  # type: ignore[attr-defined]
        {"files": {"f": SAID, "g": SAID}},
    ],
    ids=repr,
)
def test_a_manifest_with_a_valid_seal_and_wrong_contents_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(SECRET)
    store.write_sealed(tmp_path / "manifest.json", GOOD)
    assert store.read_manifest(tmp_path, KIND, SCHEMA).files == {"f": SAID}
    if change == {"meta": {"a": 1}}:
        assert store.read_manifest(tmp_path, KIND, SCHEMA).meta == {}
        return
    store.write_sealed(tmp_path / "manifest.json", {**GOOD, **change})
    with pytest.raises(IntegrityError) as caught:
        store.read_manifest(tmp_path, KIND, SCHEMA)
    one_sentence(caught.value)


@pytest.mark.parametrize("missing", GOOD)
def test_a_manifest_that_lacks_something_is_refused(missing: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(SECRET)
    store.write_sealed(tmp_path / "manifest.json", {k: v for k, v in GOOD.items() if k != missing})
    with pytest.raises(IntegrityError) as caught:
        store.read_manifest(tmp_path, KIND, SCHEMA)
    one_sentence(caught.value)


@pytest.mark.parametrize("path", ["none", "file", "folder"])
def test_what_holds_no_artifact_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IntegrityError) as caught:
        store.read_manifest(tmp_path / path, KIND, SCHEMA)
    one_sentence(caught.value)


# ---------------------------------------------------------------------- damaged arrays and tensors, no manifest


@contextmanager
def memory_below(more: int) -> Iterator[None]:
    """The kernel refuses this process more than so many bytes beyond what it has, touched or not."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def loaded(load: Callable[[Path], Any], path: Path) -> bool:
    """Whether a file could be read; if not, the reason is one sentence."""
    read: Any = None

    def work() -> None:
        nonlocal read
        read = load(path)

    refusal = raised(work)
    if refusal is not None:
        assert isinstance(refusal, IntegrityError)
        one_sentence(refusal)
        return False
    for tensor in read.values() if isinstance(read, dict) else [read]:
        tensor.clone()  # every byte is there
    return True


LOADS: dict[str, Callable[[Path], Any]] = {
    "array": store.load_array,
    "mapped": lambda path: store.load_array(path, mapped=True),
    "tensors": store.load_tensors,
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="left out: only Linux says and limits memory so")
@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", LOADS)
def test_a_damaged_file_of_numbers_gives_a_tensor_or_one_sentence(what: str, count: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if what == "tensors":
        store.save_tensors(path, tensors(1.0))
    else:
        store.save_array(path, torch.rand(6, 5))
    whole = path.read_bytes()
    accepted = 0
    with memory_below(300 << 20):
        for data in mutations(whole, count, seed=len(what), splices=(*NPY_WORDS, *SAFE_WORDS, *WORDS)):
            put(path, data)
            accepted += loaded(LOADS[what], path)
        for data in truncations(whole):
            put(path, data)
            assert not loaded(LOADS[what], path)
    assert 0 < accepted < count  # damage to the numbers themselves cannot be seen without the manifest


def npy(header: str, size: int = 100, version: bytes = b"\x01\x00", length: int | None = None) -> bytes:
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    layout = "<H" if version == b"\x01\x00" else "<I"
    return b"\x93NUMPY" + version + struct.pack(layout, length or len(text)) + text + bytes(size)


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (25,), }"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="left out: only Linux says and limits memory so")
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00",
        b"PK\x03\x04" + bytes(100),
        b"PK\x05\x06" + bytes(18),
        b"\x80\x04\x95" + bytes(100),
        npy(HEADER, 99),
        npy(HEADER, 101),
        npy(HEADER, 0),
        npy(HEADER, length=10),
        npy(HEADER, length=60_000),
        npy(HEADER, version=b"\x02\x00"),
        npy(HEADER, version=b"\x02\x00", length=(1 << 32) - 1),
        npy(HEADER, version=b"\x03\x00"),
        npy(HEADER, version=b"\x09\x00"),
        *(
            npy(HEADER.replace("25,", shape))
            for shape in (
                "25", "5, 5,", "-25,", "-5, -5", "25.0,", "True,", "250_0,", "10**9,", "1000000000000,", "0, 9" * 40,
                "99999999999999999999999,", "4294967296, 4294967296, 4294967296", "'25',", "25, 1j", "(" * 5000,
                "-" * 9000 + "1,", "9" * 9000 + ",", "__import__('os').abort(),", "0, 999999999999999999",
            )
        ),
        *(
            npy(HEADER.replace("'<f4'", descr))
            for descr in (
                "'|O'", "'O'", "'>f4'", "'<f3'", "'<f16'", "'|V4'", "'|S4'", "'<U1'", "'<M8'", "'<m8'", "''", "None",
                "4", "'|i4,|i4'", "[('a', '<f4')]", "'<f4', 'descr': '<f4'", "'<f99'", "'<i0'", "'|V0'", "'|S0'",
            )
        ),
        npy(HEADER.replace("False", "True")),
        npy(HEADER.replace("False", "0")),
        npy(HEADER.replace("}", "")),
        npy(HEADER + "#"),
        npy("{" * 9000),
        npy("'" * 3),
        npy("\\"),
        npy("("),
    ],
    ids=lambda data: repr(data[10:70]) if isinstance(data, bytes) else None,
)  # fmt: skip
def test_no_crafted_array_harms(data: bytes, mapped: bool, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(data)
    with memory_below(300 << 20):
        assert not loaded(lambda path: store.load_array(path, mapped), tmp_path / "a.npy")


def test_the_crafted_array_is_read_when_nothing_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(npy(HEADER))
    assert torch.equal(store.load_array(tmp_path / "a.npy"), torch.zeros(25))


def safe(header: str, size: int = 16, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header.encode() + bytes(size)


def entry(dtype: str = "F32", shape: str = "[4]", offsets: str = "[0,16]") -> str:
    return f'{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}'


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="left out: only Linux says and limits memory so")
@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(7),
        bytes(8),
        safe(entry(), length=(1 << 64) - 1),
        safe(entry(), length=1 << 40),
        safe(entry(), length=99_000_000),
        safe(entry(), 15),
        safe(entry(), 17),
        safe("{"),
        safe("[]"),
        safe("null"),
        safe("[" * 5000),
        safe('{"x":' * 5000),
        *(
            safe(entry(shape=shape))
            for shape in ("[5]", "[-4]", "[4.0]", "4", '["4"]', "[4294967296,4294967296,4294967296]", "[1e9]", "[[4]]")
        ),
        *(
            safe(entry(offsets=offsets))
            for offsets in ("[0,17]", "[0,15]", "[16,0]", "[-16,0]", "[0,18446744073709551615]", "[0]", "[0,16,16]")
        ),
        *(safe(entry(dtype=dtype)) for dtype in ("O", "f4", "F33", "", "F64", "F16")),
        safe('{"x":1}'),
        safe('{"x":{}}'),
    ],
    ids=lambda data: repr(data[8:60]),
)
def test_no_crafted_safetensors_file_harms(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with memory_below(300 << 20):
        assert not loaded(store.load_tensors, tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4", "U16", "C64", "BOOL"])
def test_rare_element_types_of_safetensors_give_a_tensor_or_one_sentence(dtype: str, tmp_path: Path) -> None:
    for size in (1, 2, 4, 8, 16, 32):
        (tmp_path / "a.safetensors").write_bytes(safe(entry(dtype=dtype, shape=f"[{size}]")))
        loaded(store.load_tensors, tmp_path / "a.safetensors")


def test_the_crafted_safetensors_file_is_read_when_nothing_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(safe(entry()))
    assert torch.equal(store.load_tensors(tmp_path / "a.safetensors")["x"], torch.zeros(4))


def test_files_of_numbers_that_are_no_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        for load in LOADS.values():
            with pytest.raises(IntegrityError) as caught:
                load(path)
            one_sentence(caught.value)


def test_damage_is_the_same_in_every_run_and_always_damage() -> None:
    whole = random.Random(0).randbytes(300)
    made = list(mutations(whole, 500, seed=1, splices=(b"abc",)))
    assert made == list(mutations(whole, 500, seed=1, splices=(b"abc",)))
    assert made != list(mutations(whole, 500, seed=2, splices=(b"abc",)))
    assert whole not in made
    assert len(set(map(len, made))) > 50
    assert len(set(flips(whole))) == 2400
    assert sum(1 for _ in truncations(whole)) == 300
    assert all(data for data in mutations(b"", 20, seed=0))


@pytest.mark.skipif(os.name == "nt", reason="left out: permissions are those of POSIX")
def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_bytes(b"")
    store.save_tensors(tmp_path / "tensors.safetensors", {"a": torch.ones(2)})
    store.write_sealed(tmp_path / "sealed.json", {"a": 1})
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
