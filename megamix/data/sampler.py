"""Sampler: the samples that each rank reads in a step.

A step is a range of positions of the blend (`megamix.data.batches`): the same samples whatever the number of ranks or
the size of a micro-batch. Data-parallel rank r of R reads the r-th of R equal slices, cut into micro-batches in order.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megamix.core.errors import InputError
from megamix.data.batches import Batches
from megamix.data.blend.blend import Blend, Segment
from megamix.data.blend.rest import Rest


@dataclass(frozen=True)
class Slice:
    """The part of every global batch that one data-parallel rank reads.

    Raises:
        InputError: the global batch does not divide into data_size * micro_batch.
    """

    global_batch: int
    micro_batch: int
    data_rank: int = 0
    data_size: int = 1

    def __post_init__(self) -> None:
        if self.global_batch % (self.micro_batch * self.data_size):
            raise InputError(
                f"global_batch {self.global_batch} does not divide into {self.data_size} data-parallel ranks times micro-batches of "
                f"{self.micro_batch} (= {self.micro_batch * self.data_size}). Choose a multiple of that."
            )

    @property
    def num_micro_batches(self) -> int:
        return self.global_batch // (self.micro_batch * self.data_size)

    @property
    def samples(self) -> slice:
        """This rank's samples within a global batch."""
        size = self.global_batch // self.data_size
        return slice(self.data_rank * size, (self.data_rank + 1) * size)


@dataclass(frozen=True)
class StepSamples:
    """The samples of one step.

    Attributes:
        position: the first position of the global batch.
        domain, sample: int64 [num_micro_batches, micro_batch], one rank's samples.
        all_domain, all_sample: int64 [global_batch], all ranks' samples.
    """

    step: int
    position: int
    domain: NDArray[np.int64]
    sample: NDArray[np.int64]
    all_domain: NDArray[np.int64]
    all_sample: NDArray[np.int64]


class DataExhausted(Exception):
    """A step would read more of a domain than the run allows; ``step`` counts from 0, ``domain`` is an index."""

    def __init__(self, step: int, domain: int) -> None:
        super().__init__(f"domain {domain} is used up before step {step}")
        self.step, self.domain = step, domain


class Sampler:
    """Deals the blend out step by step; weight changes take effect at the start of a stated step.

    Steps may be dealt ahead of training (prefetching); weights may be set for any step that has not been dealt yet.
    Safe to use from a loading thread and the training thread at once.

    Args:
        share: this rank's part of a global batch; of which size says ``batches``.
        limits: int64 [K], the most samples of each domain in the whole run; None for no limit.
        batches: of the run; default: all of the size of ``share``.
    """

    def __init__(
        self,
        blend: Blend,
        share: Slice,
        limits: NDArray[np.int64] | None = None,
        batches: Batches | None = None,
    ) -> None:
        self.share = share
        self.batches = Batches.equal(share.global_batch) if batches is None else batches
        self._limits = limits
        self._blend = blend
        self._lock = threading.Lock()
        if not self.batches.is_start(blend.position):
            raise InputError(
                f"the data position {blend.position} is not at the start of a step of global_batch {share.global_batch} samples. "
                "Resume with the global batch the run was started with."
            )

    @property
    def rests(self) -> Mapping[int, Rest]:
        """See `Blend`."""
        return self._blend.rests

    @property
    def num_domains(self) -> int:
        return self._blend.num_domains

    def share_of(self, step: int) -> Slice:
        """This rank's part of the global batch of ``step``."""
        return replace(self.share, global_batch=self.batches.size(step))

    def deal(self) -> StepSamples:
        """The samples of the next step.

        Raises:
            DataExhausted: it would take a domain past its limit.
        """
        with self._lock:
            position = self._blend.position
            step = self.batches.step(position)
            share = self.share_of(step)
            domain, sample = self._blend.take(share.global_batch)
            over = None if self._limits is None else np.flatnonzero(self._blend.counts > self._limits)
        if over is not None and over.size:
            raise DataExhausted(step, int(over[0]))
        shape = (share.num_micro_batches, share.micro_batch)
        mine = share.samples
        return StepSamples(
            step,
            position,
            domain[mine].reshape(shape),
            sample[mine].reshape(shape),
            domain,
            sample,
        )

    def set_weights(self, weights: ArrayLike, step: int) -> bool:
        """Sets the sampling weights from ``step`` on; returns whether they differ from those before."""
        with self._lock:
            return self._blend.set_weights(weights, at=self.batches.position(step))

    def segment_at(self, step: int) -> Segment:
        """The segment that contains the start of ``step``."""
        with self._lock:
            return self._blend.segment_at(self.batches.position(step))

    def segments_from(self, step: int) -> list[Segment]:
        """The segments from ``step`` on, with announced ones."""
        with self._lock:
            start = self.batches.position(step)
            later = [position for position, _ in self._blend.ledger if position > start]
            return [self._blend.segment_at(position) for position in (start, *later)]

    def weights_at(self, step: int) -> NDArray[np.float64]:
        """float64 [K]: the sampling weights in effect in ``step``."""
        with self._lock:
            return self._blend.segment_at(self.batches.position(step)).weights.copy()

    def counts_at(self, step: int) -> NDArray[np.int64]:
        """int64 [K]: samples of each domain in all steps before ``step``."""
        with self._lock:
            return self._blend.counts_at(self.batches.position(step))

    def forget_before(self, step: int) -> None:
        """Drops state that only describes steps before ``step``."""
        with self._lock:
            self._blend.forget_before(self.batches.position(step))

    def state_dict(self, step: int) -> dict[str, Any]:
        """The state as of the start of ``step``, whatever was dealt ahead."""
        with self._lock:
            return {"blend": self._blend.state_dict(at=self.batches.position(step))}

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Any],
        share: Slice,
        limits: NDArray[np.int64] | None = None,
        batches: Batches | None = None,
    ) -> Sampler:
        """The sampler in the state that `state_dict` gave; other arguments as in the constructor."""
        return cls(Blend.from_state_dict(state["blend"]), share, limits, batches)
