"""The report of a run: one account of its numbers, its figures, and pages that tell them."""

from plait.report.page import Written, write_report

__all__ = ["Written", "write_report"]
