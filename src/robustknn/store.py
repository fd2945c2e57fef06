"""The one place that writes: atomic, checksummed files and artifact directories. No pickle anywhere.

Two shapes exist on disk:

* a *sealed JSON* file carries the sha256 of its own content and is accepted only byte for byte as written;
* an *artifact* is a directory of files (`.safetensors`, `.npy`, sealed `.json`) with a sealed `manifest.json`
  that lists each file's size and sha256. It appears under its final name only when whole.

Everything is written to a temporary name, flushed to the disk (fsync) and renamed, so that a reader, or a run
killed at any moment, sees the old content or the new one and nothing between.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shutil
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustknn._version import __version__
from robustknn.errors import InputError, IntegrityError, RobustKNNError, brief, reason

FORMAT = "robustknn"
MANIFEST = "manifest.json"
_CHUNK = 1 << 22
_TEMPORARY = ".partial"
_LEFT = re.compile(rf"\..*{re.escape(_TEMPORARY)}|\.tmp\w{{6}}")
"""Names of temporary files: ours, and those that safetensors writes beside a file before it takes its name."""
_NPY_START = 10  # magic, version, length of the header
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<|][biufc][0-9]{1,2})', 'fortran_order': False, "
    rb"'shape': \((|[0-9]{1,18},|[0-9]{1,18}(?:, [0-9]{1,18})+)\), \} *\n",
    re.DOTALL,
)


class StorageError(RobustKNNError):
    """The disk refused (full, read-only, no permission). What was written before is whole."""


# ------------------------------------------------------------------------------------------ bytes


@contextmanager
def disk(action: str, path: Path) -> Iterator[None]:
    """What the operating system refuses becomes a StorageError: "cannot write 'path': no space left"."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot {action} {str(path)!r}: {reason(error)}; what was finished before is kept."
        ) from error


