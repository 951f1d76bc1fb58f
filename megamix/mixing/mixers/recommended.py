"""The recommended online mixer: the objective's mixture, without the domains whose tokens no longer lower its loss.

The objective is a mean of domain losses, sum over i of v_i L_i (`Mixer.objective`). Let g_i be the slope of domain i's
loss, -dL_i / d ln n_i: what it loses, in nats, while its tokens n_i grow by a factor of e. For a given number of tokens
in all the objective is least where the last token of every domain gains as much as that of any other, v_i g_i / n_i the
same for all, so where the weights are in proportion to v_i g_i. On a scaling curve L = E + A n^-b the slope is b (L -
E): near 0 for noise, for what is learnt and for what is beyond the model, without a fit of the floor E, which short
runs do not determine.

Interval s brought m_s tokens of domain i with mean loss y_s, at the end of which it had given n_s tokens in all, now n.
The line of least squares through

    (x_s, y_s),  x_s = ln(n_s - m_s / 2),  with weight w_s = m_s (n_s / n)^memory

has the slope -g_i and the usual standard error se_i, from the residuals and the effective number of observations (sum
w)^2 / sum w^2. Old observations fade with the domain's own tokens, so that what is known of a rare domain is not
forgotten. An observation further than 3 of its standard deviations from the line counts as if it were 3 away, so that
one strange sample moves nothing. Uncertain slopes are drawn to the mean of all (empirical Bayes):

    tau^2 = max(0, variance of g over domains - mean of se_i^2)
    r_i   = max(0, mean(g) + (g_i - mean(g)) tau^2 / (tau^2 + se_i^2))   with too few observations: mean(g)
    c     = sum r^2 / sum r                        the typical slope, to which domains that do not learn add nothing
    s_i   = clip(4 r_i / c - 1, 0, 1)              whether i learns: 0 up to a quarter of c, 1 from half of c on

and the weights are, with d_i = v_i r_i / sum v r, R = reach and e = exploration,

    w_i   = s_i clip(d_i, v_i / R, v_i R)
    pi_i  = (1 - e) w_i / sum w + e / K

Before slopes are known all are equal, and the weights are the objective's. But a domain with 8 to 30 effective
observations can be suspected: its s_i is that of g_i + 3 se_i, and at least a quarter, with c of all slopes found
so far (those below 0 as 0). So noise loses most of its weight after some 12 steps, while the learning rate is high;
waiting for the 30th observation cost 0.04 nats in the end (DECISIONS.md). A domain that the objective leaves out gets
the exploration only. With R = 1, the default, weights stay the objective's for all domains that learn; above it they
are bent towards those that gain more.

What it rests on: the slope along a run taken for what a domain's own tokens give. Measured on the mini-pile (12
domains, 0.5 M parameters, 400 steps of 4,096 tokens), the slope along a run of equal weights and the loss that a domain
gains per e-fold when its weight alone is doubled have a correlation of 0.95, so no part of the slope is taken off as
common.

What it cannot see: what a domain's tokens do for the others, which differs more between domains than what they do for
itself; losses that fall because data is repeated (bound it by data.max_epochs); a domain that is being forgotten, whose
rising loss earns it the exploration only; that the loss of a rare domain unlike all others may rise until the model has
learnt what is frequent, which is why a suspected one keeps a quarter. DECISIONS.md has what was tried and measured.

Shapes: every array is float64 [K], K the number of domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from megamix.core.log import get_logger
from megamix.mixing.mixers.base import Mixer, ScheduleConfig
from megamix.mixing.mixers.stats import DomainStats
from megamix.mixing.mixers.weights import DomainWeights, FloatArray

BoolArray = NDArray[np.bool_]

_LARGEST_LOSS = 1e6
"""Nats per token; the squares of losses up to here can be summed without a thought to overflow."""

_MIN_OBSERVATIONS = 30.0
"""Effective observations from which on a slope counts: the first are of a phase in which a model learns little but the
frequency of tokens."""

_MIN_SUSPICIOUS = 8.0
"""Effective observations from which on a domain can be suspected of not learning."""

_SUSPECTED = 0.25
"""The least share of its weight that a domain keeps while it is only suspected."""

_DOUBT = 3.0
"""Standard errors above its slope that a suspected domain is given."""

_SMALLEST_SLOPE = 1e-6
"""Nats per e-fold; slopes that are all below this are rounding errors of losses that do not change."""

_NOT_LEARNING, _LEARNING = 0.25, 0.5
"""Of the typical slope: up to the one a domain does not learn, from the other on it fully does."""

_CLIP = 3.0
"""Standard deviations from its line beyond which an observation counts no more."""

_SUMS = ("w", "ww", "wx", "wy", "wxx", "wxy", "wyy")
"""The sums over a domain's observations, of products of weight, position and loss."""


