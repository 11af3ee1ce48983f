"""`run`: one self-contained HTML page about a run, or several runs overlaid."""

from unicom_dist.tracking.report.page import REPORT_FILE, run

__all__ = ["REPORT_FILE", "run"]
