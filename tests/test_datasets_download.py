"""Downloads, against a server on this machine."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from robustknn.datasets import download, load
from robustknn.datasets.download import DownloadError, Remote, fetch
from robustknn.errors import InputError, IntegrityError
from robustknn.store import StorageError

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Server:
    """A file server whose manners can be changed; `asked` are the paths and ranges of all requests."""

    url: str
    content: bytes = CONTENT
    ranges: bool = True
    break_after: int | None = None
    announce_length: bool = True
    status: int = 200
    shift: int = 0
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    state = Server("")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.asked.append((self.path, wanted))
            if state.status != 200:
                self.send_error(state.status)
                return
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and state.ranges else 0
            if start and start >= len(state.content):
                self.send_error(416)
                return
            part = state.content[start:]
            self.send_response(206 if start else 200)
            if start:
                first = start + state.shift
                self.send_header("Content-Range", f"bytes {first}-{len(state.content) - 1}/{len(state.content)}")
            if state.announce_length:
                self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part[: state.break_after])

        def log_message(self, *_: object) -> None:
            return None

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{httpd.server_port}/file"
    yield state
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "file.gz"


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


@pytest.mark.parametrize("announce_length", [True, False])
def test_a_whole_file(server: Server, path: Path, announce_length: bool) -> None:
    server.announce_length = announce_length
    fetch([server.url], path, MD5)
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert server.asked == [("/file", None)]


class Watch:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.told.append((what, total, done))
        self.sum = done

    def advance(self, amount: int = 1) -> None:
        self.sum += amount

    def stop(self) -> None:
        self.told.append((self.sum,))


def test_an_interrupted_transfer_goes_on_where_it_ended(server: Server, path: Path) -> None:
    server.break_after = 300_000
    with pytest.raises(DownloadError, match=r"ended after 300000 of 1024000 bytes.*what arrived is kept"):
        fetch([server.url], path, MD5)
    assert not path.exists()
    assert partial_of(path).read_bytes() == CONTENT[:300_000]
    server.break_after = None
    watch = Watch()
    fetch([server.url], path, MD5, watch)
    assert path.read_bytes() == CONTENT
    assert server.asked[1:] == [("/file", "bytes=300000-")]
    assert watch.told == [("downloading file.gz", 1024000, 300000), (1024000,)]
    assert not partial_of(path).exists()


def test_a_server_without_ranges_sends_everything_again(server: Server, path: Path) -> None:
    path.parent.mkdir()
    partial_of(path).write_bytes(CONTENT[:1000])
    server.ranges = False
    fetch([server.url], path, MD5)
    assert path.read_bytes() == CONTENT
    assert server.asked == [("/file", "bytes=1000-")]


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more", b"other" * 100, b""])
def test_any_part_left_from_before_is_put_right(server: Server, path: Path, part: bytes) -> None:
    """Whole already, too long, of another file, empty."""
    path.parent.mkdir()
    partial_of(path).write_bytes(part)
    fetch([server.url], path, MD5)
    assert path.read_bytes() == CONTENT
    assert len(server.asked) <= 2


def test_a_server_that_sends_another_range_is_given_up(server: Server, path: Path) -> None:
    path.parent.mkdir()
    partial_of(path).write_bytes(CONTENT[:1000])
    server.shift = 1
    with pytest.raises(DownloadError, match="another part"):
        fetch([server.url], path, MD5)
    assert partial_of(path).read_bytes() == CONTENT[:1000]


def test_a_file_of_another_checksum_is_refused_and_removed(server: Server, path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"is not the official 'file.gz': its MD5 is not 0000.*it was removed"):
        fetch([server.url], path, "0" * 32)
    assert list(path.parent.iterdir()) == []
    assert len(server.asked) == 1


def test_what_never_ends_is_not_kept(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 400_000)
    with pytest.raises(IntegrityError, match="not the official"):
        fetch([server.url], path, MD5)
    assert list(path.parent.iterdir()) == []


def test_mirrors_are_tried_in_order(server: Server, path: Path) -> None:
    closed = "http://127.0.0.1:9/file"
    fetch([closed, server.url], path, MD5)
    assert path.read_bytes() == CONTENT
    with pytest.raises(DownloadError, match=r"127.0.0.1:9/file: .*refused; http://127.0.0.1:9/file") as refused:
        fetch([closed, closed], path.with_name("other"), MD5)
    assert str(path.with_name("other")) in str(refused.value)


@pytest.mark.parametrize("status", [404, 403, 503])
def test_a_refusing_server_is_named(server: Server, path: Path, status: int) -> None:
    server.status = status
    with pytest.raises(DownloadError, match=f"{server.url}: {status} "):
        fetch([server.url], path, MD5)


def test_a_disk_that_refuses_is_told(server: Server, tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="cannot write"):
        fetch([server.url], tmp_path / "folder" / "file.gz", MD5)
    assert server.asked == []


def test_a_data_set_is_fetched_only_when_asked_and_only_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    from robustknn.datasets.mnist import FILES

    def packed(header: bytes, n: int) -> bytes:
        return gzip.compress(header + bytes(i % 10 for i in range(n)), mtime=0)

    images = packed(b"\0\0\x08\x03\0\0\0\x0a\0\0\0\x01\0\0\0\x01", 10)
    labels = packed(b"\0\0\x08\x01\0\0\0\x0a", 10)
    remotes = tuple(
        Remote(f"MNIST/raw/{name}.gz", hashlib.md5(images if "images" in name else labels).hexdigest(), (server.url,))
        for name in FILES
    )
    monkeypatch.setitem(download.REMOTES, "mnist", remotes)
    with pytest.raises(InputError, match="download=True"):
        load("mnist", root=tmp_path)
    assert server.asked == []

    server.content = images
    with pytest.raises(IntegrityError, match="train-labels"):  # this server has only images
        load("mnist", root=tmp_path, download=True)
    server.content = labels
    with pytest.raises(IntegrityError, match="t10k-images"):  # the first two are there by now
        load("mnist", root=tmp_path, download=True)
    server.content = images
    with pytest.raises(IntegrityError, match="t10k-labels"):
        load("mnist", root=tmp_path, download=True)
    server.content, server.asked = labels, []
    assert len(load("mnist", root=tmp_path, download=True, protocol="published").train) == 10
    assert load("mnist", root=tmp_path, download=True, protocol="published").test.labels.tolist() == list(range(10))
    assert len(server.asked) == 1


def test_the_table_of_official_files() -> None:
    """Every file has a whole MD5, several places where possible, and lies where its loader looks."""
    assert sorted(download.REMOTES) == ["cifar10", "cifar100", "fashion-mnist", "mnist", "svhn"]
    for remotes in download.REMOTES.values():
        for remote in remotes:
            assert len(bytes.fromhex(remote.md5)) == 16
            assert all(url.endswith("/" + Path(remote.path).name) for url in remote.urls)
    with pytest.raises(InputError, match="unknown data set to download"):
        download.download_dataset("digits", Path())
