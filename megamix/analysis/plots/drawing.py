"""The parts of plots: line styles, axes over tokens, and the names at the ends of lines."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator

from megamix.analysis import palette
from megamix.analysis.labels import spread
from megamix.analysis.marks import WORDS, Mark
from megamix.core.files import writing

_INK = "#222222"
STYLE: Any = {
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
_MOST_NAMED_MARKS = 12
"""Vertical distance of two labels, in points."""


@dataclass(frozen=True)
class Label:
    """Name at the end of a line: its place (y in data) and look."""

    y: float
    text: str
    colour: str
    style: Any
    bold: bool = False


def new_figure(title: str, num_lines: int) -> tuple[Figure, Axes]:
    """A figure over tokens, high enough to name that many lines."""
    height = max(4.2, 1.3 + num_lines * _POINTS_PER_LINE * 1.25 / 72)
    figure = Figure(figsize=(8.0, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, pad=22)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    return figure, axes


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a PNG, whole or not at all; makes its folder.

    Raises:
        InputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path, "Choose another folder with --out."):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", facecolor="white")
        os.replace(temporary, path)
    return path


def look(index: int) -> tuple[str, Any]:
    """Colour and line style of a run."""
    return _for_matplotlib(palette.run_look(index))


def domain_look(index: int) -> tuple[str, Any]:
    """Colour and line style of a domain."""
    return _for_matplotlib(palette.domain_look(index))


def _for_matplotlib(given: palette.Look) -> tuple[str, Any]:
    (light, _), dashes = given
    return light, (0, tuple(length / 2 for length in dashes)) if dashes else "-"


def _darker(colour: str) -> tuple[float, ...]:
    """Text needs more contrast than lines."""
    return tuple(0.75 * part for part in to_rgb(colour))


def plain(text: str) -> str:
    """A name as it is, not as a formula."""
    return text.replace("$", r"\$")


def note(axes: Axes, text: str) -> None:
    """A line in small print below the title."""
    axes.annotate(
        text, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", fontsize=8, color="#777777"
    )


def points(
    axes: Axes, tokens: list[int], loss: list[float], colour: str, style: Any, width: float, zorder: float = 3
) -> None:
    """Evaluations, joined from the first one after training: a line from the untrained model would hide the rest."""
    first = 1 if tokens and tokens[0] == 0 else 0
    axes.plot(tokens[first:], loss[first:], color=colour, linestyle=style, linewidth=width, zorder=zorder)
    axes.plot(tokens, loss, "o", color=colour, markersize=2.4 + width, zorder=zorder + 1, clip_on=False)


def mark_axes(axes: Axes, marks: Sequence[Mark]) -> None:
    """A dotted line at each mark, with its kind at the top where there are few."""
    for mark in marks:
        axes.axvline(mark.tokens, color="#999999", linestyle=":", linewidth=0.9, zorder=1)
        if len(marks) <= _MOST_NAMED_MARKS:
            axes.annotate(
                WORDS[mark.kind], (mark.tokens, 1), (2, -3), xycoords=("data", "axes fraction"), fontsize=6.5,
                textcoords="offset points", rotation=90, va="top", ha="left", color="#777777",
            )  # fmt: skip


def weight_axis(axes: Axes, highest: float, median: float) -> None:
    """From 0 to above ``highest``; on a square-root scale where one large weight would press the others flat."""
    axes.set_ylabel("weight")
    if palette.needs_root_scale(highest, median):
        axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
        axes.yaxis.set_major_locator(FixedLocator(palette.ROOT_TICKS))
        axes.set_ylabel("weight (square-root scale)")
        axes.set_ylim(0, palette.root_top(highest))
    else:
        axes.set_ylim(0, min(highest * 1.06, max(1.0, highest)))


def name_lines(figure: Figure, axes: Axes, labels: Sequence[Label]) -> None:
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
    place: dict[str, Any] = {"xycoords": ("axes fraction", "axes points"), "textcoords": "offset points"}
    write = functools.partial(axes.annotate, **place, annotation_clip=False)
    for index, y_line, y_name in zip(order, wanted, placed, strict=True):
        label = labels[index]
        # A hairline from the end of the line, a sample of the line, and the name.
        for y, to, gap, stroke in (
            (y_line, (18, y_name - y_line), 2, {"lw": 0.6}),
            (y_name, (42, 0), 20, {"lw": 2.4 if label.bold else 1.6, "ls": label.style}),
        ):
            line = {"arrowstyle": "-", "capstyle": "butt", "color": label.colour, "shrinkA": 0, "shrinkB": gap}
            write("", (1, y), to, arrowprops=line | stroke)
        write(
            plain(label.text), (1, y_name), (46, 0), va="center", color=_darker(label.colour), fontsize=8.5,
            fontweight="bold" if label.bold else "normal",
        )  # fmt: skip
