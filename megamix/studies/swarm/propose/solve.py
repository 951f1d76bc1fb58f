"""Convex problem of a proposal, solved by Clarabel through cvxpy, with a certificate of its own.

    minimise  F(x) = sum_j v_j exp(A_j . x) + kl * sum_k x_k log(x_k / q_k)     over  sum x = 1, floor <= x <= cap

The certificate trusts no solver: F is convex, so no feasible mixture is better than x by more than max_y grad F(x) .
(x - y), the Frank-Wolfe gap, and the largest such y follows by filling caps in the order of the gradient. The KL term
is strongly convex, so a gap also bounds the distance to the best mixture (Pinsker).

Source of the objective: Olmix, Chen et al., arXiv 2602.12237.

Legend: K domains, F of them free, J metrics.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import MegamixError
from megamix.core.packages import need
from megamix.mixing.mixers import project_to_capped_simplex

Floats = NDArray[np.float64]
_EXACT = 4e-13
"""A gap, relative to the objective, that ends the attempts."""
WANTED_GAP = 1e-8
"""A gap above this, relative to the objective, is no solution."""
_TOLERANCES: dict[str, Any] = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-13)
_SETTINGS: tuple[dict[str, Any], ...] = (
    _TOLERANCES,
    {**_TOLERANCES, "iterative_refinement_reltol": 1e-16, "iterative_refinement_abstol": 1e-16},
    {**_TOLERANCES, "static_regularization_constant": 1e-12, "dynamic_regularization_delta": 1e-9},
)
"""Settings of Clarabel, tried in turn: none of them reaches the tolerances on every problem."""
_ATTEMPTS = 9
_NEXT_TO_NOTHING = 1e-6
_SNAP = 1e-9
"""Without KL a weight below this becomes 0."""
_SMALLEST_LOG = -690.0
"""Logarithm of the smallest weight where the KL forbids 0."""
_ROUNDING = 1e-16
"""Weights below this do not change the sum of a mixture."""


@dataclass(frozen=True)
class Problem:
    """Objective and bounds.

    Attributes:
        v_J: float64 [J], weights of the metrics, above 0.
        A_JK: float64 [J, K], the law's.
        kl: not negative.
        prior_K: float64 [K], q; it need not sum to 1. Where it is 0 and kl is not, x is 0.
        floor_K, cap_K: float64 [K], with sum floor <= 1 <= sum cap; where both are equal x is fixed.
    """

    v_J: Floats
    A_JK: Floats
    kl: float
    prior_K: Floats
    floor_K: Floats
    cap_K: Floats

    def value(self, x_K: Floats) -> float:
        """F(x), without the constant floors of the law."""
        smooth = float(np.exp(self.A_JK @ x_K) @ self.v_J)
        return smooth + self.kl * divergence(x_K, self.prior_K) if self.kl > 0 else smooth

    def slope(self, x_K: Floats) -> Floats:
        """float64 [K]: the gradient without the KL."""
        return self.A_JK.T @ (np.exp(self.A_JK @ x_K) * self.v_J)

    def gradient(self, x_K: Floats) -> Floats:
        """float64 [K]: grad F(x); -inf where x is 0 and the KL wants it above."""
        smooth = self.slope(x_K)
        if self.kl == 0:
            return smooth
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = self.kl * (np.log(x_K / self.prior_K) + 1)
        return smooth + np.where(self.prior_K > 0, slope, 0.0)

    @property
    def bounds(self) -> tuple[Floats, Floats]:
        """floor and cap, 0 where the prior forbids a domain."""
        forbidden = (self.prior_K <= 0) & (self.kl > 0)
        return np.where(forbidden, 0.0, self.floor_K), np.where(forbidden, 0.0, np.minimum(self.cap_K, 1.0))


@dataclass(frozen=True)
class Solution:
    """Best mixture and its certificate.

    Attributes:
        x_K: float64 [K], feasible.
        gap: no feasible mixture has an F lower than this one's by more.
        residual: the largest violation of the optimality conditions (stationarity), in units of F.
        within: the sum of the absolute differences between x and the best mixture is at most this; infinite for kl 0.
        steps: iterations of the solver.
    """

    x_K: Floats
    gap: float
    residual: float
    within: float
    steps: int


def divergence(x_K: Floats, prior_K: Floats) -> float:
    """sum_k x_k log(x_k / q_k), with 0 log 0 = 0."""
    some = x_K > 0
    with np.errstate(divide="ignore"):
        return float(x_K[some] @ np.log(x_K[some] / prior_K[some]))


def solve(problem: Problem) -> Solution:
    """Finds the minimum.

    Raises:
        InputError: cvxpy is not installed.
        MegamixError: no mixture near the minimum was found, by its gap.
    """
    floor_K, cap_K = problem.bounds
    x_K = project_to_capped_simplex(problem.prior_K if problem.prior_K.any() else cap_K, floor_K, cap_K)
    gap, steps = np.inf, 0
    for attempt in range(_ATTEMPTS):
        # Clarabel's tolerances are relative to the size of the objective: that of the best mixture so far becomes 1.
        answer_K, iterations = _by_clarabel(problem, x_K, _SETTINGS[attempt % len(_SETTINGS)])
        steps += iterations
        for candidate_K in _settled(problem, answer_K):
            candidate_gap = frank_wolfe_gap(problem, candidate_K)
            if candidate_gap < gap:
                x_K, gap = candidate_K, candidate_gap
        if gap <= _EXACT * (problem.value(x_K) + problem.kl):
            break
    if not gap <= WANTED_GAP * (problem.value(x_K) + problem.kl):
        raise MegamixError(
            f"the best mixture could not be found: after {steps} steps the objective {problem.value(x_K):.6g} may still be "
            f"{gap:.3g} too large. The law's coefficients reach {np.abs(problem.A_JK).max():.3g}; fit it with fewer domains or "
            "more runs, or raise the KL."
        )
    within = float(np.sqrt(2 * gap / problem.kl)) if problem.kl > 0 else float("inf")
    return Solution(x_K, gap, _residual(problem, x_K), within, steps)


def _by_clarabel(problem: Problem, near_K: Floats, settings: dict[str, Any]) -> tuple[Floats, int]:
    """Clarabel's mixture, float64 [K], and its iterations; ``near_K`` where it has none.

    Args:
        near_K: float64 [K]; the objective is divided by its value there.
    """
    cvxpy = need("cvxpy", "a proposal")
    floor_K, cap_K = problem.bounds
    free = cap_K > floor_K
    if not free.any():
        return floor_K, 0
    log_J = np.log(problem.v_J)
    smallest = np.log(problem.kl) if problem.kl > 0 else -np.inf
    size = np.logaddexp.reduce(log_J + problem.A_JK @ near_K, initial=smallest)
    shift_J = log_J + problem.A_JK[:, ~free] @ floor_K[~free] - size
    x_F = cvxpy.Variable(int(free.sum()))
    objective = cvxpy.sum(cvxpy.exp(problem.A_JK[:, free] @ x_F + shift_J))
    if problem.kl > 0:
        objective += problem.kl * np.exp(-size) * cvxpy.sum(cvxpy.rel_entr(x_F, problem.prior_K[free]))
    bounds = [x_F >= floor_K[free], x_F <= cap_K[free], cvxpy.sum(x_F) == 1 - floor_K[~free].sum()]
    convex = cvxpy.Problem(cvxpy.Minimize(objective), bounds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the gap says how near it came
        try:
            convex.solve(solver="CLARABEL", **settings)
        except cvxpy.error.SolverError:
            return near_K, 0
    if x_F.value is None:
        return near_K, 0
    answer_K = floor_K.copy()
    answer_K[free] = np.clip(x_F.value, floor_K[free], cap_K[free])
    return answer_K, convex.solver_stats.num_iters


def _settled(problem: Problem, x_K: Floats) -> Iterator[Floats]:
    """Feasible mixtures near ``x_K`` whose smallest weights, or all of them, are those that its gradient asks for.

    Clarabel is exact to about 1e-12 in every weight; where the KL wants a weight of 1e-20, the gradient shows that.
    """
    floor_K, cap_K = problem.bounds
    # The weight that takes up differences: the one furthest from its bounds, where a cap of 1 is none.
    inner = int(np.argmax(np.minimum(x_K - floor_K, np.where(cap_K < 1, cap_K - x_K, 1.0))))
    if problem.kl == 0:
        asked = [np.where(x_K < _SNAP, floor_K, x_K)]
    else:
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            log_K = np.log(problem.prior_K) - problem.slope(x_K) / problem.kl
            log_K += np.log(x_K[inner]) - log_K[inner]
            weight_K = np.exp(np.clip(np.nan_to_num(log_K), _SMALLEST_LOG, 0.0))
        asked = [np.where(small_K, weight_K, x_K) for small_K in (x_K < _NEXT_TO_NOTHING, cap_K > floor_K)]
    for asked_K in asked:
        asked_K = np.clip(asked_K, floor_K, cap_K)
        settled_K = project_to_capped_simplex(asked_K, floor_K, cap_K)
        # Beside a weight of almost 1 the projection leaves nothing for the smallest.
        settled_K = np.where(asked_K < _ROUNDING, asked_K, settled_K)
        settled_K[inner] += 1 - settled_K.sum()
        yield settled_K


def frank_wolfe_gap(problem: Problem, x_K: Floats) -> float:
    """By how much F(x) may exceed the minimum at most: max over feasible y of grad F(x) . (x - y)."""
    floor_K, cap_K = problem.bounds
    gradient, y, left = problem.gradient(x_K), floor_K.copy(), float((x_K - floor_K).sum())
    for k in np.argsort(gradient, kind="stable"):
        taken = min(cap_K[k] - floor_K[k], left)
        y[k] += taken
        left -= taken
    moved = x_K != y
    # As differences from one multiplier, which cancels in exact arithmetic: less rounding.
    level = float(np.median(gradient[moved])) if moved.any() else 0.0
    return max(float((gradient[moved] - level) @ (x_K - y)[moved]), 0.0)


def _residual(problem: Problem, x_K: Floats) -> float:
    """max |grad F + multiplier| over the domains between their bounds."""
    floor_K, cap_K = problem.bounds
    inside = (x_K > floor_K + 1e-7) & (x_K < cap_K - 1e-7)
    slopes = problem.gradient(x_K)[inside]
    return float(np.ptp(slopes) / 2) if slopes.size else 0.0
