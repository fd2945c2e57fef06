"""Evaluation: run attacks on classifiers, row by row, and say what came out."""

from robustknn.evaluation.detection import (
    ROC,
    Detection,
    DetectionPoint,
    detect,
    detect_by_credibility,
    neighbor_distance,
    roc,
    threshold_at,
)
from robustknn.evaluation.diagnostics import Warned
from robustknn.evaluation.rundir import Cell, RunDirectory
from robustknn.evaluation.runner import Options, evaluate
from robustknn.evaluation.summary import Summary, finish, read_summary, summarize
from robustknn.evaluation.transfer import Transferability, transferability

__all__ = [
    "ROC",
    "Cell",
    "Detection",
    "DetectionPoint",
    "Options",
    "RunDirectory",
    "Summary",
    "Transferability",
    "Warned",
    "detect",
    "detect_by_credibility",
    "evaluate",
    "finish",
    "neighbor_distance",
    "read_summary",
    "roc",
    "summarize",
    "threshold_at",
    "transferability",
]
