"""Batched Huber fits of y = e + exp(a . x), e >= 0, by Levenberg-Marquardt.

In e and a the loss has a long bent valley: a higher floor goes with larger coefficients. With u the mean of y, and

    f(x) = u + (exp(b z) - 1) / b,  z = p . x - u,  so that  e = u - 1 / b  and  a = b (p - u) - log b  (as sum x = 1),

p is nearly the linear fit and b > 0 how much the law bends, which hardly depend on each other: tens of steps become a
few. e >= 0 is b >= 1 / u.

All problems share the mixtures; each has its own values and weights of the runs. A weight of 0 takes a run out, so that
folds of a cross-validation, and a number of draws, so that resamples, are problems like any other. The normal matrices
of a whole batch are one product of matrices, which is what makes tens of thousands of fits a matter of seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_BATCH = 512
"""Problems worked on at a time: bounds the memory for their normal matrices."""
_LARGEST_DAMPING = 1e14
_CURVATURE_OUTSIDE = 1000.0
"""Runs beyond delta count with a curvature of this times the damping, up to that of squares that touch the loss from
above: safe steps at first, Newton's at the end. Those squares alone took 110 to 180 steps where half of the runs are
beyond delta, and this 20 to 35."""
_LARGEST_EXPONENT = 300.0
"""Products of two exponentials are still float64; a law that rises so high is no fit of anything."""
_SMALL_EXPONENT = 0.02
"""Below it the derivative by b is a series: the closed form loses digits."""


@dataclass(frozen=True)
class Problems:
    """P fit problems over R runs and K domains.

    Attributes:
        x_RK: float64 [R, K], mixtures.
        y_PR: float64 [P, R], values.
        weight_PR: float64 [P, R], >= 0.
        delta: where the loss turns from squares to absolute values.
        ridge: pulls the coefficients to those of the law that says the mean of the values whatever the mixture, in
            units of delta^2: the loss gains ridge delta^2 / 2 times the sum of (a_k - log(u - e))^2.
    """

    x_RK: Array
    y_PR: Array
    weight_PR: Array
    delta: float
    ridge: float = 0.0

    def rows(self, index: NDArray[np.intp]) -> Problems:
        """Some of the problems."""
        return replace(self, y_PR=self.y_PR[index], weight_PR=self.weight_PR[index])

    @property
    def pull(self) -> float:
        """The factor of half the squared coefficients in the loss."""
        return self.ridge * self.delta**2

    def loss(self, curve: _Curve) -> Array:
        """float64 [P]: sum over runs of r^2 / 2 up to delta and delta (|r| - delta / 2) above, and the ridge."""
        size = np.abs(self.y_PR - curve.value_PR)
        each = np.where(size <= self.delta, 0.5 * size**2, self.delta * (size - 0.5 * self.delta))
        return (self.weight_PR * each).sum(axis=1) + 0.5 * self.pull * (curve.coefficient_PK**2).sum(axis=1)


@dataclass(frozen=True)
class Minima:
    """Local minima of P fit problems.

    Attributes:
        floor_P: float64 [P], e, >= 0.
        a_PK: float64 [P, K].
        loss_P: float64 [P].
        converged_P: bool [P]; False where the steps ran out.
    """

    floor_P: Array
    a_PK: Array
    loss_P: Array
    converged_P: NDArray[np.bool_]

    def or_better(self, other: Minima) -> Minima:
        """Of each problem the minimum with the lower loss."""
        other_P = other.loss_P < self.loss_P
        return Minima(
            np.where(other_P, other.floor_P, self.floor_P),
            np.where(other_P[:, None], other.a_PK, self.a_PK),
            np.where(other_P, other.loss_P, self.loss_P),
            np.where(other_P, other.converged_P, self.converged_P),
        )


def minimise(problems: Problems, floor_P: Array, a_PK: Array, *, max_steps: int = 200) -> Minima:
    """Refines guesses to local minima: no step makes a loss larger.

    Args:
        floor_P: float64 [P], e, >= 0 and below the mean of a problem's values.
        a_PK: float64 [P, K].
    """
    num_domains = problems.x_RK.shape[1]
    outer_RQ = (problems.x_RK[:, :, None] * problems.x_RK[:, None, :]).reshape(-1, num_domains**2)
    parts = []
    for first in range(0, len(floor_P), _BATCH):
        index = np.arange(first, min(first + _BATCH, len(floor_P)))
        parts.append(_descend(problems.rows(index), outer_RQ, floor_P[index], a_PK[index], max_steps))
    return Minima(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _descend(
    problems: Problems, outer_RQ: Array, floor_P: Array, a_PK: Array, max_steps: int
) -> tuple[Array, Array, Array, NDArray[np.bool_]]:
    """Levenberg-Marquardt on one batch; problems leave it as they converge."""
    middle_P = (problems.weight_PR * problems.y_PR).sum(axis=1) / problems.weight_PR.sum(axis=1)
    bend_P = 1 / np.maximum(middle_P - floor_P, 1e-9 * middle_P)
    plain_PK = (a_PK + np.log(bend_P)[:, None]) / bend_P[:, None] + middle_P[:, None]
    theta_PM = np.concatenate([bend_P[:, None], plain_PK], axis=1)
    loss_P = problems.loss(_Curve(problems.x_RK, middle_P, theta_PM))
    damping_P = np.full(len(theta_PM), 1e-3)
    converged_P = np.zeros(len(theta_PM), dtype=bool)
    tiny_P = 1e-31 * (problems.weight_PR * problems.y_PR**2).sum(axis=1)
    for _ in range(max_steps):
        active = np.flatnonzero(~converged_P)
        if not len(active):
            break
        part, middle = problems.rows(active), middle_P[active]
        step_PM, expected_P = _step(part, outer_RQ, middle, theta_PM[active], damping_P[active])
        trial_PM = theta_PM[active] + step_PM
        trial_P = part.loss(_Curve(part.x_RK, middle, trial_PM))
        better_P = trial_P <= loss_P[active]
        small_P = (expected_P <= 1e-14 * loss_P[active] + tiny_P[active]) & (damping_P[active] <= 1)
        stuck_P = ~better_P & (damping_P[active] > _LARGEST_DAMPING)
        accepted = active[better_P]
        theta_PM[accepted], loss_P[accepted] = trial_PM[better_P], trial_P[better_P]
        damping_P[active] = np.where(better_P, np.maximum(damping_P[active] / 8, 1e-14), damping_P[active] * 8)
        converged_P[active] = small_P | stuck_P
    bend_P = theta_PM[:, 0]
    floor_P = np.where(bend_P * middle_P <= 1, 0.0, middle_P - 1 / bend_P)
    a_PK = bend_P[:, None] * (theta_PM[:, 1:] - middle_P[:, None]) - np.log(bend_P)[:, None]
    return floor_P, a_PK, loss_P, converged_P


class _Curve:
    """Values at (b, p), and the parts of their derivatives.

    Attributes:
        value_PR: float64 [P, R], f.
        slope_PR: df/dp_k = slope x_k.
        z_PR: p . x - u.
        coefficient_PK: float64 [P, K], b (p - u) = a - log(u - e), which are 0 where all mixtures are alike.
    """

    def __init__(self, x_RK: Array, middle_P: Array, theta_PM: Array) -> None:
        self.z_PR = theta_PM[:, 1:] @ x_RK.T - middle_P[:, None]
        self.coefficient_PK = theta_PM[:, :1] * (theta_PM[:, 1:] - middle_P[:, None])
        self._t_PR = np.clip(theta_PM[:, :1] * self.z_PR, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        self._rise_PR = np.expm1(self._t_PR)
        self.slope_PR = self._rise_PR + 1
        self.value_PR = middle_P[:, None] + self._rise_PR / theta_PM[:, :1]

    def by_bend(self) -> Array:
        """df/db = z^2 (t e^t - e^t + 1) / t^2 with t = b z."""
        t_PR = self._t_PR
        series_PR = 1 / 2 + t_PR * (1 / 3 + t_PR * (1 / 8 + t_PR * (1 / 30 + t_PR * (1 / 144 + t_PR / 840))))
        small_PR = np.abs(t_PR) < _SMALL_EXPONENT
        closed_PR = (t_PR * self.slope_PR - self._rise_PR) / np.where(small_PR, 1.0, t_PR) ** 2
        return self.z_PR**2 * np.where(small_PR, series_PR, closed_PR)


def _step(
    problems: Problems, outer_RQ: Array, middle_P: Array, theta_PM: Array, damping_P: Array
) -> tuple[Array, Array]:
    """A damped Gauss-Newton step on the Huber loss.

    Returns:
        The step, float64 [P, 1 + K], that keeps every floor >= 0, and by how much it would lower the quadratic model.
    """
    num_domains = problems.x_RK.shape[1]
    curve = _Curve(problems.x_RK, middle_P, theta_PM)
    residual_PR, slope_PR, by_bend_PR = problems.y_PR - curve.value_PR, curve.slope_PR, curve.by_bend()
    with np.errstate(divide="ignore"):
        robust_PR = problems.weight_PR * np.minimum(1.0, problems.delta / np.abs(residual_PR))
    pull_PR = robust_PR * residual_PR
    trusted_P1 = np.minimum(1.0, _CURVATURE_OUTSIDE * damping_P)[:, None]
    curvature_PR = np.where(np.abs(residual_PR) > problems.delta, trusted_P1 * robust_PR, robust_PR)
    gradient_PM = np.concatenate(
        [(pull_PR * by_bend_PR).sum(axis=1, keepdims=True), (pull_PR * slope_PR) @ problems.x_RK], axis=1
    )
    normal_PMM = np.empty((len(theta_PM), num_domains + 1, num_domains + 1))
    normal_PMM[:, 0, 0] = (curvature_PR * by_bend_PR**2).sum(axis=1)
    normal_PMM[:, 0, 1:] = normal_PMM[:, 1:, 0] = (curvature_PR * by_bend_PR * slope_PR) @ problems.x_RK
    normal_PMM[:, 1:, 1:] = ((curvature_PR * slope_PR**2) @ outer_RQ).reshape(-1, num_domains, num_domains)
    if problems.pull:
        _add_ridge(problems.pull, theta_PM[:, 0], curve.coefficient_PK, gradient_PM, normal_PMM)
    diagonal_PM = np.einsum("pmm->pm", normal_PMM)
    # A domain that no run of the problem has leaves its row empty; its coefficient stays where it is.
    scale_PM = np.maximum(diagonal_PM, 1e-14 * diagonal_PM.max(axis=1, keepdims=True) + 1e-300)
    damped_PMM = normal_PMM.copy()
    np.einsum("pmm->pm", damped_PMM)[...] += damping_P[:, None] * scale_PM
    step_PM = np.asarray(np.linalg.solve(damped_PMM, gradient_PM[..., None])[..., 0], dtype=np.float64)
    lowest_P = 1 / middle_P - theta_PM[:, 0]
    below = np.flatnonzero(step_PM[:, 0] < lowest_P)
    if len(below):
        step_PM[below] = _with_bend(damped_PMM[below], gradient_PM[below], lowest_P[below])
    model_PM = np.einsum("pmn,pn->pm", normal_PMM, step_PM)
    return step_PM, np.einsum("pm,pm->p", step_PM, gradient_PM - 0.5 * model_PM)


def _add_ridge(pull: float, bend_P: Array, coefficient_PK: Array, gradient_PM: Array, normal_PMM: Array) -> None:
    """Adds the ridge's part to the (downhill) gradient and the normal matrix, in place.

    A coefficient g_k = b (p_k - u) has the derivatives g_k / b by b and b by p_k.
    """
    by_bend_PK = coefficient_PK / bend_P[:, None]
    gradient_PM[:, 0] -= pull * (coefficient_PK * by_bend_PK).sum(axis=1)
    gradient_PM[:, 1:] -= pull * coefficient_PK * bend_P[:, None]
    normal_PMM[:, 0, 0] += pull * (by_bend_PK**2).sum(axis=1)
    normal_PMM[:, 0, 1:] += pull * coefficient_PK
    normal_PMM[:, 1:, 0] += pull * coefficient_PK
    np.einsum("pmm->pm", normal_PMM)[:, 1:] += pull * bend_P[:, None] ** 2


def _with_bend(damped_PMM: Array, gradient_PM: Array, bend_P: Array) -> Array:
    """The steps whose first coordinate is given, best in all else."""
    rest_PK = gradient_PM[:, 1:] - damped_PMM[:, 1:, 0] * bend_P[:, None]
    step_PK = np.linalg.solve(damped_PMM[:, 1:, 1:], rest_PK[..., None])[..., 0]
    return np.concatenate([bend_P[:, None], step_PK], axis=1, dtype=np.float64)
