"""DoReMi: weights that rise for domains whose loss can still come down to a reference model's.

Source: Xie et al., "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining", arXiv 2305.10429,
algorithm 1, and its repository (sangmichaelxie/doremi).

Notation: K domains; alpha the domain weights, at first the initial weights; lambda_i domain i's mean excess loss,
max(loss - reference loss, 0) in nats per token; c the smoothing. An update is

    lambda_i <- excess nats of i / tokens of i          for the domains seen; the others keep their last score
    alpha'   =  alpha exp(eta lambda), normalised
    alpha    =  (1 - c) alpha' + c / K

and the result of a run is the mean of alpha after each update (the repository counts the initial weights once more). A
domain not seen yet has the score ``initial_score``: at 0 its weight is multiplied by 1, then normalised and smoothed
with the others, so it keeps its ratio to every domain that is as good as the reference.

A step's loss is weighed by the alpha that follows from the step before, in the paper by that from the same step: this
is known only when every rank has done all its forward passes, and no rank waits for it here.

The paper samples domains with fixed weights and lets alpha weigh the loss (``apply: loss``). With ``apply: sampling``
the blend follows alpha and all tokens weigh the same: the same objective in expectation.

Shapes: every array is float64 [K].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from megamix.core.errors import InputError
from megamix.mixing.mixers.base import Mixer, ScheduleConfig
from megamix.mixing.mixers.stats import LARGEST, DomainStats, IntArray
from megamix.mixing.mixers.weights import DomainWeights, FloatArray


class DoremiConfig(ScheduleConfig):
    """DoReMi's proxy run: weights from the excess loss over a reference model."""

    name: Literal["doremi"] = "doremi"
    """Which mixer this configures."""

    eta: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Step size of the weights. The paper's 1 goes with 24,000 tokens of each domain in each of 200,000 steps;
    DataFlex's is 0.1. Smaller batches need less, lest the weights follow their noise (0.02 at 340 tokens)."""

    smoothing: float = Field(default=1e-3, ge=0, le=1, allow_inf_nan=False)
    """c: share of uniform weights in every update; the paper's is 1e-3, DataFlex's 1e-2."""

    apply: Literal["loss", "sampling"] = "loss"
    """What the weights act on. loss: each token's loss, in the step after the one that they follow from, while domains
    are sampled with the initial weights (the paper, there in the same step); sampling: the blend, while all tokens
    weigh the same."""

    normalisation: Literal["paper", "official"] = "paper"
    """Loss to minimise with apply: loss. paper: the sum of alpha times each domain's mean loss; official: the sum over
    tokens of alpha / sampling weight times loss, divided by the sum of those factors (the repository)."""

    initial_score: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Excess loss of a domain until it is first seen; the repository's ln(vocabulary size) floods such a domain."""

    reference: Path | None = None
    """Folder of the reference model's losses (`megamix reference`); null: reference losses of 0, so that the proxy's
    own loss drives the weights."""

    def loss_factors(self, alpha_K: FloatArray, tokens_K: IntArray, sampling_K: FloatArray) -> tuple[FloatArray, float]:
        """What a step with ``apply: loss`` differentiates: the sum over its tokens of loss_weights[domain] * loss,
        divided by a normaliser.

        Args:
            alpha_K: the domain weights.
            tokens_K: int64, each domain's labels in the global batch.
            sampling_K: the weights these were drawn with.

        Returns:
            The loss weights (0 for a domain without labels or, with ``official``, of sampling weight 0) and the
            normaliser, above 0.
        """
        if self.normalisation == "paper":
            return np.divide(alpha_K, tokens_K, out=np.zeros(alpha_K.size), where=tokens_K > 0), 1.0
        factor_K = np.divide(alpha_K, sampling_K, out=np.zeros(alpha_K.size), where=sampling_K > 0)
        factor_K /= factor_K.sum() or 1.0
        # Where only domains of weight 0 came, the sum is 0 and so is the loss, whatever it is divided by.
        return factor_K, float(factor_K @ tokens_K) or 1.0


