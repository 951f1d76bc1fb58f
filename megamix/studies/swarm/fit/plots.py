"""Plots of a fit: held-out predictions against values, and the effect of each domain on each metric."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from megamix.analysis.plots.drawing import STYLE, look, plain, save_figure
from megamix.core.text import number
from megamix.studies.swarm.fit.fitted import Fitted

Array = NDArray[np.float64]
_COLUMNS, _ROWS = 3, 3
_SHIFT = 0.1
"""The weight that a domain gains in the matrix of effects."""
_LONGEST_NAME = 34


def plot_fit(fitted: Fitted, folder: Path) -> list[Path]:
    """Writes fit_predictions.png, or fit_predictions_1.png and so on, and fit_effects.png; removes older ones."""
    for old in folder.glob("fit_predictions*.png"):
        old.unlink()
    with mpl.rc_context(STYLE):
        pages = predictions_figures(fitted)
        names = (
            ["fit_predictions.png"] if len(pages) == 1 else [f"fit_predictions_{n + 1}.png" for n in range(len(pages))]
        )
        paths = [save_figure(page, folder / name) for page, name in zip(pages, names, strict=True)]
        return [*paths, save_figure(effects_figure(fitted), folder / "fit_effects.png")]


def predictions_figures(fitted: Fitted) -> list[Figure]:
    """Pages of nine metrics: each run's value and its held-out prediction, which agree on the diagonal."""
    per_page, pages = _COLUMNS * _ROWS, []
    for first in range(0, len(fitted.metrics), per_page):
        numbers = range(first, min(first + per_page, len(fitted.metrics)))
        columns = min(_COLUMNS, len(numbers))
        rows = -(-len(numbers) // columns)
        figure = Figure(figsize=(3.0 * columns + 0.3, 2.9 * rows + 0.5), layout="constrained")
        figure.suptitle("Predicted without the run, against its value", x=0.01, ha="left", fontweight="bold")
        for place, j in enumerate(numbers):
            _predictions(fitted, j, figure, (rows, columns, place + 1))
        pages.append(figure)
    return pages


def _predictions(fitted: Fitted, j: int, figure: Figure, where: tuple[int, int, int]) -> None:
    axes = figure.add_subplot(*where)
    actual_R, predicted_R = fitted.table.values_RJ[:, j], fitted.held_out_RJ[:, j]
    margin = 0.08 * np.ptp(actual_R)
    low, high = actual_R.min() - margin, actual_R.max() + margin
    # A prediction far off would press the others into a corner: it is drawn at the edge.
    shown_R = np.clip(predicted_R, low - margin / 2, high + margin / 2)
    outside = shown_R != predicted_R
    axes.plot([low, high], [low, high], color="#999999", linewidth=0.8, zorder=1)
    axes.plot(actual_R[~outside], shown_R[~outside], "o", ms=3.6, alpha=0.75, color=look(0)[0], mew=0)
    axes.plot(actual_R[outside], shown_R[outside], "x", ms=4.5, color=look(1)[0])
    axes.set_xlim(low, high)
    axes.set_ylim(low - margin, high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_title(_short(fitted.metrics[j]), fontsize=9)
    one = fitted.cross_validation[fitted.metrics[j]]
    text = f"R2 {number(one['r2'], 2)}, rank correlation {number(one['spearman'], 2)}"
    text += f"\n{outside.sum()} outside" if outside.any() else ""
    axes.text(0.03, 0.97, text, transform=axes.transAxes, va="top", fontsize=7.5, color="#555555")
    axes.set_xlabel("value", fontsize=8)
    axes.set_ylabel("predicted", fontsize=8)


def effects(fitted: Fitted) -> Array:
    """Change of each metric when a domain gains 0.1 of weight at the mean mixture, the others shrinking alike.

    Returns:
        float64 [K, J], in standard deviations of the metric over the runs.
    """
    mean_K = fitted.table.ratios_RK.mean(axis=0)
    moved_KK = (1 - _SHIFT) * mean_K + _SHIFT * np.eye(len(fitted.domains))
    change_KJ = fitted.predict(moved_KK) - fitted.predict(mean_K[None])
    return change_KJ / fitted.table.values_RJ.std(axis=0)


def effects_figure(fitted: Fitted) -> Figure:
    """`effects` as a map of domains and metrics; blue lowers a metric."""
    effect_KJ = effects(fitted)
    num_domains, num_metrics = effect_KJ.shape
    figure = Figure(figsize=(3.4 + 0.36 * num_metrics, 2.6 + 0.24 * num_domains), layout="constrained")
    axes = figure.add_subplot()
    # A few extreme cells would leave all others white.
    limit = float(np.quantile(np.abs(effect_KJ), 0.97)) or 1.0
    image = axes.imshow(effect_KJ, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(num_metrics), [_short(name) for name in fitted.metrics], rotation=90, fontsize=8)
    axes.set_yticks(range(num_domains), [_short(name) for name in fitted.domains], fontsize=8)
    axes.grid(visible=False)
    figure.suptitle("What a domain does to a metric", x=0.01, ha="left", fontweight="bold")
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label(f"change by +{_SHIFT:g} of weight, in sd over the runs", fontsize=8)
    return figure


def _short(name: str) -> str:
    return plain(name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3] + "...")
