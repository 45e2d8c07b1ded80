"""The HTML reports of a run and of a comparison. They read folders, never live objects."""

from omnifm.report.html import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
