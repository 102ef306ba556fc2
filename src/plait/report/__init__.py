"""The report of a run: its numbers, its plots and one self-contained page."""

from plait.report.page import write_report

__all__ = ["write_report"]
