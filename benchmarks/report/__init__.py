"""One page of HTML from benchmark records: ``ringattn report RESULTS...``.

    write_report(["benchmarks/results"], "report.html")

The page stands alone: no network, no other files, readable without JavaScript, light and dark.
"""

from ringattn.benchmarks.report.page import report, write_report

__all__ = ["report", "write_report"]
