"""The page of an arena, RUN_DIR/arena.html: tables, gains over tokens, and the weights of online arms; it needs no
network."""

from __future__ import annotations

from html import escape

import numpy as np

from megamix import __version__
from megamix.analysis.report.charts import Data, Shown, weight_charts
from megamix.analysis.report.looks import rules, run_class, swatch
from megamix.analysis.report.page import whole_page
from megamix.analysis.report.svg import Chart, End, line_path, nice_axis, weight_axis
from megamix.analysis.series import weight_series
from megamix.analysis.summary import run_table
from megamix.core.text import Table
from megamix.studies.arena.config import NO_TRAP
from megamix.studies.arena.figures import gains
from megamix.studies.arena.results import Cell, Results, online_runs
from megamix.studies.arena.tables import cell_table, how_to_read, in_words, status, title, trap_table
from megamix.training.records.recorded_run import RecordedRun

PAGE = "arena.html"
MOST_WEIGHTS = 8
"""At most so many runs have their weights drawn."""


def page(results: Results) -> str:
    """The page as text."""
    data, cells = Data(), results.cells
    shown = _online(results)
    parts = [
        ("", "", f'<p class="verdict">{escape(status(results))}</p><p class="note">{escape(how_to_read(results))}</p>')
    ]
    for number, cell in enumerate(cells):
        answer, *words = in_words(results, cell)
        body = f'<p class="verdict">{escape(answer)}</p>{_table(cell_table(cell))}'
        if cell.condition.trap != NO_TRAP:
            body += f"<p>Against the best static arm without the trap:</p>{_table(trap_table(cell))}"
        body += "".join(f'<p class="note">{escape(text)}</p>' for text in words)
        body += _gain_chart(results, cell, f"gain:{number}", data)
        parts.append((f"cell{number}", escape(title(cell)), body))
    parts.append(("weights", "Weights over time", _weights(shown, data) if shown.runs else ""))
    looks = rules(len(results.study.domains) + len(results.study.traps), max(len(results.study.arms), len(shown.runs)))
    footer = f"<footer><p>megamix {escape(__version__)}, {escape(results.study.source)}</p></footer>"
    return whole_page(
        f"megamix arena: {results.study.run_dir.name}",
        escape(f"Arena {results.study.run_dir.name}"),
        parts,
        looks,
        data,
        footer,
    )


def _gain_chart(results: Results, cell: Cell, key: str, data: Data) -> str:
    curves = list(gains(results, cell))
    if not curves:
        return ""
    order = list(results.study.arms)
    looks = {arm: run_class(order.index(arm)) for arm, _ in curves}
    values = [value for _, (_, gain) in curves for value in gain]
    x = nice_axis(0.0, float(max(tokens[-1] for _, (tokens, _) in curves)), 5, inside=True)
    y = nice_axis(min(0.0, *values), max(0.0, *values))
    body, ends = "", []
    for arm, (tokens, gain) in curves:
        heights = y.at(np.array(gain))
        body += f'<path class="line {looks[arm]}" d="{line_path(x.at(np.array(tokens)), heights)}"/>'
        ends.append(End(float(heights[-1]), arm, looks[arm]))
    rows = [(arm, looks[arm]) for arm, _ in curves]
    data.add(key, "near", rows, [tokens for _, (tokens, _) in curves], [gain for _, (_, gain) in curves])
    spoken = ", ".join(f"{arm} {gain[-1]:+.4f}" for arm, (_, gain) in curves)
    label = f"Gain over natural, at the end: {spoken}"
    return Chart(
        "Gain over natural", label, x, y, body, key, note="objective loss, nats per token; above 0 is better", ends=ends
    ).html()


def _online(results: Results) -> Shown:
    """A run of each online arm."""
    found = online_runs(results)[:MOST_WEIGHTS]
    runs = [RecordedRun.open(results.study.run_dir_of(entry)) for entry in found]
    return Shown(runs, [run_table(run) for run in runs], [entry.name for entry in found])


def _weights(shown: Shown, data: Data) -> str:
    series = [weight_series(run, shown.points) for run in shown.runs]
    y = weight_axis([one.values for one in series])
    key = "".join(f"<li>{swatch(shown.look(name))}{escape(name)}</li>" for name in shown.domains)
    drawn = "".join(
        weight_charts(shown, index, one, y, f"weights:{index}", "Weights", data) for index, one in enumerate(series)
    )
    return f'<p class="note">one run of each arm with a mixer</p><ul class="key domains">{key}</ul>{drawn}'


def _table(table: Table) -> str:
    """The table; verdicts have the colour of what they say."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = ""
    for arm, *cells in table.rows:
        rows += f'<tr><th scope="row">{escape(arm)}</th>{"".join(map(_cell, cells))}</tr>'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Arms"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(text: str) -> str:
    tone = "good" if text.startswith("better by") else "bad" if text.startswith("worse by") else ""
    return f'<td class="number {tone}">{escape(text)}</td>'
