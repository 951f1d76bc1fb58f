"""Evaluation: per-domain loss of fixed samples, through the engine's pipeline; for validation and for mixers that
reward it.

Legend: K domains, B samples in a micro-batch, S tokens in a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megamix.data.loader import IGNORED_LABEL, Batch, WindowReader
from megamix.data.tokens.stream import DomainTokens
from megamix.engines.base import Engine
from megamix.mixing.mixers import OdmConfig, wants_evaluation
from megamix.training.objective import weighted_loss
from megamix.training.plan import Plan
from megamix_kernels import DomainSums


class EvaluationSamples:
    """Samples of every domain, the same at every call, sliced over data-parallel ranks.

    Each domain gives up to ``wanted`` samples, spread evenly over its tokens (all of them where it has fewer). The
    samples of all domains form one list; its last micro-batches are filled with rows that are not counted.

    Args:
        streams: each domain's tokens, training or validation.
        wanted: samples per domain.
    """

    def __init__(self, plan: Plan, engine: Engine, streams: Sequence[DomainTokens], wanted: int) -> None:
        place, config = engine.place, plan.config
        domain_n, sample_n = _choose(streams, config.data.seq_length, wanted)
        per_round = config.train.micro_batch * place.data_size
        rounds, multiple = -(-domain_n.size // per_round), engine.micro_batch_multiple
        self.num_micro_batches = -(-rounds // multiple) * multiple
        self._batch = None
        if place.reads_data:
            rows = np.arange(place.data_rank, self.num_micro_batches * place.data_size, place.data_size)
            self._batch = self._build(plan.reader(streams), domain_n, sample_n, rows, config.train.micro_batch)

    def _build(
        self,
        reader: WindowReader,
        domain_n: NDArray[np.int64],
        sample_n: NDArray[np.int64],
        micro_batches: NDArray[np.int64],
        micro_batch: int,
    ) -> Batch:
        index = (micro_batches[:, None] * micro_batch + np.arange(micro_batch)).ravel()
        filler = index >= domain_n.size
        index[filler] = 0
        batch = reader.batch(domain_n, sample_n, index, (self.num_micro_batches, micro_batch))
        batch.labels.flatten(0, 1)[torch.from_numpy(filler)] = IGNORED_LABEL
        return batch

    def sums(self, engine: Engine) -> torch.Tensor:
        """This rank's int64 [K, C] sums over its samples; every rank of the job must call it."""
        return engine.evaluate(self._batch, self.num_micro_batches).clone()


class Validation:
    """The validation loss of a run: ``evaluate.samples`` of every domain's held-out samples."""

    def __init__(self, plan: Plan, engine: Engine) -> None:
        self._samples = EvaluationSamples(plan, engine, plan.validation, plan.config.evaluate.samples)
        self._names = plan.domain_names
        self._natural = plan.natural_weights
        self._objective = plan.objective_weights

    def run(self, engine: Engine) -> dict[str, Any]:
        """The ``evaluate`` line of metrics.jsonl without step and tokens; every rank calls it and gets the same."""
        buffer = self._samples.sums(engine)
        dist.all_reduce(buffer)
        sums = DomainSums.from_buffer(buffer.cpu())
        loss = sums.nats.numpy() / np.maximum(sums.tokens.numpy(), 1)
        finite = [
            value if math.isfinite(value) and count else None
            for value, count in zip(loss.tolist(), sums.tokens.tolist(), strict=True)
        ]
        domain_loss = dict(zip(self._names, finite, strict=True))
        known = {name: value for name, value in domain_loss.items() if value is not None}
        worst = max(known, key=lambda name: known[name]) if known else None
        objective = dict(zip(self._names, self._objective.tolist(), strict=True))
        return {
            "objective_loss": weighted_loss(objective, domain_loss),
            "domain_loss": domain_loss,
            "macro_loss": sum(known.values()) / len(known) if known else None,
            "micro_loss": weighted_loss(dict(zip(self._names, self._natural.tolist(), strict=True)), domain_loss),
            "worst_domain": worst,
            "worst_loss": None if worst is None else known[worst],
            "objective": objective,
        }


class RewardEvaluation:
    """Evaluation for a mixer with ``reward_from: evaluation``.

    Its samples are training data: a mixer that follows the held-out losses would bias them as a measure of a mixture.
    """

    def __init__(self, plan: Plan, engine: Engine, config: OdmConfig) -> None:
        self._config = config
        self._engine = engine
        self._samples = EvaluationSamples(plan, engine, plan.domains, config.num_eval_samples)

    @classmethod
    def of(cls, plan: Plan, engine: Engine) -> RewardEvaluation | None:
        """None for a mixer that rewards training losses."""
        config = plan.config.mixer
        return cls(plan, engine, config) if isinstance(config, OdmConfig) and wants_evaluation(config) else None

    def due_after(self, step: int) -> bool:
        """Whether the mixer wants an evaluation after ``step``, which counts from 0."""
        return self._config.evaluates_at(step + 1)

    def sums(self) -> torch.Tensor:
        """This rank's int64 [K, C] sums; every rank of the job must call it."""
        return self._samples.sums(self._engine)


def _choose(
    streams: Sequence[DomainTokens], seq_length: int, wanted: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(domain, sample) of every row: at most ``wanted`` of each domain, evenly spaced."""
    domains, samples = [], []
    for index, stream in enumerate(streams):
        available = stream.num_windows(seq_length)
        number = min(wanted, available)
        domains.append(np.full(number, index, np.int64))
        samples.append(np.arange(number, dtype=np.int64) * available // number)
    return np.concatenate(domains), np.concatenate(samples)
