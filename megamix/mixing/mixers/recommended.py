"""The recommended online mixer: the given mixture, harder domains more often, those that no longer learn left out.

Loss as a reward (ODM) goes to whatever is hard, and random noise is the hardest of all. Here a domain must earn its
samples by a falling loss. Let L_i(n) be domain i's loss after n of its tokens; its slope g_i = -dL_i / d ln n is what
it loses, in nats, while its tokens grow by a factor of e. On a scaling curve L = E + A n^-b that is b (L - E): near 0
for noise, for what is learnt, and for what is beyond the model, without a fit of the floor E, which short runs do not
determine.

Notation: K domains; p the initial weights, the user's mixture; interval s brought m_s tokens of domain i with mean loss
y_s, at the end of which it had given n_s tokens in all; n the tokens it has given now; a = memory; d = difficulty; e =
exploration. For each domain there is the line of least squares through

    (x_s, y_s),  x_s = ln(n_s - m_s / 2),  with weight w_s = m_s (n_s / n)^a

Its negative slope is g_i, its value at ln n the present loss l_i; g_i has the usual standard error se_i, from the
residuals and the effective number of observations (sum w)^2 / sum w^2. Old observations fade with the domain's own
tokens, so that what is known of a rare domain is not forgotten. Slopes that are uncertain are drawn to the mean of all
(empirical Bayes), and the weights follow:

    tau^2 = max(0, variance of g over domains - mean of se_i^2)
    r_i   = max(0, mean(g) + (g_i - mean(g)) tau^2 / (tau^2 + se_i^2))   with too few observations: mean(g)
    c     = sum r^2 / sum r                        the typical slope, to which domains that do not learn add nothing
    s_i   = clip(4 r_i / c - 1, 0, 1)              whether i learns: 0 up to a quarter of c, 1 from half of c on
    M     = sum s l / sum s
    h_i   = exp(min(d (l_i - M), ln 2))            how hard i is, up to a ceiling; 1 with too few observations
    pi_i  = (1 - e) p_i s_i h_i / sum p s h + e / K

With p uniform, d = 1, s = 1 and no ceiling these are nearly ODM's `official` weights, in proportion to perplexity. What
it cannot see: losses that fall because data is repeated (bound it by data.max_epochs), and a domain that is being
forgotten, whose rising loss earns it the exploration only. All is kept as seven sums per domain, whatever the length of
the run.

Measured on text (tests/mixing/test_noise.py: a model of 0.5 M parameters, a vocabulary of 300, six domains of an
earlier mini-pile, 800 steps of 2048 tokens), mean validation loss over three seeds, from the natural mixture: 2.592
(2.553, 2.644, 2.578); `official` 2.654 (2.676, 2.680, 2.608), natural weights 2.597 (2.607, 2.589, 2.596). From uniform
weights, one seed: 2.667, where uniform weights stay at 2.638. With random bytes as a seventh domain (2 % of the data),
one seed: 2.643, and 4 % of the tokens trained on were random bytes; `official` 2.86 and 41 %. Without p and with d = 1
it was 2.706 (two seeds): it took from a domain that needs its natural share whatever its training loss says. In
proportion to r alone it was better with noise and worse without: a part of every slope is what all domains learn
together. On simulated curves (tests/benchmarks/simulate_mixers.py) it always improves on the mixture that it starts
from; where that is a bad one, rules that forget it do better. On six domains of the present mini-pile, one seed, it was
between `official` and natural weights without noise (2.488; 2.413 and 2.542), and better than `official` with it (2.527
and 2.684). Not measured: larger models, longer runs, data repeated many times.

Shapes: every array is float64 [K].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from megamix.mixing.mixers.base import Mixer, ScheduleConfig
from megamix.mixing.mixers.stats import DomainStats
from megamix.mixing.mixers.weights import DomainWeights, FloatArray

_LARGEST_LOSS = 1e6
"""Nats per token; the squares of losses up to here can be summed without a thought to overflow."""

_MIN_OBSERVATIONS = 5.0
"""Effective observations from which on a slope and its error mean something."""

_SMALLEST_SLOPE = 1e-6
"""Nats per e-fold; slopes that are all below this are rounding errors of losses that do not change."""

_NOT_LEARNING, _LEARNING = 0.25, 0.5
"""Of the typical slope: up to the one a domain does not learn, from the other on it fully does."""

_CEILING = 2.0
"""Times as often as a domain of mean difficulty a harder one is sampled at most."""

_SUMS = ("w", "ww", "wx", "wy", "wxx", "wxy", "wyy")
"""The sums over a domain's observations, of products of weight, position and loss."""


