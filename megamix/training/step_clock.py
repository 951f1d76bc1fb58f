"""Wall time of training steps, split into data, communication, mixing and compute.

The parts are those of one rank's training thread, so they add up to its steps; background threads are in none of them.

- data: waiting for the next batch.
- communication: collectives, sends, receives and waiting for them, inside the engine's step; this includes waiting for
  late ranks and pipeline bubbles. On a CPU it is host time. On a GPU host time says nothing: there it is the time in
  which the model's stream communicated or waited, by pairs of events that are read with the log line, never in a step;
  communication beside computation is not counted.
- mixing: handing over the step's sums and waiting for the mixer (loss weights, evaluations that are rewards, log
  lines).
- compute: forward, backward, optimizer, and the rest of the step.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

_COMPUTE, _DATA, _COMMUNICATION, _MIXING = range(4)


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
        """Means per step, for a ``train`` line of metrics.jsonl."""
        steps = max(1, self.steps)
        return {
            "step_seconds": self.total / steps,
            "data_wait_seconds": self.data / steps,
            "communication_seconds": self.communication / steps,
            "mixing_seconds": self.mixing / steps,
            "compute_seconds": self.compute / steps,
        }


class StepClock:
    """Charges every moment of a step to one part; belongs to the thread that creates it.

    Args:
        device: the engine's; on a GPU, communication is timed by events.
    """

    def __init__(self, device: torch.device) -> None:
        communication = self._on_stream if device.type == "cuda" else self._on_host
        # Every function of torch.distributed ends in these methods, also where an engine kept a reference to it.
        methods = {**communicating_methods(dist.ProcessGroup), (dist.Work, "wait"): dist.Work.wait}
        self._methods = [(*place, method, _within(communication, method)) for place, method in methods.items()]
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

    def data(self) -> AbstractContextManager[None]:
        """Around waiting for a batch."""
        return self._during(_DATA)

    def mixing(self) -> AbstractContextManager[None]:
        """Around work that only mixing needs, its communication included."""
        return self._during(_MIXING)

    def device(self) -> AbstractContextManager[None]:
        """Around a wait for the device outside a step: it still computes the steps before."""
        return self._during(_COMPUTE)

    def as_mixing(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """``function``, timed as `mixing` wherever it is called."""
        return _within(self.mixing, function)

    @contextmanager
    def engine(self) -> Iterator[None]:
        """Around the engine's step: inside, this rank's communication is timed."""
        for owner, name, _, timed in self._methods:
            setattr(owner, name, timed)
        try:
            yield
        finally:
            for owner, name, method, _ in self._methods:
                setattr(owner, name, method)

    def take(self) -> StepTimes:
        """The sums since the last call; on a GPU it waits for the communication until now."""
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

    @contextmanager
    def _on_host(self) -> Iterator[None]:
        # The mixing thread communicates too, at the same time.
        if self._part != _COMPUTE or threading.get_ident() != self._thread:
            yield
            return
        with self._during(_COMMUNICATION):
            yield

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        # Backward passes run on threads of autograd, which Python did not start.
        thread = threading.current_thread()
        mine = thread.ident == self._thread or isinstance(thread, threading._DummyThread)
        if self._part != _COMPUTE or not mine:
            yield
            return
        start, end = self._event(), self._event()
        start.record()
        try:
            yield
        finally:
            end.record()
            self._events.append((start, end))

    def _event(self) -> torch.cuda.Event:
        return self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)


def communicating_methods(group: type) -> dict[tuple[type, str], Callable[..., Any]]:
    """The methods of a process group that communicate, by owner and name: those whose signature returns a Work.

    Their names differ between versions of torch.
    """
    methods = {(group, name): method for name, method in vars(group).items() if callable(method)}
    return {place: method for place, method in methods.items() if re.search(r"-> \S*\bWork\b", method.__doc__ or "")}


def _within(
    around: Callable[[], AbstractContextManager[None]], function: Callable[..., Result]
) -> Callable[..., Result]:
    """``function``, inside the context that ``around`` opens for each call."""

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Result:
        with around():
            return function(*args, **kwargs)

    return timed
