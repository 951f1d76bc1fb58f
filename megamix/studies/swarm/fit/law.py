"""The log-linear law of a swarm, f_j(x) = exp(c_j) + exp(A_j . x), and its fit.

x is a mixture of K domains, j a metric of which lower is better. exp(c_j) >= 0 is a floor that no mixture goes below; a
negative A_jk says that more of domain k lowers metric j. Given the floor e, log(y - e) = A . x is linear, so
that a guess of the floor gives a guess of A; the guesses are then refined together (`megamix.studies.swarm.fit.huber`).

Source: Olmix, Chen et al., arXiv 2602.12237; the Huber loss with delta 0.02 is theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamix.studies.swarm.fit.huber import Minima, Problems, minimise
from megamix.studies.swarm.fit.tables import SwarmTable

Array = NDArray[np.float64]
_LARGEST_EXPONENT = 700.0
"""exp of it is still a float64."""
_SCATTER = 2.0
"""Standard deviation of the noise that half of the starts add to the guessed coefficients. On 144 laws that are not
quite true, 8 starts found the best known fit of 96 %, and were 0.07 % above it on the mean; with 0.5, of 94 % and
0.3 %."""


@dataclass(frozen=True)
class LogLinearLaw:
    """J laws over K domains.

    Attributes:
        c_J: float64 [J]; -inf where the floor is 0.
        A_JK: float64 [J, K].
    """

    domains: tuple[str, ...]
    metrics: tuple[str, ...]
    c_J: Array
    A_JK: Array

    def predict(self, x_NK: Array) -> Array:
        """The metrics of N mixtures.

        Args:
            x_NK: float64 [N, K].

        Returns:
            float64 [N, J], finite: an exponent above 700 counts as 700.
        """
        return predict(x_NK, self.c_J, self.A_JK)

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """Arrays to save, by name."""
        return {"c_J": self.c_J, "A_JK": self.A_JK}


def predict(x_NK: Array, c_J: Array, A_JK: Array) -> Array:
    """`LogLinearLaw.predict`; further leading axes of ``c_J`` and ``A_JK`` (resamples) come first in the result."""
    exponent = np.asarray(x_NK, dtype=np.float64) @ np.swapaxes(A_JK, -1, -2)
    return np.exp(c_J)[..., None, :] + np.exp(np.minimum(exponent, _LARGEST_EXPONENT))


def fit_log_linear(
    table: SwarmTable, *, starts: int = 8, seed: int = 0, delta: float = 0.02, ridge: float = 0.0
) -> LogLinearLaw:
    """Fits every metric of a table by Huber loss; the same input gives the same law.

    Args:
        starts: starting points; the best end is kept.
        delta: where the loss turns from squares to absolute values, in the metric's unit.
        ridge: see `Problems`.
    """
    weights_JR = np.ones((len(table.metrics), len(table.runs)))
    floor_J, A_JK = fit_weighted(
        table.ratios_RK, table.values_RJ.T, weights_JR, starts=starts, seed=seed, delta=delta, ridge=ridge
    )
    return LogLinearLaw(table.domains, table.metrics, log_floor(floor_J), A_JK)


def log_floor(floor: Array) -> Array:
    """c of a floor: -inf for 0."""
    with np.errstate(divide="ignore"):
        return np.log(floor)


def fit_weighted(
    x_RK: Array, y_PR: Array, weight_PR: Array, *, starts: int, seed: int, delta: float, ridge: float = 0.0
) -> tuple[Array, Array]:
    """Fits P problems on the same R mixtures from several starts each.

    Args:
        x_RK: float64 [R, K].
        y_PR: float64 [P, R].
        weight_PR: float64 [P, R]; how often each run counts.

    Returns:
        The floors, float64 [P], and A, float64 [P, K].
    """
    problems = Problems(x_RK, y_PR, weight_PR, delta, ridge)
    generator = np.random.default_rng([seed, 1])
    best: Minima | None = None
    for start in range(starts):
        floor_P, a_PK = _guess(problems, (start + generator.uniform(0, 1)) / starts if start else 1.0)
        if start >= (starts + 1) // 2:
            a_PK = a_PK + generator.normal(0, _SCATTER, x_RK.shape[1])
        found = minimise(problems, floor_P, a_PK)
        best = found if best is None else best.or_better(found)
    assert best is not None
    return best.floor_P, best.a_PK


def _guess(problems: Problems, share: float) -> tuple[Array, Array]:
    """Guesses floor and A.

    Args:
        share: where the floor is, from 0 (just below the lowest value) to 1 (at 0), on a logarithmic scale of the gap.
    """
    counted = problems.weight_PR > 0
    lowest_P = np.where(counted, problems.y_PR, np.inf).min(axis=1)
    highest_P = np.where(counted, problems.y_PR, -np.inf).max(axis=1)
    spread_P = np.maximum(highest_P - lowest_P, 1e-12 * np.abs(highest_P) + 1e-300)
    nearest_P = np.minimum(0.02 * spread_P, lowest_P)
    gap_P = nearest_P * (lowest_P / nearest_P) ** share
    floor_P = np.maximum(lowest_P - gap_P, 0.0)
    above_PR = np.maximum(problems.y_PR - floor_P[:, None], nearest_P[:, None])
    target_PR = np.log(above_PR)
    # An error of y is one of log(y - e) times 1 / (y - e).
    precision_PR = problems.weight_PR * (above_PR / (highest_P - floor_P)[:, None]) ** 2
    mean_P = (precision_PR * target_PR).sum(axis=1) / precision_PR.sum(axis=1)
    x_RK, num_domains = problems.x_RK, problems.x_RK.shape[1]
    outer_RQ = (x_RK[:, :, None] * x_RK[:, None, :]).reshape(-1, num_domains**2)
    normal_PKK = (precision_PR @ outer_RQ).reshape(-1, num_domains, num_domains)
    # A little towards the mean, which is all there is to say of a domain that no run has.
    ridge_P = 1e-9 * np.einsum("pkk->p", normal_PKK)
    np.einsum("pkk->pk", normal_PKK)[...] += ridge_P[:, None]
    right_PK = (precision_PR * (target_PR - mean_P[:, None])) @ x_RK
    # sum x = 1: the mean is a constant of all coefficients.
    return floor_P, mean_P[:, None] + np.linalg.solve(normal_PKK, right_PK[..., None])[..., 0]
