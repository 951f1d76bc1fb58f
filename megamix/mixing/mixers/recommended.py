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
    d_i   = v_i r_i / c,  c = sum v r              the shares at which the objective is least

Slopes do not see a domain that has been learnt and is being forgotten: it has none while it is sampled, and its loss
rises once it is not. So what a domain's loss has risen counts as well. From the first slope on,

    u_i   = mean of its last losses, of which each weighs 0.9 times the next; sd_i its standard error
    low_i = min over steps so far of u_i + 2 sd_i
    f_i   = max(0, min(u_i - 2 sd_i, first_i) - low_i)           what has been lost of what was learnt, in nats
    x_i   = max(r_i, f_i) / c
    s_i   = clip(max((x_i - 0.1) / 0.7, 4 x_i - 1), 0, 1)        whether i learns, or forgets

and the weights are, with R = reach and e = exploration,

    w_i   = s_i clip(d_i, v_i / R, v_i R)
    pi_i  = max(lambda w_i, min(v_i, e / K))          with the lambda that makes the sum 1; e / K where v_i is 0

so that what is left is still seen, and with R = 1 the weights are exactly the objective's while all domains learn.

r_i / c is the factor between the best share and the objective's: a domain with less than a tenth of c is left, one that
learns slowly keeps about its best share, and from half of c on a domain keeps the objective's. A rise is compared with
c as well: to hold a domain at its share costs the others about c v_i nats of the objective, and saves f_i v_i. It
counts up to first_i, the loss in the domain's first step: noise that is left rises, too (random tokens from 6.9 to 9
nats), but above what it began with, as it was never learnt. Noise that comes late begins high and is then held in part.

Before slopes are known all are equal, and the weights are the objective's. But a domain with 8 to 30 effective
observations can be suspected: its s_i is that of g_i + 3 se_i, and at least a quarter, with c the mean of all slopes
found so far (those below 0 as 0), weighed by v. So noise loses most of its weight after some 12 steps, while the
learning rate is high; waiting for the 30th observation cost 0.04 nats in the end (DECISIONS.md). With R above 1 the
weights of domains that learn are bent towards those that gain more.

What it rests on: the slope along a run taken for what a domain's own tokens give. Measured on the mini-pile (12
domains, 0.5 M parameters, 400 steps of 4,096 tokens), the slope along a run of equal weights and the loss that a domain
gains per e-fold when its weight alone is doubled have a correlation of 0.95, so no part of the slope is taken off as
common.

What it cannot see: what a domain's tokens do for the others, which differs more between domains than what they do for
itself; losses that fall because data is repeated (bound it by data.max_epochs); that the loss of a rare domain unlike
all others may rise until the model has learnt what is frequent, which is why a suspected one keeps a quarter; that a
domain would learn later, which has not begun to (its exploration shows it then); that the line of a domain that comes
late is flat at first, as the logarithm of its few tokens grows fast: it is suspected for a while. DECISIONS.md has what
was tried and measured.

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
from megamix.mixing.mixers.stats import DomainStats, IntArray
from megamix.mixing.mixers.weights import DomainWeights, FloatArray, project_to_capped_simplex

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

_ROUNDING = 1e-12
"""Weights with a sum within this of 1 are taken as they are."""

_AGEING = 0.9
"""Weight of a loss in the mean of the last ones, relative to the next."""

_CHANCE = 2.0
"""Standard errors by which a mean of losses may be off without being said to have risen."""

_CLIP = 3.0
"""Standard deviations from its line beyond which an observation counts no more."""

_SUMS = ("w", "ww", "wx", "wy", "wxx", "wxy", "wyy")
"""The sums over a domain's observations, of products of weight, position and loss."""

_RECENT = ("w", "ww", "wy")
"""The sums over a domain's last losses, likewise."""


