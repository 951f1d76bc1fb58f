"""Scaling curves L(n) = exp(e) + exp(a) n^-alpha through losses, by ADO's criterion (`megamix.mixing.mixers.ado`).

A curve minimises, over a, e and alpha, the sum over its points of Huber(ln L - ln(exp(e) + exp(a) n^-alpha)), plus
penalties with slope 1 wherever a is above `Penalties.largest_a`, e below `smallest_e` or alpha outside `exponents`.

The published code minimises it by at most 200 steps of L-BFGS from each of 512 starts, a grid of a, e and alpha, and
takes the best. Here the minimum itself is looked for, with fewer starts: one for each of many alphas, of which a and e
follow by weighted least squares. A delta of 1e-3 makes the criterion nearly a sum of absolute values, so it is
approached by way of larger ones. The penalties have corners, at which many minima lie: descent takes Newton's steps
with several dampings and lengths, of which the lowest value wins, and stops a parameter that would pass a corner there;
it leaves a corner only where the slopes on both sides let it.

Legend: B starts, P points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megamix.mixing.mixers.weights import FloatArray

_NUM_ALPHAS = 16
"""Starts of a fit."""

_FEW_POINTS = 128
"""Points on which starts are ranked."""

_LEAST_A = -30.0
"""The falling part is below any loss with it; lower values are all alike."""

_WIDTHS = (30.0, 10.0, 3.0, 1.0)
"""Multiples of delta up to which residuals count by their squares, in turn: a wide one leads near the minimum fast."""

_DAMPINGS = (0.0, 1e-3)
"""Multiples of the diagonal of the majorant's curvature that are added to Newton's."""

_LENGTHS = (1.0, 0.3, 0.05, 0.005)
"""Parts of each proposed step."""


@dataclass(frozen=True)
class Penalties:
    """Where the penalties on a, e and alpha begin."""

    largest_a: float = 6.5
    smallest_e: float = 0.5
    exponents: tuple[float, float] = (0.001, 0.8)

    @property
    def corners(self) -> list[tuple[int, float, float, float]]:
        """(parameter, place, slope below, slope above)."""
        low, high = self.exponents
        return [
            (0, self.largest_a, 0.0, 1.0),
            (1, self.smallest_e, -1.0, 0.0),
            (2, low, -1.0, 0.0),
            (2, high, 0.0, 1.0),
        ]


def fit_curve(n_P: FloatArray, loss_P: FloatArray, delta: float, penalties: Penalties) -> FloatArray:
    """float64 [3], (a, e, alpha) of the curve through losses above 0 at ``n_P``."""
    log_n, log_loss = np.log(n_P), np.log(loss_P)
    every = -(-log_n.size // _FEW_POINTS)
    # From the end on, so that the newest point is one of them.
    few = _Criterion(log_n[::-1][::every], log_loss[::-1][::every], delta, penalties, weight=float(every))
    z, kept = _starts(log_n, log_loss, penalties), 8
    for width in _WIDTHS:
        z = _distinct(_best(few, few.descend(z, 8, width), kept))
        kept = 4
    everything = _Criterion(log_n, log_loss, delta, penalties)
    for width in _WIDTHS[-2:] if every > 1 else ():
        z = everything.descend(z[:2], 15, width)
    return _best(everything, everything.descend(z, 100), 1)[0]


def _starts(log_n_P: FloatArray, log_loss_P: FloatArray, penalties: Penalties) -> FloatArray:
    """float64 [B, 3]: for each of many alphas the a and e of least squares, with relative residuals."""
    alpha = np.linspace(*penalties.exponents, _NUM_ALPHAS)
    middle = log_n_P.mean()
    falls = np.exp(-alpha[:, None] * (log_n_P - middle))
    weight = np.exp(-2.0 * log_loss_P)
    loss, total = np.exp(log_loss_P), weight.sum()
    mean_x, mean_y = falls @ weight / total, loss @ weight / total
    moved = falls - mean_x[:, None]
    spread = (moved * moved) @ weight
    factor = np.divide(moved @ (weight * (loss - mean_y)), spread, out=np.zeros_like(alpha), where=spread > 1e-12)
    least = np.exp(penalties.smallest_e)
    factor = np.clip(factor, 1e-6, np.maximum(mean_y - least, 1e-6) / mean_x)
    floor = np.maximum(mean_y - factor * mean_x, least)
    a = np.minimum(np.log(factor) + alpha * middle, penalties.largest_a)
    return np.stack([a, np.log(floor), alpha], axis=1)


def _best(criterion: _Criterion, z_B3: FloatArray, number: int) -> FloatArray:
    return z_B3[np.argsort(criterion.value(z_B3), kind="stable")[:number]]


def _distinct(z_B3: FloatArray) -> FloatArray:
    """Without those that lie next to one before them."""
    kept: list[FloatArray] = []
    for z in z_B3:
        if all(np.abs(z - other).max() > 1e-3 for other in kept):
            kept.append(z)
    return np.array(kept)


class _Criterion:
    """What a curve minimises; see the module's docstring.

    Args:
        weight: factor on the sum over points.
    """

    def __init__(
        self, log_n_P: FloatArray, log_loss_P: FloatArray, delta: float, penalties: Penalties, weight: float = 1.0
    ) -> None:
        self._x, self._y, self._delta, self._weight = log_n_P, log_loss_P, delta, weight
        self._corners = penalties.corners

    def value(self, z_B3: FloatArray, width: float = 1.0) -> FloatArray:
        """float64 [B].

        Args:
            width: multiple of delta up to which a residual counts by its square; the force of larger ones stays.
        """
        reach = width * self._delta
        a, e, alpha = (z_B3[:, j, None] for j in range(3))
        away = np.abs(self._y - np.logaddexp(a - alpha * self._x, e))
        huber = np.where(away > reach, self._delta * (away - 0.5 * reach), 0.5 / width * away * away)
        total = self._weight * huber.sum(axis=1)
        for j, place, below, above in self._corners:
            beyond = z_B3[:, j] - place
            total = total + np.where(beyond < 0, below, above) * beyond
        return total

    def descend(self, z_B3: FloatArray, steps: int, width: float = 1.0) -> FloatArray:
        """The points that at most ``steps`` damped Newton steps lead to."""
        z = z_B3.copy()
        value = self.value(z, width)
        live = np.arange(len(z))
        for _ in range(steps):
            proposals = self._proposals(z[live], width)
            values = self.value(proposals.reshape(-1, 3), width).reshape(proposals.shape[:2])
            best = np.argmin(np.where(np.isfinite(values), values, np.inf), axis=0)
            here = np.arange(len(live))
            lower = values[best, here] < value[live]
            moved = live[lower]
            z[moved], value[moved] = proposals[best, here][lower], values[best, here][lower]
            live = moved
            if not live.size:
                break
        return z

    def _proposals(self, z: FloatArray, width: float) -> FloatArray:
        """float64 [D, B, 3]: where Newton's step leads from each point with each damping, stopped at corners."""
        gradient, newton, majorant = self._derivatives(z, width)
        low, high = self._slopes(z)
        slope = gradient + np.clip(-gradient, low, high)
        pinned = slope == 0
        diagonal = np.eye(3) * np.maximum(majorant, 1e-12)
        found = []
        for matrix in (*(newton + damping * diagonal for damping in _DAMPINGS), majorant + 1e-9 * diagonal):
            step = _solve(matrix, slope, pinned)
            found += [self._stopped(z, length * step) for length in _LENGTHS]
            # The same with what passes a corner held there, which changes where the others go.
            cut = found[-len(_LENGTHS)] - z
            held = pinned | (cut != step)
            shift = np.where(held & ~pinned, cut, 0.0)
            moved = slope + np.einsum("bij,bj->bi", matrix, shift)
            found.append(self._stopped(z, shift + _solve(matrix, moved, held)))
        return np.stack(found)

    def _derivatives(self, z: FloatArray, width: float) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Gradient [B, 3] of the sum over points, its Hessian and the Hessian of a quadratic that touches it from above
        where curves are linear in their parameters ([B, 3, 3])."""
        a, e, alpha = (z[:, j, None] for j in range(3))
        power = a - alpha * self._x
        curve = np.logaddexp(power, e)
        share = np.exp(power - curve)  # of the part that falls
        away = self._y - curve
        size = np.abs(away)
        force = np.clip(away / width, -self._delta, self._delta)
        # Derivatives of the logarithm of the curve: share, 1 - share, -share x.
        J = np.stack([share, 1.0 - share, -share * self._x], axis=1)
        gradient = -np.einsum("bp,bjp->bj", force, J)
        inside = np.where(size <= width * self._delta, 1.0 / width, 0.0)
        bend = force * share * (1.0 - share)  # second derivatives: share (1 - share) d d', d = (1, -1, -x)
        d = np.stack([np.ones_like(self._x), -np.ones_like(self._x), -self._x])
        second = np.einsum("bp,jp,kp->bjk", bend, d, d, optimize=True)
        newton = np.matmul(J * inside[:, None], J.swapaxes(1, 2)) - second
        near = np.minimum(1.0 / width, self._delta / np.maximum(size, 1e-300))
        majorant = np.matmul(J * near[:, None], J.swapaxes(1, 2))
        return self._weight * gradient, self._weight * newton, self._weight * majorant

    def _slopes(self, z: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The least and the greatest slope of the penalties, [B, 3] each; they differ at corners."""
        low, high = np.zeros_like(z), np.zeros_like(z)
        for j, place, below, above in self._corners:
            low[:, j] += np.where(z[:, j] <= place, below, above)
            high[:, j] += np.where(z[:, j] >= place, above, below)
        return low, high

    def _stopped(self, z: FloatArray, step: FloatArray) -> FloatArray:
        """``z + step``, but a parameter that would pass a corner stops there."""
        moved = z + step
        moved[:, 0] = np.maximum(moved[:, 0], _LEAST_A)
        for j, place, _, _ in self._corners:
            passes = (z[:, j] - place) * (moved[:, j] - place) < 0
            moved[:, j] = np.where(passes, place, moved[:, j])
        return moved


def _solve(matrix: FloatArray, slope: FloatArray, pinned: npt.NDArray[np.bool_]) -> FloatArray:
    """-matrix^-1 slope, [B, 3], 0 in the pinned parameters."""
    free = ~pinned[:, :, None] & ~pinned[:, None, :]
    matrix = np.where(free, matrix, 0.0) + np.eye(3) * np.where(pinned, 1.0, 1e-12)[:, None, :]
    determinant = np.linalg.det(matrix)
    matrix = np.where((np.abs(determinant) > 1e-300)[:, None, None], matrix, np.eye(3))
    solved = np.linalg.solve(matrix, np.where(pinned, 0.0, slope)[:, :, None])[:, :, 0]
    return -np.asarray(solved, np.float64)
