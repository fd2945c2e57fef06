"""What a database of n vectors takes: memory, disk, time and money of every engine, on machines of a size.

Nothing is run: this is arithmetic from smaller runs, and every figure names what it was computed from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from robustknn.checks import check_positive_int
from robustknn.database.notation import said
from robustknn.database.plan_constants import CONSTANTS, LARGEST_RUN, RECALL
from robustknn.database.plan_engines import ENGINES, HALF, Cost, Figure, Share, value
from robustknn.errors import InputError
from robustknn.neighbors.auto import choose

_MILVUS = "(Milvus)"
_HOURS = 730
_GB = 1e9
_MOST_MACHINES = 100_000


@dataclass(frozen=True)
class Task:
    """What is to be searched.

    Attributes:
        vectors, dim: how many vectors of which length.
        k: neighbors of a query.
        payload: bytes kept beside each vector, see `payload_bytes`.
    """

    vectors: int
    dim: int
    k: int = 50
    payload: int = 88

    def __post_init__(self) -> None:
        for name in ("vectors", "dim", "k"):
            check_positive_int(getattr(self, name), name)
        if self.k > self.vectors:
            raise InputError(f"k = {self.k} neighbors were asked of {self.vectors} vectors; lower k.")


@dataclass(frozen=True)
class Machine:
    """One machine: bytes of memory and of disk, and cores."""

    memory: float = 64e9
    disk: float = 2e12
    cores: int = 16

    def __post_init__(self) -> None:
        check_positive_int(self.cores, "the machine's cores")


@dataclass(frozen=True)
class Prices:
    """In $: a GB and month of memory and of disk, an hour of a core and of a GPU."""

    memory: float = CONSTANTS["memory price"].value
    disk: float = CONSTANTS["disk price"].value
    core: float = CONSTANTS["core price"].value
    gpu: float = CONSTANTS["GPU price"].value

    def __post_init__(self) -> None:
        for name, price in asdict(self).items():
            if not (math.isfinite(price) and price >= 0):
                raise InputError(f"the price of {name} must be at least 0, not {price}.")

    @property
    def assumed(self) -> tuple[str, ...]:
        """The names of the constants behind the monthly prices that nobody gave."""
        monthly = {"memory price": self.memory, "disk price": self.disk, "core price": self.core}
        return tuple(name for name, price in monthly.items() if price == value(name))


@dataclass(frozen=True)
class Row:
    """One engine. Sizes and money are of all machines together; queries are answered by all of them at once."""

    engine: str
    machines: int
    fits: bool
    memory: Figure
    disk: Figure
    build: Figure
    latency: Figure
    throughput: Figure
    month: Figure
    recall: str
    recall_source: str


@dataclass(frozen=True)
class Plan:
    """All engines for one task; `machines` is the number given, None where each engine takes as many as it needs."""

    task: Task
    machine: Machine
    machines: int | None
    prices: Prices
    rows: tuple[Row, ...]
    recommended: str
    sentences: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The plan and every constant it rests on, as JSON."""
        return {**asdict(self), "constants": {name: asdict(CONSTANTS[name]) for name in self.used()}}

    def used(self) -> list[str]:
        """The names of the constants it rests on."""
        figures = [f for row in self.rows for f in vars(row).values() if isinstance(f, Figure)]
        found = {name for figure in figures for name in figure.constants}
        return [name for name in CONSTANTS if name in found]


def payload_bytes(classes: int | None = None, top: int | None = 20) -> int:
    """Bytes beside a vector: a label (int64), and class probabilities as they are stored.

    Args:
        classes: how many there are, where that is known.
        top: the largest so many probabilities are kept, in float16, with their classes; None keeps all, in float32.
    """
    if top is None:
        if classes is None:
            raise InputError("the probabilities of all classes take a known number of classes; pass --classes.")
        return 8 + 4 * check_positive_int(classes, "classes")
    kept = check_positive_int(top, "top")
    if classes is None:
        return 8 + 4 * kept
    return 8 + min(kept, classes) * (4 if classes < 2**15 else 6)


def plan(task: Task, machine: Machine | None = None, machines: int | None = None, prices: Prices | None = None) -> Plan:
    """What each engine takes for a task.

    Args:
        machine: what one machine has.
        machines: how many there are; None takes for each engine as many as it needs.

    Raises:
        InputError: numbers that cannot be.
    """
    machine, prices = machine or Machine(), prices or Prices()
    if machines is not None:
        check_positive_int(machines, "machines")
    rows = tuple(_row(name, task, machine, machines, prices) for name in ENGINES)
    recommended = recommend(task, machine)
    sentences = _sentences(task, machine, machines, rows, recommended, prices)
    return Plan(task, machine, machines, prices, rows, recommended, sentences)


