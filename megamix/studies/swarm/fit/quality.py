"""Quality of held-out predictions: R2, Spearman's rank correlation and RMSE, by folds of the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Quality = dict[str, dict[str, float | None]]
"""By metric or family: r2, spearman and rmse; None where undefined."""
MOST_FOR_LEAVING_ONE_OUT = 40
FOLDS = 5
GOOD_RANKS = 0.5
"""Below this rank correlation a fit hardly orders mixtures that it has not seen."""


def fold_of_runs(num_runs: int, folds: int | None, seed: int) -> NDArray[np.intp]:
    """The fold of each run, intp [R]: as even as can be, shuffled by the seed.

    Args:
        folds: None: one for each run of at most 40, else 5.
    """
    if folds is None:
        folds = num_runs if num_runs <= MOST_FOR_LEAVING_ONE_OUT else FOLDS
    order = np.random.default_rng([seed, 2]).permutation(num_runs)
    fold_R = np.empty(num_runs, dtype=np.intp)
    fold_R[order] = np.arange(num_runs) % min(folds, num_runs)
    return fold_R


def quality(actual_RJ: Array, predicted_RJ: Array, names: Sequence[str]) -> Quality:
    """Quality of the predictions of R runs for each of J metrics; folds are pooled."""
    return {
        name: quality_of(actual_R, predicted_R)
        for name, actual_R, predicted_R in zip(names, actual_RJ.T, predicted_RJ.T, strict=True)
    }


def family_quality(
    actual_RJ: Array, predicted_RJ: Array, names: Sequence[str], families: Mapping[str, Sequence[str]]
) -> Quality:
    """`quality` of the means over each family's metrics."""
    if not families:
        return {}
    return quality(
        family_means(actual_RJ, names, families), family_means(predicted_RJ, names, families), list(families)
    )


def family_means(values_RJ: Array, names: Sequence[str], families: Mapping[str, Sequence[str]]) -> Array:
    """float64 [R, families]: the mean over each family's metrics."""
    places = list(names)
    columns = [values_RJ[:, [places.index(name) for name in members]].mean(axis=1) for members in families.values()]
    return np.stack(columns, axis=1)


def quality_of(actual_R: Array, predicted_R: Array) -> dict[str, float | None]:
    """`quality` of one metric."""
    from scipy.stats import spearmanr

    with np.errstate(over="ignore"):
        squares = float(((actual_R - predicted_R) ** 2).sum())
    spread = float(((actual_R - actual_R.mean()) ** 2).sum())
    both_vary = bool(np.ptp(actual_R) and np.ptp(predicted_R))
    ranked: Any = spearmanr(actual_R, predicted_R) if both_vary else None
    return {
        "r2": _finite(1 - squares / spread) if spread else None,
        "spearman": float(ranked.statistic) if both_vary else None,
        "rmse": _finite(np.sqrt(squares / len(actual_R))),
    }


def _finite(value: float) -> float | None:
    """None for an overflow, which JSON has no number for."""
    return float(value) if np.isfinite(value) else None
