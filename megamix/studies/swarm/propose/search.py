"""Searches where no method is exact: for the worst mixture, and for the best by trees and Gaussian processes.

The answer is the best of the mixtures looked at, which the seed determines.

Legend: N mixtures, K domains, J metrics.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megamix.mixing.mixers import project_to_capped_simplex
from megamix.studies.swarm.propose.solve import Problem

Floats = NDArray[np.float64]
STARTS = 64
_ROUNDS = 500
CANDIDATES = 2000
_KEPT = 16
_NEIGHBOURS = 24
_WIDTHS = (0.5, 0.25, 0.12, 0.06, 0.03, 0.015, 0.007, 0.003)


def search_worst(problem: Problem, tried_NK: Floats, seed: int) -> tuple[Floats, int]:
    """Searches for the x with the largest sum_j v_j exp(A_j . x) - kl * KL(x || q) within the bounds of ``problem``.

    The first term is convex, so every step replaces it by its tangent, which is below it: the maximum of the tangent
    minus the KL is known in closed form, and no step makes the value smaller. Where that ends depends on the start.

    Args:
        tried_NK: float64 [N, K], mixtures to start from, beside the prior, a corner for each domain and drawn ones.

    Returns:
        The best x found, and the number of starts.
    """
    floor_K, cap_K = problem.bounds
    size = floor_K.size
    corners = [_filled(np.eye(size)[k] + 1e-9 * cap_K, floor_K, cap_K) for k in range(size) if cap_K[k] > floor_K[k]]
    drawn = np.random.default_rng(seed).dirichlet(np.ones(size), STARTS)
    rows = [problem.prior_K if problem.prior_K.sum() > 0 else cap_K, *tried_NK[:STARTS], *drawn]
    starts = corners + [_filled(row, floor_K, cap_K) for row in rows]
    best, best_value = starts[0], -np.inf
    for start in starts:
        x = _ascended(problem, start, floor_K, cap_K)
        value = _height(problem, x)
        if value > best_value:
            best, best_value = x, value
    return best, len(starts)


def _height(problem: Problem, x_K: Floats) -> float:
    """sum_j v_j exp(A_j . x) - kl * KL(x || q)."""
    smooth = float(np.exp(problem.A_JK @ x_K) @ problem.v_J)
    return 2 * smooth - problem.value(x_K)


def _ascended(problem: Problem, x: Floats, floor_K: Floats, cap_K: Floats) -> Floats:
    for _ in range(_ROUNDS):
        slope = problem.A_JK.T @ (np.exp(problem.A_JK @ x) * problem.v_J)
        if problem.kl > 0:
            with np.errstate(divide="ignore"):
                exponent = slope / problem.kl + np.log(problem.prior_K)
            new = _filled(np.exp(exponent - exponent[cap_K > 0].max()), floor_K, cap_K)
        else:
            new, left = floor_K.copy(), 1 - floor_K.sum()
            for k in np.argsort(-slope, kind="stable"):
                taken = min(cap_K[k] - floor_K[k], left)
                new[k] += taken
                left -= taken
        if np.abs(new - x).max() < 1e-12:
            return new
        x = new
    return x


def search(
    value: Callable[[Floats], Floats], prior_K: Floats, floor_K: Floats, cap_K: Floats, tried_NK: Floats, seed: int
) -> tuple[Floats, int]:
    """Searches for the mixture with the smallest ``value`` within bounds: draws around the prior and around what was
    tried, then around the best of these, nearer and nearer.

    Args:
        value: of mixtures, float64 [N, K] -> [N].

    Returns:
        The best mixture found, and how many were looked at.
    """
    random = np.random.default_rng(seed)
    centres = np.concatenate([np.tile(prior_K, (max(1, len(tried_NK)), 1)), tried_NK])
    strengths = np.geomspace(1, 200, CANDIDATES)
    picked = centres[random.integers(len(centres), size=CANDIDATES)]
    draws = random.standard_gamma(np.maximum(picked * strengths[:, None], 1e-3)) + 1e-12
    pool = np.stack([_filled(row, floor_K, cap_K) for row in np.concatenate([prior_K[None], tried_NK, draws])])
    values, looked = value(pool), len(pool)
    for width in _WIDTHS:
        order = np.argsort(values, kind="stable")[:_KEPT]
        pool, values = pool[order], values[order]
        factors = np.exp(width * random.normal(size=(len(pool), _NEIGHBOURS, pool.shape[1])))
        near = ((pool + 1e-6)[:, None, :] * factors).reshape(-1, pool.shape[1])
        near = np.stack([_filled(row, floor_K, cap_K) for row in near])
        pool, values = np.concatenate([pool, near]), np.concatenate([values, value(near)])
        looked += len(near)
    return pool[int(np.argmin(values))], looked


def _filled(weights: Floats, floor_K: Floats, cap_K: Floats) -> Floats:
    """The feasible mixture nearest to ``weights`` (`project_to_capped_simplex`)."""
    return project_to_capped_simplex(weights, floor_K, cap_K)
