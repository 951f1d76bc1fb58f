"""Aioli: measures in short probes what each domain does for the losses of all, and samples what does most.

Source: Chen et al., "Aioli: A Unified Optimization Framework for Language Model Data Mixing", arXiv 2411.05735, and its
repository (HazyResearch/aioli); the defaults are those of its runs with three domains of SlimPajama.

Notation: K domains; f = one_hot_factor; a probe of domain j is lp_steps steps with weight f on it and (1 - f) / (K - 1)
on each other; L the mean losses of all domains in an evaluation; o the objective (the source: 1/K each); m the weights
between probes. A round is update_steps steps:

    probe every domain in random order, lp_rounds times; evaluate before the first probe and after each
    G[:, j] = sum over probes of j of (L before - L after), divided by lp_rounds
    A       = the solution of W A[i, :] = G[i, :] for each i; row j of W is the mixture of j's probe
              diagonal: A[i, i] = G[i, i] / W[i, i], 0 elsewhere
    normalise: A = A - min(A) where that is negative, then A = A / sum(A)
    m      ~ m exp(eta K o A), at first from equal weights; with ema, and B = A at first, later (1 - ema) A + ema B:
    m      ~ exp(eta K o B)
    sample with m to the end of the round

Traps. A probe's weights act data.weight_lag steps after they are asked for. The evaluation after a probe follows the
last step that was sampled with it, and the steps between the end of the probes and the new m are sampled with the old
m: that many steps of a round are neither probe nor new m. W holds the weights the probes were really sampled with,
which constraints may have moved from those above; without constraints it is the source's. With f = 1/K all probes are
alike and W is singular, which is refused; with f = 1 the source keeps all of A, diagonal or not. The source's learning
rate rises over a tenth of the run, so that its first probes have at most 14 % of the peak. G is a difference of two
losses of few samples: with short probes and late in a run it is mostly noise. Probes cost lp_rounds lp_steps K steps a
round, which no mixture chose, and lp_rounds K + 1 evaluations.

Evaluations are of fixed samples of the training data, not of held-out data as in the source: a mixer that follows the
held-out losses would spoil them as a measure of the mixture.

Shapes: every array is float64, [K] or [K, K].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from megamix.core.errors import InputError
from megamix.mixing.mixers.base import EvaluatedConfig, Mixer
from megamix.mixing.mixers.stats import DomainStats
from megamix.mixing.mixers.weights import DomainWeights, FloatArray


class AioliConfig(EvaluatedConfig):
    """Aioli: probes every domain in turn, evaluates all after each, and samples those whose probes lower the losses
    most. Costs the steps of the probes and an evaluation after each."""

    name: Literal["aioli"] = "aioli"
    """Which mixer this configures."""

    update_steps: int = Field(default=250, gt=0)
    """Steps of a round: its probes, and the steps with the weights that follow from them."""

    first_round: int = Field(default=1, gt=0)
    """Step after which the first round begins; until then the initial weights."""

    lp_rounds: int = Field(default=4, gt=0)
    """Probes of each domain in a round."""

    lp_steps: int = Field(default=6, gt=0)
    """Steps of a probe."""

    one_hot_factor: float = Field(default=0.5, gt=0, le=1)
    """Weight of the probed domain; the others share the rest evenly. Not 1/K, with which probes do not differ."""

    eta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Factor on what a domain does for the losses, in the exponent of its weight."""

    ema: float | None = Field(default=0.5, ge=0, lt=1)
    """Share of the old value in the moving average of what was measured; null: no average, but weights that are
    multiplied from round to round."""

    normalise: bool = True
    """Whether what was measured in a round is shifted to be not negative and scaled to sum 1."""

    diagonal: bool = False
    """Whether only the effect of a domain on its own loss counts."""

    seed: int = Field(default=0, ge=0)
    """Of the random order of probes."""

    num_eval_samples: int = Field(default=64, gt=0)
    """Samples per domain in an evaluation (fewer where a domain has not that many), kept in memory."""

    why_evaluated: ClassVar[str] = "aioli needs an evaluation after each of its probes"

    @property
    def is_evaluated(self) -> bool:
        return True

    def evaluates_at(self, step: int, weight_lag: int, num_domains: int) -> bool:
        asked = step - weight_lag - self.first_round
        if asked < 0 or num_domains == 1:
            return False
        probe, rest = divmod(asked % self.update_steps, self.lp_steps)
        return rest == 0 and probe <= self.lp_rounds * num_domains


