"""Online data mixing (ODM): a bandit whose arms are the domains and whose reward is their training loss.

Source: Albalak et al., "Efficient Online Data Mixing for Language Model Pre-Training", arXiv 2312.02406, algorithm 1.
The paper, its repository (alon-albalak/online-data-mixing) and DataFlex (OpenDCAI/DataFlex) compute different things
under this name; each is a preset here, a set of defaults for the parameters of one mixer.

Notation: K domains; pi the sampling weights; L_i domain i's mean loss in nats per token over the tokens since the last
update, or of the update's step alone (``reward_over``); t the 1-based optimizer step of the update, counted from the
run's start or from the end of the warm-up (``exploration_from``); e_t = min(1/K, sqrt(ln K / (K t))) the exploration
rate, e_{t-1} that of the update before (1/K before the first); a = alpha; R the estimated rewards, at first 0, from the
first step or from the end of the warm-up on (``estimate_in_warmup``). An update is

    r_i = scale * L_i  or  scale * exp(L_i), divided by pi_i with importance weighting        for the domains seen
    R_i <- R_i + r_i  (cumulative)  or  a R_i + (1 - a) r_i  (moving average)                 the others keep theirs
    q = softmax(e_{t-1} R)  (gibbs)  or  R / sum R  (linear)
    pi_i = (1 - K e_t) q_i + e_t, then normalised

Rewards of the form exp(L) are kept as log R, so that no loss overflows; the numbers are those of the formula wherever
that is finite.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from megamix.core.errors import InputError, did_you_mean
from megamix.mixing.mixers.base import EvaluatedConfig, Mixer, ScheduleConfig
from megamix.mixing.mixers.stats import LARGEST, DomainStats
from megamix.mixing.mixers.weights import DomainWeights, FloatArray

_MOVING_AVERAGE = {"alpha": 0.9, "estimate": "moving_average"}
_PLAIN = {"reward_scale": 1.0, "reward_clip": None, "exponent_clip": None, "min_exploration_rate": 0.0}
# The repository calls its updater after the warm-up only, with the losses of that step alone, and counts all steps.
_REPOSITORY = {"reward_over": "step", "estimate_in_warmup": False, "exploration_from": "start"}

PRESETS: dict[str, dict[str, Any]] = {
    # The repository's SmoothedMeanWeightUpdater.group_update: sampling in proportion to smoothed perplexity.
    "official": {
        **_PLAIN,
        **_REPOSITORY,
        **_MOVING_AVERAGE,
        "reward": "exp_loss",
        "importance_weighting": False,
        "policy": "linear",
    },
    # The paper's algorithm 1, which updates after every step and knows no warm-up.
    "paper": {
        **_PLAIN,
        **_MOVING_AVERAGE,
        "reward": "loss",
        "importance_weighting": True,
        "policy": "gibbs",
        "reward_over": "interval",
        "estimate_in_warmup": True,
        "exploration_from": "start",
    },
    # The repository's Exp3WeightUpdater, and the rule in DataFlex's documentation.
    "exp3": {
        **_PLAIN,
        **_REPOSITORY,
        "alpha": 0.9,
        "estimate": "cumulative",
        "reward": "loss",
        "reward_scale": 0.1,
        "importance_weighting": True,
        "policy": "gibbs",
    },
    # The rule of DataFlex's ODMMixer, for every domain's own loss. Its trainer hands it the last micro-batch's loss as
    # that of the domain of the batch's first sample.
    "dataflex": {
        **_MOVING_AVERAGE,
        "reward": "loss",
        "reward_scale": 15.0,
        "importance_weighting": True,
        "reward_clip": 1e4,
        "policy": "gibbs",
        "exponent_clip": 5.0,
        "min_exploration_rate": 0.03,
        "reward_over": "step",
        "estimate_in_warmup": False,
        "exploration_from": "warmup",
    },
}
"""The parameters each preset stands for; keys given in a config win over these."""

BEFORE_THESE_KEYS = {"reward_over": "interval", "estimate_in_warmup": True, "exploration_from": "start"}
"""What every preset did before there were these keys, and so the meaning of a recorded config without them."""


class OdmConfig(ScheduleConfig, EvaluatedConfig):
    """Online data mixing. ``preset`` sets the defaults of all other parameters; those given beside it win."""

    name: Literal["odm"] = "odm"
    """Which mixer this configures."""

    preset: Literal["official", "paper", "exp3", "dataflex"] = "official"
    """official: the paper's repository; paper: its algorithm 1; exp3: the repository's Exp3, which DataFlex documents;
    dataflex: the rule in DataFlex's code."""

    alpha: float = Field(default=0.9, ge=0, lt=1, allow_inf_nan=False)
    """Share of the old value in the moving average, in [0, 1); of no effect on cumulative estimates."""

    reward: Literal["loss", "exp_loss"] = "exp_loss"
    """loss: mean loss in nats per token; exp_loss: its exponential, the perplexity."""

    reward_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Factor on the reward (on the perplexity where reward is exp_loss)."""

    importance_weighting: bool = False
    """Whether rewards are divided by the sampling weight with which the tokens were drawn."""

    estimate: Literal["moving_average", "cumulative"] = "moving_average"
    """Whether the estimated reward forgets (with alpha) or sums up."""

    reward_clip: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Bound on the absolute estimated reward; null: none."""

    policy: Literal["gibbs", "linear"] = "linear"
    """gibbs: weights from the softmax of exploration rate x estimated reward; linear: in proportion to the estimated
    reward."""

    exponent_clip: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """gibbs only: how far below the largest exponent the others may lie; null: no limit."""

    min_exploration_rate: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    """Lower bound of the exploration rate, and so of every weight (up to normalisation)."""

    reward_over: Literal["interval", "step"] = "step"
    """Losses that an update sees with update_every above 1. interval: of all steps since the last update; step: of the
    update's step alone (the repository, DataFlex)."""

    estimate_in_warmup: bool = False
    """Whether rewards are estimated during the warm-up, too; the repository and DataFlex begin after it."""

    exploration_from: Literal["start", "warmup"] = "start"
    """Where the exploration rate counts steps from: the run's start, or the end of the warm-up (DataFlex)."""

    reward_from: Literal["training", "evaluation"] = "training"
    """training: the losses of the tokens trained on, at no cost; evaluation (DataFlex): before each update after the
    warm-up the losses of num_eval_samples training samples of every domain, the same each time."""

    num_eval_samples: int = Field(default=500, gt=0)
    """reward_from: evaluation only: samples per domain (fewer if it has fewer), kept in memory. An update costs a
    forward pass over all of them, about a third of training on as many: set update_every accordingly."""

    why_evaluated: ClassVar[str] = "reward_from is evaluation"
    without_evaluations: ClassVar[str] = "Set it to training, whose losses cost nothing."

    @property
    def is_evaluated(self) -> bool:
        return self.reward_from == "evaluation"

    def evaluates_at(self, step: int, weight_lag: int, num_domains: int) -> bool:
        """Whether ``step`` ends with an update after the warm-up."""
        if self.reward_from == "training" or step <= self.warmup_steps or step % self.update_every:
            return False
        # Every evaluation sees every domain, so each of these updates changes the weights.
        number = step // self.update_every - self.warmup_steps // self.update_every
        return self.update_times < 0 or number <= self.update_times

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        preset = data.get("preset", "official")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset: unknown '{preset}'." + did_you_mean(str(preset), PRESETS))
        # Of the keys that a record spells out, none but these can be missing.
        is_old_record = {*cls.model_fields} - data.keys() == {*BEFORE_THESE_KEYS}
        return {**PRESETS[preset], **(BEFORE_THESE_KEYS if is_old_record else {}), **data}


