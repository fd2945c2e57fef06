"""Evaluation: run attacks on classifiers, row by row, and say what came out."""

from robustknn.evaluation.diagnostics import Warned
from robustknn.evaluation.rundir import Cell, RunDirectory
from robustknn.evaluation.runner import Options, evaluate
from robustknn.evaluation.summary import Summary, finish, read_summary, summarize
from robustknn.evaluation.transfer import Transferability, transferability

__all__ = [
    "Cell",
    "Options",
    "RunDirectory",
    "Summary",
    "Transferability",
    "Warned",
    "evaluate",
    "finish",
    "read_summary",
    "summarize",
    "transferability",
]