class AioliMixer(Mixer):
    """Probes domains; see the module's docstring for the formulas. `update` gets the sums of evaluations."""

    name = "aioli"
    config: AioliConfig

    def __init__(self, config: AioliConfig, domains: Sequence[str], initial_weights: DomainWeights) -> None:
        super().__init__(config, domains, initial_weights)
        k = self.num_domains
        probes = config.lp_rounds * k * config.lp_steps
        if k > 1 and probes >= config.update_steps:
            raise InputError(
                f"mixer 'aioli': {config.lp_rounds} x {k} probes of {config.lp_steps} steps are {probes} steps, which leaves "
                f"none of a round of {config.update_steps}. Raise update_steps or lower lp_rounds or lp_steps."
            )
        if k > 1 and abs(config.one_hot_factor * k - 1.0) < 1e-6:
            raise InputError(
                f"mixer 'aioli': one_hot_factor is {config.one_hot_factor:g}, which of {k} domains is an equal weight for all, "
                f"so that every probe is the same mixture. Use more than {1 / k:.3g} (the source: 0.625 of two domains)."
            )
        self._main = self.weights
        """m."""
        self._effect: FloatArray | None = None
        """K o B; without ema the sum of K o A over rounds."""
        self._asked: list[list[int]] = []
        """Round and place in it of every evaluation that is still to come."""
        self._left_out = -1
        """A round whose evaluations do not count."""
        self._begin_measuring()

    def _begin_measuring(self) -> None:
        k = self.num_domains
        self._before: FloatArray | None = None
        self._falls, self._mixtures = np.zeros((k, k)), np.zeros((k, k))

    @property
    def _num_probes(self) -> int:
        return self.config.lp_rounds * self.num_domains

    def _place(self, step: int) -> tuple[int, int] | None:
        """The round, and which of its probes (or, the number of probes, their end) is asked for after ``step``."""
        since = step - self.config.first_round
        if since < 0 or self.num_domains == 1:
            return None
        round_, within = divmod(since, self.config.update_steps)
        probe, rest = divmod(within, self.config.lp_steps)
        return (round_, probe) if rest == 0 and probe <= self._num_probes else None

    def _domain(self, round_: int, probe: int) -> int:
        """The domain of a probe."""
        sweep, place = divmod(probe, self.num_domains)
        order = np.random.default_rng([self.config.seed, round_, sweep]).permutation(self.num_domains)
        return int(order[place])

    def _observe(self, stats: DomainStats, step: int) -> None:
        asked = self._place(step)
        if asked is not None and asked[0] != self._left_out:
            self._asked.append(list(asked))
        self._is_measured = False
        if not (stats.tokens.any() and self._asked):
            return
        round_, place = self._asked.pop(0)
        if place == 0:
            self._begin_measuring()
        before, self._before = self._before, np.where(stats.seen, stats.loss, 0.0)
        if place > 0 and before is not None:
            # The evaluation follows the last step of the probe, so these are the weights that the probe was drawn with.
            assert stats.weights is not None
            domain = self._domain(round_, place - 1)
            self._falls[:, domain] += (before - self._before) / self.config.lp_rounds
            self._mixtures[domain] += stats.weights / self.config.lp_rounds
            self._is_measured = place == self._num_probes

    def _new_weights(self, step: int) -> FloatArray | None:
        if self._is_measured:
            self._update_main()
        asked = self._place(step)
        if asked is None:
            return self._main if self._is_measured else None
        if asked[1] == self._num_probes:
            return self._main
        k, factor = self.num_domains, self.config.one_hot_factor
        weights = np.full(k, (1.0 - factor) / (k - 1))
        weights[self._domain(*asked)] = factor
        return weights

    def _update_main(self) -> None:
        """m from what the probes of a round have measured."""
        if self.config.diagonal:
            own, share = np.diag(self._falls), np.diag(self._mixtures)
            matrix = np.diag(np.divide(own, share, out=np.zeros_like(own), where=share > 0))
        else:
            # Least squares, as constraints may make the mixtures of two probes alike.
            matrix = np.linalg.lstsq(self._mixtures, self._falls.T, rcond=1e-9)[0].T
        if self.config.normalise:
            matrix = matrix - min(float(matrix.min()), 0.0)
            matrix = matrix / (float(matrix.sum()) or 1.0)
        effect, ema = self.num_domains * (self.objective @ matrix), self.config.ema
        if self._effect is None:
            self._effect = effect
        elif ema is None:
            self._effect = self._effect + effect
        else:
            self._effect = (1.0 - ema) * effect + ema * self._effect
        exponent = self.config.eta * self._effect
        share = np.exp(exponent - exponent.max())
        self._main = share / share.sum()

    def _extra_state(self) -> dict[str, Any]:
        return {
            "main": self._main.tolist(),
            "effect": None if self._effect is None else self._effect.tolist(),
            "asked": [list(entry) for entry in self._asked],
            "left_out": self._left_out,
            "before": None if self._before is None else self._before.tolist(),
            "falls": self._falls.tolist(),
            "mixtures": self._mixtures.tolist(),
        }

    def _load_extra_state(self, state: Mapping[str, Any]) -> None:
        k = self.num_domains

        def array(key: str, *shape: int) -> FloatArray | None:
            found = None if state[key] is None else np.array(state[key], np.float64)
            if found is not None and found.shape != shape:
                raise ValueError(f"{key} of shape {found.shape}")
            return found

        main, effect, before = array("main", k), array("effect", k), array("before", k)
        falls, mixtures = array("falls", k, k), array("mixtures", k, k)
        if main is None or falls is None or mixtures is None:
            raise ValueError("main, falls or mixtures is null")
        self._main, self._effect, self._before = main, effect, before
        self._falls, self._mixtures = falls, mixtures
        self._asked = [[int(round_), int(place)] for round_, place in state["asked"]]
        self._left_out = int(state["left_out"])

    def _carry_extra_state(self, state: Mapping[str, Any], parents: Sequence[int | None]) -> dict[str, Any]:
        """What the present round has measured is of the other domains and is dropped; the weights between probes are
        kept, and a new domain has the mean."""
        k, old = len(parents), super()._carry_extra_state(state, parents)
        main = np.array(old["main"]) / [1 if parent is None else parents.count(parent) for parent in parents]
        nothing = np.zeros((k, k)).tolist()
        return {
            "main": (main / main.sum()).tolist(),
            "effect": old.get("effect"),
            "asked": [],
            "left_out": (state["step"] - self.config.first_round) // self.config.update_steps,
            "before": None,
            "falls": nothing,
            "mixtures": nothing,
        }

    def _extra_record(self) -> dict[str, Any]:
        """``between_probes`` (m) and ``estimated_effects`` (K o B, or its sum over rounds; null in the first round)."""
        effect = None if self._effect is None else self._effect.tolist()
        return {"between_probes": self._main.tolist(), "estimated_effects": effect}
