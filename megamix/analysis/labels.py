"""Short names of runs, and room for labels; for whatever draws runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def run_names(run_dirs: Sequence[Path]) -> list[str]:
    """Short names that differ: the last parts of the paths, as many as it takes."""
    paths = [path.resolve().parts for path in run_dirs]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["-".join(parts[-length:]).strip("/") for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{parts[-1]}-{index}" for index, parts in enumerate(paths, start=1)]


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
