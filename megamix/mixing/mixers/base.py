"""Base of all mixers: update steps, checks, state and record.

A mixer is a deterministic function from the statistics of a run so far to sampling weights. It knows nothing of
devices, processes or data: one process calls `Mixer.update` after every optimizer step and tells the others the result.

Shapes: K is the number of domains; every array is [K], in the order of the domain names given to the mixer.
"""

from __future__ import annotations

import contextlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from megamix.core.config import Config
from megamix.core.errors import InputError, given_twice
from megamix.mixing.mixers.stats import DomainStats, IntArray
from megamix.mixing.mixers.weights import DomainWeights, FloatArray, normalise_weights


class ScheduleConfig(Config):
    """Base of the configs of mixers that change weights: when they do, and how their loss weights enter the loss."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps during which the weights stay the initial ones while statistics are already collected; the first change can
    come after step warmup_steps + 1."""

    update_every: int = Field(default=1, ge=1)
    """Steps between updates, on steps that are multiples of it; the statistics of the steps in between are summed."""

    update_times: int = Field(default=-1, ge=-1)
    """How many times the weights change before they stay as they are; -1: for ever."""

    def loss_factors(
        self, loss_weights_K: FloatArray, tokens_K: IntArray, sampling_K: FloatArray, /
    ) -> tuple[FloatArray, float]:
        """Factors of the losses in a step under a mixer with loss weights. What is differentiated is the sum over its
        tokens of factor[domain] * loss, divided by a normaliser; by default the weighted mean over tokens, so that
        equal weights change nothing.

        Every rank calls it, so the result must depend on the config and the arguments alone.

        Args:
            loss_weights_K: the mixer's `loss_weights`.
            tokens_K: int64, each domain's labels in the global batch.
            sampling_K: the weights these were drawn with.

        Returns:
            The factors and the normaliser, above 0.
        """
        # Where only domains of weight 0 came, the sum is 0 and so is the loss, with any normaliser.
        return loss_weights_K, float(loss_weights_K @ tokens_K) or 1.0


class EvaluatedConfig(Config):
    """Base of the configs of mixers that may see the losses of evaluations in place of those of training.

    `Mixer.update` then gets the sums of the evaluation after its step, or empty ones.
    """

    num_eval_samples: int = Field(default=500, gt=0)
    """Samples per domain in an evaluation (fewer where a domain has not that many), kept in memory."""

    why_evaluated: ClassVar[str] = "the mixer needs evaluations"
    """Begins the message where there are none."""
    without_evaluations: ClassVar[str] = "Use another mixer."
    """Ends it: what to do."""

    @property
    def is_evaluated(self) -> bool:
        """Whether the mixer sees evaluations."""
        return True

    def evaluates_at(self, step: int, weight_lag: int, num_domains: int) -> bool:
        """Whether the mixer wants an evaluation after ``step``, counted from 1; a function of the config and the
        arguments alone, so that every rank knows without asking.

        Args:
            weight_lag: steps between the one that weights follow from and the first with them, not counting either.
        """
        raise NotImplementedError


def evaluated(config: Config) -> EvaluatedConfig | None:
    """The config of a mixer that sees evaluations; None for one that sees the losses of training."""
    return config if isinstance(config, EvaluatedConfig) and config.is_evaluated else None


