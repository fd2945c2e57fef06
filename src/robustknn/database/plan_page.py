"""The plan as text: the cells that terminal and page share, and the page docs/scale/plan.md."""

from __future__ import annotations

from collections.abc import Iterator

from robustknn.database.notation import said
from robustknn.database.plan import Machine, Plan, Row, Task, plan
from robustknn.database.plan_constants import ASSUMED, CONSTANTS, MEASURED, PUBLISHED
from robustknn.database.plan_engines import Figure

SIZES = (1_300_000, 100_000_000, 1_000_000_000, 50_000_000_000)
COLUMNS = ("engine", "machines", "memory", "disk", "build", "one query", "queries/s", "a month", "recall")
LEGEND = (
    "Marks: m from figures measured here, p published, a assumed; without a mark it is arithmetic alone. Recall is "
    "what was seen in smaller runs, not a promise."
)
_MARKS = {MEASURED: "m", PUBLISHED: "p", ASSUMED: "a"}


def cells(row: Row) -> list[str]:
    """What the table says of an engine, in the order of COLUMNS."""
    figures = (row.memory, row.disk, row.build, row.latency, row.throughput, row.month)
    machines = f"{row.machines:,}" + ("" if row.fits else " (too few)")
    return [row.engine, machines, *map(_cell, figures), row.recall]


def _cell(figure: Figure) -> str:
    if figure.value is None:
        return "–"
    marks = "".join(sorted(_MARKS[kind] for kind in figure.kinds))
    return said(figure.value, figure.unit) + (f" {marks}" if marks else "")


def title(made: Plan) -> str:
    """What the table is of."""
    task, machine = made.task, made.machine
    return (
        f"{task.vectors:,} vectors of length {task.dim}, k {task.k}, {task.payload} bytes beside each; machines of "
        f"{said(machine.memory, 'bytes')} memory, {said(machine.disk, 'bytes')} disk, {machine.cores} cores"
    )


def page() -> str:
    """docs/scale/plan.md: what was run, and what is arithmetic, apart."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield "# Planning a database"
    yield ""
    yield "Written by `robustknn index plan --markdown`; for other numbers and machines:"
    yield ""
    yield "```bash"
    yield "robustknn index plan --vectors 50e9 --dim 256 --k 50 --machine-memory 64GB --machine-disk 2TB"
    yield "```"
    yield ""
    yield "## What was run"
    yield ""
    yield "These runs, and no larger ones. Machines differ; compare ratios rather than figures."
    yield ""
    yield from _constants(MEASURED)
    yield "## What others published, and what is assumed"
    yield ""
    yield from _constants(PUBLISHED)
    yield from _constants(ASSUMED)
    yield "## What is arithmetic"
    yield ""
    yield f"Everything below: none of it was run. {LEGEND}"
    yield ""
    for n in SIZES:
        made = plan(Task(n, 256), Machine())
        yield f"### {n:,} vectors"
        yield ""
        yield f"{title(made)}."
        yield ""
        yield from _table(COLUMNS, [cells(row) for row in made.rows])
        yield from (f"* {sentence}" for sentence in made.sentences)
        yield ""
    yield "### How each figure is computed"
    yield ""
    made = plan(Task(SIZES[-1], 256), Machine())
    lines = [
        [row.engine, name, figure.formula, ", ".join(figure.constants) or "–"]
        for row in made.rows
        for name, figure in (
            ("memory", row.memory),
            ("disk", row.disk),
            ("build", row.build),
            ("one query", row.latency),
            ("queries/s", row.throughput),
        )
    ]
    yield "Bytes are for each vector unless said otherwise; of 50 billion, n is what one machine holds."
    yield ""
    yield from _table(("engine", "figure", "computed as", "constants"), lines)
    yield "### Where each recall was seen"
    yield ""
    yield from _table(("engine", "recall", "seen"), [[r.engine, r.recall, r.recall_source] for r in made.rows])


def _constants(kind: str) -> Iterator[str]:
    found = {name: c for name, c in CONSTANTS.items() if c.kind == kind}
    lines = [[name, f"{c.value:,.4g}", c.unit, c.source] for name, c in found.items()]
    yield from _table((kind, "value", "unit", "from"), lines)


def _table(head: tuple[str, ...], lines: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(line)} |" for line in lines)
    yield ""
