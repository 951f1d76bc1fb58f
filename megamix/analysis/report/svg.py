"""Axes, paths and the frame of a chart.

The SVG of a chart is stretched to the width it finds (``preserveAspectRatio="none"``) with strokes that are not, and
its labels are HTML beside it, placed in percent: lines and letters keep their size on any screen, without a script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

import numpy as np

from megamix.analysis.labels import spread
from megamix.analysis.palette import ROOT_TICKS, needs_root_scale, root_top
from megamix.analysis.report.looks import swatch
from megamix.analysis.series import Floats, Ints

WIDTH, HEIGHT = 2000, 1000
_LABEL_GAP = 12.5
"""Distance of two labels at the end of lines, in CSS pixels."""


@dataclass(frozen=True)
class Axis:
    """From values to [0, 1]; on a square-root scale small ones get more room."""

    low: float
    high: float
    ticks: Sequence[float]
    scale: Literal["linear", "sqrt"] = "linear"

    def at(self, values: Floats | Ints | float) -> Floats:
        """The places of values, 0 at ``low`` and 1 at ``high``."""
        given = np.asarray(values, np.float64)
        if self.scale == "sqrt":
            return np.sqrt(np.maximum(given, 0) / self.high)
        return (given - self.low) / (self.high - self.low)


def nice_axis(low: float, high: float, num_ticks: int = 5, inside: bool = False) -> Axis:
    """An axis with round ticks.

    Args:
        inside: keep the limits and only tick within them; else they are widened to ticks.
    """
    if not high > low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / num_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = (math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9))
    if inside and last == first and num_ticks < 10:  # one tick alone does not tell the scale
        return nice_axis(low, high, 2 * num_ticks, inside)
    if not inside:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        low, high = first * step, last * step
    return Axis(low, high, [round(index * step, 12) for index in range(first, last + 1)])


def weight_axis(runs: Sequence[Floats]) -> Axis:
    """From 0 to a tick that no weight of any run ([P, N] each) is above; on a square-root scale where needed."""
    highest = max(float(np.nanmax(values)) for values in runs)
    if needs_root_scale(highest, min(float(np.nanmedian(values[-1])) for values in runs)):
        top = root_top(highest)
        return Axis(0.0, top, [tick for tick in ROOT_TICKS if tick <= top], "sqrt")
    return nice_axis(0.0, max(highest, 1e-6))


def tokens_text(tokens: float) -> str:
    """``1.5M``."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(tokens) >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.3g}"


def step_path(x: Floats, y: Floats, close: bool = False) -> str:
    """A line that holds each value until the next; ``close`` makes it the area below.

    Args:
        x, y: [P], places in [0, 1] from the lower left corner; NaN in y is a gap.
    """
    if close:
        edge = _steps(*_pixels(x, np.nan_to_num(y)))
        return f"{edge}V{HEIGHT}H{_pixels(x, y)[0][0]}z"
    return "".join(_steps(*_pixels(x[part], y[part])) for part in _known(y))


def line_path(x: Floats, y: Floats) -> str:
    """Straight lines from point to point; see `step_path`."""
    parts = []
    for part in _known(y):
        px, py = _pixels(x[part], y[part])
        moves = "".join(f"l{dx} {dy}" for dx, dy in zip(np.diff(px).tolist(), np.diff(py).tolist(), strict=True))
        parts.append(f"M{px[0]} {py[0]}{moves}")
    return "".join(parts)


def dot_path(x: Floats, y: Floats) -> str:
    """Round dots, as lines without length: their size is the stroke's width, however the chart is stretched."""
    known = np.isfinite(y)
    return "".join(f"M{px} {py}h0" for px, py in zip(*(p.tolist() for p in _pixels(x[known], y[known])), strict=True))


def _known(y: Floats) -> list[slice]:
    """The stretches without NaN."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.isfinite(y).astype(int), [0]])))
    return [slice(start, stop) for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)]


def _pixels(x: Floats, y: Floats) -> tuple[np.ndarray, np.ndarray]:
    # A value outside of its axis is drawn at most one height off, so that no stray number stretches the page.
    y = np.clip(y, -1.0, 2.0)
    return np.rint(x * WIDTH).astype(np.int64), np.rint((1 - np.nan_to_num(y)) * HEIGHT).astype(np.int64)


def _steps(px: np.ndarray, py: np.ndarray) -> str:
    moves, x, y = [f"M{px[0]} {py[0]}"], int(px[0]), int(py[0])
    for next_x, next_y in zip(px[1:].tolist(), py[1:].tolist(), strict=True):
        if next_y != y:
            moves.append(f"h{next_x - x}v{next_y - y}" if next_x != x else f"v{next_y - y}")
            x, y = next_x, next_y
    if int(px[-1]) != x:
        moves.append(f"h{int(px[-1]) - x}")
    return "".join(moves)


@dataclass(frozen=True)
class End:
    """A name at the right end of a line: its place in [0, 1] from below, and the CSS class of its colour."""

    at: float
    text: str
    look: str


@dataclass(frozen=True)
class Chart:
    """A chart over tokens.

    Attributes:
        title: heading; ``look``: CSS class of a colour before it; ``note``: small print after it.
        label: description for readers who do not see the chart.
        data: key of the page's data that the pointer reads; None for none.
        body: SVG.
        ends: names beside the ends of lines.
        height: CSS pixels.
    """

    title: str
    label: str
    x: Axis
    y: Axis
    body: str
    data: str | None = None
    look: str = ""
    note: str = ""
    ends: Sequence[End] = field(default=())
    height: int = 240
    size: Literal["", "small"] = ""

    def html(self) -> str:
        """The figure."""
        data = "" if self.data is None else f' data-chart="{escape(self.data)}" tabindex="0"'
        note = f" <small>{escape(self.note)}</small>" if self.note else ""
        named = " named" if self.ends else ""
        return (
            f'<figure class="chart {self.size}{named}"><figcaption>{swatch(self.look)}{escape(self.title)}{note}</figcaption>'
            f'<div class="plot" style="--h:{self.height}px"{data} data-x="{self.x.low:g} {self.x.high:.12g}">'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(self.label)}">{self._grid()}{self.body}</svg>'
            f"{self._ticks()}{self._names()}</div></figure>"
        )

    def _grid(self) -> str:
        rows = np.rint((1 - self.y.at(np.array(self.y.ticks, np.float64))) * HEIGHT).astype(int).tolist()
        return f'<path class="grid" d="{"".join(f"M0 {row}H{WIDTH}" for row in rows)}"/>'

    def _ticks(self) -> str:
        across = "".join(
            f'<span class="tx" style="left:{100 * float(self.x.at(tick)):.4g}%">{tokens_text(tick)}</span>'
            for tick in self.x.ticks
        )
        up = "".join(
            f'<span class="ty" style="bottom:{100 * float(self.y.at(tick)):.4g}%">{tick:.6g}</span>'
            for tick in self.y.ticks
        )
        return f'<div aria-hidden="true">{across}{up}</div>'

    def _names(self) -> str:
        if not self.ends:
            return ""
        order = sorted(self.ends, key=lambda end: end.at)
        places = spread(np.array([end.at * self.height for end in order]), _LABEL_GAP, -6.0, self.height + 6.0)
        names = "".join(
            f'<span class="end {end.look}" data-d="{end.look}" style="bottom:{place:.1f}px">{escape(end.text)}</span>'
            for end, place in zip(order, places.tolist(), strict=True)
        )
        return f'<div aria-hidden="true">{names}</div>'