class OdmMixer(Mixer):
    """ODM in all its variants; see the module's docstring for the formulas and `OdmConfig` for the parameters.

    A domain that was sampled although its weight was 0 is importance-weighted by its share of the tokens that the
    update sees: 1 / pi does not exist there, and the share is what pi estimates.
    """

    name = "odm"
    follows_objective = False
    config: OdmConfig

    def __init__(self, config: OdmConfig, domains: Sequence[str], initial_weights: DomainWeights) -> None:
        super().__init__(config, domains, initial_weights)
        self._log_space = config.reward == "exp_loss"
        # The estimated rewards R, or log R where the reward is an exponential; R = 0 at first.
        self._estimates = np.full(self.num_domains, -math.inf if self._log_space else 0.0)
        self._rate = self._previous_rate = 1.0 / self.num_domains
        if self.num_domains > 1 and config.min_exploration_rate >= 1.0 / self.num_domains:
            warnings.warn(
                f"odm: min_exploration_rate {config.min_exploration_rate} x {self.num_domains} domains is 1 or more, "
                f"so the weights will be uniform. Set it below {1 / self.num_domains:.3g}.",
                stacklevel=2,
            )

    def exploration_rate(self, step: int) -> float:
        """e_t = min(1/K, sqrt(ln K / (K t))), arXiv 2312.02406, algorithm 1; not below ``min_exploration_rate``.

        A minimum above 1/K counts as 1/K, where the weights are uniform: 1 - K e_t must not become negative.
        """
        k = self.num_domains
        count = step if self.config.exploration_from == "start" else step - self.config.warmup_steps
        decayed = math.sqrt(math.log(k) / (k * count)) if count > 0 else math.inf
        return min(1.0 / k, max(decayed, self.config.min_exploration_rate))

    def _sums_interval(self) -> bool:
        """See `Mixer._sums_interval`: `is_warmup` is still of the step before."""
        ignored = self.is_warmup and not self.config.estimate_in_warmup
        return self.config.reward_over == "interval" and not ignored

    def _observe(self, stats: DomainStats, step: int) -> None:
        if self.is_warmup and not self.config.estimate_in_warmup:
            return
        self._previous_rate, self._rate = self._rate, self.exploration_rate(step)
        seen = stats.seen
        loss, old = stats.loss[seen], self._estimates[seen]
        pi = self._drawn_with(stats)[seen]
        with np.errstate(over="ignore", divide="ignore"):
            if self._log_space:
                self._estimates[seen] = self._observe_log(loss, pi, old)
            else:
                self._estimates[seen] = self._observe_plain(loss, pi, old)

    def _drawn_with(self, stats: DomainStats) -> FloatArray:
        """float64 [K], what rewards are divided by: 1 without importance weighting."""
        if not self.config.importance_weighting or stats.weights is None:
            return np.ones(self.num_domains)
        return np.where(stats.weights > 0, stats.weights, stats.tokens / max(int(stats.tokens.sum()), 1))

    def _observe_plain(self, loss: FloatArray, pi: FloatArray, old: FloatArray) -> FloatArray:
        """New R of the domains seen; what overflows float64 stays at its largest number."""
        reward = self.config.reward_scale * loss / pi
        if self.config.estimate == "cumulative":
            new = old + reward
        else:
            new = self.config.alpha * old + (1.0 - self.config.alpha) * reward
        bound = LARGEST if self.config.reward_clip is None else self.config.reward_clip
        return np.clip(new, -bound, bound)

    def _observe_log(self, loss: FloatArray, pi: FloatArray, old: FloatArray) -> FloatArray:
        """New log R of the domains seen: the same rule with sums as logaddexp and products as sums."""
        reward = loss + (math.log(self.config.reward_scale) - np.log(pi))
        if self.config.estimate == "cumulative":
            new = np.logaddexp(old, reward)
        else:
            new = np.logaddexp(np.log(self.config.alpha) + old, math.log1p(-self.config.alpha) + reward)
        bound = LARGEST if self.config.reward_clip is None else math.log(self.config.reward_clip)
        return np.minimum(new, bound)

    def _new_weights(self, step: int) -> FloatArray | None:
        q = self._linear() if self.config.policy == "linear" else self._gibbs()
        if q is None:
            return None
        return (1.0 - self.num_domains * self._rate) * q + self._rate

    def _linear(self) -> FloatArray | None:
        """R / sum R; None while nothing was seen. Divided by the largest first, so that the sum cannot overflow."""
        largest = self._estimates.max()
        if self._log_space:
            if largest == -math.inf:
                return None
            with np.errstate(over="ignore"):
                share = np.exp(self._estimates - largest)
        else:
            if largest <= 0:
                return None
            # A negative estimate (no loss in nats is, but a reward of one's own may be) earns nothing.
            share = np.maximum(self._estimates, 0.0) / largest
        return share / share.sum()

    def _gibbs(self) -> FloatArray:
        """softmax(e_{t-1} R); the largest exponent is subtracted first, ``exponent_clip`` bounds the differences."""
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            rewards = np.exp(self._estimates) if self._log_space else self._estimates
            if np.isfinite(rewards).all():
                exponent = self._previous_rate * rewards
                exponent = exponent - exponent.max()
            else:
                # R_i - R_max = -R_max (1 - R_i / R_max), from the logarithms alone; equal estimates give exactly 0.
                ratio = np.exp(self._estimates - self._estimates.max())
                log_gap = self._estimates.max() + np.log1p(-ratio)
                exponent = -self._previous_rate * np.exp(log_gap)
        if self.config.exponent_clip is not None:
            exponent = np.maximum(exponent, -self.config.exponent_clip)
        q = np.exp(exponent)
        return q / q.sum()

    def _extra_state(self) -> dict[str, Any]:
        return {
            "reward": self.config.reward,
            "estimate": self.config.estimate,
            # log R of a domain never seen is -infinity, which JSON has not.
            "estimates": _without_infinity(self._estimates),
            "rate": self._rate,
            "previous_rate": self._previous_rate,
        }

    def _load_extra_state(self, state: Mapping[str, Any]) -> None:
        for key in ("reward", "estimate"):
            saved, wanted = state[key], getattr(self.config, key)
            if saved != wanted:
                raise InputError(
                    f"mixer 'odm': the state was made with {key} '{saved}', the config says '{wanted}', and the "
                    f"estimates of one mean nothing to the other. Set {key} back, or start without the state."
                )
        estimates = np.array([-math.inf if value is None else float(value) for value in state["estimates"]])
        if estimates.shape != (self.num_domains,) or not (self._log_space or np.isfinite(estimates).all()):
            raise ValueError(f"estimates {state['estimates']}")
        self._rate, self._previous_rate = float(state["rate"]), float(state["previous_rate"])
        self._estimates = estimates

    def _carry_extra_state(self, state: Mapping[str, Any], parents: Sequence[int | None]) -> dict[str, Any]:
        """A new domain starts from the mean reward of those that have one, so that it is neither starved nor flooded
        before it was seen."""
        old = state["estimates"]
        seen = np.array([value for value in old if value is not None], np.float64)
        mean: float | None = None
        if seen.size:
            largest = float(seen.max())
            logs = state["reward"] == "exp_loss"
            mean = largest + math.log(np.exp(seen - largest).mean()) if logs else float((seen / seen.size).sum())
        return {"estimates": [mean if parent is None else old[parent] for parent in parents]}

    def _extra_record(self) -> dict[str, Any]:
        """Keys named as in DataFlex's logs.

        ``estimated_rewards`` (``cumulative_estimated_rewards`` where they sum up) always holds finite numbers. For
        exponential rewards the logarithms stand beside them under ``log_...``, null for a domain never seen; where exp
        of one exceeds float64 the plain key shows the largest float64 and ``rewards_overflowed`` is true.
        """
        key = "estimated_rewards" if self.config.estimate == "moving_average" else "cumulative_estimated_rewards"
        result: dict[str, Any] = {}
        if self._log_space:
            with np.errstate(over="ignore"):
                rewards = np.exp(self._estimates)
            result[key] = np.minimum(rewards, LARGEST).tolist()
            result[f"log_{key}"] = self._extra_state()["estimates"]
            result["rewards_overflowed"] = bool(np.isinf(rewards).any())
        else:
            result[key] = self._estimates.tolist()
        return {
            **result,
            "exploration_rate": self._rate,
            "alpha": self.config.alpha,
            "warmup_steps": self.config.warmup_steps,
        }


def _without_infinity(logs: FloatArray) -> list[float | None]:
    """A list with None for -infinity."""
    unseen = logs == -math.inf
    if not unseen.any():
        return logs.tolist()
    values = logs.astype(object)
    values[unseen] = None
    return values.tolist()
