"""The report of a run: one self-contained HTML file made from what the stages wrote."""

from rlaif.report.run import write_report

__all__ = ["write_report"]
