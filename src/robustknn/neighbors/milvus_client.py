"""pymilvus itself: the guarded import, and a connection whose failures are one sentence and bounded in time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from robustknn.checks import check_positive, check_whole
from robustknn.errors import InputError, MissingExtraError, brief, needs, reason
from robustknn.store import StorageError

_ADDRESSES = ("http://", "https://", "tcp://", "unix:")
_PAUSE, _LONGEST_PAUSE = 0.5, 8.0  # seconds before another try, doubled each time
# Milvus's own numbers for what passes by itself, such as after a restart. 2 is also pymilvus's "cannot connect".
_NOT_LOADED = 101
_PASSING = frozenset({2, 8, 103, 401, 500, 501, 503, 601, 602, 901, 902, 903, 904, _NOT_LOADED})

_STARTING = ("not ready", "find no available")  # what comes with the number of any other error


def load_pymilvus() -> Any:
    """The pymilvus module; MissingExtraError where it cannot be imported."""
    with needs("pymilvus", "milvus"):
        import pymilvus
    return pymilvus


@contextmanager
def quiet() -> Iterator[None]:
    """What is told here in one sentence the libraries log with a traceback, in this process: not within this block."""
    loggers = [logging.getLogger(name) for name in ("pymilvus", "milvus_lite", "grpc")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Connection:
    """A Milvus server or cluster by its address, or Milvus Lite by the path of its file.

    pymilvus tries a failing request 75 times, or as long as its time-out allows. Here a request has `timeout`
    seconds to be answered; a server that is not there is tried `retries` times more, after 0.5, 1, 2 … seconds.

    Args:
        uri: "http://host:19530", "https://…", "tcp://…", with a database as "/name" behind it; or a path "….db".
        token: "user:password" or an API key. It is never written anywhere.
        timeout: seconds.
        retries: further tries.

    Raises:
        MissingExtraError: pymilvus (or milvus-lite, for a path) is not installed.
        InputError: the uri is neither, holds a password, or lies in no folder.
    """

    def __init__(self, uri: Any, token: str | None, timeout: float, retries: int) -> None:
        load_pymilvus()
        self.uri, self.lite = _checked(uri)
        self.timeout, self.retries = check_positive(timeout, "timeout"), check_whole(retries, "retries", 0)
        self._token = token
        self._client: Any = None

    def ask(self, request: str, collection: str, *args: Any, patience: float | None = None, **options: Any) -> Any:
        """What the method `request` of pymilvus's client answers for a collection.

        Args:
            patience: seconds for what takes the server long; `timeout` otherwise.

        Raises:
            StorageError: the server cannot be reached, or did not answer in time.
            InputError: it refused.
        """
        patience = self.timeout if patience is None else patience
        for attempt in range(self.retries + 1):
            try:
                with quiet():
                    return getattr(self._open(), request)(collection, *args, timeout=patience, **options)
            except Exception as error:
                self._judge(error, request, patience)
                last = error
            if attempt < self.retries:
                time.sleep(min(_PAUSE * 2**attempt, _LONGEST_PAUSE))
                self._renew(last, collection)
        raise StorageError(
            f"Milvus at {self.uri!r} cannot be reached or is not ready ({_said(last)}); start it or correct uri=: "
            "it keeps what it holds, and build() goes on from there."
        ) from last

    def _open(self) -> Any:
        if self._client is None:
            # One of its own: pymilvus would hand out a shared one, which stays with an address that is gone.
            self._client = load_pymilvus().MilvusClient(
                self.uri, token=self._token or "", timeout=min(self.timeout, 10.0), dedicated=True
            )
        return self._client

    def _judge(self, error: Exception, request: str, patience: float) -> None:
        """Return where another try may help, else raise what the user is to read."""
        code = _code(error)
        if code == "DEADLINE_EXCEEDED":
            raise StorageError(
                f"Milvus at {self.uri!r} did not answer {request} within {patience:g} s; raise timeout= or look after "
                "the server, which keeps what it holds."
            ) from error
        if self.lite and "Open local milvus failed" in str(error):
            raise InputError(
                f"Milvus Lite cannot open {self.uri!r}: another process has it open, or it is none of its databases; "
                "close the other one or choose another path."
            ) from error
        if code not in _PASSING and code != "UNAVAILABLE" and not any(text in str(error) for text in _STARTING):
            raise InputError(f"Milvus at {self.uri!r} refused {request}: {_said(error)}.") from error

    def _renew(self, error: Exception, collection: str) -> None:
        """Prepare for another try: load what a restarted server has not loaded yet, or connect anew."""
        if _code(error) != _NOT_LOADED:
            return self.close()
        try:
            with quiet():
                self._open().load_collection(collection, timeout=self.timeout)
        except Exception:  # the next try says what is the matter
            self.close()
        return None

    def close(self) -> None:
        """Let go of the server; the next request connects again."""
        client, self._client = self._client, None
        if client is not None:
            with quiet():
                client.close()

    def release(self) -> None:
        """Close, and end Milvus Lite where this is one, so that another process can open its file."""
        self.close()
        if self.lite:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self.uri)

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # at the end of the interpreter anything may be gone already
            return


def _checked(uri: Any) -> tuple[str, bool]:
    """(what pymilvus is given, whether it is Milvus Lite)."""
    text = str(uri) if isinstance(uri, str | Path) else ""
    if text.startswith(_ADDRESSES):
        if urlsplit(text).password or urlsplit(text).username:
            raise InputError("uri= is written into files, so it holds no password; pass token='user:password' instead.")
        return text, False
    if not text.endswith(".db"):
        raise InputError(
            f"uri must be the address of a Milvus server, such as 'http://localhost:19530', or a path that ends in "
            f"'.db' for Milvus Lite, not {brief(uri)}."
        )
    if find_spec("milvus_lite") is None:
        raise MissingExtraError("milvus-lite", "milvus")
    path = Path(text).absolute()
    if not path.parent.is_dir():
        raise InputError(f"the folder {str(path.parent)!r} of uri= does not exist; make it first.")
    return str(path), True


def _code(error: BaseException) -> Any:
    """The number Milvus gives an error, or the name gRPC does."""
    code = getattr(error, "code", None)
    code = code() if callable(code) else code
    return getattr(code, "name", code)


def _said(error: BaseException) -> str:
    return reason(RuntimeError(getattr(error, "message", None) or getattr(error, "details", str)() or str(error)), 200)
