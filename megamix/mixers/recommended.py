"""The recommended online mixer: each domain is sampled in proportion to what it is still learning.

Loss as a reward (ODM) goes to whatever is hard, and random noise is the hardest of all. This mixer's reward is how fast
a domain's loss falls. Let L_i(n) be domain i's loss after n of its tokens. To bring down the sum of all losses with a
given number of tokens, every domain should gain the same from its next token, and -dL_i/dn = g_i / n with
g_i = -dL_i / d ln n. So the tokens should go to the domains in proportion to g_i, the loss in nats that a domain loses
while its tokens grow by a factor of e. For a scaling curve L = E + A n^-b, g is b (L - E): it knows of the floor E
without a fit of E, which short runs do not determine. Noise, a domain that is learnt, and one that is beyond the model
have g = 0. That a domain also learns from the others is not in this model; their gain is counted as its own.

Notation: K domains; interval s brought m_s tokens of domain i with mean loss y_s, at the end of which it had given n_s
tokens in all; n the tokens it has given now; a = memory. An update is, for each domain seen, the line through

    (x_s, y_s),  x_s = ln(n_s - m_s / 2),  with weight w_s = m_s (n_s / n)^a        least squares; g_i = -slope

with the usual standard error se_i from the residuals and the effective number of observations (sum w)^2 / sum w^2.
Old observations fade with the domain's own tokens, so that a domain sampled rarely does not forget what is known of it.
Slopes that are uncertain are drawn to the mean of all (empirical Bayes):

    tau^2 = max(0, variance of g over domains - mean of se_i^2)
    r_i   = mean(g) + (g_i - mean(g)) tau^2 / (tau^2 + se_i^2)        a domain with too few observations has the mean
    pi_i  = (1 - e) max(r_i, 0) / sum max(r, 0) + e / K               e = exploration

All is kept as seven sums per domain, whatever the length of the run.

Shapes: every array is float64 [K].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from megamix.mixers.base import Mixer, ScheduleConfig
from megamix.mixers.stats import DomainStats
from megamix.mixers.weights import FloatArray

_LARGEST_LOSS = 1e6
"""Nats per token; the squares of losses up to here can be summed without a thought to overflow."""

_MIN_OBSERVATIONS = 5.0
"""Effective observations from which on a slope and its error mean something."""

_SMALLEST_SLOPE = 1e-6
"""Nats per e-fold; rewards that are all below this are rounding errors of losses that do not change."""

_SUMS = ("w", "ww", "wx", "wy", "wxx", "wxy", "wyy")
"""The sums over a domain's observations, of products of weight, position and loss."""


class RecommendedConfig(ScheduleConfig):
    """Samples each domain in proportion to how fast its loss still falls; runs after neither noise nor what is learnt.

    Weights stay the initial ones for the first few updates, until slopes can be estimated.
    """

    name: Literal["recommended"] = "recommended"
    """Which mixer this configures."""

    memory: float = Field(default=1.0, ge=0, le=10, allow_inf_nan=False)
    """How fast old losses fade: those from when a domain had given half of its tokens so far count 2^-memory as much;
    0: all count alike."""

    exploration: float = Field(default=0.1, ge=0, le=1, allow_inf_nan=False)
    """Share of the samples that is spread evenly over all domains, whatever they learn."""


class RecommendedMixer(Mixer):
    """Rewards the slope of the loss; see the module's docstring for the formulas.

    Args:
        config: The parameters.
        domains: The K domain names.
        initial_weights: K relative weights, in that order or by name; in force until slopes are known.
    """

    name = "recommended"
    config: RecommendedConfig

    def __init__(
        self,
        config: RecommendedConfig,
        domains: Sequence[str],
        initial_weights: Mapping[str, float] | Sequence[float] | FloatArray,
    ) -> None:
        super().__init__(config, domains, initial_weights)
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

    def _slopes(self) -> tuple[FloatArray, FloatArray]:
        """(g, squared standard error), NaN for a domain with too few observations."""
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
        return np.where(known, -slope, np.nan), np.where(known, error, np.nan)

    def _rewards(self) -> FloatArray | None:
        """r; None while no slope is known."""
        slope, error = self._slopes()
        known = np.isfinite(slope)
        if not known.any():
            return None
        mean = float(slope[known].mean())
        spread = float(slope[known].var(ddof=1)) - float(error[known].mean()) if known.sum() > 1 else 0.0
        rewards = np.full(self.num_domains, mean)
        if spread > 0:
            rewards[known] += (slope[known] - mean) * (spread / (spread + error[known]))
        return rewards

    def _new_weights(self, step: int) -> FloatArray | None:
        rewards = self._rewards()
        if rewards is None or rewards.max() < _SMALLEST_SLOPE:
            return None
        gain = np.maximum(rewards, 0.0)
        e = self.config.exploration
        return (1.0 - e) * (gain / gain.sum()) + e / self.num_domains

    def _extra_state(self) -> dict[str, Any]:
        return {"tokens": self._tokens.tolist(), "sums": dict(zip(_SUMS, self._sums.tolist(), strict=True))}

    def _load_extra_state(self, state: Mapping[str, Any]) -> None:
        tokens, sums = np.array(state["tokens"], np.float64), np.array([state["sums"][name] for name in _SUMS])
        for what, array, shape in (("tokens", tokens, self._tokens.shape), ("sums", sums, self._sums.shape)):
            if array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"{what} {array.tolist()}")
        self._tokens, self._sums = tokens, sums

    def _carry_extra_state(self, state: Mapping[str, Any], parents: Sequence[int | None]) -> dict[str, Any]:
        """A new domain has no observations, and so the mean reward of the others until it was seen often enough."""

        def carry(values: Sequence[float]) -> list[float]:
            return [0.0 if parent is None else values[parent] for parent in parents]

        return {
            "tokens": carry(state["tokens"]),
            "sums": {name: carry(values) for name, values in state["sums"].items()},
        }

    def _extra_record(self) -> dict[str, Any]:
        """``loss_slope`` and its standard error ``loss_slope_error`` (nats per e-fold of a domain's own tokens, null
        where not known), ``estimated_rewards`` (r; null while no slope is known), and ``stalled``: the names of the
        domains whose loss does not fall by more than two standard errors."""
        slope, squared_error = self._slopes()
        error, rewards = np.sqrt(squared_error), self._rewards()
        known = np.isfinite(slope)
        stalled = known & (np.where(known, slope, 1.0) <= 2.0 * np.where(known, error, 0.0))
        return {
            "loss_slope": _or_null(slope),
            "loss_slope_error": _or_null(error),
            "estimated_rewards": None if rewards is None else rewards.tolist(),
            "stalled": [name for name, stalls in zip(self.domains, stalled, strict=True) if stalls],
            "exploration_rate": self.config.exploration / self.num_domains,
            "warmup_steps": self.config.warmup_steps,
        }


def _or_null(values: FloatArray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
