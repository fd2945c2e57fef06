"""A Ray cluster to spread work over: joined, or started for the time of the work, without Ray's own chatter."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import isfinite
from typing import Any

from robustknn.checks import check_positive_int
from robustknn.errors import InputError, RobustKNNError, brief, needs, reason

_REACH = 5.0
"""Seconds in which the head of a cluster must answer. Ray itself tries for many minutes."""

RETRIES = 3
"""So many workers may die of one piece of work after the first: a death by chance is made good."""


START_TRIES = 3
"""So often Ray is started on this machine: it gives a node 30 s to come up, which a busy machine may not make."""


def load_ray() -> Any:
    """The ray module; MissingExtraError where it cannot be imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the cluster
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a worker without GPUs sees none; no warning
    with needs("ray", "ray"):
        import ray
    return ray


@dataclass(frozen=True)
class RayCluster:
    """Which cluster, and what one worker takes of it.

    Args:
        address: None starts Ray on this machine and ends it with the work (or takes the session that this process
            has open); "auto" joins the cluster that this machine belongs to, HOST:PORT the one whose head is there.
            A cluster that was there already is left as it was.
        workers: how many; by default as many as there is room for. Those beyond join when there is room.
        cpus: CPUs that a worker takes; below 1, several share one. It has one torch thread for each, and at least one.
        gpus: GPUs that a worker takes; a fraction shares one.

    Raises:
        InputError: a number out of range, or an address of another form.
        MissingExtraError: Ray is not installed.
    """

    address: str | None = None
    workers: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.workers is not None:
            check_positive_int(self.workers, "workers")
        for name, least in (("cpus", "above 0"), ("gpus", "at least 0")):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
            if not number or value < 0 or (name == "cpus" and value == 0):
                raise InputError(f"{name} of a Ray worker must be a number {least}, not {brief(value)}.")
            if value > 1 and value != int(value):
                raise InputError(f"{name} of a Ray worker above 1 must be whole, not {brief(value)}.")
        if self.address not in (None, "auto"):
            _host_and_port(self.address)
        load_ray()

    @property
    def threads(self) -> int:
        """torch threads of a worker."""
        return max(1, int(self.cpus))

    @contextmanager
    def connected(self) -> Iterator[Any]:
        """The ray module, connected for this block; what was started for it is ended with it.

        Raises:
            InputError: there is no such cluster, it cannot be joined, or this process belongs to another one.
        """
        ray = load_ray()
        if ray.is_initialized():
            held = ray.get_runtime_context().gcs_address
            if self.address not in (None, "auto", held):
                raise InputError(f"this process is connected to the Ray cluster at {held}; name that one, or leave it.")
            yield ray
            return
        self._join(ray)
        try:
            yield ray
        finally:
            ray.shutdown()

    def _join(self, ray: Any) -> None:
        if self.address not in (None, "auto"):
            _check_reachable(self.address)
        try:
            with _unheard():
                start_ray(ray, self.address or "local")
        except Exception as error:
            ray.shutdown()
            if self.address is None:
                raise RobustKNNError(f"Ray cannot be started on this machine: {reason(error)}.") from error
            if self.address == "auto" and isinstance(error, ConnectionError):
                raise InputError(
                    "this machine belongs to no running Ray cluster; start one (ray start --head), or leave the "
                    "address out to work on this machine alone."
                ) from error
            raise InputError(
                f"the Ray cluster at {self.address} cannot be joined: {reason(error)}; this machine needs its "
                "versions of Ray and Python and, where it asks for a token, RAY_AUTH_MODE=token with that token."
            ) from error

    def room(self, ray: Any, work: int) -> int:
        """How many workers to start for so many pieces of work.

        Raises:
            InputError: no node has what one worker takes.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(self._fitting(node) for node in nodes)
        if room < 1:
            most = {what: max((node.get(what, 0.0) for node in nodes), default=0.0) for what in ("CPU", "GPU")}
            raise InputError(
                f"no node of the Ray cluster has {self.cpus:g} CPUs and {self.gpus:g} GPUs for a worker (the most: "
                f"{most['CPU']:g} and {most['GPU']:g}); let a worker take less."
            )
        return min(self.workers or room, work)

    def _fitting(self, node: dict[str, float]) -> int:
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        return int(min(node.get(what, 0.0) / each for what, each in wanted.items() if each > 0) + 1e-9)


def start_ray(ray: Any, address: str, **options: Any) -> None:
    """Starts or joins a cluster, with more ``options`` of ``ray.init``; a start here that timed out is tried again."""
    for tries_left in reversed(range(START_TRIES)):
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error", **options)
            return
        except Exception as error:
            ray.shutdown()
            if address != "local" or "timed out" not in str(error) or not tries_left:
                raise


def cause_of(error: BaseException) -> str:
    """Why a worker died, as a piece of a sentence: what Ray tells names an error last, or is one long line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if line.split(":")[0].endswith("Error")]
    return reason(RuntimeError(raised[-1] if raised else "".join(lines[-1:])))


def _host_and_port(address: Any) -> tuple[str, int]:
    host, colon, port = str(address).rpartition(":")
    if not isinstance(address, str) or not colon or not host or "/" in host or not port.isdigit():
        raise InputError(f"the address of a Ray cluster is auto or HOST:PORT (of its head), not {brief(address)}.")
    return host, int(port)


def _check_reachable(address: Any) -> None:
    try:
        socket.create_connection(_host_and_port(address), _REACH).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({reason(error)}); is its head running, and its port reachable?"
        ) from error


@contextmanager
def _unheard() -> Iterator[None]:
    """Ray prints to stdout that a worker died, whatever it is told; who works over it says so where it matters."""
    worker: Any = None
    with suppress(Exception):  # a private name, which another version may not have: it is only noise
        from ray._private import worker
    heard = getattr(worker, "listen_error_messages", None)
    if heard is None:
        yield
        return
    worker.listen_error_messages = lambda *_: None
    try:
        yield
    finally:
        worker.listen_error_messages = heard