class RecommendedConfig(ScheduleConfig):
    """Minimises the run's objective: samples a domain by its weight there while its tokens still lower its loss, and
    leaves noise and what is learnt; with `reach` above 1 more where the tokens gain more. Until slopes are known the
    weights are the objective's."""

    name: Literal["recommended"] = "recommended"
    """Which mixer this configures."""

    memory: float = Field(default=1.0, ge=0, le=10, allow_inf_nan=False)
    """How fast old losses fade: those from when a domain had given half of its tokens so far count 2^-memory as much;
    0: all count alike."""

    reach: float = Field(default=1.0, ge=1, le=1000, allow_inf_nan=False)
    """The largest factor between a weight and the objective's, either way, for a domain that still learns. 1: such a
    domain keeps its weight, and only what no longer learns is left."""

    exploration: float = Field(default=0.05, ge=0, le=1, allow_inf_nan=False)
    """Share of the samples that is spread evenly over all domains, whatever they learn."""

    @model_validator(mode="before")
    @classmethod
    def _without_difficulty(cls, data: object) -> object:
        if not isinstance(data, dict) or "difficulty" not in data:
            return data
        get_logger().warning(
            "mixer recommended: difficulty is of the rule that 0.1 had under this name and has no effect; the weights follow "
            "the run's objective."
        )
        return {key: value for key, value in data.items() if key != "difficulty"}


