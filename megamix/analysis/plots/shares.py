"""Figures with a row for each domain: shares of the samples, and epochs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megamix.analysis.plots.drawing import domain_look, look, plain
from megamix.analysis.series import asked_shares
from megamix.analysis.summary import run_table
from megamix.training.records.recorded_run import RecordedRun


def proportions_figure(run: RecordedRun) -> Figure | None:
    """Realised against asked shares of every domain; None before the first step."""
    asked, drawn = asked_shares(run), set(run.domain_names)
    rows = [row for row in run_table(run).rows if row.domain in drawn]
    if not asked:
        return None
    figure, axes = _rows(f"Shares of the samples: {plain(run.run_dir.resolve().name)}", [row.domain for row in rows], 1)
    places = np.arange(len(rows))
    realised = [row.realised_share or 0.0 for row in rows]
    axes.barh(
        places, realised, height=0.6, color=[domain_look(k)[0] for k in range(len(rows))], alpha=0.75, label="realised"
    )
    axes.plot(
        [asked[row.domain] for row in rows], places, "|", color="black", ms=13, mew=2.2, label="asked, on average"
    )
    natural = [(row.natural_share, place) for place, row in enumerate(rows) if row.natural_share is not None]
    if natural:
        axes.plot(*zip(*natural, strict=True), "D", color="white", mec="black", ms=4.5, label="natural")
    axes.set_xlim(left=0)
    axes.set_xlabel("share")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def epochs_figure(runs: Sequence[RecordedRun], names: Sequence[str]) -> Figure | None:
    """Epochs read of each domain by each run; None without a data set."""
    epochs = [run.epochs() for run in runs]
    drawn = {name for run in runs for name in run.domain_names}
    domains = [domain for domain in dict.fromkeys(domain for one in epochs for domain in one) if domain in drawn]
    if not domains:
        return None
    figure, axes = _rows("Epochs read", domains, len(runs))
    height = 0.75 / len(runs)
    for index, (one, name) in enumerate(zip(epochs, names, strict=True)):
        places = np.arange(len(domains)) + (index - (len(runs) - 1) / 2) * height
        axes.barh(places, [one.get(domain, 0.0) for domain in domains], height=height, color=look(index)[0], label=name)
    axes.set_xlim(left=0)
    axes.set_xlabel("epochs")
    if len(runs) > 1:
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def _rows(title: str, domains: Sequence[str], bars: int) -> tuple[Figure, Axes]:
    """A figure with room for so many bars in each row; the first domain is on top."""
    figure = Figure(figsize=(8.0, 1.5 + len(domains) * (0.2 + 0.08 * bars)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_yticks(range(len(domains)), [plain(domain) for domain in domains])
    axes.set_ylim(len(domains) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    return figure, axes
