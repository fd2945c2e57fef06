"""Evaluation over a Ray cluster: workers make the experiment from its configuration, this process alone writes.

Classifiers are not sent: they hold references in memory or mapped from files, and indexes of other libraries. A
worker makes them as this process did, and works only when everything that decides has the hashes that it has here.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from robustknn.cluster import RETRIES, RayCluster, cause_of, load_ray
from robustknn.datasets.files import ENVIRONMENT
from robustknn.errors import Carried, InputError, RobustKNNError
from robustknn.evaluation.experiment_config import ExperimentConfig
from robustknn.evaluation.rundir import Cell
from robustknn.evaluation.runner import Batch, Evaluation, Executor, Finished, planned


def ray_executor(config: ExperimentConfig, cluster: RayCluster) -> Executor:
    """Spreads the batches of the experiment that a configuration describes over a cluster.

    Every node needs this version of the package, and the data, weights and references under the paths that the
    configuration names. A worker that dies is replaced and its batch is worked on again.

    Raises (when it runs):
        InputError: the cluster cannot be joined or has no room; a worker's experiment is not the one of this process;
            or what the experiment itself raises.
        RobustKNNError: workers die again and again.
    """

    def run(job: Evaluation, identity: Mapping[str, str], todo: Sequence[Batch]) -> Generator[Finished]:
        task = {
            "config": {**config.model_dump(), "data": {**config.data.model_dump(), "download": False}},
            "folder": os.getcwd(),
            "data_root": os.environ.get(ENVIRONMENT),
            "identity": dict(identity),
            "device": torch.device(job.device).type,
            "threads": cluster.threads,
        }
        with cluster.connected() as ray:
            kind = ray.remote(_Worker).options(num_cpus=cluster.cpus, num_gpus=cluster.gpus, max_restarts=0)
            yield from _Pool(ray, lambda: kind.remote(task), todo).finished(cluster.room(ray, len(todo)))

    return run


class _Worker:
    """One process of the cluster. It answers with errors of ours instead of raising them, in Ray's wrapping."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        self._task = task
        self._job: Evaluation

    def prepare(self) -> Carried | None:
        """Make the experiment; InputError when it is not the one of the process that asks."""
        node = load_ray().util.get_node_ip_address()
        try:
            self._prepare(node)
        except RobustKNNError as error:
            return Carried.of(error, "" if node in str(error) else f"on the Ray node {node}: ")
        return None

    def _prepare(self, node: str) -> None:
        from robustknn.evaluation.experiment import prepare

        task = self._task
        torch.set_num_threads(task["threads"])
        with suppress(OSError):  # relative paths mean what they mean there, where that folder is shared
            os.chdir(task["folder"])
        if task["data_root"] is not None:
            os.environ[ENVIRONMENT] = task["data_root"]
        self._job, plan = planned(**prepare(ExperimentConfig.model_validate(task["config"])).given())
        if torch.device(self._job.device).type != task["device"]:
            raise InputError(
                f"the Ray node {node} works on {self._job.device} and this machine on {task['device']}; give workers a "
                "GPU (--ray-gpus 1) and this machine too, or choose --device cpu."
            )
        held, identity = self._job.identity(plan), task["identity"]
        differing = sorted(name for name in {*held, *identity} if held.get(name) != identity.get(name))
        if differing:
            raise InputError(
                f"the Ray node {node} has another {' and another '.join(differing)} than this machine; install the "
                "same version of everything there, and give it the same files under the same paths."
            )

    def batch(self, cell: Cell, rows: Tensor) -> Finished | Carried:
        """The rows of a batch."""
        try:
            return self._job.batch(cell, rows)
        except RobustKNNError as error:
            return Carried.of(error)

    def process(self) -> int:
        """The number of this process on its node."""
        return os.getpid()


class _Pool:
    """Workers, each with one batch at a time, so that the last ones are spread evenly."""

    def __init__(self, ray: Any, hire: Callable[[], Any], todo: Sequence[Batch]) -> None:
        self._ray, self._hire_one = ray, hire
        self._left = deque(todo)
        self._at_work: dict[Any, tuple[Any, Batch | None]] = {}  # by what is awaited; None: it makes the experiment
        self._deaths: Counter[str] = Counter()

    def finished(self, workers: int) -> Generator[Finished]:
        """The batches, as they are finished; workers are gone when this ends, however it ends."""
        try:
            for _ in range(workers):
                self._hire()
            while self._left or any(batch is not None for _, batch in self._at_work.values()):
                (ready,), _ = self._ray.wait(list(self._at_work), num_returns=1)
                worker, batch = self._at_work[ready]
                try:
                    result = self._ray.get(ready)
                except self._ray.exceptions.RayActorError as error:
                    del self._at_work[ready]
                    self._bury(worker, batch, error)
                    continue
                if isinstance(result, Carried):
                    raise result.error()
                self._deaths.pop(_named(batch), None)
                del self._at_work[ready]
                self._give(worker)
                if batch is not None:
                    yield result
        finally:
            for worker, _ in self._at_work.values():
                self._dismiss(worker)

    def _hire(self) -> None:
        worker = self._hire_one()
        self._at_work[worker.prepare.remote()] = worker, None

    def _give(self, worker: Any) -> None:
        if self._left:
            batch = self._left.popleft()
            self._at_work[worker.batch.remote(*batch)] = worker, batch
        else:
            self._dismiss(worker)

    def _bury(self, worker: Any, batch: Batch | None, error: Exception) -> None:
        """Put a dead worker's batch back and another one in its place."""
        self._dismiss(worker)  # it may be only out of reach, and would work for nobody
        name = _named(batch)
        self._deaths[name] += 1
        if self._deaths[name] > RETRIES:
            raise RobustKNNError(
                f"{self._deaths[name]} Ray workers died {name}, the last because: {cause_of(error)}; what was finished "
                "is kept, and the same command goes on (with fewer workers, or a smaller batch size, if memory was "
                "short)."
            ) from error
        if batch is not None:
            self._left.appendleft(batch)
        self._hire()

    def _dismiss(self, worker: Any) -> None:
        with suppress(Exception):  # the cluster may be gone itself
            self._ray.kill(worker)


def _named(batch: Batch | None) -> str:
    if batch is None:
        return "making the experiment"
    cell, rows = batch
    return f"over the samples {int(rows[0])} to {int(rows[-1])} of {cell.folder!r}"