class RecommendedConfig(ScheduleConfig):
    """Minimises the run's objective: samples a domain by its weight there while its tokens still lower its loss, and
    leaves noise and what is learnt, until it is being forgotten; with `reach` above 1 more where the tokens gain more.
    Until slopes are known the weights are the objective's."""

    name: Literal["recommended"] = "recommended"
    """Which mixer this configures."""

    memory: float = Field(default=1.0, ge=0, le=10, allow_inf_nan=False)
    """How fast old losses fade: those from when a domain had given half of its tokens so far count 2^-memory as much;
    0: all count alike."""

    reach: float = Field(default=1.0, ge=1, le=1000, allow_inf_nan=False)
    """The largest factor between a weight and the objective's, either way, for a domain that still learns. 1: such a
    domain keeps its weight, and only what no longer learns is left."""

    exploration: float = Field(default=0.05, ge=0, le=1, allow_inf_nan=False)
    """No domain falls below this share of the samples divided by the number of domains, whatever it learns, unless its
    weight in the objective is above 0 and lower, which it then keeps."""

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
        self._recent = np.zeros((len(_RECENT), self.num_domains))
        self._lowest = np.zeros(self.num_domains)
        """low; 0 where there are no last losses."""
        self._first = np.zeros(self.num_domains)
        """Loss of each domain's first step; 0 before."""

    def _observe(self, stats: DomainStats, step: int) -> None:
        seen = stats.seen
        m, y = stats.tokens[seen].astype(np.float64), np.clip(stats.loss[seen], -_LARGEST_LOSS, _LARGEST_LOSS)
        before = self._tokens[seen]
        after = before + m
        x = np.log(before + m / 2)
        fit = self._lines(_MIN_OBSERVATIONS)
        y = _within_reason(fit, seen, x, y, m)
        fade = (before / after) ** self.config.memory
        self._sums[:, seen] *= np.stack([fade * fade if name == "ww" else fade for name in _SUMS])
        self._sums[:, seen] += np.stack([m, m * m, m * x, m * y, m * x * x, m * x * y, m * y * y])
        self._tokens[seen] = after
        self._first[seen] = np.where(before == 0, y, self._first[seen])
        known = fit.known[seen]
        self._follow_level(fit, np.flatnonzero(seen)[known], m[known], y[known])

    def _follow_level(self, fit: _Lines, index: IntArray, m: FloatArray, y: FloatArray) -> None:
        """Takes losses of the domains ``index``, which have a line, into their means of the last ones."""
        is_first = self._recent[0, index] == 0
        self._recent[:, index] *= np.array([_AGEING, _AGEING**2, _AGEING])[:, None]
        # A mean of m tokens has the m-th part of a token's variance, so ww sums m times the age weight squared.
        self._recent[:, index] += np.stack([m, m, m * y])
        mean, error = (values[index] for values in self._level(fit))
        upper = mean + _CHANCE * error
        self._lowest[index] = np.where(is_first, upper, np.minimum(self._lowest[index], upper))

    def _level(self, fit: _Lines) -> tuple[FloatArray, FloatArray]:
        """(u, sd), NaN where a domain has no line."""
        w, ww, wy = self._recent
        with np.errstate(divide="ignore", invalid="ignore"):
            return wy / w, np.sqrt(fit.token_variance * ww) / w

    def _rises(self, fit: _Lines) -> FloatArray:
        """f, 0 where not known."""
        mean, error = self._level(fit)
        lost = np.minimum(mean - _CHANCE * error, self._first) - self._lowest
        return np.nan_to_num(np.maximum(lost, 0.0), nan=0.0)

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

    def _slopes(self, fit: _Lines) -> FloatArray | None:
        """r, the slopes drawn to their mean; None while none is known or none is above 0."""
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
        slope, v = np.where(fit.known, fit.slope, 0.0), np.where(fit.known, self.objective, 0.0)
        typical = float(v @ np.maximum(slope, 0.0)) / (float(v.sum()) or 1.0)
        if typical < _SMALLEST_SLOPE:
            return np.ones(self.num_domains)
        upper = slope + _DOUBT * np.sqrt(fit.squared_error)
        return np.where(fit.known, np.maximum(_learning(upper / typical), _SUSPECTED), 1.0)

    def _shares(self) -> tuple[FloatArray, FloatArray]:
        """(d, w): what the tokens of every domain gain, sum 1, and the shares that follow."""
        fit = self._lines(_MIN_OBSERVATIONS)
        v, reach, slopes, learning = self.objective, self.config.reach, self._slopes(fit), self._not_suspected()
        if slopes is None:
            return v, learning * v
        gain = v * slopes
        typical = float(gain.sum())
        if not typical > 0:
            return v, np.zeros(self.num_domains)
        learning = np.where(fit.known, _learning(np.maximum(slopes, self._rises(fit)) / typical), learning)
        return gain / typical, learning * np.clip(gain / typical, v / reach, v * reach)

    def _new_weights(self, step: int) -> FloatArray | None:
        share, least = self._shares()[1], self.config.exploration / self.num_domains
        if not share.any():  # nothing of the objective is learnt any more
            return None
        floor = np.where(self.objective > 0, np.minimum(self.objective, least), least)
        total = float(share.sum())
        # The objective's weights stay as they are: divided by a sum of 1 + 1e-16 they would give samples another order.
        return project_to_capped_simplex(share if abs(total - 1.0) <= _ROUNDING else share / total, floor, 1.0)

    def _extra_state(self) -> dict[str, Any]:
        return {
            "tokens": self._tokens.tolist(),
            "sums": dict(zip(_SUMS, self._sums.tolist(), strict=True)),
            "recent": dict(zip(_RECENT, self._recent.tolist(), strict=True)),
            "lowest": self._lowest.tolist(),
            "first": self._first.tolist(),
        }

    def _load_extra_state(self, state: Mapping[str, Any]) -> None:
        k = self.num_domains
        found = {
            "tokens": np.array(state["tokens"], np.float64),
            "sums": np.array([state["sums"][name] for name in _SUMS], np.float64),
            # Missing in states of before there were rises.
            "recent": np.array([state["recent"][name] for name in _RECENT] if "recent" in state else np.zeros((3, k))),
            "lowest": np.array(state.get("lowest", [0.0] * k), np.float64),
            "first": np.array(state.get("first", [0.0] * k), np.float64),
        }
        for what, new in found.items():
            old = getattr(self, f"_{what}")
            if new.shape != old.shape or not np.isfinite(new).all():
                raise ValueError(f"{what} {new.tolist()}")
        self._tokens, self._sums, self._recent, self._lowest, self._first = found.values()

    def _carry_extra_state(self, state: Mapping[str, Any], parents: Sequence[int | None]) -> dict[str, Any]:
        """A new domain has no observations, and so the mean slope of the others until it was seen often enough. Parts
        of a domain have its line, and no level of the loss: theirs may differ."""

        def carry(values: Sequence[float], *, parts: bool = True) -> list[float]:
            kept = [None if not parts and parents.count(parent) > 1 else parent for parent in parents]
            return [0.0 if parent is None else values[parent] for parent in kept]

        recent = state.get("recent", dict.fromkeys(_RECENT, [0.0] * len(state["domains"])))
        return {
            "tokens": carry(state["tokens"]),
            "sums": {name: carry(values) for name, values in state["sums"].items()},
            "recent": {name: carry(values, parts=False) for name, values in recent.items()},
            "lowest": carry(state.get("lowest", recent["w"]), parts=False),
            "first": carry(state.get("first", recent["w"])),
        }

    def _extra_record(self) -> dict[str, Any]:
        """``loss_slope`` and its standard error ``loss_slope_error`` (nats per e-fold of a domain's own tokens), null
        where not known; ``learning_slope`` (r), null while no slope above 0 is known; ``loss_rise`` (f, nats per
        token); ``estimated_rewards`` (d);
        ``stalled``: the names of the domains whose loss does not fall by more than two standard errors;
        ``suspected``: of those that may not learn, by too few observations to know."""
        fit = self._lines(_MIN_OBSERVATIONS)
        slopes = self._slopes(fit)
        error = np.sqrt(fit.squared_error)
        suspected = ~fit.known & (self._not_suspected() < 1.0)
        stalled = fit.known & (np.where(fit.known, fit.slope, 1.0) <= 2.0 * np.where(fit.known, error, 0.0))
        return {
            "loss_slope": _or_null(fit.slope),
            "loss_slope_error": _or_null(error),
            "learning_slope": None if slopes is None else slopes.tolist(),
            "loss_rise": self._rises(fit).tolist(),
            "estimated_rewards": self._shares()[0].tolist(),
            "stalled": [name for name, stalls in zip(self.domains, stalled, strict=True) if stalls],
            "suspected": [name for name, may_not in zip(self.domains, suspected, strict=True) if may_not],
            "exploration_rate": self.config.exploration / self.num_domains,
            "warmup_steps": self.config.warmup_steps,
        }


def observations_to_suspect(config: RecommendedConfig) -> int:
    """Losses of a domain, each of as many tokens, before which no weight leaves the objective's."""
    number, total, squares = 0, 0.0, 0.0
    while number == 0 or total * total < _MIN_SUSPICIOUS * squares:
        number += 1
        weight = float(number) ** config.memory
        total, squares = total + weight, squares + weight * weight
    return number


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


def _learning(worth: FloatArray) -> FloatArray:
    """s of x."""
    return np.clip(np.maximum((worth - 0.1) / 0.7, 4.0 * worth - 1.0), 0.0, 1.0)


def _within_reason(fit: _Lines, seen: BoolArray, x: FloatArray, y: FloatArray, m: FloatArray) -> FloatArray:
    """Losses ``y`` of the domains seen, moved to within `_CLIP` standard deviations of the lines so far."""
    with np.errstate(invalid="ignore"):
        expected = fit.mean_y[seen] - fit.slope[seen] * (x - fit.mean_x[seen])
        reach = _CLIP * np.sqrt(fit.token_variance[seen] / m)
        clipped = expected + np.clip(y - expected, -reach, reach)
    return np.where(np.isfinite(clipped), clipped, y)


def _or_null(values: FloatArray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
