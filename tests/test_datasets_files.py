"""The readers of files: IDX, CIFAR's pickles and archives, SVHN, image folders; damaged and malicious ones too."""

from __future__ import annotations

import gzip
import math
import os
import pickle
import pickletools
import random
import struct
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robustknn.datasets import cifar, load
from robustknn.datasets.folder import image_folder
from robustknn.datasets.idx import read_idx
from robustknn.datasets.imagenette import CLASSES
from robustknn.datasets.mnist import FILES, mnist
from robustknn.datasets.pickles import read_pickle
from robustknn.datasets.svhn import svhn
from robustknn.errors import InputError, IntegrityError

MIB = 1 << 20
GENERATOR = np.random.default_rng(0)


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def mutations(whole: bytes, count: int, seed: int, splices: tuple[bytes, ...] = ()) -> Iterator[bytes]:
    """Flipped, overwritten, truncated, spliced, doubled and cut copies of a file."""
    draw = random.Random(seed)
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 1, 2, 5, 20))):
            at = draw.randrange(len(data)) if data else 0
            kind = draw.randrange(7)
            if kind == 0:
                data[at : at + 1] = bytes([draw.randrange(256)])
            elif kind == 1 and data:
                data[at] ^= 1 << draw.randrange(8)
            elif kind == 2:
                del data[at:]
            elif kind == 3:
                del data[at : at + draw.randrange(1, 9)]
            elif kind == 4:
                data[at:at] = data[draw.randrange(len(data) + 1) :][: draw.randrange(1, 40)]
            elif kind == 5:
                data[at : at + 4] = draw.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\0"))
            elif splices:
                data[at:at] = draw.choice(splices)
        yield bytes(data)


# ------------------------------------------------------------------------------------------------ IDX


def idx(array: np.ndarray) -> bytes:
    """An array of bytes in the IDX format, written by its published description."""
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IMAGES = GENERATOR.integers(0, 256, (20, 28, 28), dtype=np.uint8)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_is_read(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{ending}"
    path.write_bytes(gzip.compress(idx(IMAGES)) if ending else idx(IMAGES))
    assert np.array_equal(read_idx(path, 3).numpy(), IMAGES)


HEADER = b"\0\0\x08\x01"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "begins with ''"),
        (b"\0\0\x09\x01\0\0\0\x01\x05", "begins with '00 00 09 01'"),
        (idx(IMAGES), "begins with '00 00 08 03'"),
        (b"\x89PNG\r\n", "begins with '89 50 4e 47'"),
        (HEADER + b"\0\0", "ends inside its header"),
        (HEADER + b"\0\0\0\0", r"announces the shape \(0,\)"),
        (HEADER + b"\xff\xff\xff\xff" + b"12", r"announces the shape \(4294967295,\)"),
        (HEADER + b"\x7f\xff\xff\xff" + b"12", "2 of 2147483647 bytes are there"),
        (HEADER + b"\0\0\0\x03" + b"12", "2 of 3 bytes"),
        (HEADER + b"\0\0\0\x03" + b"1234", "goes on after the 3 bytes"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_of_another_shape_is_refused(content: bytes, said: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{ending}"
    path.write_bytes(gzip.compress(content) if ending else content)
    with memory_below(3 * MIB), pytest.raises(IntegrityError, match=said):
        read_idx(path, 1)


def test_what_unpacks_to_more_than_announced_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(HEADER + struct.pack(">I", 1000))
        for _ in range(64):
            file.write(bytes(MIB))
    with memory_below(3 * MIB), pytest.raises(IntegrityError, match="goes on after the 1000 bytes"):
        read_idx(path, 1)


def test_no_damage_to_an_idx_file_goes_unseen_but_in_plain_pixels(tmp_path: Path) -> None:
    plain, zipped = tmp_path / "file", tmp_path / "file.gz"
    whole = idx(IMAGES[:3])
    refused = 0
    with memory_below(40 * MIB):
        for data in mutations(whole, 3000, seed=1):
            plain.write_bytes(data)
            # Independent judgement: whole when the header is one of three dimensions that multiply to what follows.
            shape = struct.unpack(">3I", data[4:16]) if data[:4] == b"\0\0\x08\x03" and len(data) >= 16 else (0,)
            if math.prod(shape) == len(data) - 16 > 0:
                assert read_idx(plain, 3).numpy().tobytes() == data[16:]
            else:
                refused += 1
                with pytest.raises(IntegrityError):
                    read_idx(plain, 3)
        for data in mutations(gzip.compress(whole, mtime=0), 3000, seed=2):
            zipped.write_bytes(data)
            try:
                assert read_idx(zipped, 3).numpy().tobytes() == whole[16:]
            except IntegrityError:
                refused += 1
    assert 2000 < refused < 6000


def write_mnist(folder: Path, ending: str = "") -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True)
    labels = np.arange(20, dtype=np.uint8) % 10
    for name, content in zip(FILES, (IMAGES, labels, IMAGES[:12], labels[:12]), strict=True):
        (folder / f"{name}{ending}").write_bytes(gzip.compress(idx(content)) if ending else idx(content))
    return IMAGES, labels


@pytest.mark.parametrize("folder", ["MNIST/raw", "mnist", ""])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_mnist_is_found(folder: str, ending: str, tmp_path: Path) -> None:
    images, labels = write_mnist(tmp_path / "root" / folder, ending)
    source = load("mnist", root=tmp_path / "root", protocol="published")
    assert np.array_equal((source.train.batch(torch.arange(20)) * 255).round().numpy()[:, 0], images)
    assert source.train.labels.tolist() == labels.tolist()
    assert len(source.test) == 12


def test_the_missing_file_of_mnist_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / FILES[2]).unlink()
    with pytest.raises(InputError, match=f"'{FILES[2]}' or '{FILES[2]}.gz' is not in"):
        load("mnist", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (FILES[1], np.zeros(19, np.uint8), "has 20 images, .* 19 labels"),
        (FILES[1], np.full(20, 10, np.uint8), "holds the label 10, outside 0..9"),
    ],
)
def test_mnist_files_that_disagree_are_refused(name: str, content: np.ndarray, said: str, tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / name).write_bytes(idx(content))
    with pytest.raises(IntegrityError, match=said):
        mnist(tmp_path)


