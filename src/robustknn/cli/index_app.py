"""The group of commands `robustknn index`."""

from __future__ import annotations

import typer

from robustknn.cli.app import app

index_app = typer.Typer(no_args_is_help=True, help="Databases of references: build, search, check, plan.")
app.add_typer(index_app, name="index")
