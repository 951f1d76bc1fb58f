"""``megamix plot``: PNGs of a run's weights and losses over tokens, and of several runs beside each other.

Colours are those of Okabe and Ito (2008) and Tol (2021) that stay apart for colour-blind readers, in several line
styles; each line is named at its end.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator
from matplotlib.transforms import Affine2D, ScaledTranslation

from megamix.errors import InputError
from megamix.summary import RecordedRun

FOLDER = "plots"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#332288")
_STYLES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
_INK = "#222222"
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": _INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "savefig.dpi": 160,
}
_POINTS_PER_LINE = 11.0
"""Vertical distance of two labels, in points."""


@dataclass(frozen=True)
class _Label:
    """A name for the end of a line: where it belongs (y in data) and how it is drawn."""

    y: float
    text: str
    colour: str
    style: Any
    bold: bool = False


def plot_run(run_dirs: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Writes weights.png and loss.png of every run and, of several, comparison.png.

    Args:
        run_dirs: directories of runs.
        out: folder for the PNGs, with one subfolder for each run where there are several. Default: RUN/plots of each
            run, the comparison in the first one's.

    Returns:
        The files written.

    Raises:
        InputError: no such run, one that has recorded nothing yet, a damaged line, or a folder that cannot be written.
    """
    if not run_dirs:
        raise InputError("no run given. Name the run_dir of at least one run.")
    runs = [RecordedRun.open(Path(run_dir)) for run_dir in run_dirs]
    names = run_names([run.run_dir for run in runs])
    written = []
    with matplotlib.rc_context(_STYLE):
        for run, name in zip(runs, names, strict=True):
            folder = run.run_dir / FOLDER if out is None else out if len(runs) == 1 else out / name
            written.append(_save(weights_figure(run), folder / "weights.png"))
            written.append(_save(loss_figure(run), folder / "loss.png"))
        if len(runs) > 1:
            folder = runs[0].run_dir / FOLDER if out is None else out
            written.append(_save(comparison_figure(runs, names), folder / "comparison.png"))
    return written


