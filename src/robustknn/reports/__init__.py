"""The report of a run: one HTML page and its figures, from the run directory alone."""

from robustknn.reports.certificates import write_certificates
from robustknn.reports.floors import Floor, check_floors, judge
from robustknn.reports.junit import write_junit
from robustknn.reports.page import write_report

__all__ = ["Floor", "check_floors", "judge", "write_certificates", "write_junit", "write_report"]
