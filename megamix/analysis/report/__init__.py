"""``megamix report``: one HTML page of several runs, to be looked at.

The page needs nothing but itself: charts are SVG that is drawn here, colours follow the reader's light or dark
setting, and the script only adds what the charts do without (values under the pointer, a table that sorts, domains that
light up).
"""

from megamix.analysis.report.page import write_report

__all__ = ["write_report"]
