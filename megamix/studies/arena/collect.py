"""The files of an arena's results.

    RUN_DIR/results.csv    a line for each arm, seed, trap, objective, budget and model
    RUN_DIR/results.json   for each of these cells the arms' means, and paired differences with intervals
    RUN_DIR/results.md     the same as tables

Beside them are the page (`megamix.studies.arena.page`) and plots (`megamix.studies.arena.figures`).
"""

from __future__ import annotations

import json

from megamix.core.files import replace_file, writing
from megamix.core.locks import turn
from megamix.core.text import Report
from megamix.studies.arena.results import read_results
from megamix.studies.arena.study import ArenaStudy
from megamix.studies.arena.tables import markdown, report

CSV, JSON, MARKDOWN = "results.csv", "results.json", "results.md"


def collect(study: ArenaStudy) -> Report:
    """Writes the results of the members that are done, with page and plots; returns what to print."""
    # Not at once: matplotlib takes seconds to import, and submitting does without it.
    from megamix.studies.arena.figures import plot
    from megamix.studies.arena.page import PAGE, page

    with writing(study.run_dir, "Choose another run_dir."):
        study.run_dir.mkdir(parents=True, exist_ok=True)
    # One at a time, or a job that collects could take away what another writes, or put older results in its place.
    with turn(study.run_dir):
        results = read_results(study)
        content = {
            CSV: results.csv(),
            JSON: json.dumps(results.json(), indent=1, allow_nan=False) + "\n",
            MARKDOWN: markdown(results),
            PAGE: page(results),
        }
        with writing(study.run_dir, "Choose another run_dir."):
            for name, text in content.items():
                replace_file(study.run_dir / name, text.encode())
        return report(results, [*(study.run_dir / name for name in content), *plot(results)])
