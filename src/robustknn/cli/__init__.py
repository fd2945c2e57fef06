"""The command line."""

from robustknn.cli.app import main

__all__ = ["main"]
