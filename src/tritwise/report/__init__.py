"""Reads a run folder and nothing else; draws its plots and its page. No torch here.

`write_report(run)` writes `report/index.html` and PNG files into a run folder. The plots alone, as functions from
plain lists to matplotlib figures, are in `tritwise.report.plots`.
"""

from tritwise.report.page import ReportResult, write_report

__all__ = ["ReportResult", "write_report"]
