"""The figures of one run over tokens, and of several runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megamix.analysis.marks import marks
from megamix.analysis.movers import movers_note
from megamix.analysis.plots.drawing import (
    Label,
    domain_look,
    look,
    mark_axes,
    name_lines,
    new_figure,
    note,
    plain,
    points,
    weight_axis,
)
from megamix.analysis.series import (
    mean_series,
    recorded_series_of,
    score_series,
    shared_objective,
    training_series,
    validation_series,
    weight_series,
)
from megamix.core.errors import InputError
from megamix.training.objective import objective_name
from megamix.training.records.recorded_run import RecordedRun

_POINTS = 2000
"""At most so many points of a line: more than a figure has dots across."""
_Curve = tuple[str, tuple[str, Any], Sequence[float], Sequence[float]]
"""Name, look, tokens and values of a line."""


def weights_figure(run: RecordedRun) -> Figure:
    """The weight of each domain over tokens, as steps at the positions where weights take effect."""
    series = weight_series(run)
    curves = [(name, domain_look(k), *series.column(name)) for k, name in enumerate(series.names)]
    figure, axes, labels = _lines(f"Sampling weights: {_name(run)}", "weight", curves, drawstyle="steps-post")
    highest = float(series.values.max())
    natural = {name: share for name, share in run.natural_shares().items() if name in series.names}
    if natural:
        highest = max(highest, *natural.values())
        place = {name: k for k, name in enumerate(run.domain_names)}
        for k, share in ((place[name], share) for name, share in natural.items()):
            axes.plot(
                [0.0, 0.022], [share, share], transform=axes.get_yaxis_transform(),
                color=domain_look(k)[0], linewidth=2.6, alpha=0.55, solid_capstyle="butt", zorder=3,
            )  # fmt: skip
        note(axes, "thick dashes at the left: natural shares")
    mark_axes(axes, marks(run))
    if said := movers_note([run]):
        axes.set_xlabel(said)
    weight_axis(axes, highest, float(np.median(series.values[-1])))
    name_lines(figure, axes, labels)
    return figure


def stacked_figure(run: RecordedRun) -> Figure:
    """The weights of all domains over tokens, stacked."""
    series = weight_series(run, _POINTS)
    figure, axes = new_figure(f"Sampling weights, stacked: {_name(run)}", len(series.names))
    looks = [domain_look(k) for k in range(len(series.names))]
    axes.stackplot(
        series.tokens, series.values.T, colors=[colour for colour, _ in looks], step="post",
        edgecolor="white", linewidth=0.4,
    )  # fmt: skip
    middle = np.cumsum(series.values[-1]) - series.values[-1] / 2
    labels = [Label(float(middle[k]), name, *looks[k]) for k, name in enumerate(series.names)]
    axes.set_xlim(0, max(float(series.tokens[-1]), 1.0))
    axes.set_ylim(0, 1)
    axes.set_ylabel("weight")
    name_lines(figure, axes, labels)
    return figure


def loss_figure(run: RecordedRun) -> Figure:
    """Per-domain training loss (thin) and validation loss (points), the objective loss (bold) and the mean over
    domains, over tokens."""
    figure, axes = new_figure(f"Loss: {_name(run)}", len(run.domain_names) + 2)
    labels, seen = [], []
    training, validation = training_series(run, _POINTS), validation_series(run, _POINTS)
    for k, name in enumerate(run.domain_names):
        colour, style = domain_look(k)
        tokens, loss = training.column(name)
        axes.plot(tokens, loss, color=colour, linestyle="-", linewidth=0.8, alpha=0.45, zorder=2)
        checked, checked_loss = validation.column(name)
        points(axes, checked, checked_loss, colour, style, 1.4)
        seen += [*loss, *checked_loss]
        ends = checked_loss or loss
        if ends:
            labels.append(Label(ends[-1], name, colour, style))
    means = mean_series(run, _POINTS)
    named = (
        ("macro", "mean over domains", "#777777", 1.8),
        ("objective", f"objective ({objective_name(run.config.objective)})", "black", 2.6),
    )
    for column, name, colour, width in named:
        tokens, loss = means.column(column)
        if loss:
            points(axes, tokens, loss, colour, "-", width, zorder=5)
            labels.append(Label(loss[-1], name, colour, "-", bold=column == "objective"))
            seen += loss
    if not seen:
        raise InputError(
            f"the run {run.run_dir} has recorded no loss yet: metrics.jsonl has no line. Wait for the first one."
        )
    axes.set_xlim(0, max(run.tokens, 1))
    low, high = min(seen), max(seen)
    margin = 0.05 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel("loss, nats per token")
    note(axes, "points: validation; thin lines: training")
    name_lines(figure, axes, labels)
    return figure


def comparison_figure(runs: Sequence[RecordedRun], names: Sequence[str]) -> Figure:
    """The objective loss of several runs; of runs with different objectives, the mean over domains."""
    objective = shared_objective(runs)
    column, title = ("macro", "mean over domains") if objective is None else ("objective", f"objective ({objective})")
    figure, axes = new_figure(f"Validation loss, {title}", len(runs))
    labels = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour, style = look(index)
        tokens, loss = mean_series(run, _POINTS).column(column)
        if loss:
            points(axes, tokens, loss, colour, style, 1.8)
            labels.append(Label(loss[-1], f"{name}  {loss[-1]:.3f}", colour, style))
    axes.set_xlim(0, max(1, *(run.tokens for run in runs)))
    axes.set_ylabel("loss, nats per token")
    name_lines(figure, axes, labels)
    return figure


def exploration_figure(runs: Sequence[RecordedRun], names: Sequence[str]) -> Figure | None:
    """The exploration rates of runs; None where none has one."""
    known = recorded_series_of(runs, "exploration_rate", _POINTS)
    if not known:
        return None
    curves = [(names[index], look(index), *series.column("exploration_rate")) for index, series in known]
    figure, axes, labels = _lines("Exploration rate", "exploration rate", curves, drawstyle="steps-post")
    axes.set_ylim(bottom=0)
    name_lines(figure, axes, labels)
    return figure


def excess_figure(run: RecordedRun) -> Figure | None:
    """The excess loss of each domain that drives DoReMi's weights; None where the run has none."""
    series = score_series(run, "perdomain_scores", 300)
    if series is None:
        return None
    curves = [(name, domain_look(k), *series.column(name)) for k, name in enumerate(series.names)]
    figure, axes, labels = _lines(f"Excess loss: {_name(run)}", "nats per token", curves)
    referenced = getattr(run.config.mixer, "reference", None) is not None
    note(axes, "over the reference model" if referenced else "of a reference loss 0: the run's own loss")
    name_lines(figure, axes, labels)
    return figure


def _lines(title: str, what: str, curves: Sequence[_Curve], **style: Any) -> tuple[Figure, Axes, list[Label]]:
    """A figure with a line for each curve that has a point, and the names of these lines, still to be written."""
    figure, axes = new_figure(title, len(curves))
    labels, end = [], 1.0
    for name, (colour, dashes), tokens, values in curves:
        if len(tokens):
            axes.plot(tokens, values, color=colour, linestyle=dashes, linewidth=1.5, **style)
            labels.append(Label(values[-1], name, colour, dashes))
            end = max(end, tokens[-1])
    axes.set_xlim(0, end)
    axes.set_ylabel(what)
    return figure, axes, labels


def _name(run: RecordedRun) -> str:
    return plain(run.run_dir.resolve().name)