class RecommendedConfig(ScheduleConfig):
    """Starts from the mixture; samples harder domains more often, but only those whose loss still falls: runs after
    neither noise nor what is learnt. Weights stay the initial ones for the first few updates, until slopes can be
    estimated."""

    name: Literal["recommended"] = "recommended"
    """Which mixer this configures."""

    memory: float = Field(default=1.0, ge=0, le=10, allow_inf_nan=False)
    """How fast old losses fade: those from when a domain had given half of its tokens so far count 2^-memory as much;
    0: all count alike."""

    difficulty: float = Field(default=0.5, ge=0, le=10, allow_inf_nan=False)
    """Exponent of the perplexity by which the initial weights of domains that learn are multiplied. 0: they keep their
    ratios; 1: in proportion to perplexity, as in ODM."""

    exploration: float = Field(default=0.1, ge=0, le=1, allow_inf_nan=False)
    """Share of the samples that is spread evenly over all domains, whatever they learn."""


class RecommendedMixer(Mixer):
    """Rewards loss where it falls; see the module's docstring for the formulas. Until slopes are known, the
    initial weights are in force."""

    name = "recommended"
    config: RecommendedConfig

    def __init__(self, config: RecommendedConfig, domains: Sequence[str], initial_weights: DomainWeights) -> None:
        super().__init__(config, domains, initial_weights)
        self._prior = self.weights
        self._tokens = np.zeros(self.num_domains)
        self._sums = np.zeros((len(_SUMS), self.num_domains))

    def _observe(self, stats: DomainStats, step: int) -> None:
        seen = stats.seen
        m, y = stats.tokens[seen].astype(np.float64), np.clip(stats.loss[seen], -_LARGEST_LOSS, _LARGEST_LOSS)
        before = self._tokens[seen]
        after = before + m
        x = np.log(before + m / 2)
        fade = (before / after) ** self.config.memory
        self._sums[:, seen] *= np.stack([fade * fade if name == "ww" else fade for name in _SUMS])
        self._sums[:, seen] += np.stack([m, m * m, m * x, m * y, m * x * x, m * x * y, m * y * y])
        self._tokens[seen] = after

    def _lines(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(g, squared standard error, l), NaN for a domain with too few observations."""
        w, ww, wx, wy, wxx, wxy, wyy = self._sums
        with np.errstate(divide="ignore", invalid="ignore"):
            number = w * w / ww
            mean_x, mean_y = wx / w, wy / w
            variance_x, variance_y = wxx / w - mean_x**2, wyy / w - mean_y**2
            covariance = wxy / w - mean_x * mean_y
            known = (number >= _MIN_OBSERVATIONS) & (variance_x > 0)
            slope = covariance / variance_x
            residual = np.maximum(variance_y - slope * covariance, 0.0)
            error = residual / ((number - 2.0) * variance_x)
            now = mean_y + slope * (np.log(self._tokens) - mean_x)
        return np.where(known, -slope, np.nan), np.where(known, error, np.nan), np.where(known, now, np.nan)

    def _rewards(self) -> tuple[FloatArray, FloatArray] | None:
        """(r, s h), of which at least one is above 0 each; None while no slope is known or none is above 0."""
        slope, error, loss = self._lines()
        known = np.isfinite(slope)
        if not known.any():
            return None
        mean = float(slope[known].mean())
        spread = float(slope[known].var(ddof=1)) - float(error[known].mean()) if known.sum() > 1 else 0.0
        drawn = np.full(self.num_domains, mean)
        if spread > 0:
            drawn[known] += (slope[known] - mean) * (spread / (spread + error[known]))
        drawn = np.maximum(drawn, 0.0)
        if drawn.max() < _SMALLEST_SLOPE:
            return None
        typical = float(drawn @ drawn / drawn.sum())
        learning = np.clip((drawn / typical - _NOT_LEARNING) / (_LEARNING - _NOT_LEARNING), 0.0, 1.0)
        # The largest slope is one of those known and not below the typical one, so there is something to divide by.
        mean_loss = float(learning[known] @ loss[known] / learning[known].sum())
        exponent = np.where(known, self.config.difficulty * (np.where(known, loss, 0.0) - mean_loss), 0.0)
        return drawn, learning * np.exp(np.minimum(exponent, np.log(_CEILING)))

    def _new_weights(self, step: int) -> FloatArray | None:
        rewards = self._rewards()
        if rewards is None:
            return None
        e, share = self.config.exploration, self._prior * rewards[1]
        if not share.any():  # what still learns has no weight in the mixture
            return None
        return (1.0 - e) * (share / share.sum()) + e / self.num_domains

    def _extra_state(self) -> dict[str, Any]:
        prior, tokens = self._prior.tolist(), self._tokens.tolist()
        return {"prior": prior, "tokens": tokens, "sums": dict(zip(_SUMS, self._sums.tolist(), strict=True))}

    def _load_extra_state(self, state: Mapping[str, Any]) -> None:
        tokens, sums = np.array(state["tokens"], np.float64), np.array([state["sums"][name] for name in _SUMS])
        prior = np.array(state["prior"], np.float64)
        for what, new, old in (
            ("prior", prior, self._prior),
            ("tokens", tokens, self._tokens),
            ("sums", sums, self._sums),
        ):
            if new.shape != old.shape or not np.isfinite(new).all():
                raise ValueError(f"{what} {new.tolist()}")
        self._prior, self._tokens, self._sums = prior, tokens, sums

    def _carry_extra_state(self, state: Mapping[str, Any], parents: Sequence[int | None]) -> dict[str, Any]:
        """A new domain has no observations, and so the mean slope of the others until it was seen often enough; its
        place in the mixture is their mean, and parts share that of the whole."""

        def carry(values: Sequence[float]) -> list[float]:
            return [0.0 if parent is None else values[parent] for parent in parents]

        old = state["prior"]
        mean = sum(old) / len(old)
        return {
            "prior": [mean if parent is None else old[parent] / parents.count(parent) for parent in parents],
            "tokens": carry(state["tokens"]),
            "sums": {name: carry(values) for name, values in state["sums"].items()},
        }

    def _extra_record(self) -> dict[str, Any]:
        """``loss_slope`` and its standard error ``loss_slope_error`` (nats per e-fold of a domain's own tokens) and
        ``fitted_loss`` (nats per token), null where not known; ``learning_slope`` (r) and ``estimated_rewards`` (s h),
        null while no slope above 0 is known; ``stalled``: the names of the domains whose loss does not fall by more
        than two standard errors."""
        slope, squared_error, loss = self._lines()
        error, rewards = np.sqrt(squared_error), self._rewards()
        known = np.isfinite(slope)
        stalled = known & (np.where(known, slope, 1.0) <= 2.0 * np.where(known, error, 0.0))
        return {
            "loss_slope": _or_null(slope),
            "loss_slope_error": _or_null(error),
            "fitted_loss": _or_null(loss),
            "learning_slope": None if rewards is None else rewards[0].tolist(),
            "estimated_rewards": None if rewards is None else rewards[1].tolist(),
            "stalled": [name for name, stalls in zip(self.domains, stalled, strict=True) if stalls],
            "exploration_rate": self.config.exploration / self.num_domains,
            "warmup_steps": self.config.warmup_steps,
        }


def _or_null(values: FloatArray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
