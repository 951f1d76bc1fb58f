"""The figures of an arena's results.

RUN_DIR/plots/differences.png  every arm against the best static one, with intervals
RUN_DIR/plots/gain.CELL.png    the gain over natural weights, over tokens, of each objective and condition
RUN_DIR/plots/weights.png      the weights of a run of each arm with a mixer
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from megamix.analysis.plots.drawing import (
    STYLE,
    Label,
    domain_look,
    look,
    name_lines,
    new_figure,
    plain,
    save_figure,
    weight_axis,
)
from megamix.analysis.series import weight_series
from megamix.studies.arena.config import NATURAL, NO_TRAP
from megamix.studies.arena.results import Cell, Results, online_runs
from megamix.studies.arena.tables import title
from megamix.training.records.recorded_run import RecordedRun

PLOTS = "plots"
Curve = tuple[list[int], list[float]]
_POINTS = 1000
"""At most so many points of a line."""


def plot(results: Results) -> list[Path]:
    """Writes the PNGs; returns the files written."""
    folder = results.study.run_dir / PLOTS
    with matplotlib.rc_context(STYLE):
        figures = {"differences.png": differences_figure(results)}
        figures |= {f"gain.{slug(cell)}.png": gain_figure(results, cell) for cell in results.cells}
        figures["weights.png"] = weights_figure(results)
        return [save_figure(figure, folder / name) for name, figure in figures.items() if figure is not None]


def gains(results: Results, cell: Cell) -> Iterator[tuple[str, Curve]]:
    """The objective loss of natural less the loss of each other arm, after each evaluation: mean over the seeds that
    both have, by tokens; the one before the first step is left out."""
    batches = results.study.plan.config.batches
    base = cell.rows.get(NATURAL, {})
    for arm, mine in cell.rows.items():
        pairs = [(dict(base[seed].curve), dict(mine[seed].curve)) for seed in mine if seed in base]
        if arm == NATURAL or not pairs:
            continue
        steps = sorted(set.intersection(*(first.keys() & second.keys() for first, second in pairs)) - {0})
        if steps:
            gain = [statistics.fmean(first[step] - second[step] for first, second in pairs) for step in steps]
            yield arm, ([batches.tokens(step) for step in steps], gain)


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


def weights_figure(results: Results) -> Figure | None:
    """The weights of a run of each arm with a mixer, over tokens, on one scale; None where there is none yet."""
    runs = [(entry.name, RecordedRun.open(results.study.run_dir_of(entry))) for entry in online_runs(results)]
    if not runs:
        return None
    columns = min(2, len(runs))
    rows = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(8.0, 0.9 + 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    lines, highest, last = {}, 0.0, []
    for axes, (name, run) in zip(panels, runs, strict=False):
        axes.set_title(plain(name), fontsize=9)
        series = weight_series(run, _POINTS)
        for domain in series.names:
            colour, style = domain_look(run.domain_names.index(domain))
            tokens, weights = series.column(domain)
            drawn = axes.plot(tokens, weights, color=colour, linestyle=style, drawstyle="steps-post", linewidth=1.2)
            lines.setdefault(domain, drawn[0])
        highest, last = max(highest, float(series.values.max())), [*last, *series.values[-1].tolist()]
    for place, axes in enumerate(panels):
        axes.set_visible(place < len(runs))
        if place % columns == 0:
            weight_axis(axes, highest, statistics.median(last))
        if place >= len(runs) - columns:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("tokens")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    figure.legend(lines.values(), map(plain, lines), loc="outside lower center", ncols=6, fontsize=8)
    return figure
