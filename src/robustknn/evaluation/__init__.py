"""Evaluation: run attacks on classifiers, row by row, and say what came out."""

from robustknn.evaluation.attacked import attach
from robustknn.evaluation.certificates import CertificateDirectory, certify, holds_certificates
from robustknn.evaluation.certified import CertificatesSummary, finish_certificates, read_certificates
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
    "CertificateDirectory",
    "CertificatesSummary",
    "Detection",
    "DetectionPoint",
    "Options",
    "RunDirectory",
    "Summary",
    "Transferability",
    "Warned",
    "attach",
    "certify",
    "detect",
    "detect_by_credibility",
    "evaluate",
    "finish",
    "finish_certificates",
    "holds_certificates",
    "neighbor_distance",
    "read_certificates",
    "read_summary",
    "roc",
    "summarize",
    "threshold_at",
    "transferability",
]
