"""Adaptive data optimization (ADO): samples a domain the faster, the faster its fitted scaling curve falls.

Source: Jiang et al., "Adaptive Data Optimization: Dynamic Sample Selection with Scaling Laws", arXiv 2410.11820, and
its repository (yidingjiang/ado), whose constants are the defaults here.

Notation: K domains; mu the initial weights (the sources' natural shares are ``mixture: natural``); t the step, from 0;
n_t the samples of the run through step t, of *all* domains; L_t,i the mean loss of domain i in step t, or its last one
where it was absent (in the first step the mean of all); S L the losses smoothed over steps, by Savitzky and Golay's
filter. Each of the constants in words is a key of the config.

    every refit_every steps from fit_from on:
        (a_i, e_i, alpha_i) = the curve exp(e) + exp(a) n^-alpha through (n_s, S L_s,i), by the criterion of
                              `megamix.mixing.mixers.scaling_curves`, s = fit_from, fit_from + fit_every, ... t;
                              in force from step t + fit_delay on (the sources: at once)
    every step:
        h       = credit_memory h + (1 - credit_memory) (shares of the step's samples), at first mu
        speed_i = max(alpha_i, min_exponent) exp(a_i) n_t^-alpha_i / n_t
        q_i     ~ mu_i h_i^credit_power speed_i, normalised, raised to at least min_share, normalised
        pi      = average_share A + (1 - average_share) q                  sampled with from here on; before: mu
        A       = A - (A - q) / (t + 1), at first mu

Traps. n counts all samples of the run, so curves say how fast a domain falls with training, whatever it was sampled
from. With the published constants the first fit has a single point (step 1000), so its curves, in force to step 2000,
are arbitrary; ``start`` puts fits off. Floors below exp(0.5) nats and exponents above 0.8 are penalised. mu enters
twice, as h is near it: a small domain stays small. A is a mean over all steps, in which mu counts as long as it was
sampled with: weights move slowly. What cannot be learnt has no falling part, so noise gets min_share of q. Shares are
of tokens here, which are those of samples where no labels are masked, and n counts units of ``sample_tokens`` tokens:
another unit moves the penalty of a alone.

The published code keeps all losses and smooths them anew at every fit. A smoothed loss changes only while steps come
within half a window after it, so the state holds the losses of a last window and the smoothed ones of every tenth step
before it (fit_every): K + 1 numbers for ten steps, so it grows with the run.

A fit takes 0.1 to 0.2 s of one core a domain. As published the weights of its step follow from it, so a loader that
needs them sooner waits. With fit_delay it runs in a thread of its own, and the old curves stay in force until then: a
fixed number of steps, however long the fit takes, so that runs repeat and resume exactly.

Shapes: every array is float64 [K] unless stated. P points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pydantic
from pydantic import Field

from megamix.core.config import Config
from megamix.mixing.mixers.base import Mixer
from megamix.mixing.mixers.scaling_curves import Penalties, fit_curve
from megamix.mixing.mixers.stats import DomainStats
from megamix.mixing.mixers.weights import DomainWeights, FloatArray

_SMALLEST_LOSS, _LARGEST_LOSS = 1e-6, 1e6
"""Nats per token; a curve is fitted to logarithms."""


class AdoConfig(Config):
    """Adaptive data optimization: fits a scaling curve to each domain's training loss and samples where it falls
    fastest, in proportion to the mixture. The defaults are those of its published code, made for 60,000 steps; a short
    run needs a smaller fit_from and refit_every."""

    name: Literal["ado"] = "ado"
    """Which mixer this configures."""

    fit_from: int = Field(default=1000, ge=0)
    """First step, from 0, whose losses curves are fitted to. Not less than smoothing_window - 1."""

    start: int | None = Field(default=None, ge=0)
    """First step, from 0, at which a curve is fitted and followed; the weights stay the initial ones before. null:
    fit_from, where a curve has one point."""

    refit_every: int = Field(default=1000, gt=0)
    """Steps between fits, at multiples of it."""

    fit_delay: int = Field(default=0, ge=0)
    """Steps from a fit to the first weights that follow it, fitted meanwhile beside the run; 0: fitted at once, which
    the loader may wait for. Less than refit_every."""

    fit_every: int = Field(default=10, gt=0)
    """Steps from one that a curve is fitted to to the next."""

    smoothing_window: int = Field(default=101, gt=0)
    """Steps that losses are smoothed over, an odd number."""

    smoothing_degree: int = Field(default=3, ge=0)
    """Degree of the polynomials that losses are smoothed by."""

    huber_delta: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Residual, of logarithms of losses, from which on it counts in proportion and not by its square."""

    max_scale: float = Field(default=6.5, allow_inf_nan=False)
    """Logarithm of the falling part at one sample, above which a curve is penalised."""

    min_floor: float = Field(default=0.5, allow_inf_nan=False)
    """Logarithm of the loss that remains, below which a curve is penalised."""

    exponents: tuple[float, float] = (0.001, 0.8)
    """Exponents outside which a curve is penalised."""

    min_exponent: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    """A smaller fitted exponent counts as this one in the speed of a domain."""

    credit_memory: float = Field(default=0.9, ge=0, lt=1, allow_inf_nan=False)
    """Share of the old value in the moving average of what each domain was sampled."""

    credit_power: float = Field(default=0.5, ge=0, le=1, allow_inf_nan=False)
    """Power of that average by which a domain's speed is credited to it; 0: in full."""

    average_share: float = Field(default=0.9, ge=0, le=1, allow_inf_nan=False)
    """Share of the mean over all steps so far in the weights."""

    min_share: float = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)
    """Least share of a domain in the weights of a step, before its mean is taken."""

    sample_tokens: int = Field(default=1024, gt=0)
    """Tokens of a sample, the unit that curves count in; the published runs had 1024."""

    @pydantic.model_validator(mode="after")
    def _windows_fit(self) -> AdoConfig:
        window = self.smoothing_window
        if window % 2 == 0 or window <= self.smoothing_degree:
            raise ValueError(
                f"smoothing_window is {window}, expected an odd number above smoothing_degree, {self.smoothing_degree}."
            )
        if self.fit_from < window - 1:
            raise ValueError(
                f"fit_from is {self.fit_from}, but the losses of {window} steps are smoothed (smoothing_window). Use at "
                f"least {window - 1}, or a smaller window."
            )
        if not 0 <= self.exponents[0] < self.exponents[1] < np.inf:
            raise ValueError(f"exponents is {list(self.exponents)}, expected two rising numbers that are not negative.")
        if self.start is not None and self.start < self.fit_from:
            raise ValueError(f"start is {self.start}, before fit_from, {self.fit_from}. Use at least that.")
        if self.fit_delay >= self.refit_every:
            raise ValueError(
                f"fit_delay is {self.fit_delay}, but the next fit begins after {self.refit_every} steps (refit_every). Use "
                "less than that."
            )
        return self


