"""Where the wall time of training steps goes: data, communication, mixing, and compute, which is the rest.

It is the time of one rank's training thread, so that the parts of a rank add up to its steps; what background threads
do is in none of them.

- data: waiting for the next batch.
- communication: on CPUs, the time in collectives, sends and receives, and in waiting for them, inside the engine's
  step. It includes waiting for whoever is late: bubbles of the pipeline, slower ranks. On a GPU, host time says
  nothing: there it is the time in which the stream of the model ran them or waited for them, by pairs of events that
  are read with the log line, never in a step; what runs beside computation is not in it.
- mixing: handing over the sums of the step, and waiting for the mixer: for loss weights, for an evaluation whose losses
  are its rewards, and at log lines.
- compute: forward, backward, optimizer, and everything else in a step.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

_COMPUTE, _DATA, _COMMUNICATION, _MIXING = range(4)
# The methods that every function of torch.distributed ends in, whoever kept a reference to that function; their names
# differ between versions of torch.
_METHODS = (
    "allreduce", "allreduce_coalesced", "broadcast", "reduce", "gather", "scatter", "barrier",
    "allgather", "_allgather_base", "all_gather_single", "allgather_coalesced", "allgather_into_tensor_coalesced",
    "all_gather_single_coalesced", "_reduce_scatter_base", "reduce_scatter", "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced", "alltoall", "alltoall_base",
    "all_to_all_single", "send", "recv", "recv_anysource", "_end_coalescing",
)  # fmt: skip


@dataclass(frozen=True)
class StepTimes:
    """Wall time of ``steps`` steps, in seconds."""

    steps: int
    compute: float
    data: float
    communication: float
    mixing: float

    @property
    def total(self) -> float:
        return self.compute + self.data + self.communication + self.mixing

    def record(self) -> dict[str, float]:
        """What a ``train`` line of metrics.jsonl holds of it: means per step."""
        steps = max(1, self.steps)
        return {
            "step_seconds": self.total / steps,
            "data_wait_seconds": self.data / steps,
            "communication_seconds": self.communication / steps,
            "mixing_seconds": self.mixing / steps,
            "compute_seconds": self.compute / steps,
        }


class StepClock:
    """Charges every moment of a step to one part of it; of the thread that makes it.

    Args:
        device: the engine's; on a GPU, communication is timed by events.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._thread = threading.get_ident()
        self._part: int | None = None
        self._mark = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._spare: list[torch.cuda.Event] = []
        self._start_sums()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a whole step."""
        self._steps += 1
        with self._during(_COMPUTE):
            yield

    def data(self) -> Any:
        """Around waiting for a batch."""
        return self._during(_DATA)

    def mixing(self) -> Any:
        """Around whatever only mixing needs; what it communicates counts as mixing too."""
        return self._during(_MIXING)

    def device(self) -> Any:
        """Around a wait for the device outside of a step: it is still at work on the steps before."""
        return self._during(_COMPUTE)

    def as_mixing(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """``function``, timed as `mixing` wherever it is called."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Result:
            with self._during(_MIXING):
                return function(*args, **kwargs)

        return timed

    @contextmanager
    def engine(self) -> Iterator[None]:
        """Around the engine's step: inside, what this rank communicates is timed."""
        timed = self._on_stream if self._on_gpu else self._on_host
        kept = []
        for owner, names in ((dist.ProcessGroup, _METHODS), (dist.Work, ("wait",))):
            for name in names:
                if name in vars(owner):
                    kept.append((owner, name, vars(owner)[name]))
                    setattr(owner, name, timed(getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, method in kept:
                setattr(owner, name, method)

    def take(self) -> StepTimes:
        """The sums since the last call; on a GPU it waits for what was communicated until now."""
        parts = self._sums
        if self._events:
            self._events[-1][1].synchronize()
            waited = sum(start.elapsed_time(end) for start, end in self._events) / 1000
            waited = min(waited, parts[_COMPUTE])
            parts[_COMPUTE] -= waited
            parts[_COMMUNICATION] += waited
            self._spare += [event for pair in self._events for event in pair]
            self._events.clear()
        taken = StepTimes(self._steps, parts[_COMPUTE], parts[_DATA], parts[_COMMUNICATION], parts[_MIXING])
        self._start_sums()
        return taken

    def _start_sums(self) -> None:
        self._steps, self._sums = 0, [0.0, 0.0, 0.0, 0.0]

    @contextmanager
    def _during(self, part: int) -> Iterator[None]:
        before = self._switch(part)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, part: int | None) -> int | None:
        now = time.perf_counter()
        before, self._part = self._part, part
        if before is not None:
            self._sums[before] += now - self._mark
        self._mark = now
        return before

    def _on_host(self, method: Callable[..., Result]) -> Callable[..., Result]:
        def timed(*args: Any, **kwargs: Any) -> Result:
            # The mixing thread communicates too, at the same time.
            if self._part != _COMPUTE or threading.get_ident() != self._thread:
                return method(*args, **kwargs)
            self._switch(_COMMUNICATION)
            try:
                return method(*args, **kwargs)
            finally:
                self._switch(_COMPUTE)

        return timed

    def _on_stream(self, method: Callable[..., Result]) -> Callable[..., Result]:
        def timed(*args: Any, **kwargs: Any) -> Result:
            # Backward passes run on threads of autograd's own, which Python did not start.
            thread = threading.current_thread()
            mine = thread.ident == self._thread or isinstance(thread, threading._DummyThread)
            if self._part != _COMPUTE or not mine:
                return method(*args, **kwargs)
            start, end = self._event(), self._event()
            start.record()
            try:
                return method(*args, **kwargs)
            finally:
                end.record()
                self._events.append((start, end))

        return timed

    def _event(self) -> torch.cuda.Event:
        return self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
