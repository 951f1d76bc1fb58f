"""The page of an arena, and its plots.

RUN_DIR/arena.html             tables, gains over tokens, and the weights of online arms; it needs no network
RUN_DIR/plots/differences.png  every arm against the best static one, with intervals
RUN_DIR/plots/gain.CELL.png    the gain over natural weights, over tokens, of each objective and condition
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from megamix import __version__
from megamix.analysis.plots.drawing import STYLE, Label, look, name_lines, new_figure, plain, save_figure
from megamix.analysis.report.charts import Data, Shown, weight_charts
from megamix.analysis.report.looks import rules, run_class, swatch
from megamix.analysis.report.page import whole_page
from megamix.analysis.report.svg import Chart, End, line_path, nice_axis, weight_axis
from megamix.analysis.series import weight_series
from megamix.analysis.summary import run_table
from megamix.core.text import Table
from megamix.studies.arena.config import NATURAL, NO_TRAP
from megamix.studies.arena.results import Cell, Results
from megamix.studies.arena.tables import cell_table, how_to_read, status, title, trap_table, visible_text
from megamix.training.records.recorded_run import RecordedRun

PAGE, PLOTS = "arena.html", "plots"
MOST_WEIGHTS = 8
"""At most so many runs have their weights drawn."""
Curve = tuple[list[int], list[float]]


def page(results: Results) -> str:
    """The page as text."""
    data, cells = Data(), results.cells
    shown = _online(results)
    parts = [
        ("", "", f'<p class="verdict">{escape(status(results))}</p><p class="note">{escape(how_to_read(results))}</p>')
    ]
    for number, cell in enumerate(cells):
        body = _table(cell_table(cell))
        if cell.condition.trap != NO_TRAP:
            body += f"<p>Against the best static arm without the trap:</p>{_table(trap_table(cell))}"
        body += f'<p class="note">{escape(visible_text(cell))}</p>{_gain_chart(results, cell, f"gain:{number}", data)}'
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


def plot(results: Results) -> list[Path]:
    """Writes the PNGs; returns the files written."""
    folder = results.study.run_dir / PLOTS
    with matplotlib.rc_context(STYLE):
        figures = {"differences.png": differences_figure(results)}
        figures |= {f"gain.{slug(cell)}.png": gain_figure(results, cell) for cell in results.cells}
        return [save_figure(figure, folder / name) for name, figure in figures.items() if figure is not None]


def gains(results: Results, cell: Cell) -> Iterator[tuple[str, Curve]]:
    """The objective loss of natural less the loss of each other arm, after each evaluation: mean over the seeds that
    both have, by tokens; the one before the first step is left out."""
    train = results.study.plan.config.train
    per_step = train.global_batch * results.study.plan.config.data.seq_length
    base = cell.rows.get(NATURAL, {})
    for arm, mine in cell.rows.items():
        pairs = [(dict(base[seed].curve), dict(mine[seed].curve)) for seed in mine if seed in base]
        if arm == NATURAL or not pairs:
            continue
        steps = sorted(set.intersection(*(first.keys() & second.keys() for first, second in pairs)) - {0})
        if steps:
            gain = [statistics.fmean(first[step] - second[step] for first, second in pairs) for step in steps]
            yield arm, ([step * per_step for step in steps], gain)


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
    """A run of each online arm: of the first seed and condition that are done."""
    study, found = results.study, {}
    for row in results.rows:
        arm = study.arms[row.arm]
        if not arm.is_static and (row.member not in found) and not any(name == row.arm for name, _ in found.values()):
            found[row.member] = row.arm, study.run_dir / "runs" / row.member
    runs = [RecordedRun.open(folder) for _, folder in list(found.values())[:MOST_WEIGHTS]]
    return Shown(runs, [run_table(run) for run in runs], list(found)[:MOST_WEIGHTS])


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


def differences_figure(results: Results) -> Figure | None:
    """Every arm against the best static one, with its interval; None where there is no difference yet."""
    cells = [(cell, _against(cell, "best_static")) for cell in results.cells]
    cells = [(cell, found) for cell, found in cells if found]
    if not cells:
        return None
    heights = [len(found) + 1.5 for _, found in cells]
    figure = Figure(figsize=(8.0, 0.6 + 0.24 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(cells), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, (cell, found) in zip(axes, cells, strict=True):
        axis.set_title(plain(title(cell)), fontsize=9)
        axis.axvline(0, color="#777777", linewidth=0.8)
        axis.grid(axis="x")
        for place, (arm, mean, half) in enumerate(found):
            colour, _ = look(list(results.study.arms).index(arm))
            axis.errorbar(mean, place, xerr=half or 0.0, fmt="o", color=colour, markersize=4, capsize=2)
        axis.set_yticks(range(len(found)), [plain(arm) for arm, _, _ in found])
        axis.invert_yaxis()
    axes[-1].set_xlabel("objective loss less the best static arm's, nats per token (left: better), 95 % intervals")
    return figure


def _against(cell: Cell, against: str) -> Sequence[tuple[str, float, float | None]]:
    found = [
        (arm, one.interval.mean, one.interval.half_width)
        for arm, differences in cell.differences.items()
        for one in differences
        if one.against == against
    ]
    return sorted(found, key=lambda one: one[1])


def slug(cell: Cell) -> str:
    """``uniform.small.800steps.noise``: a cell's part of a file name."""
    model, steps, trap = cell.condition.model, cell.condition.steps, cell.condition.trap
    return ".".join(
        [cell.objective, *([model] if model else []), f"{steps}steps", *([trap] if trap != NO_TRAP else [])]
    )


def gain_figure(results: Results, cell: Cell) -> Figure | None:
    """The gain of each arm of a cell over natural, over tokens; None where there is none yet."""
    curves = list(gains(results, cell))
    if not curves:
        return None
    figure, axes = new_figure(f"Gain over natural weights: {plain(title(cell))}", len(curves))
    labels = []
    for arm, (tokens, gain) in curves:
        colour, style = look(list(results.study.arms).index(arm))
        axes.plot(tokens, gain, color=colour, linestyle=style, linewidth=1.8)
        labels.append(Label(gain[-1], f"{arm}  {gain[-1]:+.4f}", colour, style))
    axes.axhline(0, color="#777777", linewidth=0.8)
    axes.set_xlim(0, max(tokens[-1] for _, (tokens, _) in curves))
    axes.set_ylabel("objective loss less, nats per token")
    name_lines(figure, axes, labels)
    return figure
