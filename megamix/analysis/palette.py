"""Colours, dashes and the scale of weights, shared by plots and report: a domain looks the same in both.

The 30 colours of domains maximise the least distance of any two (0.08 in OKLab, on the light and on the dark page at
once) among those with a contrast of 3 to the page. Lines from the 11th domain on are also dashed. The colours of runs
follow Okabe and Ito (2008), darkened or lightened to the same contrast.
"""

from __future__ import annotations

PAGE = ("#ffffff", "#181b20")
"""Behind the charts, light and dark."""
DOMAINS = (
    ("#2a62b7", "#65a0fa"), ("#b18e14", "#f4d067"), ("#7f021b", "#c04b4f"), ("#02520f", "#468a48"),
    ("#bf3ba7", "#fb8be2"), ("#15a39d", "#6ee6df"), ("#630182", "#9a51ba"), ("#805f50", "#be9989"),
    ("#278b16", "#6dcb60"), ("#2b3f58", "#5f748f"), ("#918aba", "#d1cbfe"), ("#23219f", "#5165d3"),
    ("#0d7269", "#59aea4"), ("#b43500", "#f9764f"), ("#573a10", "#8f6f47"), ("#7e3cc5", "#b685f9"),
    ("#88356a", "#c86fa5"), ("#b87f72", "#fdc0b1"), ("#70885e", "#aec89b"), ("#71608d", "#ad9bcc"),
    ("#676401", "#a2a04d"), ("#2f89bb", "#74caff"), ("#5d2b43", "#975f79"), ("#b64c64", "#fc8aa0"),
    ("#ae651a", "#f2a360"), ("#4c4388", "#827bc6"), ("#769e23", "#b5e16d"), ("#145c80", "#5496bd"),
    ("#42563c", "#788f72"), ("#b3709e", "#f7b0e0"),
)  # fmt: skip
RUNS = (
    ("#0068a8", "#56b4e9"), ("#c24e00", "#ff8c42"), ("#00805c", "#2fc99a"), ("#b04a86", "#e79bc6"),
    ("#946200", "#e6b000"), ("#5a4fcf", "#9d97ff"), ("#882255", "#d8719f"), ("#4d5a66", "#aab6c2"),
)  # fmt: skip
DASHES = ((), (7, 3), (2, 3), (9, 3, 2, 3))
"""Lengths of strokes and gaps, in pixels; the first is a solid line."""
ROOT_TICKS = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Ticks of an axis of weights on a square-root scale."""

Look = tuple[tuple[str, str], tuple[int, ...]]
"""Colour on a light and on a dark page, and dashes."""


def domain_look(index: int) -> Look:
    return DOMAINS[index % len(DOMAINS)], DASHES[index // 10 % len(DASHES)]


def run_look(index: int) -> Look:
    return RUNS[index % len(RUNS)], DASHES[index // len(RUNS) % len(DASHES)]


def root_top(highest: float) -> float:
    """The end of an axis of weights on a square-root scale: the first tick that none is above."""
    return next((tick for tick in ROOT_TICKS[1:] if tick >= highest), highest)


def needs_root_scale(highest: float, median: float) -> bool:
    """Whether the largest weight would press the others flat on a linear axis."""
    return highest > 5 * median