def sync_directory(path: Path) -> None:
    """Flush what was renamed or removed in a directory."""
    if os.name == "nt":  # a directory cannot be opened for fsync there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on success it is flushed and renamed to `path`, on failure removed."""
    path = Path(path)
    with disk("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        try:
            yield partial
            publish(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _partial(path: Path) -> Path:
    return path.parent / f".{path.name}.{os.getpid()}{_TEMPORARY}"


def publish(partial: Path, path: Path) -> None:
    """Flush a finished file to the disk and give it its name."""
    _sync_file(partial)
    os.replace(partial, path)
    sync_directory(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def remove_partials(directory: Path) -> None:
    """Delete temporary files a killed process left anywhere under `directory`."""
    with disk("tidy", Path(directory)):
        for path in sorted(p for p in Path(directory).rglob(".*") if _LEFT.fullmatch(p.name)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- fingerprints


def update_with_tensor(digest: Any, tensor: Tensor) -> None:
    """Feed a tensor's dtype, shape and bytes to a hashlib digest."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().view(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)


def fingerprint_tensors(tensors: Mapping[str, Tensor], extra: str = "") -> str:
    """A sha256 over named tensors (in order of name) and a text."""
    digest = hashlib.sha256(extra.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0")
        update_with_tensor(digest, tensors[name])
    return digest.hexdigest()


def fingerprint_config(config: Mapping[str, Any]) -> str:
    """A sha256 over a JSON-able configuration."""
    return hashlib.sha256(_dump(config, pretty=False)).hexdigest()


# --------------------------------------------------------------------------------------- sealed JSON


def _dump(value: Any, pretty: bool) -> bytes:
    layout: dict[str, Any] = {"indent": 1} if pretty else {"separators": (",", ":")}
    try:
        return (json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, **layout) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"this cannot be written as JSON ({reason(error)}); use text, finite numbers, lists and tables."
        ) from error


def _seal_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump(content, pretty=False)).hexdigest()


def sealed_bytes(content: Mapping[str, Any], pretty: bool = True) -> bytes:
    """The bytes of a sealed JSON file: the content and, under `sha256`, the checksum of the content.

    Raises:
        InputError: JSON cannot hold the content (NaN, infinity, objects), or it has a `sha256` of its own.
    """
    if "sha256" in content:
        raise InputError("the content of a sealed file cannot have a field 'sha256'; give it another name.")
    content = json.loads(_dump(content, pretty=False))  # keys that are numbers become text before they are sorted
    return _dump({**content, "sha256": _seal_of(content)}, pretty)


def write_sealed(path: Path, content: Mapping[str, Any], pretty: bool = True) -> None:
    """Write a sealed JSON file atomically; see `sealed_bytes`."""
    write_bytes(path, sealed_bytes(content, pretty))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a sealed JSON file.

    Raises:
        IntegrityError: the file is missing, unreadable, truncated, altered in any byte, or not ours.
    """
    path = Path(path)
    with _readable(path):
        if not path.is_file():
            raise IntegrityError(f"{str(path)!r} does not exist or is not a file; check the path.")
        raw = path.read_bytes()
    try:
        value = json.loads(raw.decode())
        content = dict(value)
        seal = content.pop("sha256")
        whole = seal == _seal_of(content) and raw in (_dump(value, pretty=True), _dump(value, pretty=False))
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise IntegrityError(
            f"{str(path)!r} is truncated or altered (its checksum does not match); restore it or make it again."
        )
    return content


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise IntegrityError(f"{str(path)!r} cannot be read: {reason(error)}; check the path and the disk.") from error


# ----------------------------------------------------------------------------------------- artifacts


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself; `meta` is the part its kind defines."""

    path: Path
    kind: str
    schema: int
    meta: dict[str, Any]
    files: dict[str, dict[str, Any]]

    def file(self, name: str) -> Path:
        """The path of one of its files; IntegrityError when it lists no such file."""
        if name not in self.files:
            raise IntegrityError(f"{str(self.path)!r} lists no file {name!r}; make the {self.kind} again.")
        return self.path / name


@contextmanager
def artifact(path: Path, kind: str, schema: int, meta: dict[str, Any], overwrite: bool = False) -> Iterator[Path]:
    """Write an artifact: yields a temporary directory to put files in, then seals and renames it to `path`.

    `meta` may be filled until the block ends. An existing `path` is kept and refused unless `overwrite`. A link is
    followed: what it points to is written.
    """
    with swapped(Path(path), MANIFEST, lambda place: refuse_existing(place, overwrite)) as partial:
        yield partial
        files = {}
        for file in sorted(partial.iterdir()):
            _sync_file(file)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        header = {"format": FORMAT, "kind": kind, "schema": schema, "version": __version__}
        write_sealed(partial / MANIFEST, {**header, "meta": meta, "files": files})


@contextmanager
def swapped(path: Path, marker: str, refuse: Callable[[Path], None]) -> Iterator[Path]:
    """Write a folder whole or not at all: yields a temporary one beside it, which takes its name in the end.

    Args:
        marker: the file by which a whole folder is told.
        refuse: raises InputError where what is at the path may not be replaced.
    """
    with disk("write", path):
        path = path.resolve() if path.is_symlink() else path
        refuse(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            sync_directory(partial)
            # A directory cannot be replaced in one step: the old one steps aside, and `take_back` gives it the
            # name again should the process die before the new one has it.
            refuse(path)  # once more: another process may have been quicker
            if path.exists():
                shutil.rmtree(_aside(path), ignore_errors=True)  # left by a process that died right after
                os.replace(path, _aside(path))
            os.replace(partial, path)
            sync_directory(path.parent)
            shutil.rmtree(_aside(path), ignore_errors=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(StorageError):
                take_back(path, marker)
            raise


def _aside(path: Path) -> Path:
    return path.parent / f".{path.name}.old"


def take_back(path: Path, marker: str = MANIFEST) -> None:
    """Give a folder its name back when it stepped aside for one that never came."""
    with disk("restore", path):
        if not path.exists() and (_aside(path) / marker).is_file():
            os.replace(_aside(path), path)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """InputError when something is at `path` and may not be replaced. Only our own artifacts ever are."""
    path = Path(path)
    take_back(path)
    if not path.exists():
        return
    if not overwrite:
        raise InputError(f"{str(path)!r} exists; choose another path or allow overwriting it.")
    try:
        parts = {MANIFEST, *read_sealed(path / MANIFEST)["files"]}
    except (IntegrityError, KeyError, TypeError) as error:
        raise InputError(
            f"{str(path)!r} exists and is not a whole artifact of ours, so it is not overwritten; remove it yourself."
        ) from error
    others = sorted({held.name for held in path.iterdir()} - parts)
    if others:
        raise InputError(
            f"{str(path)!r} holds {brief(others[0])}, which is no part of the artifact, so it is not overwritten; "
            "move that away first."
        )


def check_artifact(path: Path) -> None:
    """IntegrityError unless an artifact of whatever kind is whole."""
    held = read_sealed(Path(path) / MANIFEST)
    read_manifest(path, str(held.get("kind")), held.get("schema", 0))


def read_manifest(path: Path, kind: str, schema: int, verify: bool = True, unread: Collection[str] = ()) -> Manifest:
    """Open an artifact, checking its kind, schema and, when `verify`, every file's size and sha256.

    Args:
        unread: files too large to read whole whenever they are opened; of these only the size is checked.

    Raises:
        IntegrityError: anything is missing, truncated, altered, of another kind, or a link.
    """
    path = Path(path)
    take_back(path)
    with _readable(path):
        if not path.is_dir() or (path / MANIFEST).is_symlink():
            raise IntegrityError(f"{str(path)!r} is not a directory that holds a {kind} artifact; check the path.")
    content = read_sealed(path / MANIFEST)
    found = (content.get("format"), content.get("kind"), content.get("schema"))
    if found[:2] != (FORMAT, kind):
        raise IntegrityError(f"{str(path)!r} holds {brief(found[1])}, not a {kind} artifact; check the path.")
    if found[2] != schema:
        raise IntegrityError(
            f"{str(path)!r} has schema {brief(found[2])}, this version reads {schema}; make the {kind} again."
        )
    meta, files = content.get("meta"), content.get("files")
    if not isinstance(meta, dict) or not isinstance(files, dict):
        raise IntegrityError(f"{str(path)!r} has a manifest without contents; make the {kind} again.")
    for name, expected in files.items():
        _check_file(path, name, expected, verify and name not in unread)
    return Manifest(path, kind, schema, meta, files)


def _check_file(directory: Path, name: str, expected: Any, verify: bool) -> None:
    if Path(name).name != name or name in ("", ".", "..") or not isinstance(expected, dict):
        raise IntegrityError(f"{str(directory)!r} lists an impossible file {brief(name)}; make the artifact again.")
    file = directory / name
    with _readable(file):
        if file.is_symlink() or not file.is_file():
            raise IntegrityError(f"{str(file)!r} is missing or is a link; restore the whole directory.")
        if file.stat().st_size != expected.get("bytes"):
            raise IntegrityError(
                f"{str(file)!r} has {file.stat().st_size} bytes where {expected.get('bytes')} were written; "
                "it is truncated or altered, restore it."
            )
        if verify and sha256_file(file) != expected.get("sha256"):
            raise IntegrityError(f"{str(file)!r} is altered (its sha256 does not match the manifest); restore it.")


# ------------------------------------------------------------------------------------ tensors, arrays


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as one safetensors file, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as partial:
        try:
            # Clones, since tensors that share memory (tied weights, an unchanged example) are refused.
            apart = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
            save_file(apart, str(partial))
            partial.chmod(_usual_mode())  # it makes files that only their owner can read
        except SafetensorError as error:  # it reports a full disk in its own words
            raise OSError(str(error)) from error


def _usual_mode() -> int:
    """The permissions that a new file gets by the user's settings."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        IntegrityError: it is not one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise IntegrityError(
            f"{str(path)!r} is not a whole safetensors file ({reason(error)}); restore it or make it again."
        ) from error


def save_array(path: Path, tensor: Tensor) -> None:
    """Write a tensor as `.npy`, into the folder of an artifact (not atomic by itself).

    Raises:
        InputError: NumPy has no such element type (bfloat16).
    """
    try:
        array = tensor.detach().cpu().contiguous().numpy()
    except TypeError as error:
        raise InputError(
            f"a .npy file cannot hold {str(tensor.dtype).removeprefix('torch.')}; convert it with .float() first."
        ) from error
    with path.open("wb") as file:
        file.write(array_header(array.dtype.str, array.shape))
        file.write(array.reshape(-1).view(np.uint8).data)  # NumPy's own writer does not say why a disk refuses


def array_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The first bytes of a `.npy` file, as many for any number of rows, so that rows can be appended.

    Args:
        dtype: NumPy's code of the element type, such as "<f4".
        shape: of the whole array.
    """
    header = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


_MAPPED: weakref.WeakValueDictionary[int, np.ndarray[Any, Any]] = weakref.WeakValueDictionary()
"""Arrays that `load_array` mapped and somebody still holds, by where they begin."""


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor is (a view of) what `load_array` mapped: to write to it would pull it into memory."""
    place = tensor.data_ptr()
    return any(start <= place < start + array.nbytes for start, array in list(_MAPPED.items()))


def load_array(path: Path, mapped: bool = False, rows: int | None = None) -> Tensor:
    """Read a `.npy` file, into memory or (`mapped`) copy-on-write from the disk.

    NumPy's own reader evaluates the header as Python and makes room for whatever size it states; here the header
    must have the one form that is written, and the size must be the file's.

    Args:
        rows: read so many rows of a file to which further ones may be being added; it must hold them.

    Raises:
        IntegrityError: it is not a plain array file, or its size is not the one it states.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(_NPY_START)
            header = _NPY.fullmatch(start + file.read(int.from_bytes(start[-2:], "little")))
            if header is None:
                raise ValueError("its header is none that is written here")
            dtype, shape = np.dtype(header[1].decode()), [int(n) for n in header[2].split(b",") if n.strip()]
            if rows is not None and shape:
                shape[0] = rows
            count = math.prod(shape)
            beyond = path.stat().st_size - header.end() - count * dtype.itemsize
            if beyond < 0 or (beyond and rows is None):
                raise ValueError("its size is not the one it states")
            if mapped and count:
                array: np.ndarray[Any, Any] = np.memmap(path, dtype, "c", header.end(), tuple(shape))
                _MAPPED[array.ctypes.data] = array
            else:
                array = np.fromfile(file, dtype, count).reshape(shape)
        return torch.from_numpy(array)
    except (ValueError, TypeError, OSError) as error:
        raise IntegrityError(
            f"{str(path)!r} is not a whole .npy array ({reason(error)}); restore it or make it again."
        ) from error
