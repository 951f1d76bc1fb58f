"""The convex problem of a proposal, solved by a primal-dual interior-point method, with a proof of how exact it is.

    minimise  F(x) = sum_j v_j exp(A_j . x) + kl * sum_k x_k log(x_k / q_k)     over  sum x = 1, floor <= x <= cap

Whatever the method does, the answer is certified by itself: F is convex, so for any feasible x no point is better by
more than max_y grad F(x) . (x - y) (the Frank-Wolfe gap), and the largest such y is found exactly by filling caps in
order of the gradient. As the KL term is strongly convex, a gap also bounds how far x is from the best (Pinsker).

Source of the objective: Olmix, Chen et al., arXiv 2602.12237; of the method: Boyd and Vandenberghe, Convex
Optimization, algorithm 11.2.

Legend: K domains, F of them free, J metrics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import MegamixError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
_STEPS = 300
_PATIENCE = 25
"""Steps without a smaller gap after which to end."""
_CENTRING = 0.1
"""By how much each step aims to lower the complementarity."""
_EXACT = 1e-14
"""A gap, relative to the objective, at which to end: rounding."""
WANTED_GAP = 1e-8
"""A gap above this, relative to the objective, is no solution."""
_NEXT_TO_NOTHING = 1e-6
_SNAP = 1e-9
"""Without KL a weight this near to a bound is put on it."""


@dataclass(frozen=True)
class Problem:
    """What is to be minimised.

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

    def gradient(self, x_K: Floats) -> Floats:
        """float64 [K]: grad F(x); -inf where x is 0 and the KL wants it above."""
        smooth = self.A_JK.T @ (np.exp(self.A_JK @ x_K) * self.v_J)
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
    """The best mixture, and how exact it is.

    Attributes:
        x_K: float64 [K], feasible.
        gap: no feasible mixture has an F lower than this one's by more.
        residual: the largest violation of the optimality conditions (stationarity), in units of F.
        within: the sum of the absolute differences between x and the best mixture is at most this; infinite for kl 0.
        steps: Newton steps taken.
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
        MegamixError: the method ended before it was near the minimum, which the gap shows; nothing is proposed then.
    """
    floor_K, cap_K = problem.bounds
    free = cap_K > floor_K
    x_K = np.where(free, 0.0, cap_K)
    steps = 0
    if free.any():
        total = 1 - x_K.sum() - floor_K[free].sum()
        room = np.minimum(cap_K - floor_K, total)[free]
        if total <= 0:
            x_K[free] = floor_K[free]
        elif room.sum() <= total * (1 + 1e-12):
            x_K[free] = cap_K[free]
        elif np.count_nonzero(free) == 1:
            x_K[free] = floor_K[free] + total
        else:
            x_K[free], steps = _InteriorPoint(problem, x_K, free, floor_K[free], room, total).solve()
    gap = frank_wolfe_gap(problem, x_K)
    if not gap <= WANTED_GAP * (problem.value(x_K) + problem.kl):
        raise MegamixError(
            f"the best mixture could not be found: after {steps} steps the objective {problem.value(x_K):.6g} may still be "
            f"{gap:.3g} too large. The law's coefficients reach {np.abs(problem.A_JK).max():.3g}; fit it with fewer domains or "
            "more runs, or raise the KL."
        )
    within = float(np.sqrt(2 * max(gap, 0.0) / problem.kl)) if problem.kl > 0 else float("inf")
    return Solution(x_K, gap, _residual(problem, x_K), within, steps)


def frank_wolfe_gap(problem: Problem, x_K: Floats) -> float:
    """By how much F(x) may exceed the minimum at most: max over feasible y of grad F(x) . (x - y)."""
    floor_K, cap_K = problem.bounds
    return _gap(problem.gradient(x_K), x_K - floor_K, cap_K - floor_K)


