"""`robustknn index plan`: what a database takes, before there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from robustknn.cli.index_app import index_app

if TYPE_CHECKING:
    from robustknn.database.plan import Plan

Text = str | None
Price = float | None


@index_app.command("plan")
def plan_command(
    vectors: Annotated[Text, typer.Option(help="How many: 50e9, 1.3M, 1_000_000.")] = None,
    dim: Annotated[str, typer.Option(help="Length of a vector.")] = "256",
    k: Annotated[str, typer.Option("--k", "-k", help="Neighbors of a query.")] = "50",
    machine_memory: Annotated[str, typer.Option(help="Of one machine: 64GB.")] = "64GB",
    machine_disk: Annotated[str, typer.Option(help="Of one machine: 2TB.")] = "2TB",
    machine_cores: Annotated[str, typer.Option(help="Of one machine.")] = "16",
    machines: Annotated[Text, typer.Option(help="How many there are; by default as many as each engine needs.")] = None,
    classes: Annotated[Text, typer.Option(help="Number of classes.")] = None,
    payload_top: Annotated[str, typer.Option(help="Class probabilities kept beside a vector: so many, or all.")] = "20",
    price_memory: Annotated[Price, typer.Option(help="$ a GB of memory and month.")] = None,
    price_disk: Annotated[Price, typer.Option(help="$ a GB of disk and month.")] = None,
    price_core: Annotated[Price, typer.Option(help="$ a core and hour.")] = None,
    price_gpu: Annotated[Price, typer.Option(help="$ a GPU and hour.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every figure with its source, as JSON.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The page of the documentation, for four sizes.")
    ] = False,
) -> None:
    """What a database takes with each engine: memory, disk, machines, time, money. Nothing is run."""
    import json

    from robustknn.database.notation import count, size
    from robustknn.database.plan import Machine, Prices, Task, payload_bytes, plan
    from robustknn.database.plan_page import page
    from robustknn.errors import InputError

    if markdown:
        print(page(), end="")
        return
    if vectors is None:
        raise InputError("say how many vectors: --vectors 1.3M.")
    known = None if classes is None else count(classes, "--classes")
    top = None if payload_top == "all" else count(payload_top, "--payload-top")
    task = Task(count(vectors, "--vectors"), count(dim, "--dim"), count(k, "--k"), payload_bytes(known, top))
    machine = Machine(
        size(machine_memory, "--machine-memory"),
        size(machine_disk, "--machine-disk"),
        count(machine_cores, "--machine-cores"),
    )
    given = {"memory": price_memory, "disk": price_disk, "core": price_core, "gpu": price_gpu}
    prices = Prices(**{name: price for name, price in given.items() if price is not None})
    made = plan(task, machine, None if machines is None else count(machines, "--machines"), prices)
    if as_json:
        print(json.dumps(made.to_json(), indent=2))
    else:
        _print(made)


def _print(made: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    from robustknn.database.plan_constants import CONSTANTS
    from robustknn.database.plan_page import COLUMNS, LEGEND, cells, title

    console = Console(highlight=False)
    table = Table(title=title(made), caption=LEGEND)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "engine" else "right")
    for row in made.rows:
        table.add_row(*cells(row), style="bold" if row.engine == made.recommended else None)
    console.print(table)
    for sentence in made.sentences:
        console.print(sentence)
    console.print("From:")
    for name in made.used():
        c = CONSTANTS[name]
        console.print(f"  {name} ({c.kind}): {c.value:,.4g} {c.unit}; {c.source}", markup=False)
