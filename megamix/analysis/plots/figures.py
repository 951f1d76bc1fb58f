"""The figures of one run over tokens, and of several runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from megamix.analysis.plots.drawing import Label, look, name_lines, new_figure, note, plain, points, shade, weight_axis
from megamix.analysis.series import (
    mean_series,
    recorded_series,
    score_series,
    training_series,
    validation_series,
    weight_series,
)
from megamix.core.errors import InputError
from megamix.training.records.recorded_run import RecordedRun

_POINTS = 2000
"""At most so many points of a line: more than a figure has dots across."""


def weights_figure(run: RecordedRun) -> Figure:
    """The weight of each domain over tokens, as steps at the positions where weights take effect."""
    series = weight_series(run)
    position, weights = series.tokens, series.values
    figure, axes = new_figure(f"Sampling weights: {plain(run.run_dir.resolve().name)}", len(run.domain_names))
    labels = []
    for k, name in enumerate(run.domain_names):
        colour, style = look(k)
        axes.step(position, weights[:, k], where="post", color=colour, linestyle=style, linewidth=1.5)
        labels.append(Label(float(weights[-1, k]), name, colour, style))
    axes.set_xlim(0, max(float(position[-1]), 1.0))
    highest = float(weights.max())
    natural = run.natural_shares()
    if natural:
        highest = max(highest, *natural.values())
        for k, share in ((run.domain_names.index(name), share) for name, share in natural.items()):
            axes.plot(
                [0.0, 0.022], [share, share], transform=axes.get_yaxis_transform(),
                color=look(k)[0], linewidth=2.6, alpha=0.55, solid_capstyle="butt", zorder=3,
            )  # fmt: skip
        note(axes, "thick dashes at the left: natural shares")
    weight_axis(axes, highest, float(np.median(weights[-1])))
    name_lines(figure, axes, labels)
    return figure


def stacked_figure(run: RecordedRun) -> Figure:
    """The weights of all domains over tokens, stacked."""
    series = weight_series(run, _POINTS)
    figure, axes = new_figure(f"Sampling weights, stacked: {plain(run.run_dir.resolve().name)}", len(series.names))
    looks = [look(k) for k in range(len(series.names))]
    axes.stackplot(
        series.tokens, series.values.T, colors=[shade(k) for k in range(len(looks))], step="post",
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
    """Per-domain training loss (thin), validation loss (points) and its mean over domains (bold), over tokens."""
    figure, axes = new_figure(f"Loss: {plain(run.run_dir.resolve().name)}", len(run.domain_names) + 1)
    labels, seen = [], []
    training, validation = training_series(run, _POINTS), validation_series(run, _POINTS)
    for k, name in enumerate(run.domain_names):
        colour, style = look(k)
        tokens, loss = training.column(name)
        axes.plot(tokens, loss, color=colour, linestyle="-", linewidth=0.8, alpha=0.45, zorder=2)
        checked, checked_loss = validation.column(name)
        points(axes, checked, checked_loss, colour, style, 1.4)
        seen += [*loss, *checked_loss]
        ends = checked_loss or loss
        if ends:
            labels.append(Label(ends[-1], name, colour, style))
    tokens, macro = mean_series(run, _POINTS).column("macro")
    if macro:
        points(axes, tokens, macro, "black", "-", 2.6, zorder=5)
        labels.append(Label(macro[-1], "mean over domains", "black", "-", bold=True))
        seen += macro
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
    """The mean validation loss over domains of several runs."""
    figure, axes = new_figure("Validation loss, mean over domains", len(runs))
    labels = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour, style = look(index)
        tokens, macro = mean_series(run, _POINTS).column("macro")
        if macro:
            points(axes, tokens, macro, colour, style, 1.8)
            labels.append(Label(macro[-1], f"{name}  {macro[-1]:.3f}", colour, style))
    axes.set_xlim(0, max(1, *(run.tokens for run in runs)))
    axes.set_ylabel("loss, nats per token")
    name_lines(figure, axes, labels)
    return figure


def exploration_figure(runs: Sequence[RecordedRun], names: Sequence[str]) -> Figure | None:
    """The exploration rates of runs; None where none has one."""
    found = [(index, recorded_series(run, "exploration_rate", _POINTS)) for index, run in enumerate(runs)]
    known = [(index, series) for index, series in found if series is not None]
    if not known:
        return None
    figure, axes = new_figure("Exploration rate", len(known))
    labels = []
    for index, series in known:
        colour, style = look(index)
        rate = series.values[:, 0]
        axes.step(series.tokens, rate, where="post", color=colour, linestyle=style, linewidth=1.6)
        labels.append(Label(float(rate[-1]), names[index], colour, style))
    axes.set_xlim(0, max(1, *(int(series.tokens[-1]) for _, series in known)))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("exploration rate")
    name_lines(figure, axes, labels)
    return figure


def excess_figure(run: RecordedRun) -> Figure | None:
    """The excess loss of each domain that drives DoReMi's weights; None where the run has none."""
    series = score_series(run, "perdomain_scores", 300)
    if series is None:
        return None
    figure, axes = new_figure(f"Excess loss: {plain(run.run_dir.resolve().name)}", len(series.names))
    labels = []
    for k, name in enumerate(series.names):
        tokens, excess = series.column(name)
        if not tokens:
            continue
        colour, style = look(k)
        axes.plot(tokens, excess, color=colour, linestyle=style, linewidth=1.4)
        labels.append(Label(excess[-1], name, colour, style))
    axes.set_xlim(0, max(float(series.tokens[-1]), 1.0))
    axes.set_ylabel("nats per token")
    referenced = getattr(run.config.mixer, "reference", None) is not None
    note(axes, "over the reference model" if referenced else "of a reference loss 0: the run's own loss")
    name_lines(figure, axes, labels)
    return figure
