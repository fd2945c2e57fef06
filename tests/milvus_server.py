"""A real Milvus server for tests: the standalone process that the package milvus 2.3.5 on PyPI carries.

It needs no network. Its own starter ends a server after one second and moves to other ports when it starts again,
so the process is started here, on ports that stay.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

_START = 180.0  # seconds


class Server:
    """A server that keeps its data in a folder. It can be killed, stopped and started again."""

    def __init__(self, folder: Path) -> None:
        import milvus

        config = milvus.MilvusServerConfig(data_dir=str(folder))
        ports = free_ports(1 + sum(key.endswith("_port") for key in config.configurable_items))
        for key in config.configurable_items:
            if key.endswith("_port"):
                config.configs[key] = ports.pop()
        # How long a server that was killed is waited for by the next one, in seconds.
        config.set("common.session.ttl", 10)
        config.resolve()
        milvus._initialize_data_files(str(folder))
        self.folder, self._health = folder, ports.pop()
        self.uri = f"http://127.0.0.1:{config.get('proxy_port')}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it says that it is healthy."""
        programs = str(self.folder / "bin")
        settings = {
            "DEPLOY_MODE": "STANDALONE",
            "METRICS_PORT": str(self._health),
            "MILVUS_RUN_DIR": str(self.folder / "run"),
            "LD_LIBRARY_PATH": f"{programs}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        }
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [f"{programs}/milvus", "run", "standalone"],
                cwd=self.folder,
                env={**os.environ, **settings},
                stdout=log,
                stderr=log,
            )
        until = time.monotonic() + _START
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > until:
                tail = (self.folder / "server.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the Milvus server did not start: {tail}")
            time.sleep(0.2)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._health}/healthz", timeout=5) as answer:
                return b"OK" in answer.read()
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Ask it to end as its own starter does: this version never ends by itself, it lets go of what it serves."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(3)
        self.kill()


def free_ports(count: int) -> list[int]:
    """Ports nobody listens at."""
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in held]
    finally:
        for one in held:
            one.close()
