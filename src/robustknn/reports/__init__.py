"""The report of a run: one HTML page and its figures, from the run directory alone."""

from robustknn.reports.certificates import write_certificates
from robustknn.reports.page import write_report

__all__ = ["write_certificates", "write_report"]