class Mixer(ABC):
    """Maps the statistics of a run to sampling weights.

    A custom mixer overrides `_new_weights`, and `_observe`, `_extra_state`, `_load_extra_state` and
    `_extra_record` where it keeps estimates, and `loss_weights` where it weighs losses. The base sums statistics
    between updates, decides which steps update, checks and normalises the weights, and saves its part of the state.

    Args:
        config: The mixer's config; where it derives from `ScheduleConfig` it says which steps update, otherwise every
            step does.
        domains: The K domain names, all different.
        initial_weights: K relative weights in that order (or by name); normalised here.

    Raises:
        InputError: Domains that are missing or given twice; weights that cannot be used.
    """

    name: str = ""
    """The mixer's name in messages and states; default: the name that the config chose it by."""

    follows_objective: ClassVar[bool] = True
    """Whether the weights depend on `objective`, so that a resume with another one is a change of the mixer."""

    def __init__(self, config: Config, domains: Sequence[str], initial_weights: DomainWeights) -> None:
        self.name = vars(type(self)).get("name") or getattr(config, "name", type(self).__name__)
        names = tuple(str(domain) for domain in domains)
        repeated = given_twice(names)
        if not names or repeated:
            raise InputError(
                f"mixer '{self.name}': the domain names {', '.join(repeated)} are given more than once. Name each once."
                if names
                else f"mixer '{self.name}': no domains. Give at least one."
            )
        self.config = config
        self._schedule = config if isinstance(config, ScheduleConfig) else ScheduleConfig()
        self._domains = names
        self._weights = normalise_weights(initial_weights, names, "initial weights")
        self._objective = self._weights
        self._pending: DomainStats | None = None
        self._step = 0
        self._num_updates = 0
        self._last_update = 0

    # For custom mixers.

    @abstractmethod
    def _new_weights(self, step: int) -> FloatArray | None:
        """New weights, float64 [K], not negative, normalised later; None keeps the present ones. Not in warm-up."""

    def _observe(self, stats: DomainStats, step: int) -> None:  # noqa: B027 - not every mixer keeps estimates
        """Observes the sums of one interval, ``stats.weights`` always set; called in the warm-up too."""

    def _sums_interval(self) -> bool:
        """Whether the sums that `_observe` sees still hold those of the interval's steps so far, as in every step by
        default; False drops them."""
        return True

    def _extra_state(self) -> dict[str, Any]:
        """The mixer's own state as plain numbers, strings, lists and mappings; JSON knows no NaN and no infinity."""
        return {}

    def _load_extra_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - nor a state
        """Restores `_extra_state`; a missing key may raise KeyError."""

    def _carry_extra_state(self, state: Mapping[str, Any], parents: Sequence[int | None]) -> dict[str, Any]:
        """The entries of ``state`` (a `state_dict` over other domains) with one value a domain, for these domains.

        By default every list of K numbers: the parent's number, or for a new domain the mean. See `adopt_state`.
        """
        number = len(state["domains"])
        lists = {
            key: value
            for key, value in state.items()
            if isinstance(value, list) and len(value) == number and all(isinstance(x, int | float) for x in value)
        }
        return {
            key: [sum(value) / number if parent is None else value[parent] for parent in parents]
            for key, value in lists.items()
        }

    def _extra_record(self) -> dict[str, Any]:
        """Further keys of `record`, JSON-serialisable."""
        return {}

    # For trainers.

    @property
    def domains(self) -> tuple[str, ...]:
        """The K domain names."""
        return self._domains

    @property
    def num_domains(self) -> int:
        """K."""
        return len(self._domains)

    @property
    def weights(self) -> FloatArray:
        """float64 [K], the latest sampling weights (a copy); they sum to 1."""
        return self._weights.copy()

    @property
    def objective(self) -> FloatArray:
        """float64 [K], the weights of the domains in the loss that the run is judged by (a copy); they sum to 1. By
        default the initial weights; `make_mixer` sets it after the constructor."""
        return self._objective.copy()

    @property
    def loss_weights(self) -> FloatArray | None:
        """float64 [K], weights of each domain's losses in the next step (see `ScheduleConfig.loss_factors`); None
        in every step where the mixer has none."""
        return None

    @property
    def is_warmup(self) -> bool:
        """Whether the last step given (or, before any, the beginning) lies in the warm-up."""
        return self._step <= self._schedule.warmup_steps and self._schedule.warmup_steps > 0

    @property
    def has_updated(self) -> bool:
        """Whether the weights were ever computed anew; until then they are the initial ones."""
        return self._num_updates > 0

    def changed_at(self, step: int) -> bool:
        """Whether the weights were computed anew in the call for ``step``; true only of the latest such step."""
        return self._num_updates > 0 and self._last_update == step

    def set_objective(self, weights: DomainWeights) -> None:
        """Sets `objective`, K relative weights in the order of the domains or by name; before the first update.

        Raises:
            InputError: Weights that cannot be used.
        """
        self._objective = normalise_weights(weights, self._domains, "objective")

    def set_prior(self, weights: FloatArray) -> None:  # noqa: B027 - most rules have none
        """Sets the weights that the mixture asks for from where the next update takes effect; called where they change.
        A rule whose weights start from the mixture's in every update, as ADO's do, follows them; others need not."""

    def update(self, stats: DomainStats, step: int) -> FloatArray:
        """Updates the mixer with the statistics of one optimizer step; returns the weights to sample with from here on.

        Args:
            stats: The sums over the step's tokens of the whole data-parallel world.
            step: The 1-based optimizer step; it must grow from call to call.

        Returns:
            float64 [K], summing to 1: a copy of `weights`.

        Raises:
            InputError: Another number of domains, a step that does not follow, or computed weights that cannot be used.
        """
        step = self._checked_step(step)
        if stats.num_domains != self.num_domains:
            raise InputError(
                f"mixer '{self.name}': statistics of {stats.num_domains} domains, expected {self.num_domains} "
                f"({', '.join(self._domains)})."
            )
        # Integer division, so that an interval still ends when the caller skips a step.
        every = self._schedule.update_every
        due = step // every > self._step // every
        pending = self._pending if self._sums_interval() else None
        self._step = step
        if 0 <= self._schedule.update_times <= self._num_updates:
            return self.weights
        if stats.weights is None:
            stats = DomainStats(stats.nats, stats.tokens, stats.excess_nats, self._weights, stats.non_finite)
        self._pending = stats if pending is None else pending + stats
        if due:
            interval, self._pending = self._pending, None
            self._observe(interval, step)
            if step > self._schedule.warmup_steps:
                self._apply(self._new_weights(step), step)
        return self.weights

    def _checked_step(self, step: int) -> int:
        try:
            step = operator.index(step)
        except TypeError as error:
            raise InputError(f"mixer '{self.name}': the step is {step!r}, expected an integer.") from error
        if step <= self._step:
            raise InputError(
                f"mixer '{self.name}': step {step} after step {self._step}. Steps count from 1 and "
                "grow; after a resume, load the state that belongs to the checkpoint."
            )
        return step

    def _apply(self, weights: FloatArray | None, step: int) -> None:
        if weights is None:
            return
        # Dividing by a sum of 1 in all but the last bit would change weights that should stay as they are.
        if not np.array_equal(weights, self._weights):
            source = f"mixer '{self.name}', weights of step {step}"
            self._weights = normalise_weights(np.asarray(weights, dtype=np.float64), self._domains, source)
        self._num_updates += 1
        self._last_update = step

    def record(self) -> dict[str, Any]:
        """The mixer's keys in a line of weights.jsonl, JSON-serialisable."""
        return {"is_warmup": self.is_warmup, **self._extra_record()}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue exactly, in plain numbers, strings, lists and mappings."""
        return {
            "mixer": self.name,
            "domains": list(self._domains),
            "weights": self._weights.tolist(),
            "step": self._step,
            "num_updates": self._num_updates,
            "last_update": self._last_update,
            "pending": None if self._pending is None else self._pending.to_state(),
            **self._extra_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state, bit for bit.

        Raises:
            InputError: The state of another mixer or of other domains, or one that is not whole.
        """
        if state.get("mixer") != self.name:
            raise InputError(
                f"the state is of mixer '{state.get('mixer')}', this is mixer '{self.name}'. "
                "Use the same mixer, or start without the state."
            )
        saved = tuple(state.get("domains", ()))
        if saved != self._domains:
            raise InputError(f"mixer '{self.name}': the state is of other domains: {_difference(saved, self._domains)}")
        with self._reading_state():
            weights = np.array(state["weights"], dtype=np.float64)
            pending = None if state["pending"] is None else DomainStats(**state["pending"])
            step, num_updates, last_update = (int(state[key]) for key in ("step", "num_updates", "last_update"))
            if weights.shape != (self.num_domains,):
                raise ValueError(f"weights of shape {weights.shape}")
            self._load_extra_state(state)
        self._weights, self._pending = weights, pending
        self._step, self._num_updates, self._last_update = step, num_updates, last_update

    def adopt_state(self, state: Mapping[str, Any], parents: Sequence[int | None], weights: FloatArray) -> None:
        """Continues from the state of the same mixer over other domains.

        Statistics of an interval that has not ended are dropped: they are of the other domains.

        Args:
            state: A `state_dict`.
            parents: [K], for each domain of this mixer the index of the one it continues, or None for a new one, which
                starts from the mean of the others' estimates.
            weights: float64 [K], the latest weights, as they follow from the old ones.

        Raises:
            InputError: See `load_state_dict`.
        """
        with self._reading_state():
            carried = self._carry_extra_state(state, parents)
        self.load_state_dict(
            {
                **state,
                **carried,
                "domains": list(self._domains),
                "weights": np.asarray(weights, np.float64).tolist(),
                "pending": None,
            }
        )

    @contextlib.contextmanager
    def _reading_state(self) -> Iterator[None]:
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputError(
                f"mixer '{self.name}': the state is not whole ({type(error).__name__}: {error})."
            ) from error


def _difference(saved: Sequence[str], present: Sequence[str]) -> str:
    missing = [name for name in saved if name not in present]
    added = [name for name in present if name not in saved]
    if not missing and not added:
        return f"the same names in another order ({', '.join(saved)}; here {', '.join(present)})."
    parts = [
        f"{what} {', '.join(names)}"
        for what, names in (("only in the state:", missing), ("only here:", added))
        if names
    ]
    return "; ".join(parts) + "."
