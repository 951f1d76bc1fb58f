"""Many small fits of y = e + exp(a . x) by Huber loss at once: Levenberg-Marquardt over a batch.

All problems share the mixtures; each has its own values and weights of the runs. A weight of 0 takes a run out, so that
folds of a cross-validation, and a number of draws, so that resamples, are problems like any other. The normal matrices
of a whole batch are one product of matrices, which is what makes tens of thousands of fits a matter of seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_BATCH = 512
"""Problems worked on at a time: bounds the memory for their normal matrices."""
_LARGEST_DAMPING = 1e14


@dataclass(frozen=True)
class Problems:
    """P problems over R runs and K domains.

    Attributes:
        x_RK: float64 [R, K], mixtures.
        y_PR: float64 [P, R], values.
        weight_PR: float64 [P, R], >= 0.
        delta: where the loss turns from squares to absolute values.
    """

    x_RK: Array
    y_PR: Array
    weight_PR: Array
    delta: float

    def rows(self, index: NDArray[np.intp]) -> Problems:
        """Some of the problems."""
        return Problems(self.x_RK, self.y_PR[index], self.weight_PR[index], self.delta)

    def loss(self, residual_PR: Array) -> Array:
        """float64 [P]: sum over runs of r^2 / 2 up to delta, delta (|r| - delta / 2) above; inf for what overflows."""
        size = np.abs(residual_PR)
        each = np.where(size <= self.delta, 0.5 * size**2, self.delta * (size - 0.5 * self.delta))
        total = (self.weight_PR * np.where(self.weight_PR > 0, each, 0.0)).sum(axis=1)
        return np.where(np.isfinite(total), total, np.inf)


@dataclass(frozen=True)
class Solution:
    """Where P problems ended.

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


def solve(problems: Problems, floor_P: Array, a_PK: Array, *, max_steps: int = 200) -> Solution:
    """Refines guesses to local minima: no step makes a loss larger.

    Args:
        floor_P: float64 [P], e, >= 0.
        a_PK: float64 [P, K].
    """
    num_domains = problems.x_RK.shape[1]
    outer_RQ = (problems.x_RK[:, :, None] * problems.x_RK[:, None, :]).reshape(-1, num_domains**2)
    parts = []
    for first in range(0, len(floor_P), _BATCH):
        index = np.arange(first, min(first + _BATCH, len(floor_P)))
        parts.append(_descend(problems.rows(index), outer_RQ, floor_P[index], a_PK[index], max_steps))
    return Solution(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _descend(
    problems: Problems, outer_RQ: Array, floor_P: Array, a_PK: Array, max_steps: int
) -> tuple[Array, Array, Array, NDArray[np.bool_]]:
    """Levenberg-Marquardt on one batch; problems leave it as they converge."""
    theta_PM = np.concatenate([floor_P[:, None], a_PK], axis=1)
    loss_P = problems.loss(_residual(problems, theta_PM))
    damping_P = np.full(len(theta_PM), 1e-3)
    converged_P = np.zeros(len(theta_PM), dtype=bool)
    tiny_P = 1e-31 * (problems.weight_PR * problems.y_PR**2).sum(axis=1)
    for _ in range(max_steps):
        active = np.flatnonzero(~converged_P)
        if not len(active):
            break
        part = problems.rows(active)
        step_PM, expected_P = _step(part, outer_RQ, theta_PM[active], damping_P[active])
        trial_PM = theta_PM[active] + step_PM
        trial_P = part.loss(_residual(part, trial_PM))
        better_P = trial_P <= loss_P[active]
        small_P = (expected_P <= 1e-14 * loss_P[active] + tiny_P[active]) & (damping_P[active] <= 1)
        stuck_P = ~better_P & (damping_P[active] > _LARGEST_DAMPING)
        accepted = active[better_P]
        theta_PM[accepted], loss_P[accepted] = trial_PM[better_P], trial_P[better_P]
        damping_P[active] = np.where(better_P, np.maximum(damping_P[active] / 6, 1e-14), damping_P[active] * 8)
        converged_P[active] = small_P | stuck_P
    return theta_PM[:, 0], theta_PM[:, 1:], loss_P, converged_P


def _exponential(problems: Problems, theta_PM: Array) -> Array:
    """exp(a . x), float64 [P, R]; inf where it overflows."""
    with np.errstate(over="ignore"):
        return np.exp(theta_PM[:, 1:] @ problems.x_RK.T)


def _residual(problems: Problems, theta_PM: Array) -> Array:
    return problems.y_PR - theta_PM[:, :1] - _exponential(problems, theta_PM)


def _step(problems: Problems, outer_RQ: Array, theta_PM: Array, damping_P: Array) -> tuple[Array, Array]:
    """A damped Gauss-Newton step of the loss that is quadratic within delta and, outside it, touches Huber's from above.

    Returns:
        The step, float64 [P, 1 + K], that leaves every floor >= 0, and by how much it would lower the quadratic model.
    """
    num_domains = problems.x_RK.shape[1]
    model_PR = _exponential(problems, theta_PM)
    residual_PR = problems.y_PR - theta_PM[:, :1] - model_PR
    with np.errstate(divide="ignore"):
        robust_PR = problems.weight_PR * np.minimum(1.0, problems.delta / np.abs(residual_PR))
    pull_PR = robust_PR * residual_PR
    gradient_PM = np.concatenate([pull_PR.sum(axis=1, keepdims=True), (pull_PR * model_PR) @ problems.x_RK], axis=1)
    normal_PMM = np.empty((len(theta_PM), num_domains + 1, num_domains + 1))
    normal_PMM[:, 0, 0] = robust_PR.sum(axis=1)
    normal_PMM[:, 0, 1:] = normal_PMM[:, 1:, 0] = (robust_PR * model_PR) @ problems.x_RK
    normal_PMM[:, 1:, 1:] = ((robust_PR * model_PR**2) @ outer_RQ).reshape(-1, num_domains, num_domains)
    diagonal_PM = np.einsum("pmm->pm", normal_PMM)
    # A domain that no run of the problem has leaves its row empty; its coefficient stays where it is.
    damped_PMM = normal_PMM.copy()
    scale_PM = np.maximum(diagonal_PM, 1e-14 * diagonal_PM.max(axis=1, keepdims=True) + 1e-300)
    np.einsum("pmm->pm", damped_PMM)[...] += damping_P[:, None] * scale_PM
    step_PM = np.linalg.solve(damped_PMM, gradient_PM[..., None])[..., 0]
    below = np.flatnonzero(theta_PM[:, 0] + step_PM[:, 0] < 0)
    if len(below):
        step_PM[below] = _to_zero_floor(damped_PMM[below], gradient_PM[below], theta_PM[below, 0])
    expected_P = np.einsum("pm,pm->p", step_PM, gradient_PM) - 0.5 * np.einsum(
        "pm,pmn,pn->p", step_PM, normal_PMM, step_PM
    )
    return step_PM, expected_P


def _to_zero_floor(damped_PMM: Array, gradient_PM: Array, floor_P: Array) -> Array:
    """The steps that end at a floor of 0, best in all else."""
    rest_PK = gradient_PM[:, 1:] + damped_PMM[:, 1:, 0] * floor_P[:, None]
    step_PK = np.linalg.solve(damped_PMM[:, 1:, 1:], rest_PK[..., None])[..., 0]
    return np.concatenate([-floor_P[:, None], step_PK], axis=1)