def _gap(gradient: Floats, y: Floats, room: Floats) -> float:
    """max gradient . (y - z) over z with the sum of y and 0 <= z <= room, each float64 [any]."""
    z, left = np.zeros_like(y), float(y.sum())
    for k in np.argsort(gradient, kind="stable"):
        z[k] = min(room[k], left)
        left -= z[k]
    moved = y != z
    # As differences from one multiplier, which cancels in exact arithmetic: less rounding.
    level = float(np.median(gradient[moved])) if moved.any() else 0.0
    return max(float((gradient[moved] - level) @ (y - z)[moved]), 0.0)


def _residual(problem: Problem, x_K: Floats) -> float:
    """max |grad F + multiplier| over the domains between their bounds."""
    floor_K, cap_K = problem.bounds
    inside = (x_K > floor_K + 1e-7) & (x_K < cap_K - 1e-7)
    slopes = problem.gradient(x_K)[inside]
    return float(np.ptp(slopes) / 2) if slopes.size else 0.0


class _InteriorPoint:
    """The free part of a problem: y = x - floor over F domains, 0 < y, y < room where that is not implied.

    Args:
        x_K: the fixed weights, 0 elsewhere.
        room_F: float64 [F], upper bounds of y.
        total: the sum of y.
    """

    def __init__(
        self, problem: Problem, x_K: Floats, free: Bools, floor_F: Floats, room_F: Floats, total: float
    ) -> None:
        self.A_JF = problem.A_JK[:, free]
        self.shift_J = np.log(problem.v_J) + problem.A_JK @ x_K + self.A_JF @ floor_F
        self.kl, self.prior_F = problem.kl, problem.prior_K[free]
        self.floor_F, self.room_F, self.total = floor_F, room_F, total
        self.capped = room_F < total

    def solve(self) -> tuple[Floats, int]:
        """The best x of the free domains, and the Newton steps taken."""
        y = self.room_F * (self.total / self.room_F.sum())
        slope, _, value = self._derivatives(y)
        scale = max(abs(value), float(np.abs(slope).max()))
        low, high = scale / y / y.size, np.where(self.capped, scale / self._space(y) / y.size, 0.0)
        level, best, best_gap, since, steps = 0.0, y, np.inf, 0, 0
        while steps < _STEPS and since < _PATIENCE:
            slope, curvature, value = self._derivatives(y)
            for candidate in (y, self._settled(y, slope)):
                gap = _gap(self._derivatives(candidate)[0], candidate, self.room_F)
                best, best_gap, since = (candidate, gap, -1) if gap < best_gap else (best, best_gap, since)
            since += 1
            if best_gap <= _EXACT * max(abs(value), self.kl):
                break
            aim = float(y @ low + self._space(y)[self.capped] @ high[self.capped]) / (y.size + self.capped.sum())
            moved = self._step(y, level, low, high, _CENTRING * aim, slope, curvature)
            if moved is None:
                break
            y, level, low, high = moved
            steps += 1
        return self.floor_F + self._on_bounds(best), steps

    def _derivatives(self, y: Floats) -> tuple[Floats, Floats, float]:
        """Gradient [F], Hessian [F, F] and value at y of F, or of log F for kl 0, where that has the same minimum and
        is of the same size whatever the law's."""
        exponent_J = self.A_JF @ y + self.shift_J
        largest = float(exponent_J.max()) if self.kl == 0 else 0.0
        e_J = np.exp(np.minimum(exponent_J - largest, 600.0))
        slope, curvature, value = self.A_JF.T @ e_J, (self.A_JF.T * e_J) @ self.A_JF, float(e_J.sum())
        if self.kl == 0:
            slope = slope / value
            return slope, curvature / value - np.outer(slope, slope), float(np.log(value)) + largest
        x = self.floor_F + y
        logs = np.log(x / self.prior_F)
        return slope + self.kl * (logs + 1), curvature + np.diag(self.kl / x), value + self.kl * float(x @ logs)

    def _settled(self, y: Floats, slope: Floats) -> Floats:
        """``y`` with the weights that are next to nothing where the KL wants them; steps get there only slowly, as the
        logarithm is steep. A large one makes up for the difference."""
        small = (y < _NEXT_TO_NOTHING) & (self.kl > 0)
        main = self._main(y)
        if not small.any() or small[main]:
            return y
        level = slope[main] - slope
        settled = np.where(small, y * np.exp(np.clip(level / max(self.kl, 1e-300), -600.0, 0.0)), y)
        settled = np.maximum(settled, 1e-300)
        settled[main] += y.sum() - settled.sum()
        return settled

    def _space(self, y: Floats) -> Floats:
        """float64 [F]: up to the cap; 1 where there is none."""
        return np.where(self.capped, self.room_F - y, 1.0)

    def _residuals(self, y: Floats, level: float, low: Floats, high: Floats, aim: float, slope: Floats) -> Floats:
        dual = slope + level - low + high
        upper = np.where(self.capped, high * self._space(y) - aim, 0.0)
        return np.concatenate([dual, low * y - aim, upper, [y.sum() - self.total]])

    def _step(
        self, y: Floats, level: float, low: Floats, high: Floats, aim: float, slope: Floats, curvature: Floats
    ) -> tuple[Floats, float, Floats, Floats] | None:
        """A Newton step on the perturbed optimality conditions, shortened until they are nearer to being met; None
        where no step brings them nearer."""
        size, space = y.size, self._space(y)
        matrix = np.zeros((size + 1, size + 1))
        matrix[:size, :size] = curvature + np.diag(low / y + high / space)
        matrix[:size, size] = matrix[size, :size] = 1.0
        # The multipliers of the bounds are eliminated.
        upper = np.where(self.capped, aim / space, 0.0)
        right = np.append(-(slope + level - aim / y + upper), self.total - y.sum())
        # Rows and columns scaled to 1 on the diagonal: the entries span many powers of ten near the end.
        scale = np.append(1 / np.sqrt(np.diag(matrix)[:size]), 1.0)
        try:
            change = (scale * np.linalg.solve(matrix * scale[:, None] * scale, right * scale)).astype(np.float64)
        except np.linalg.LinAlgError:
            return None
        d_y, d_level = change[:size], float(change[size])
        d_low = aim / y - low - low / y * d_y
        d_high = np.where(self.capped, upper - high + high / space * d_y, 0.0)
        length = min(1.0, 0.99 * _longest(y, d_y), 0.99 * _longest(low, d_low))
        length = min(length, 0.99 * _longest(space, -d_y * self.capped), 0.99 * _longest(high, d_high))
        # By the weight that each stands for: the logarithm's slope at next to nothing must not shorten all steps.
        share = np.concatenate([y / y.max(), np.ones(2 * size + 1)])
        before = float(np.linalg.norm(share * self._residuals(y, level, low, high, aim, slope)))
        while length > 1e-12:
            new = (y + length * d_y, level + length * d_level, low + length * d_low, high + length * d_high)
            after = float(np.linalg.norm(share * self._residuals(*new, aim, self._derivatives(new[0])[0])))
            if after <= (1 - 0.01 * length) * before:
                return new
            length /= 2
        return None

    def _main(self, y: Floats) -> int:
        """The domain that is furthest from its bounds, the upper one only where that is not implied."""
        return int(np.argmax(np.where(self.capped, np.minimum(y, self.room_F - y), y)))

    def _on_bounds(self, y: Floats) -> Floats:
        """``y`` with the sum that it is to have; without KL, weights next to a bound are put on it."""
        if self.kl == 0:
            snapped = np.where(y < _SNAP, 0.0, np.where(self.capped & (self.room_F - y < _SNAP), self.room_F, y))
            # What that leaves over needs a weight between its bounds to go to.
            y = snapped if abs(snapped.sum() - self.total) < snapped[self._main(snapped)] else y
        y = y.copy()
        y[self._main(y)] += self.total - y.sum()
        return y


def _longest(values: Floats, change: Floats) -> float:
    """How far along ``change`` the values stay above 0."""
    falling = change < 0
    return float((-values[falling] / change[falling]).min()) if falling.any() else np.inf