@dataclass(frozen=True)
class _Fit:
    """A fit whose curves are not in force yet.

    Attributes:
        due: the step, from 0, with the first weights that follow it.
        num_points: how many of the final points it has.
        recent: n and the K smoothed losses of the points after those, which were not final.
        curves: float64 [K, 3].
    """

    due: int
    num_points: int
    recent: list[list[float]]
    curves: Future[FloatArray]


class AdoMixer(Mixer):
    """Follows fitted scaling curves; the initial weights are mu. See the module's docstring for the formulas."""

    name = "ado"
    config: AdoConfig

    follows_objective = False

    def __init__(self, config: AdoConfig, domains: Sequence[str], initial_weights: DomainWeights) -> None:
        super().__init__(config, domains, initial_weights)
        self._prior = self.weights
        self._credit = self.weights
        self._average = self.weights
        self._start_anew()

    def set_prior(self, weights: FloatArray) -> None:
        self._prior = np.array(weights, np.float64)

    def _start_anew(self) -> None:
        """Without losses or curves."""
        self._count = 0
        """Steps seen."""
        self._tokens = 0
        self._window: list[list[float]] = []
        """Of the last steps: n and the K losses of each."""
        self._points: list[list[float]] = []
        """n and the K smoothed losses of every point that is final."""
        self._curves: FloatArray | None = None
        """float64 [K, 3]: a, e, alpha."""
        self._running: _Fit | None = None

    def _observe(self, stats: DomainStats, step: int) -> None:
        total = int(stats.tokens.sum())
        self._tokens += total
        if total:
            memory = self.config.credit_memory
            self._credit = memory * self._credit + (1.0 - memory) * (stats.tokens / total)
        mean = float(stats.nats.sum()) / max(total, 1)
        last = np.array(self._window[-1][1:]) if self._window else np.full(self.num_domains, mean)
        loss = np.clip(np.where(stats.seen, stats.loss, last), _SMALLEST_LOSS, _LARGEST_LOSS)
        self._window = [*self._window, [self._n, *loss.tolist()]][-self.config.smoothing_window :]
        self._count += 1
        half = self.config.smoothing_window // 2
        if len(self._window) == self.config.smoothing_window and self._is_point(self._count - 1 - half):
            self._points.append([self._window[half][0], *self._smoothed()[half].tolist()])

    @property
    def _n(self) -> float:
        return self._tokens / self.config.sample_tokens

    def _is_point(self, t: int) -> bool:
        after = t - self.config.fit_from
        return after >= 0 and after % self.config.fit_every == 0

    def _smoothed(self) -> FloatArray:
        """float64 [steps of the window, K]."""
        from scipy.signal import savgol_filter

        losses = np.array(self._window)[:, 1:]
        return np.asarray(savgol_filter(losses, self.config.smoothing_window, self.config.smoothing_degree, axis=0))

    def _new_weights(self, step: int) -> FloatArray | None:
        config, t = self.config, self._count - 1
        if t < (config.fit_from if config.start is None else config.start):
            return None
        if t % config.refit_every == 0:
            self._running = self._start_fit(t + config.fit_delay, len(self._points), self._recent_points())
        if self._running is not None and t >= self._running.due:
            self._curves, self._running = self._running.curves.result(), None
        if self._curves is None or self._tokens == 0:
            return None
        now = self._instant()
        weights = config.average_share * self._average + (1.0 - config.average_share) * now
        self._average = (1.0 - 1.0 / (t + 1)) * self._average + now / (t + 1)
        return weights

    def _recent_points(self) -> list[list[float]]:
        """n and the K smoothed losses of the points that steps to come will still change."""
        half = self.config.smoothing_window // 2
        smoothed, first = self._smoothed(), self._count - self.config.smoothing_window
        return [
            [self._window[i][0], *smoothed[i].tolist()]
            for i in range(half + 1, self.config.smoothing_window)
            if self._is_point(first + i)
        ]

    def _start_fit(self, due: int, num_points: int, recent: list[list[float]]) -> _Fit:
        """Fits at once without `AdoConfig.fit_delay`, otherwise in a thread of its own."""
        points = np.array(self._points[:num_points] + recent)
        if self.config.fit_delay == 0:
            curves: Future[FloatArray] = Future()
            curves.set_result(_fitted(self.config, points))
        else:
            thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ado-fit")
            curves = thread.submit(_fitted, self.config, points)
            thread.shutdown(wait=False)  # after the fit
        return _Fit(due, num_points, recent, curves)

    def _speed(self) -> FloatArray:
        """Fall of each curve now, nats per sample of the run."""
        assert self._curves is not None
        a, _, alpha = self._curves.T
        return np.maximum(alpha, self.config.min_exponent) * np.exp(a - alpha * np.log(self._n)) / self._n

    def _instant(self) -> FloatArray:
        """q."""
        share = self._prior * self._credit**self.config.credit_power * self._speed()
        total = float(share.sum())
        if not total > 0:  # no curve falls
            share, total = self._prior, 1.0
        share, floor = share / total, self.config.min_share
        # With so many domains that the floors leave nothing, the published code scales the shares down first.
        raised = np.maximum(share * (1.0 - max(floor * share.size - 1.0, 0.0)), floor)
        return raised / raised.sum()

    def _extra_state(self) -> dict[str, Any]:
        fit = self._running
        return {
            "prior": self._prior.tolist(),
            "credit": self._credit.tolist(),
            "average": self._average.tolist(),
            "count": self._count,
            "tokens": self._tokens,
            "window": self._window,
            "points": self._points,
            "curves": None if self._curves is None else self._curves.tolist(),
            "fit": None if fit is None else {"due": fit.due, "num_points": fit.num_points, "recent": fit.recent},
        }

    def _load_extra_state(self, state: Mapping[str, Any]) -> None:
        k = self.num_domains
        arrays = {key: np.array(state[key], np.float64) for key in ("prior", "credit", "average")}
        rows = {key: [[float(value) for value in row] for row in state[key]] for key in ("window", "points")}
        curves = None if state["curves"] is None else np.array(state["curves"], np.float64)
        fit = state["fit"]
        if fit is not None:
            rows["recent"] = [[float(value) for value in row] for row in fit["recent"]]
        if (
            any(array.shape != (k,) for array in arrays.values())
            or any(len(row) != k + 1 for part in rows.values() for row in part)
            or (curves is not None and curves.shape != (k, 3))
        ):
            raise ValueError(f"arrays that are not of {k} domains")
        self._prior, self._credit, self._average = arrays["prior"], arrays["credit"], arrays["average"]
        self._window, self._points, self._curves = rows["window"], rows["points"], curves
        self._count, self._tokens = int(state["count"]), int(state["tokens"])
        # Fitted anew from the same points, which gives the same curves.
        self._running = (
            None if fit is None else self._start_fit(int(fit["due"]), int(fit["num_points"]), rows["recent"])
        )

    def _carry_extra_state(self, state: Mapping[str, Any], parents: Sequence[int | None]) -> dict[str, Any]:
        """Losses and curves begin anew, as a new domain has none that can be fitted with the others'; until they are
        fitted the weights stay. A new domain's place in the mixture is the mean, and parts share that of the whole."""

        def carry(values: Sequence[float]) -> list[float]:
            mean = sum(values) / len(values)
            carried = [mean if parent is None else values[parent] / parents.count(parent) for parent in parents]
            return [value / sum(carried) for value in carried]

        carried = {key: carry(state[key]) for key in ("prior", "credit", "average")}
        return {**carried, "count": 0, "tokens": 0, "window": [], "points": [], "curves": None, "fit": None}

    def _extra_record(self) -> dict[str, Any]:
        """``curve_scale`` (exp a, nats per token at one sample), ``curve_floor`` (exp e, nats per token) and
        ``curve_exponent`` (alpha) of the last fit, ``loss_speed`` (nats per token and sample), null before one; and
        ``credit``."""
        if self._curves is None or self._tokens == 0:
            fitted: dict[str, Any] = dict.fromkeys(("curve_scale", "curve_floor", "curve_exponent", "loss_speed"))
        else:
            a, e, alpha = self._curves.T
            with np.errstate(over="ignore"):
                scale, floor = (np.minimum(np.exp(x), np.finfo(np.float64).max) for x in (a, e))
            fitted = {
                "curve_scale": scale.tolist(),
                "curve_floor": floor.tolist(),
                "curve_exponent": alpha.tolist(),
                "loss_speed": self._speed().tolist(),
            }
        return {**fitted, "credit": self._credit.tolist()}


def _fitted(config: AdoConfig, points: FloatArray) -> FloatArray:
    """float64 [K, 3]: the curve of each domain through ``points``, [P, 1 + K] of n and the losses there."""
    # A smoothed loss may fall out of the range of the losses.
    n_P, loss_PK = np.maximum(points[:, 0], 1e-9), np.clip(points[:, 1:], _SMALLEST_LOSS, _LARGEST_LOSS)
    penalties = Penalties(config.max_scale, config.min_floor, config.exponents)
    return np.stack([fit_curve(n_P, loss_P, config.huber_delta, penalties) for loss_P in loss_PK.T])
