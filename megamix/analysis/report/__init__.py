"""``megamix report``: one HTML page about several runs.

The page loads nothing else: charts are SVG, colours follow the reader's light or dark setting, and the script only adds
values under the pointer, sorting of the table and highlighting of domains.
"""

from megamix.analysis.report.page import write_report

__all__ = ["write_report"]