# ---------------------------------------------------------------------------------------------- CIFAR

ROWS = GENERATOR.integers(0, 256, (20, 3072), dtype=np.uint8)


def python2_batch(rows: np.ndarray, labels: list[int], dtype: bytes = b"u1") -> bytes:
    """A batch as Python 2 and NumPy 1 wrote it (pickle protocol 2), instruction by instruction."""

    def text(s: bytes) -> bytes:
        return b"U" + bytes([len(s)]) + s if len(s) < 256 else b"T" + struct.pack("<i", len(s)) + s

    shape = b"".join(b"M" + struct.pack("<H", n) for n in rows.shape) + b"\x86"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x06cnumpy\nndarray\nq\x07K\x00\x85U\x01b\x87Rq\x08(K\x01"
        + shape
        + b"cnumpy\ndtype\nq\x09"
        + text(dtype)
        + b"K\x00K\x01\x87Rq\x0a(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + text(rows.tobytes())
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    names = b"]r\x00\x01\x00\x00(" + b"".join(text(b"image_%d.png" % i) for i in range(len(labels))) + b"e"
    pairs = text(b"batch_label") + text(b"training batch 1 of 5") + text(b"labels") + numbers + text(b"data") + array
    return b"\x80\x02}q\x01(" + pairs + text(b"filenames") + names + b"u."


LABELS = [i % 10 for i in range(20)]
BATCH = python2_batch(ROWS, LABELS)
META = pickle.dumps({"label_names": [f"class {i}" for i in range(10)], "num_vis": 3072}, protocol=2)


def test_the_hand_written_batch_is_a_real_one() -> None:
    real = pickle.loads(BATCH, encoding="bytes")  # noqa: S301
    assert real[b"labels"] == LABELS
    assert np.array_equal(real[b"data"], ROWS)
    assert real[b"filenames"][3] == b"image_3.png"


@pytest.mark.parametrize("data", [BATCH, META], ids=["batch", "meta"])
def test_pickles_are_read_as_pickle_reads_them(data: bytes) -> None:
    mine = read_pickle(data, "file")
    real = {k if isinstance(k, str) else k.decode(): v for k, v in pickle.loads(data, encoding="bytes").items()}  # noqa: S301
    assert list(mine) == list(real)
    for key, value in real.items():
        assert type(mine[key]) is type(value)
        assert np.array_equal(mine[key], value) if isinstance(value, np.ndarray) else mine[key] == value


@pytest.mark.parametrize("protocol", [3, 4])
def test_pickles_made_again_today_are_read(protocol: int) -> None:
    """Later protocols, and NumPy's new module names."""
    content = {b"data": ROWS, "labels": LABELS, "nested": [(1, 300, -5, b"x"), {"a": None}, [True, False], ()]}
    data = pickle.dumps(content, protocol=protocol)
    mine = read_pickle(data, "file")
    assert np.array_equal(mine.pop("data"), ROWS)
    assert mine == {"labels": LABELS, "nested": content["nested"]}
    old, new = b"numpy.core.multiarray", b"numpy._core.multiarray"
    assert (old in data) or (new in data)


def write_cifar(folder: Path, **changed: bytes) -> None:
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(changed.get(name, BATCH))
    (folder / "batches.meta").write_bytes(changed.get("meta", META))


def pack(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10(packed: bool, tmp_path: Path) -> None:
    folder = tmp_path / "root" / "cifar-10-batches-py"
    write_cifar(folder, data_batch_2=python2_batch(255 - ROWS, LABELS[::-1]))
    if packed:
        (tmp_path / "packed").mkdir()
        pack(folder, tmp_path / "packed" / "cifar-10-python.tar.gz")
    source = load("cifar10", root=tmp_path / ("packed" if packed else "root"), protocol="published")
    assert (len(source.train), len(source.test), source.class_names[3]) == (100, 20, "class 3")
    x = (source.train.batch(torch.arange(100)) * 255).round().numpy().astype(np.uint8)
    assert np.array_equal(x[20:40].reshape(20, -1), 255 - ROWS)
    assert x[0, 1, 2, 3] == ROWS[0, 1024 + 2 * 32 + 3]  # green, third row, fourth column
    assert source.train.labels.tolist() == LABELS + LABELS[::-1] + LABELS * 3


def test_cifar100(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rows = GENERATOR.integers(0, 256, (200, 3072), dtype=np.uint8)
    fine = [i % 100 for i in range(200)]
    batch = pickle.dumps({"data": rows, "fine_labels": fine, "coarse_labels": [0] * 200}, protocol=4)
    (folder / "train").write_bytes(batch)
    (folder / "test").write_bytes(batch)
    names = {"fine_label_names": [f"f{i}" for i in range(100)], "coarse_label_names": [f"c{i}" for i in range(20)]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    source = load("cifar100", root=tmp_path, protocol="published")
    assert source.n_classes == 100
    assert source.class_names[42] == "f42"
    assert source.train.labels.tolist() == fine


NO_LIST = pickle.dumps({"data": ROWS}, protocol=4)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data_batch_3": NO_LIST}, r"data_batch_3' has no list 'labels' of 20"),
        ({"test_batch": python2_batch(ROWS, LABELS[:-1])}, "has no list 'labels' of 20"),
        ({"test_batch": python2_batch(ROWS, [10, *LABELS[1:]])}, "holds the label 10, outside 0..9"),
        ({"test_batch": python2_batch(ROWS[:, :-1], LABELS)}, "has no array 'data'"),
        ({"test_batch": META}, "has no array 'data'"),
        ({"meta": BATCH}, "has no list 'label_names' of 10"),
        ({"meta": b""}, "is truncated, altered or not a CIFAR file"),
        ({"meta": META + b"."}, "1 bytes after it"),
        ({"meta": b"K\x05."}, "is truncated, altered"),
        ({"data_batch_1": python2_batch(ROWS, LABELS, dtype=b"O8")}, "a call that makes no array of bytes"),
        ({"data_batch_1": pickle.dumps({"data": ROWS.T.copy().T}, protocol=4)}, "by rows"),
    ],
)
def test_cifar_files_that_cannot_be_are_refused(changed: dict[str, bytes], said: str, tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-py", **changed)
    with pytest.raises(IntegrityError, match=said):
        cifar.cifar10(tmp_path)


def test_damaged_archives_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, archive = tmp_path / "x" / "cifar-10-batches-py", tmp_path / "cifar-10-python.tar.gz"
    write_cifar(folder)
    pack(folder, archive)
    whole = archive.read_bytes()
    for data in mutations(whole, 300, seed=3):
        archive.write_bytes(data)
        try:
            split = cifar.cifar10(tmp_path).train
            assert np.array_equal(split._items.data[:20].flatten(1), ROWS)  # type: ignore[attr-defined]
        except IntegrityError:
            continue
    for data in mutations(gzip.decompress(whole), 100, seed=6):  # damage that the checksum does not see
        archive.write_bytes(gzip.compress(data, compresslevel=1))
        try:
            assert cifar.cifar10(tmp_path).train.shape == (3, 32, 32)
        except IntegrityError:
            continue
    (folder / "test_batch").unlink()
    pack(folder, archive)
    with pytest.raises(IntegrityError, match="lacks 'cifar-10-batches-py/test_batch'"):
        cifar.cifar10(tmp_path)
    archive.write_bytes(whole)
    monkeypatch.setattr(cifar, "MAX_BYTES", 100_000)
    with pytest.raises(IntegrityError, match="unpacks to more"):
        cifar.cifar10(tmp_path)


# -------------------------------------------------------------------------------------- foreign code


class Runs:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def malicious(canary: str) -> dict[str, Any]:
    """What an attacker would put in a CIFAR file, by the name that it asks for."""
    return {
        "posix.system" if os.name == "posix" else "nt.system": Runs(os.system, f"echo > {canary}"),
        "builtins.eval": Runs(eval, f"open({canary!r}, 'w')"),
        "builtins.exec": Runs(exec, f"open({canary!r}, 'w')"),
        "io.open": Runs(open, canary, "w"),
        "builtins.getattr": Runs(getattr, "text", "upper"),
        "numpy.save": Runs(np.save, canary, 3),
        "numpy.memmap": Runs(np.memmap, canary, "u1", "w+", 0, (3,)),
        "numpy.core.multiarray.fromfile": b"cnumpy.core.multiarray\nfromfile\n(U\x09/etc/hosttR.",
        "numpy.core.multiarray.scalar": b"cnumpy.core.multiarray\nscalar\n.",
        "numpy.core.numeric._frombuffer": b"cnumpy.core.numeric\n_frombuffer\n.",
        "numpy.ndarray.tofile": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        "copyreg._reconstructor": b"ccopyreg\n_reconstructor\n(cnumpy\nndarray\nc__builtin__\nobject\nNtR.",
        "__main__.": b"c__main__\n\n.",
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", malicious(""))
def test_foreign_code_is_refused_and_not_run(name: str, protocol: int, tmp_path: Path) -> None:
    canary = tmp_path / "canary.npy"
    payload = malicious(str(canary))[name]
    if isinstance(payload, bytes):
        data, shown = payload, name
    else:
        data, shown = pickle.dumps({"data": payload}, protocol=protocol), name.rpartition(".")[2]
    for spoiled in (data, BATCH[:-2] + data.removeprefix(b"\x80\x02").removeprefix(b"\x80\x04")):
        with pytest.raises(IntegrityError, match=f"asks for '.*{shown}', which no CIFAR file needs"):
            read_pickle(spoiled, "file")
    assert not canary.exists()
    if name in ("builtins.exec", "io.open", "numpy.save"):  # the payloads are live
        pickle.loads(data)  # noqa: S301
        assert canary.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"}T\xff\xff\xff\x7f.",  # texts of 2^31 bytes, and of negative length
        b"}T\xff\xff\xff\xff.",
        b"}T\xfb\xff\xff\xff.",  # back to itself, for ever
        b"}B\xff\xff\xff\xff.",
        b"}X\xff\xff\xff\xff.",
        b"}\x8e\xff\xff\xff\xff\xff\xff\xff\x00.",  # a bytearray of 2^56
        b"}(" + b"K\x01" + b"\x85" * 100_000 + b"Nu.",  # a key whose hash overflows the stack
        b"}U\x01a" + b"]" * 100_000 + b"a" * 99_999 + b"s",  # deep nesting, and no end
        b"}U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btRs.",  # never filled
        b"}U\x04datacnumpy\nndarray\n(J\xff\xff\xff\x7ftRs.",  # np.ndarray((2^31 − 1,))
        b"}U\x04datacnumpy\ndtype\n(U\x01OtRs.",  # objects
        b"}U\x04datacnumpy\ndtype\n}U\x01aK\x01sbs.",  # attributes set on a type
        BATCH.replace(b"M\x14\x00", b"J\xff\xff\xff\x7f", 1),  # a shape of 2^31 − 1 rows
        BATCH.replace(b"M\x14\x00", b"J\xff\xff\xff\xff", 1),  # a negative one
        b"(((((eeeee.",
        b"}.}.",
        b"\x85.",
        b"0" * 10,
    ],
)
def test_absurd_pickles_are_refused_at_once(data: bytes) -> None:
    with memory_below(30 * MIB), pytest.raises(IntegrityError, match="is truncated, altered or not a CIFAR file"):
        read_pickle(data, "file")


def test_a_memo_of_2_to_32_places_takes_no_memory() -> None:
    with memory_below(MIB):
        assert read_pickle(b"}r\xff\xff\xff\xff.", "file") == {}


WATCHED = {"exec", "compile", "import", "open", "os.system", "subprocess.Popen", "pickle.find_class"}
watching: list[str] | None = None


def watch(event: str, _: tuple[Any, ...]) -> None:
    if watching is not None and event in WATCHED:
        watching.append(event)


def test_no_damage_to_a_pickle_runs_or_breaks_anything() -> None:
    """Thousands of damaged files give a dictionary or our error, and the interpreter saw no import, call or open."""
    global watching  # noqa: PLW0603  # an audit hook cannot be taken back, so it is switched
    sys.addaudithook(watch)
    codes = tuple(opcode.code.encode("latin-1") for opcode in pickletools.opcodes)
    splices = (*codes, *(v if isinstance(v, bytes) else pickle.dumps(v, 2) for v in malicious("canary").values()))
    small = [python2_batch(ROWS[:2, :9], [3, 7]), META, pickle.dumps({"data": ROWS[:2, :9], "labels": [1, 2]}, 4)]
    with pytest.raises(IntegrityError):
        read_pickle(b"", "file")
    watching = []
    read = refused = 0
    with memory_below(30 * MIB):
        for seed, whole in enumerate(small):
            for data in mutations(whole, 5000, seed, splices):
                try:
                    assert type(read_pickle(data, "file")) is dict
                    read += 1
                except IntegrityError as error:
                    assert "\n" not in str(error)  # noqa: PT017
                    refused += 1
    seen, watching = watching, None
    assert seen == []
    assert read > 300
    assert refused > 9000


# ----------------------------------------------------------------------------------------------- SVHN


def write_svhn(folder: Path, n: int = 30, compress: bool = True, **changed: Any) -> tuple[np.ndarray, np.ndarray]:
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    X = GENERATOR.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
    y = (np.arange(n, dtype=np.uint8) % 10 + 1)[:, None]
    for name in ("train_32x32.mat", "test_32x32.mat"):
        content = {"X": X, "y": y, **changed}
        content = {key: value for key, value in content.items() if value is not None}
        savemat(folder / name, content, do_compression=compress)
    return X, y


@pytest.mark.parametrize("folder", ["svhn", ""])
@pytest.mark.parametrize("compress", [True, False])
def test_svhn(folder: str, compress: bool, tmp_path: Path) -> None:
    X, y = write_svhn(tmp_path / folder, compress=compress)
    source = load("svhn", root=tmp_path, protocol="published")
    assert source.train.labels.tolist() == [int(v) if v < 10 else 0 for v in y[:, 0]]
    x = source.test.batch(torch.arange(30))
    assert x.shape == (30, 3, 32, 32)
    for n, c, h, w in GENERATOR.integers(0, (30, 3, 32, 32), (200, 4)):
        assert x[n, c, h, w] == np.float32(X[h, w, c, n]) / np.float32(255)


@pytest.mark.parametrize(
    "changed",
    [
        {"y": None},
        {"X": np.zeros((32, 32, 3, 30))},
        {"X": np.zeros((32, 32, 30), np.uint8)},
        {"X": np.zeros((31, 32, 3, 30), np.uint8)},
        {"y": np.ones((29, 1))},
        {"y": np.zeros((30, 1))},
        {"y": np.full((30, 1), 11)},
    ],
)
def test_svhn_files_that_cannot_be_are_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    write_svhn(tmp_path, **changed)
    with pytest.raises(IntegrityError, match=r"train_32x32.mat' .*get it again"):
        svhn(tmp_path)


def test_damaged_svhn_files_are_refused(tmp_path: Path) -> None:
    write_svhn(tmp_path, n=10)
    path = tmp_path / "train_32x32.mat"
    whole = path.read_bytes()
    refused = 0
    for data in mutations(whole, 200, seed=4):
        path.write_bytes(data)
        try:
            svhn(tmp_path)
        except IntegrityError:
            refused += 1
    assert refused > 100


# --------------------------------------------------------------------------------------- image folder


def write_images(
    folder: Path, count: int, size: tuple[int, int] = (6, 4), ending: str = "png", mode: str = "RGB"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = GENERATOR.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i:03d}.{ending}")


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1) / np.float32(255)


@pytest.mark.parametrize("tested", ["test", "val"])
def test_divided_image_folder(tested: str, tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "dog", 3)
    write_images(tmp_path / "train" / "cat", 2, ending="BMP", mode="L")
    write_images(tmp_path / tested / "dog", 2, ending="webp")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    source = load(tmp_path, protocol="published")
    assert source.class_names == ("cat", "dog")
    assert source.name == tmp_path.name
    assert source.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert source.test.labels.tolist() == [1, 1]
    assert source.train.shape == (3, 4, 6)
    files = [*sorted((tmp_path / "train" / "cat").glob("*.BMP")), *sorted((tmp_path / "train" / "dog").iterdir())]
    assert np.array_equal(source.train.batch(torch.tensor([4, 0, 2])).numpy(), [pixels_of(files[i]) for i in (4, 0, 2)])


def test_flat_image_folder_is_divided_by_class(tmp_path: Path) -> None:
    for name, count in (("a", 25), ("b", 4), ("c", 1)):
        write_images(tmp_path / name, count)
    official = image_folder(tmp_path)
    assert torch.bincount(official.test.labels).tolist() == [5, 1]
    assert torch.bincount(official.train.labels).tolist() == [20, 3, 1]
    files = [[str(file) for file in split._items._files] for split in (official.train, official.test)]  # type: ignore[attr-defined]
    assert sorted(files[0] + files[1]) == sorted(map(str, tmp_path.glob("*/*.png")))
    again = image_folder(tmp_path)
    assert [str(file) for file in again.test._items._files] == files[1]  # type: ignore[attr-defined]


def test_images_of_other_sizes_are_resized_and_cut(tmp_path: Path) -> None:

    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        for name, (width, height) in (("wide", (40, 20)), ("tall", (20, 60))):
            pixels = np.zeros((height, width, 3), np.uint8)
            middle = pixels[height // 2 - 10 : height // 2 + 10, width // 2 - 10 : width // 2 + 10]
            pixels[:] = 100  # everything outside the middle square
            middle[:, :10], middle[:, 10:] = 0, 200
            Image.fromarray(pixels).save(tmp_path / part / "a" / f"{name}.png")
    with pytest.raises(InputError, match=r"wide.png' has 40 × 20 pixels where the first image has 20 × 60; pass size="):
        load(tmp_path)
    x = load(tmp_path, size=10).train.batch(torch.arange(2)) * 255
    assert x.shape == (2, 3, 10, 10)
    assert bool((x[:, :, 1:-1, 1:4] == 0).all())  # at the rim the filter sees what is outside
    assert torch.allclose(x[:, :, 1:-1, 6:-1], torch.tensor(200.0))
    x = load(tmp_path, size=20).train.batch(torch.arange(2)) * 255
    assert bool((x[:, :, :, :10] == 0).all())
    assert torch.allclose(x[:, :, :, 10:], torch.tensor(200.0))


def break_image(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def grey_of_16_bits(path: Path) -> None:

    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(path)


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda root: break_image(root / "train/a/001.png"), IntegrityError, r"001.png' cannot be read"),
        (lambda root: (root / "train/a/001.png").write_text("x"), IntegrityError, r"001.png' cannot be read"),
        (lambda root: grey_of_16_bits(root / "train/a/001.png"), InputError, "more than 8 bits"),
        (lambda root: write_images(root / "test/zebra", 1), InputError, "class 'zebra' of"),
        (lambda root: (root / "train/empty").mkdir(), InputError, "empty' holds no image"),
        (lambda root: (root / "test").rename(root / "tests"), InputError, "neither 'test' nor 'val'"),
        (lambda root: write_images(root / "test/a", 1, (4, 6)), InputError, "has 4 × 6 pixels"),
    ],
)
def test_image_folders_that_cannot_be_are_refused(
    spoil: Callable[[Path], Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    write_images(tmp_path / "train" / "a", 3)
    write_images(tmp_path / "test" / "a", 1)
    spoil(tmp_path)
    with pytest.raises(error, match=said):
        load(tmp_path, protocol="published").train.batch(torch.arange(3))


@pytest.mark.parametrize(("options", "said"), [({}, "has no class folder"), ({"size": 0}, "size must be")])
def test_an_empty_folder_and_a_bad_size_are_refused(options: dict[str, int], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        load(tmp_path, **options)


def test_damaged_images_never_crash(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 1, (16, 16))
    path = tmp_path / "a" / "000.png"
    items = image_folder(tmp_path, size=8).train._items
    whole, refused = path.read_bytes(), 0
    for data in mutations(whole, 300, seed=5):
        path.write_bytes(data)
        try:
            assert items.read(torch.tensor([0])).shape == (1, 3, 8, 8)
        except (IntegrityError, InputError):
            refused += 1
    assert refused > 150


# ----------------------------------------------------------------------------------------------- Imagenette


def write_imagenette(root: Path, name: str = "imagenette2-160") -> Path:
    """The folders of the archive with JPEG files of their sizes, each class in a gray of its own."""
    for part, n in (("train", 3), ("val", 2)):
        for label, wnid in enumerate(CLASSES):
            folder = root / name / part / wnid
            folder.mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (213, 160), (25 * label,) * 3).save(folder / f"{wnid}_{i}.JPEG", quality=95)
    return root


def test_imagenette(tmp_path: Path) -> None:
    source = load("imagenette", root=write_imagenette(tmp_path), protocol="published")
    assert source.train.shape == (3, 128, 128)
    assert source.class_names[0] == "tench"
    assert source.class_names[9] == "parachute"
    assert source.train.labels.tolist() == [label for label in range(10) for _ in range(3)]
    assert len(source.test) == 20
    for place in (0, 13, 29):
        x = source.train.batch(torch.tensor([place]))
        assert float((x - 25 * int(source.train.labels[place]) / 255).abs().max()) < 0.01  # gray survives JPEG
    assert load("imagenette", root=tmp_path, size=64).test.shape == (3, 64, 64)


def test_imagenette_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROBUSTKNN_DATA", raising=False)
    with pytest.raises(InputError, match="no folder is known"):
        load("imagenette")
    with pytest.raises(InputError, match=r"was not found: .* unpack imagenette2-160.tgz"):
        load("imagenette", root=tmp_path)
    write_imagenette(tmp_path)
    (tmp_path / "imagenette2-160" / "train" / "n00000001").mkdir()
    Image.new("RGB", (160, 160)).save(tmp_path / "imagenette2-160" / "train" / "n00000001" / "a.JPEG")
    with pytest.raises(InputError, match="other classes than Imagenette's ten"):
        load("imagenette", root=tmp_path)
