"""Exchange between ranks and mixer: sums up, weights down, beside the training step.

    last stage: sums of the step --all-reduce (starts before the backward pass)--> rank 0: mixer --broadcast--> every
        rank: sampler, and the next step's loss weights where the mixer has such

The training thread launches the all-reduce. One background thread per rank waits for it, for the mixer and for the
broadcast, so the training thread neither blocks nor synchronises with its device. The weights of step s take effect at
the start of step s + 1 + weight_lag on every rank, whenever they arrive. Loss weights (DoReMi's alpha) act one
step later, in s + 1.

Legend: K domains, C statistics.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megamix.core.errors import InputError
from megamix.data.blend.blend import Segment
from megamix.data.sampler import Sampler
from megamix.mixing.mixers import DomainStats, Mixer
from megamix.mixing.shadow_change import ShadowChange
from megamix.mixing.steering.steering import Steered, Steering, follow
from megamix.mixing.weight_policy import WeightPolicy
from megamix_kernels import DomainSums

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Requests:
    """Requests of ranks for a step boundary.

    Attributes:
        stop: end the run, with a checkpoint.
        save: write a checkpoint.
    """

    stop: bool = False
    save: bool = False


NO_REQUESTS = Requests()


@dataclass(frozen=True)
class MixReport:
    """Result of a step on rank 0 once the mixer has seen it; ``step`` counts from 0.

    Attributes:
        stats: the sums of the step over the whole world.
        effective_step: the first step with the weights that follow from it.
        position: its first sample.
        segment: the stretch of constant weights that ``effective_step`` starts in.
        record: `Mixer.record`, and ``steering`` where some is in force; empty where no new weights were computed.
        updated: whether new weights were computed, by the mixer, a staged mixture or steering.
        notes: what steering has to say.
        shadows: new weights of mixers that only log.
    """

    step: int
    stats: DomainStats
    effective_step: int
    position: int
    segment: Segment
    record: dict[str, object]
    updated: bool
    notes: tuple[str, ...] = ()
    shadows: tuple[ShadowChange, ...] = ()


class MixExchange:
    """Carries sums to the mixer, weights to the samplers, and requests of any rank to all; once per step, in step
    order.

    Args:
        mixer: on rank 0 the mixer; None elsewhere.
        sampler: told of every weight change.
        policy: which weights follow from a step, and from where on they hold.
        loss_weights: float64 [K], of ``first_step``, the same on every rank; None: the mixer has none.
        has_reference: whether losses are summed against a reference; without one, excess sums are meaningless.
        rewards_evaluation: whether the mixer sees the sums of evaluations instead of training.
        judge: called on every rank with (step, int64 [K, C] sums of the step, int64 [K, C] sums of its evaluation or
            [0, C], a group of all ranks on the CPU); may raise to end the run, on every rank alike.
        on_report: called on rank 0 for every step, from the background thread.
        steering: of the run, on rank 0; None where nobody can steer it.

    Attributes:
        mixer: on rank 0 the mixer; steering may put another in its place.
    """

    def __init__(
        self,
        mixer: Mixer | None,
        sampler: Sampler,
        policy: WeightPolicy,
        *,
        first_step: int,
        loss_weights: Floats | None,
        has_reference: bool,
        rewards_evaluation: bool,
        judge: Callable[[int, torch.Tensor, torch.Tensor, Any], None],
        on_report: Callable[[MixReport], None],
        steering: Steering | None = None,
    ) -> None:
        self.mixer = mixer
        self._steering = steering
        self._sampler = sampler
        self._policy = policy
        self._has_reference = has_reference
        self._rewards_evaluation = rewards_evaluation
        self._judge = judge
        self._on_report = on_report
        self._sums_group: Any = dist.new_group()
        self._weights_group: Any = dist.new_group(backend="gloo")
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mixing")
        self._results: dict[int, Future[None]] = {}
        self._requests: dict[int, Requests] = {}
        self._stream: torch.cuda.Stream | None = None
        self._loss_weights = loss_weights
        self._settled = first_step
        self._settle_lock = threading.Lock()

    def submit(
        self,
        step: int,
        sums_KC: torch.Tensor,
        evaluated_KC: torch.Tensor | None = None,
        requests: Requests = NO_REQUESTS,
    ) -> None:
        """Takes this rank's int64 [K, C] sums of ``step`` and returns at once; the buffers may be used again.

        Args:
            evaluated_KC: the sums of the evaluation that the mixer wants after this step; on all ranks or on none.
            requests: of this rank; every rank learns of them by `requests_at`.
        """
        requests_1C = sums_KC.new_zeros(1, sums_KC.shape[1])
        if requests != NO_REQUESTS:
            requests_1C[0, 0] = requests.stop
            requests_1C[0, 1] = requests.save
        reduced = torch.cat([sums_KC, *([] if evaluated_KC is None else [evaluated_KC]), requests_1C])
        work: Any = dist.all_reduce(reduced, group=self._sums_group, async_op=True)
        self._results[step] = self._executor.submit(self._mix, step, reduced, work)

    def settle(self, step: int) -> None:
        """Waits until the weights that follow from all steps before ``step`` are known to the sampler.

        Raises:
            MegamixError: raised by the guard (on every rank, at the same step) or by the mixer.
        """
        with self._settle_lock:
            while self._settled < step:
                # Kept until it is there: a failure is told to whoever asks, the loading thread or this one.
                self._results[self._settled].result()
                del self._results[self._settled]
                self._settled += 1

    def requests_at(self, step: int) -> Requests:
        """The requests of any rank in the step whose weights take effect in ``step``; the same on all ranks.

        This is the earliest boundary before which every rank waits for that step's weights anyway.
        """
        heard = step - self._policy.weight_lag
        self.settle(heard)
        return self._requests.pop(heard - 1, NO_REQUESTS)

    def loss_weights(self, step: int) -> Floats | None:
        """float64 [K], of ``step``, which must not have been submitted; None: the mixer has none.

        Waits for the mixer's update with the step before. Its sums are complete before its backward pass, which the
        device computes meanwhile.
        """
        if self._loss_weights is None:
            return None
        self.settle(step)
        return self._loss_weights

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _mix(self, step: int, reduced: torch.Tensor, work: Any) -> None:
        reduced = self._on_host(reduced, work)
        stop, save = reduced[-1, :2].tolist()
        if stop or save:
            self._requests[step] = Requests(stop > 0, save > 0)
        k = self._sampler.num_domains
        self._judge(step, reduced[:k], reduced[k:-1], self._weights_group)
        kinds = 1 if self._loss_weights is None else 2
        weights = torch.empty(kinds, k, dtype=torch.float64)
        stats, steered = None, None
        if self.mixer is not None:
            stats = self._statistics(step, reduced[:k])
            steered = self._update(self.mixer, self._rewards(step, stats, reduced[k:-1]), step)
            effective_step = self._policy.effective_step(step)
            weights[0] = torch.from_numpy(
                self._sampler.weights_at(effective_step) if steered is None else steered.weights
            )
            given = checked_loss_weights(self.mixer)
            if (given is None) != (self._loss_weights is None):
                raise InputError(
                    f"mixer '{self.mixer.name}': loss_weights is None in some steps and not in others. Give 1 for every "
                    "domain where all count alike."
                )
            if given is not None:
                weights[1] = torch.from_numpy(given)
        dist.broadcast(weights, src=0, group=self._weights_group)
        effective_step = self._policy.effective_step(step)
        self._sampler.set_weights(weights[0].numpy(), effective_step)
        if kinds == 2:
            self._loss_weights = weights[1].numpy()
        if self.mixer is not None and stats is not None:
            position, segment = self._policy.effective_position(step), self._sampler.segment_at(effective_step)
            record = {} if steered is None else {**self.mixer.record(), **steered.recorded}
            notes = () if self._steering is None else self._steering.take_notes()
            updated = steered is not None
            self._on_report(MixReport(step, stats, effective_step, position, segment, record, updated, notes))

    def _on_host(self, reduced: torch.Tensor, work: Any) -> torch.Tensor:
        """The sums once they are reduced, on the CPU."""
        if not reduced.is_cuda:
            work.wait()
            return reduced
        # On a separate stream: the training thread's holds the backward pass and the optimizer by now.
        if self._stream is None:
            self._stream = torch.cuda.Stream(reduced.device)
        with torch.cuda.stream(self._stream):
            work.wait()
            return reduced.cpu()

    def _statistics(self, step: int, reduced: torch.Tensor) -> DomainStats:
        sums = DomainSums.from_buffer(reduced)
        return DomainStats(
            nats=sums.nats.numpy(),
            tokens=sums.tokens.numpy(),
            excess_nats=sums.excess_nats.numpy() if self._has_reference else None,
            weights=self._sampler.weights_at(step),
            non_finite=sums.non_finite.numpy(),
        )

    def _rewards(self, step: int, stats: DomainStats, evaluated: torch.Tensor) -> DomainStats:
        """The statistics for the mixer: of the step, or of its evaluation, which are empty where there was none."""
        if not self._rewards_evaluation:
            return stats
        if evaluated.numel():
            return self._statistics(step, evaluated)
        nothing = np.zeros(stats.num_domains)
        return DomainStats(nothing, nothing, weights=stats.weights)

    def _update(self, mixer: Mixer, rewards: DomainStats, step: int) -> Steered | None:
        """The weights that follow from ``step``, where they were computed anew. Constraints move with what is left of
        each domain; between updates the weights stay as they are all the same."""
        policy, effective_step = self._policy, self._policy.effective_step(step)
        wanted = policy.wanted(mixer, rewards, step)
        in_force, counts = (
            partial(self._sampler.weights_at, effective_step),
            partial(self._sampler.counts_at, effective_step),
        )
        steered = follow(self._steering, policy, mixer, wanted, step, in_force, counts)
        if steered is not None:
            self.mixer = steered.mixer
        return steered


def checked_loss_weights(mixer: Mixer) -> Floats | None:
    """The mixer's loss weights, checked.

    Raises:
        InputError: not one for every domain, or one that is negative or not finite.
    """
    given = mixer.loss_weights
    if given is None:
        return None
    given = np.asarray(given, np.float64)
    if given.shape != (mixer.num_domains,) or not (np.isfinite(given) & (given >= 0)).all():
        raise InputError(
            f"mixer '{mixer.name}': loss_weights is {given.tolist()}, expected {mixer.num_domains} finite numbers that are "
            "not negative, one a domain."
        )
    return given