class DoremiMixer(Mixer):
    """DoReMi's update; see the module's docstring for the formulas and `DoremiConfig` for the parameters.

    Statistics without excess losses stand for a reference loss of 0 where the config names no reference.
    """

    name = "doremi"
    follows_objective = False
    config: DoremiConfig

    def __init__(self, config: DoremiConfig, domains: Sequence[str], initial_weights: DomainWeights) -> None:
        super().__init__(config, domains, initial_weights)
        self._alpha = self.weights
        self._mean = self.weights
        self._num_averaged = 0
        self._scores = np.full(self.num_domains, config.initial_score)

    @property
    def loss_weights(self) -> FloatArray | None:
        """float64 [K], alpha; None with ``apply: sampling``, where `weights` is alpha."""
        return self._alpha.copy() if self.config.apply == "loss" else None

    @property
    def average_weights(self) -> FloatArray:
        """float64 [K], the result: the mean of alpha over all updates so far; before the first, alpha."""
        return self._mean.copy()

    def _observe(self, stats: DomainStats, step: int) -> None:
        excess = stats.excess_loss
        if excess is None:
            if self.config.reference is not None:
                raise InputError(
                    f"mixer 'doremi': the statistics of step {step} have no excess_nats, and the reference is "
                    f"{self.config.reference}. Hand its losses to the loss, or set reference to null."
                )
            excess = stats.loss
        self._scores[stats.seen] = excess[stats.seen]

    def _new_weights(self, step: int) -> FloatArray:
        with np.errstate(divide="ignore", over="ignore"):
            exponent = np.log(self._alpha) + np.clip(self.config.eta * self._scores, -LARGEST, LARGEST)
            raised = np.exp(exponent - exponent.max())
        c = self.config.smoothing
        self._alpha = (1.0 - c) * (raised / raised.sum()) + c / self.num_domains
        self._num_averaged += 1
        self._mean = self._mean + (self._alpha - self._mean) / self._num_averaged
        return self._alpha if self.config.apply == "sampling" else self.weights

    def _extra_state(self) -> dict[str, Any]:
        return {
            "apply": self.config.apply,
            "alpha": self._alpha.tolist(),
            "average_weights": self._mean.tolist(),
            "num_averaged": self._num_averaged,
            "scores": self._scores.tolist(),
        }

    def _load_extra_state(self, state: Mapping[str, Any]) -> None:
        if state["apply"] != self.config.apply:
            raise InputError(
                f"mixer 'doremi': the state was made with apply '{state['apply']}', the config says "
                f"'{self.config.apply}', whose weights act on something else. Set it back, or start without the state."
            )
        rows = [np.array(state[key], np.float64) for key in ("alpha", "average_weights", "scores")]
        for row in rows:
            if row.shape != (self.num_domains,) or not np.isfinite(row).all():
                raise ValueError(f"{row.tolist()} for {self.num_domains} domains")
        self._alpha, self._mean, self._scores = rows
        self._num_averaged = int(state["num_averaged"])

    def adopt_state(self, state: Mapping[str, Any], parents: Sequence[int | None], weights: FloatArray) -> None:
        """See `Mixer.adopt_state`. Alpha and its mean follow by the rules of the sampling weights: a new domain has its
        sampling weight, parts share that of the whole as they share its sampling weight, the others keep their ratios.
        """
        carried = {key: _carry(state[key], parents, weights) for key in ("alpha", "average_weights")}
        old = state["scores"]
        # From the mean, so that a new domain is neither starved nor flooded before it was seen.
        scores = [float(np.mean(old)) if parent is None else old[parent] for parent in parents]
        super().adopt_state({**state, **carried, "scores": scores}, parents, weights)

    def _carry_extra_state(self, state: Mapping[str, Any], parents: Sequence[int | None]) -> dict[str, Any]:
        """Nothing: `adopt_state` has carried it, by the weights."""
        return {}

    def _extra_record(self) -> dict[str, Any]:
        """``perdomain_scores`` as in DataFlex's logs, in nats per token; ``loss_weights`` with ``apply: loss``."""
        alpha = {} if self.loss_weights is None else {"loss_weights": self._alpha.tolist()}
        return {"perdomain_scores": self._scores.tolist(), "average_weights": self._mean.tolist(), **alpha}


def _carry(values: Sequence[float], parents: Sequence[int | None], weights: FloatArray) -> list[float]:
    """Weights of the domains before, for the domains after; see `DoremiMixer.adopt_state`.

    Args:
        values: [K], of the domains before.
        parents: [K'], see `Mixer.adopt_state`.
        weights: [K'], the sampling weights after.
    """
    new = np.array([parent is None for parent in parents])
    kept = np.zeros(len(parents))
    for parent in {parent for parent in parents if parent is not None}:
        parts = np.array([other == parent for other in parents])
        total = weights[parts].sum()
        kept[parts] = values[parent] * (weights[parts] / total if total > 0 else 1.0 / parts.sum())
    room = 1.0 - weights[new].sum()
    result = kept * (room / kept.sum() if kept.sum() > 0 else 0.0)
    result[new] = weights[new]
    return (result / result.sum()).tolist()
