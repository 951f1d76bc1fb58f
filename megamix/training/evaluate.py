"""Evaluation: per-domain loss of fixed samples, through the engine's pipeline; for validation and for mixers that
reward it.

Legend: K domains, B samples in a micro-batch, S tokens in a sample.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megamix.data.documents import label_documents
from megamix.data.loader import IGNORED_LABEL, Batch
from megamix.data.tokens.stream import DomainTokens
from megamix.engines.base import Engine
from megamix.mixing.mixers import EvaluatedConfig, evaluated
from megamix.training.domain_losses import DocumentSums
from megamix.training.plan import Plan


class EvaluationSamples:
    """Samples of every domain, the same at every call, sliced over data-parallel ranks.

    Each domain gives up to ``wanted`` samples, spread evenly over its tokens (all of them where it has fewer). The
    samples of all domains form one list; its last micro-batches are filled with rows that are not counted.

    Args:
        streams: each domain's tokens, training or validation.
        wanted: samples per domain.

    Attributes:
        domain, sample: int64 [n], the samples of all ranks.
        rows: int64 [M * B], places of this rank's rows among them; a row that is not counted has place 0.
    """

    def __init__(self, plan: Plan, engine: Engine, streams: Sequence[DomainTokens], wanted: int) -> None:
        self._place, config = engine.place, plan.config
        place = self._place
        self.domain, self.sample = choose_samples(streams, config.data.seq_length, wanted)
        per_round = config.train.micro_batch * place.data_size
        rounds, multiple = -(-self.domain.size // per_round), engine.micro_batch_multiple
        self.num_micro_batches = -(-rounds // multiple) * multiple
        micro_batches = np.arange(place.data_rank, self.num_micro_batches * place.data_size, place.data_size)
        self.rows = (micro_batches[:, None] * config.train.micro_batch + np.arange(config.train.micro_batch)).ravel()
        filler = self.rows >= self.domain.size
        self.rows[filler] = 0
        self._batch = None
        if place.reads_data:
            shape = (self.num_micro_batches, config.train.micro_batch)
            self._batch = plan.reader(streams).batch(self.domain, self.sample, self.rows, shape)
            self._batch.labels.flatten(0, 1)[torch.from_numpy(filler)] = IGNORED_LABEL

    @property
    def labels(self) -> torch.Tensor:
        """int64 [M, B, S], this rank's labels, on the CPU; on a rank that reads data."""
        assert self._batch is not None
        return self._batch.labels

    def sums(self, engine: Engine) -> torch.Tensor:
        """This rank's int64 [K, C] sums over its samples; every rank of the job must call it."""
        return engine.evaluate(self._on_device(), self.num_micro_batches).clone()

    def token_losses(self, engine: Engine) -> torch.Tensor | None:
        """The loss of each of this rank's labels, float32 [M, B, S], 0 where it is ignored; None on a rank without the
        loss. Every rank of the job must call it."""
        return engine.token_losses(self._on_device(), self.num_micro_batches)

    def _on_device(self) -> Batch | None:
        device = self._place.device
        return self._batch if self._batch is None or device.type == "cpu" else self._batch.to(device)


class Validation:
    """The validation loss of a run: ``evaluate.samples`` of every domain's held-out samples; without the domains that
    have none."""

    def __init__(self, plan: Plan, engine: Engine) -> None:
        streams, length = [plan.validation[k] for k in plan.evaluated], plan.config.data.seq_length
        self._samples = EvaluationSamples(plan, engine, streams, plan.config.evaluate.samples)
        self._names = tuple(plan.domain_names[k] for k in plan.evaluated)
        self._documents = label_documents(streams, self._samples.domain, self._samples.sample, length)
        self._natural, self._objective = map(plan.over_evaluated, (plan.natural_weights, plan.objective_weights))
        self._sums = DocumentSums(self._documents.number, engine.place.device)
        self._adds = engine.place.has_loss and engine.place.is_first_copy

    def run(self, engine: Engine) -> dict[str, Any]:
        """The ``evaluate`` line of metrics.jsonl without step and tokens; every rank calls it and gets the same."""
        losses = self._samples.token_losses(engine)
        self._sums.buffer.zero_()
        if self._adds:
            assert losses is not None
            document, counted = self._documents.of(self._samples.rows), self._samples.labels != IGNORED_LABEL
            device = losses.device
            self._sums.add(
                torch.from_numpy(document).flatten().to(device), losses.flatten(), counted.flatten().to(device)
            )
        dist.all_reduce(self._sums.buffer)
        return self._sums.losses(self._documents.domain, self._names).line(self._objective, self._natural)


class RewardEvaluation:
    """Evaluation for a mixer that sees evaluations, such as odm with ``reward_from: evaluation``.

    Its samples are training data: a mixer that follows the held-out losses would bias them as a measure of a mixture.
    """

    def __init__(self, plan: Plan, engine: Engine, config: EvaluatedConfig, num_mixed: int) -> None:
        self._config = config
        self._weight_lag = plan.config.data.weight_lag
        self._num_domains = num_mixed
        self._engine = engine
        self._samples = EvaluationSamples(plan, engine, plan.domains, config.num_eval_samples)

    @classmethod
    def of(cls, plan: Plan, engine: Engine, left_out: Collection[str]) -> RewardEvaluation | None:
        """None for a mixer that sees the losses of training.

        Args:
            left_out: domains that the mixer does not mix.
        """
        config = evaluated(plan.config.mixer)
        return None if config is None else cls(plan, engine, config, len(plan.domain_names) - len(left_out))

    def due_after(self, step: int) -> bool:
        """Whether the mixer wants an evaluation after ``step``, which counts from 0."""
        return self._config.evaluates_at(step + 1, self._weight_lag, self._num_domains)

    def sums(self) -> torch.Tensor:
        """This rank's int64 [K, C] sums; every rank of the job must call it."""
        return self._samples.sums(self._engine)


def choose_samples(
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