def recommend(task: Task, machine: Machine) -> str:
    """The engine that `index="auto"` chooses; where its lists outgrow the disk, the Milvus index on fewest machines."""
    chosen = choose(task.vectors, task.dim, int(machine.memory)).spec
    made = ENGINES[chosen](_share(task, machine, 1))
    if _amount(made.disk) <= machine.disk:
        return chosen
    needed = {name: _needed(cost, task, machine) for name, cost in ENGINES.items() if name.endswith(_MILVUS)}
    return min(needed, key=lambda name: needed[name] or math.inf)


def _share(task: Task, machine: Machine, machines: int) -> Share:
    n = -(-task.vectors // machines)
    return Share(n, task.dim, task.k, task.payload, machine.memory, machine.cores)


def _fits(cost: Callable[[Share], Cost], task: Task, machine: Machine, machines: int) -> bool:
    made = cost(_share(task, machine, machines))
    return _amount(made.memory) <= HALF * machine.memory and _amount(made.disk) <= machine.disk


def _needed(cost: Callable[[Share], Cost], task: Task, machine: Machine) -> int | None:
    """The least number of machines whose shares fit; None where no number does."""
    low, high = 0, 1  # `low` machines do not do
    while not _fits(cost, task, machine, high):
        low, high = high, 2 * high
        if low > _MOST_MACHINES:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(cost, task, machine, middle) else (middle, high)
    return high


def _amount(figure: Figure) -> float:
    assert figure.value is not None
    return figure.value


def _row(name: str, task: Task, machine: Machine, machines: int | None, prices: Prices) -> Row:
    cost = ENGINES[name]
    needed = machines or _needed(cost, task, machine)
    if needed is None:
        raise InputError(
            f"no number of machines of {said(machine.memory, 'bytes')} memory and {said(machine.disk, 'bytes')} disk "
            f"holds this with {name!r}; pass larger ones (--machine-memory, --machine-disk)."
        )
    made = cost(_share(task, machine, needed))
    memory, disk = (replace(f, value=needed * _amount(f)) for f in (made.memory, made.disk))
    month = (
        _amount(memory) / _GB * prices.memory
        + _amount(disk) / _GB * prices.disk
        + needed * machine.cores * _HOURS * prices.core
    )
    return Row(
        name,
        needed,
        _fits(cost, task, machine, needed),
        memory,
        disk,
        made.build,
        made.latency,
        made.throughput,
        Figure(month, "$", "memory and disk that are used, and all cores", prices.assumed),
        *RECALL[name],
    )


def _sentences(
    task: Task, machine: Machine, machines: int | None, rows: tuple[Row, ...], recommended: str, prices: Prices
) -> tuple[str, ...]:
    size = f"{said(machine.memory, 'bytes')} memory, {said(machine.disk, 'bytes')} disk, {machine.cores} cores"
    one = [name for name, cost in ENGINES.items() if _fits(cost, task, machine, 1)]
    needed = _needed(ENGINES[recommended], task, machine)
    where = "one machine" if needed == 1 else f"{needed:,} machines"
    why = "as index='auto' chooses"
    if recommended.endswith(_MILVUS):
        why = "since the lists that index='auto' chooses outgrow one disk"
    told = [
        f"One machine ({size}) holds: {', '.join(one)}." if one else f"Nothing here fits one machine ({size}).",
        f"Recommended, {why}: {recommended}, on {where}.",
    ]
    lacking = [r.engine for r in rows if not r.fits]
    if lacking:
        told.append(f"Not held by the {machines:,} given: {', '.join(lacking)}.")
    if task.vectors > LARGEST_RUN:
        told.append(
            f"{task.vectors:,} vectors were not run: the largest run behind these figures has {LARGEST_RUN:,}, and the "
            "rest is arithmetic. Recall falls as n grows unless more lists are looked through: measure it."
        )
    if needed != 1:
        told.append("Of Milvus, Lite and one standalone server were run, never a cluster.")
    hours = task.vectors / value("extraction") / 3600
    told.append(
        f"Reading the features once takes {said(hours * 3600, 's')} of one GPU ({said(hours * prices.gpu, '$')}) at "
        f"{value('extraction'):,.0f} images a second, an assumption."
    )
    return tuple(told)