def run_names(run_dirs: Sequence[Path]) -> list[str]:
    """Short names that differ: the last parts of the paths, as many as it takes."""
    paths = [path.resolve().parts for path in run_dirs]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["-".join(parts[-length:]).strip("/") for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{parts[-1]}-{index}" for index, parts in enumerate(paths, start=1)]


def weights_figure(run: RecordedRun) -> Figure:
    """The weight of each domain over tokens, as steps at the positions where weights take effect."""
    seq_length, train = run.config.data.seq_length, run.config.train
    # Weights are on record before the metrics of the steps they act in; the last ones of a run never act.
    starts = np.array([line["position"] for line in run.ledger.lines])
    end = min(max(run.position, int(starts[-1])), train.steps * train.global_batch)
    taken = starts <= end
    position = np.append(starts[taken], end) * seq_length
    weights = run.ledger.weights()[taken]
    weights = np.vstack([weights, weights[-1]])
    figure, axes = _figure(f"Sampling weights: {_plain(run.run_dir.resolve().name)}", len(run.domain_names))
    labels = []
    for k, name in enumerate(run.domain_names):
        colour, style = _look(k)
        axes.step(position, weights[:, k], where="post", color=colour, linestyle=style, linewidth=1.5)
        labels.append(_Label(float(weights[-1, k]), name, colour, style))
    axes.set_xlim(0, max(float(position[-1]), 1.0))
    highest = float(weights.max())
    natural = run.natural_shares()
    if natural:
        highest = max(highest, *natural.values())
        for k, share in ((run.domain_names.index(name), share) for name, share in natural.items()):
            axes.plot(
                [0.0, 0.022], [share, share], transform=axes.get_yaxis_transform(),
                color=_look(k)[0], linewidth=2.6, alpha=0.55, solid_capstyle="butt", zorder=3,
            )  # fmt: skip
        _note(axes, "thick dashes at the left: natural shares")
    _weight_axis(axes, highest, float(np.median(weights[-1])))
    _name_lines(figure, axes, labels)
    return figure


def _weight_axis(axes: Axes, highest: float, median: float) -> None:
    """From 0 to above ``highest``; on a square-root scale where one large weight would press the others flat."""
    axes.set_ylabel("weight")
    if highest > 5 * median:
        axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
        axes.yaxis.set_major_locator(FixedLocator([0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0]))
        axes.set_ylabel("weight (square-root scale)")
    axes.set_ylim(0, min(highest * 1.06, max(1.0, highest)))


def loss_figure(run: RecordedRun) -> Figure:
    """Per-domain training loss (thin), validation loss (points) and its mean over domains (bold), over tokens."""
    figure, axes = _figure(f"Loss: {_plain(run.run_dir.resolve().name)}", len(run.domain_names) + 1)
    labels, seen = [], []
    for k, name in enumerate(run.domain_names):
        colour, style = _look(k)
        tokens, loss = _curve(run.train, name)
        axes.plot(tokens, loss, color=colour, linestyle="-", linewidth=0.8, alpha=0.45, zorder=2)
        checked, validation = _curve(run.evaluations, name)
        _points(axes, checked, validation, colour, style, 1.4)
        seen += [*loss, *validation]
        ends = validation or loss
        if ends:
            labels.append(_Label(ends[-1], name, colour, style))
    tokens, macro = _macro(run)
    if macro:
        _points(axes, tokens, macro, "black", "-", 2.6, zorder=5)
        labels.append(_Label(macro[-1], "mean over domains", "black", "-", bold=True))
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
    _note(axes, "points: validation; thin lines: training")
    _name_lines(figure, axes, labels)
    return figure


def comparison_figure(runs: Sequence[RecordedRun], names: Sequence[str]) -> Figure:
    """The mean validation loss over domains of several runs."""
    figure, axes = _figure("Validation loss, mean over domains", len(runs))
    labels = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour, style = _look(index)
        tokens, macro = _macro(run)
        if macro:
            _points(axes, tokens, macro, colour, style, 1.8)
            labels.append(_Label(macro[-1], f"{name}  {macro[-1]:.3f}", colour, style))
    axes.set_xlim(0, max(1, *(run.tokens for run in runs)))
    axes.set_ylabel("loss, nats per token")
    _name_lines(figure, axes, labels)
    return figure


def _figure(title: str, num_lines: int) -> tuple[Figure, Axes]:
    """A figure high enough to name that many lines."""
    height = max(4.2, 1.3 + num_lines * _POINTS_PER_LINE * 1.25 / 72)
    figure = Figure(figsize=(8.0, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, pad=22)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    return figure, axes


def _look(index: int) -> tuple[str, Any]:
    return _COLOURS[index % len(_COLOURS)], _STYLES[index // len(_COLOURS) % len(_STYLES)]


def _darker(colour: str) -> tuple[float, ...]:
    """Text needs more contrast than lines."""
    return tuple(0.75 * part for part in to_rgb(colour))


def _plain(text: str) -> str:
    """A name as it is, not as a formula."""
    return text.replace("$", r"\$")


def _note(axes: Axes, text: str) -> None:
    """A line in small print below the title."""
    axes.annotate(
        text, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", fontsize=8, color="#777777"
    )


def _points(
    axes: Axes, tokens: list[int], loss: list[float], colour: str, style: Any, width: float, zorder: float = 3
) -> None:
    """Evaluations, joined from the first trained one on: a line from the untrained model would belie the training."""
    first = 1 if tokens and tokens[0] == 0 else 0
    axes.plot(tokens[first:], loss[first:], color=colour, linestyle=style, linewidth=width, zorder=zorder)
    axes.plot(tokens, loss, "o", color=colour, markersize=2.4 + width, zorder=zorder + 1, clip_on=False)


def _curve(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Tokens and loss of one domain, without the intervals in which it was absent."""
    known = [(line["tokens"], line["domain_loss"].get(name)) for line in lines]
    return [tokens for tokens, loss in known if loss is not None], [loss for _, loss in known if loss is not None]


def _macro(run: RecordedRun) -> tuple[list[int], list[float]]:
    known = [(line["tokens"], line.get("macro_loss")) for line in run.evaluations]
    return [tokens for tokens, loss in known if loss is not None], [loss for _, loss in known if loss is not None]


def _name_lines(figure: Figure, axes: Axes, labels: Sequence[_Label]) -> None:
    """Writes each name right of the axes at the height of its line's end, moved apart where they would overlap."""
    if not labels:
        return
    # The layout makes room for the names by itself, which takes from the width of the axes but not from their height.
    figure.draw_without_rendering()
    height = axes.get_window_extent().height * 72 / figure.dpi
    order = sorted(range(len(labels)), key=lambda index: labels[index].y)
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = np.array([to_axes.transform((0, labels[index].y))[1] * height for index in order])
    placed = spread(wanted, _POINTS_PER_LINE, -0.3 * _POINTS_PER_LINE, height + 0.3 * _POINTS_PER_LINE)
    for index, y_line, y_name in zip(order, wanted, placed, strict=True):
        label = labels[index]
        shared = {"xycoords": ("axes fraction", "axes points"), "textcoords": "offset points", "annotation_clip": False}
        _leader(axes, label, y_line, y_name)
        axes.annotate(
            _plain(label.text), (1, y_name), (46, 0), **shared, va="center", color=_darker(label.colour),
            fontsize=8.5, fontweight="bold" if label.bold else "normal",
        )  # fmt: skip


def _leader(axes: Axes, label: _Label, y_line: float, y_name: float) -> None:
    """A hairline from the end of a line to its name, and a sample of the line before the name."""
    for start, stop, y_start, y_stop, width, style in (
        (2, 18, y_line, y_name, 0.6, "-"),
        (20, 42, y_name, y_name, 2.4 if label.bold else 1.6, label.style),
    ):
        _draw_outside(axes, (start, stop), (y_start, y_stop), label.colour, width, style)


def _draw_outside(
    axes: Axes, x: tuple[float, float], y: tuple[float, float], colour: str, width: float, style: Any
) -> None:
    """A line in points, from the lower right corner of the axes."""
    figure = axes.figure
    assert figure is not None
    # Points to pixels, then from the origin to the corner.
    points = Affine2D().scale(1 / 72) + figure.dpi_scale_trans
    corner: Any = axes.transAxes
    place = points + ScaledTranslation(1, 0, corner)
    line = Line2D(x, y, color=colour, linewidth=width, linestyle=style, transform=place, clip_on=False)
    line.set_in_layout(False)
    axes.add_artist(line)


def spread(wanted: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Places near ``wanted`` (ascending, [n]) that keep ``gap`` apart within [low, high]; closer where not all fit.

    Neighbours that would overlap are set side by side around the middle of where they belong (pool adjacent violators).
    """
    number = len(wanted)
    if number > 1:
        gap = min(gap, (high - low) / (number - 1))
    # Less its rank times the gap, a place may equal its neighbour's but not fall below it: a monotone fit.
    shifted = np.asarray(wanted, float) - gap * np.arange(number)
    groups: list[tuple[float, int]] = []
    for value in shifted:
        mean, size = float(value), 1
        while groups and groups[-1][0] > mean:
            before, count = groups.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        groups.append((mean, size))
    fitted = np.concatenate([np.full(size, mean) for mean, size in groups])
    return np.clip(fitted, low, high - gap * (number - 1)) + gap * np.arange(number)


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", facecolor="white")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}. Choose another folder with --out."
        ) from error
    return path
