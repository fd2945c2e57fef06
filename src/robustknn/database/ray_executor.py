"""Building over a Ray cluster: Ray Data hands blocks to workers that hold the network; the driver alone writes.

What is between the processes are bytes of safetensors and text. A block is made by `extract_block` wherever it is made.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from safetensors.torch import load, save

from robustknn.batching import Samples
from robustknn.cluster import RETRIES, RayCluster, cause_of, load_ray
from robustknn.code_version import code_fingerprint
from robustknn.database.extract import Executor, Rows, extract_block
from robustknn.database.layout import Block, Settings
from robustknn.errors import Carried, InputError, RobustKNNError, needs, reason
from robustknn.features import FeatureExtractor

_AHEAD = 2
"""Blocks that a worker has before it: the one it makes, and the one it makes next."""


def ray_executor(
    address: str | None = None,
    workers: int | None = None,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
) -> Executor:
    """Blocks made by the workers of a Ray cluster, in any order (see `RayCluster` for the arguments).

    The extractor is sent to every worker and runs on its GPU if it has one, else on its CPU. The source is sent too;
    one that reads files needs them under the same path on every node. How many blocks wait for the driver is bounded by
    Ray Data, by a part of its object store. A worker that dies is replaced and its blocks are made again.

    Raises (when it runs):
        InputError: the cluster cannot be joined or has no room, extractor or source cannot be sent, or a node has
            another version of the package or of torch.
        RobustKNNError: workers die again and again; errors of the extractor and the source as they are.
    """
    cluster = RayCluster(address, workers, cpus_per_worker, gpus_per_worker)

    def run(
        features: FeatureExtractor, source: Samples, todo: Sequence[Block], settings: Settings, offset: int
    ) -> Generator[tuple[Block, Rows]]:
        task = {
            "features": features if features.device.type == "cpu" else copy.deepcopy(features).to("cpu"),
            "source": source,
            "settings": settings,
            "offset": offset,
            "threads": cluster.threads,
            "device": "cuda" if cluster.gpus else "cpu",
            "identity": _identity(features),
        }
        with cluster.connected() as ray, _quiet(ray) as data:
            size = cluster.room(ray, len(todo))
            attempts = ray.remote(_Attempts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
            made = (
                data.from_items([vars(block) for block in todo], override_num_blocks=len(todo))
                .map_batches(
                    _Maker,
                    fn_constructor_args=(_sent(ray, task), attempts),
                    batch_size=1,
                    batch_format="numpy",
                    num_cpus=cluster.cpus,
                    num_gpus=cluster.gpus,
                    compute=data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=_AHEAD),
                )
                .iter_rows()
            )
            try:
                for row in made:
                    yield _received(row)
            except ray.exceptions.RayError as error:
                raise RobustKNNError(
                    f"the Ray cluster failed at building: {cause_of(error)}; what was finished is kept, see to it and "
                    "run the same command again."
                ) from error

    return run


class _Maker:
    """One process of the cluster; Ray Data calls it with one block at a time.

    Args:
        task: a reference to what all workers share.
        attempts: counts how often each block was begun.
    """

    def __init__(self, task: Any, attempts: Any) -> None:
        ray = load_ray()
        self._task, self._attempts = ray.get(task), attempts
        torch.set_num_threads(self._task["threads"])
        self._features: FeatureExtractor = self._task["features"].to(self._task["device"])
        self._wrong = _difference(self._task["identity"], _identity(self._features), ray.util.get_node_ip_address())

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        block = Block(*(int(batch[name][0]) for name in ("number", "start", "rows")))
        try:
            rows, failed = save(self._made(block)), Carried("", "")
        except RobustKNNError as error:
            rows, failed = b"", Carried.of(error)
        return {**{k: [v] for k, v in vars(block).items()}, "made": [rows], **{k: [v] for k, v in vars(failed).items()}}

    def _made(self, block: Block) -> Rows:
        if self._wrong:
            raise InputError(self._wrong)
        begun = load_ray().get(self._attempts.begin.remote(block.number))
        if begun > RETRIES + 1:
            raise RobustKNNError(
                f"{begun - 1} Ray workers died over block {block.number} (rows {block.start} to "
                f"{block.start + block.rows - 1}); what was finished is kept, and the same command goes on (with fewer "
                "workers, or a smaller batch size in a new database, if memory was short)."
            )
        task = self._task
        rows = extract_block(self._features, task["source"], block, task["settings"], task["offset"])
        return {name: value.contiguous() for name, value in rows.items()}


class _Attempts:
    """How often work on a block was begun: Ray itself begins without end."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Count one, and say how many there are."""
        self._begun[number] += 1
        return self._begun[number]


def _identity(features: FeatureExtractor) -> dict[str, str]:
    return {
        "code version": code_fingerprint(),
        "version of torch": torch.__version__.split("+")[0],
        "network": features.fingerprint(),
    }


def _difference(wanted: Mapping[str, str], held: Mapping[str, str], node: str) -> str | None:
    """The sentence by which a worker is refused."""
    differing = sorted(name for name in wanted if held[name] != wanted[name])
    if not differing:
        return None
    return (
        f"the Ray node {node} has another {' and another '.join(differing)} than this machine; install the same "
        "versions there."
    )


def _sent(ray: Any, task: Mapping[str, Any]) -> Any:
    try:
        return ray.put(task)
    except (TypeError, AttributeError, ValueError) as error:
        why = reason(error.__cause__ or error)  # Ray puts the value itself before what is wrong with it
        raise InputError(
            f"the network or the samples cannot be sent to other processes ({why}); build on this machine alone, or "
            "take samples that are read from files."
        ) from error


def _received(row: Mapping[str, Any]) -> tuple[Block, Rows]:
    if row["kind"]:
        raise Carried(row["kind"], row["sentence"]).error()
    return Block(row["number"], row["start"], row["rows"]), load(row["made"])


@contextmanager
def _quiet(ray: Any) -> Iterator[Any]:
    """ray.data without its bars and its log, for this block."""
    with needs("ray[data]", "ray"):
        from ray import data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of its own settings when they are copied
        context = data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    current = getattr(data.DataContext, "current", nullcontext)
    with current(context):
        logger.setLevel(logging.CRITICAL)
        try:
            yield data
        finally:
            logger.setLevel(level)