class RecommendedMixer(Mixer):
    """Weights in proportion to the gain of the objective; see the module's docstring for the formulas.

    Args:
        config: The parameters.
        domains: The K domain names.
        initial_weights: K relative weights, in that order or by name; in force until the first update.
    """

    name = "recommended"
    config: RecommendedConfig

    def __init__(self, config: RecommendedConfig, domains: Sequence[str], initial_weights: DomainWeights) -> None:
        super().__init__(config, domains, initial_weights)
        self._tokens = np.zeros(self.num_domains)
        self._sums = np.zeros((len(_SUMS), self.num_domains))

    def _observe(self, stats: DomainStats, step: int) -> None:
        seen = stats.seen
        m, y = stats.tokens[seen].astype(np.float64), np.clip(stats.loss[seen], -_LARGEST_LOSS, _LARGEST_LOSS)
        before = self._tokens[seen]
        after = before + m
        x = np.log(before + m / 2)
        y = self._within_reason(seen, x, y, m)
        fade = (before / after) ** self.config.memory
        self._sums[:, seen] *= np.stack([fade * fade if name == "ww" else fade for name in _SUMS])
        self._sums[:, seen] += np.stack([m, m * m, m * x, m * y, m * x * x, m * x * y, m * y * y])
        self._tokens[seen] = after

    def _within_reason(self, seen: BoolArray, x: FloatArray, y: FloatArray, m: FloatArray) -> FloatArray:
        """Losses ``y`` of the domains seen, moved to within `_CLIP` standard deviations of the lines so far."""
        fit = self._lines(_MIN_OBSERVATIONS)
        with np.errstate(invalid="ignore"):
            expected = fit.mean_y[seen] - fit.slope[seen] * (x - fit.mean_x[seen])
            reach = _CLIP * np.sqrt(fit.token_variance[seen] / m)
            clipped = expected + np.clip(y - expected, -reach, reach)
        return np.where(np.isfinite(clipped), clipped, y)

    def _lines(self, min_observations: float) -> _Lines:
        w, ww, wx, wy, wxx, wxy, wyy = self._sums
        with np.errstate(divide="ignore", invalid="ignore"):
            number = w * w / ww
            mean_x, mean_y = wx / w, wy / w
            variance_x, variance_y = wxx / w - mean_x**2, wyy / w - mean_y**2
            covariance = wxy / w - mean_x * mean_y
            known = (number >= min_observations) & (variance_x > 0)
            slope = covariance / variance_x
            residual = np.maximum(variance_y - slope * covariance, 0.0)
            error = residual / ((number - 2.0) * variance_x)
            # A mean of m tokens has this variance over m; ``w / number`` is the mean m of the observations that count.
            token_variance = residual * w / number
        found = (-slope, error, mean_x, mean_y, token_variance)
        return _Lines(known, *(np.where(known, values, np.nan) for values in found))

    def _slopes(self) -> FloatArray | None:
        """r, the slopes drawn to their mean; None while none is known or none is above 0."""
        fit = self._lines(_MIN_OBSERVATIONS)
        known, slope = fit.known, fit.slope
        if not known.any():
            return None
        mean = float(slope[known].mean())
        spread = float(slope[known].var(ddof=1)) - float(fit.squared_error[known].mean()) if known.sum() > 1 else 0.0
        drawn = np.full(self.num_domains, mean)
        if spread > 0:
            drawn[known] += (slope[known] - mean) * (spread / (spread + fit.squared_error[known]))
        drawn = np.maximum(drawn, 0.0)
        return None if drawn.max() < _SMALLEST_SLOPE else drawn

    def _not_suspected(self) -> FloatArray:
        """s of the domains with some observations, but not yet enough: judged by the upper end of their slopes."""
        fit = self._lines(_MIN_SUSPICIOUS)
        slope = np.where(fit.known, fit.slope, 0.0)
        if slope.max() < _SMALLEST_SLOPE:
            return np.ones(self.num_domains)
        upper = slope + _DOUBT * np.sqrt(fit.squared_error)
        return np.where(fit.known, np.maximum(_learning(upper, np.maximum(slope, 0.0)), _SUSPECTED), 1.0)

    def _shares(self) -> tuple[FloatArray, FloatArray]:
        """(d, w): what the tokens of every domain gain, sum 1, and the shares that follow."""
        slopes = self._slopes()
        learning = self._not_suspected()
        if slopes is None:
            slopes = np.ones(self.num_domains)
        else:
            known = self._lines(_MIN_OBSERVATIONS).known
            learning = np.where(known, _learning(slopes, slopes), learning)
        v, reach = self.objective, self.config.reach
        gain = v * slopes
        if not gain.any():
            return v, np.zeros(self.num_domains)
        gain = gain / gain.sum()
        return gain, learning * np.clip(gain, v / reach, v * reach)

    def _new_weights(self, step: int) -> FloatArray | None:
        e, share = self.config.exploration, self._shares()[1]
        if not share.any():  # nothing of the objective is learnt any more
            return None
        return (1.0 - e) * (share / share.sum()) + e / self.num_domains

    def _extra_state(self) -> dict[str, Any]:
        return {"tokens": self._tokens.tolist(), "sums": dict(zip(_SUMS, self._sums.tolist(), strict=True))}

    def _load_extra_state(self, state: Mapping[str, Any]) -> None:
        tokens, sums = np.array(state["tokens"], np.float64), np.array([state["sums"][name] for name in _SUMS])
        for what, new, old in (("tokens", tokens, self._tokens), ("sums", sums, self._sums)):
            if new.shape != old.shape or not np.isfinite(new).all():
                raise ValueError(f"{what} {new.tolist()}")
        self._tokens, self._sums = tokens, sums

    def _carry_extra_state(self, state: Mapping[str, Any], parents: Sequence[int | None]) -> dict[str, Any]:
        """A new domain has no observations, and so the mean slope of the others until it was seen often
        enough."""

        def carry(values: Sequence[float]) -> list[float]:
            return [0.0 if parent is None else values[parent] for parent in parents]

        return {
            "tokens": carry(state["tokens"]),
            "sums": {name: carry(values) for name, values in state["sums"].items()},
        }

    def _extra_record(self) -> dict[str, Any]:
        """``loss_slope`` and its standard error ``loss_slope_error`` (nats per e-fold of a domain's own tokens), null
        where not known; ``learning_slope`` (r), null while no slope above 0 is known; ``estimated_rewards`` (d);
        ``stalled``: the names of the domains whose loss does not fall by more than two standard errors;
        ``suspected``: of those that may not learn, by too few observations to know."""
        fit, slopes = self._lines(_MIN_OBSERVATIONS), self._slopes()
        error = np.sqrt(fit.squared_error)
        suspected = ~fit.known & (self._not_suspected() < 1.0)
        stalled = fit.known & (np.where(fit.known, fit.slope, 1.0) <= 2.0 * np.where(fit.known, error, 0.0))
        return {
            "loss_slope": _or_null(fit.slope),
            "loss_slope_error": _or_null(error),
            "learning_slope": None if slopes is None else slopes.tolist(),
            "estimated_rewards": self._shares()[0].tolist(),
            "stalled": [name for name, stalls in zip(self.domains, stalled, strict=True) if stalls],
            "suspected": [name for name, may_not in zip(self.domains, suspected, strict=True) if may_not],
            "exploration_rate": self.config.exploration / self.num_domains,
            "warmup_steps": self.config.warmup_steps,
        }


@dataclass(frozen=True)
class _Lines:
    """Lines through the observations of every domain, float64 [K]; NaN where there are too few.

    Attributes:
        known: bool [K], whether there are enough.
        slope: g, nats per e-fold.
        squared_error: of the slope.
        mean_x, mean_y: centre of the observations: ln tokens, nats per token.
        token_variance: of a single token's loss about the line, as a mean of m tokens shows it.
    """

    known: BoolArray
    slope: FloatArray
    squared_error: FloatArray
    mean_x: FloatArray
    mean_y: FloatArray
    token_variance: FloatArray


def _learning(slope: FloatArray, of_all: FloatArray) -> FloatArray:
    """s: whether domains with these slopes learn, where the slopes ``of_all`` (0 or more) make the typical one."""
    typical = float(of_all @ of_all / of_all.sum())
    return np.clip((slope / typical - _NOT_LEARNING) / (_LEARNING - _NOT_LEARNING), 0.0, 1.0)


def _or_null(values: FloatArray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
