"""`robustknn reproduce`: the papers' tables and figures, each by one command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from robustknn.cli.app import app
from robustknn.cli.options import DownloadOption, PluginOption, ThreadsOption, use_threads

Text = str | None


@app.command()
def reproduce(
    name: Annotated[Text, typer.Argument(help="Which experiment; --list names them.")] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Name the experiments.")] = False,
    preset: Annotated[str, typer.Option(help="cpu (hours on two cores) or paper (as published).")] = "cpu",
    data: Annotated[
        Text,
        typer.Option(
            "--data", "--data-root", help="Folder of the data sets. [default: the environment's ROBUSTKNN_DATA]"
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help="Which data set; repeatable. [default: the paper's first]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of training and attacks.")] = 0,
    seeds: Annotated[Text, typer.Option(help="Several, e.g. 0,1,2: mean and standard deviation.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change an option of the preset, e.g. n=100; repeatable.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder of the work, to be continued: networks, parts.")] = Path(
        "runs/reproduce"
    ),
    out: Annotated[Path | None, typer.Option(help="Folder of the records. [default: WORK/results]")] = None,
    pages: Annotated[
        Path | None, typer.Option(help="Write the pages and figures of a folder whose data/ holds records; no more.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what is to be done and how long; no more.")] = False,
    download: DownloadOption = False,
    threads: ThreadsOption = None,
    plugin: PluginOption = None,
) -> None:
    """Run a table or figure of a paper; a stopped run goes on with the same command."""
    from robustknn import registry
    from robustknn.errors import InputError
    from robustknn.progress import Console
    from robustknn.reproduce import experiments
    from robustknn.reproduce.command import Order, ordered, perform
    from robustknn.reproduce.pages import write_pages

    use_threads(threads)
    for place in plugin or []:
        registry.load_plugin(place)
    if list_all:
        for entry in experiments:
            kind = experiments.create(entry.name)
            print(f"{entry.name:18} {kind.paper}, {kind.table}: {kind.title}")
            print(f"{'':18} on {', '.join(kind.data)}; presets {', '.join(kind.presets)}")
        return
    if pages is not None:
        for path in write_pages(pages):
            print(path)
        return
    if name is None:
        raise InputError("name an experiment, e.g. robustknn reproduce advknn-table2; --list shows them all.")
    order = Order(
        name=name,
        preset=preset,
        datasets=tuple(dataset or ()),
        device=device,
        seeds=_whole(seeds) if seeds is not None else (seed,),
        changed=_changes(change or []),
        root=data or os.environ.get("ROBUSTKNN_DATA"),
        work=work,
        out=out or work / "results",
        download=download,
    )
    progress = Console()
    runs, said = ordered(order, progress)
    print(said, file=sys.stderr, flush=True)
    if estimate:
        return
    for record in perform(order, runs, lambda line: print(line, file=sys.stderr, flush=True)):
        print(record)


def _whole(text: str) -> tuple[int, ...]:
    from robustknn.errors import InputError

    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--seeds {text!r} is no list of whole numbers; write 0,1,2.") from error
    if min(found) < 0 or len(set(found)) < len(found):
        raise InputError(f"--seeds {text!r} must be different whole numbers from 0; write 0,1,2.")
    return found


def _changes(given: list[str]) -> dict[str, Any]:
    from robustknn.errors import InputError

    changed = {}
    for word in given:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise InputError(f"--set {word!r} is not of the form key=value; write e.g. n=100.")
        try:
            changed[key] = json.loads(value)
        except ValueError:
            changed[key] = value
    return changed
