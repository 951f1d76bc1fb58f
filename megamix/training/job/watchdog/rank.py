"""The watchdog's part on each rank.

torchrun and srun start ranks on many nodes, and none of them sees a rank die on another: its peers would wait in a
collective until that times out. Here one thread per rank keeps a connection to rank 0
(`megamix.training.job.watchdog.judge`), apart from process groups, devices and steps:

- a process that ends closes its connection, so the kernel tells at once that a rank is gone;
- a rank that is stopped, or whose node is gone, is silent: no heartbeat for ``watchdog.silence_seconds``;
- heartbeats carry the time since a rank's last progress: when it exceeds ``watchdog.stall_minutes`` on every rank, the
  job hangs, and the reason says where in its code each rank is;
- a rank that fails sends its reason, so the others need not guess it from closed connections.

Rank 0 judges and tells all others; they judge rank 0 themselves. Each prints the reason and ends its process, whatever
its main thread waits for. A rank that cannot do that, as C code holds Python's lock, is ended by
Python's own timer (`faulthandler`), with its traceback, after twice the silence; so is a job that was suspended.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from megamix.core.errors import EXIT_FAILED, MegamixError, Preempted
from megamix.training.config import WatchdogConfig
from megamix.training.job.local_ranks import REPORTS, report_failure
from megamix.training.job.watchdog.heartbeat import say
from megamix.training.job.watchdog.joining import invite, join
from megamix.training.job.watchdog.judge import LONGEST_REASON, UNSURE_SECONDS, Hub, Spoke, State, Verdict

# How long a failing rank waits to be told whether it is the cause.
ANSWER_SECONDS = UNSURE_SECONDS + 3.0
LONGEST_INTERVAL = 2.0


class Watchdog:
    """The watchdog of one rank: `start`, `progress` at every new activity, and at the end `fail` or `close`.

    With ``silence_seconds`` and ``stall_minutes`` both 0 it does nothing.
    """

    def __init__(self, config: WatchdogConfig, rank: int, world_size: int) -> None:
        self._config = config
        self._rank, self._world_size = rank, world_size
        self._since = time.monotonic()
        self._step, self._doing = 0, "starting"
        self._words: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._is_said, self._is_cause = threading.Event(), threading.Event()
        self._main = threading.get_ident()
        self._thread: threading.Thread | None = None
        self._failed_link: Hub | Spoke | None = None

    def start(self, share: Callable[[Any], Any] | None = None) -> None:
        """Connects this rank; every rank of the job calls it.

        Args:
            share: gives rank 0's object to every rank; by default over the process group of the job.

        Raises:
            MegamixError: rank 0 cannot be reached.
        """
        if not self._config.silence_seconds and not self._config.stall_minutes:
            return
        server, invitation = invite() if self._rank == 0 else (None, None)
        invitation = (share or _broadcast)(invitation)
        link: Hub | Spoke
        if server is not None:
            link = Hub(server, invitation, self._world_size, self._config)
        else:
            link = Spoke(join(invitation, self._rank), self._world_size, self._config)
        self._thread = threading.Thread(target=self._run, args=(link,), name="watchdog", daemon=True)
        self._thread.start()

    def progress(self, step: int, doing: str) -> None:
        """Reports a new activity of this rank.

        Args:
            step: steps taken.
            doing: for messages: training, evaluating, saving, loading.
        """
        self._step, self._doing, self._since = step, doing, time.monotonic()

    def fail(self, error: BaseException) -> None:
        """Tells the others why this rank ends, before its connections close.

        Returns once they know, for the caller to raise ``error``. Where another rank is the cause and this one only
        follows, the process ends here, with the cause said.
        """
        if isinstance(error, Preempted):
            self.close()
            return
        stated = isinstance(error, MegamixError)
        text = str(error) if stated else "".join(traceback.format_exception_only(error)).strip()
        code = error.exit_code if isinstance(error, MegamixError) else EXIT_FAILED
        self._say({"fail": text[:LONGEST_REASON], "code": code, "stated": stated, "step": self._step})
        if self._thread is not None and self._thread.is_alive():
            self._is_cause.wait(ANSWER_SECONDS)

    def close(self) -> None:
        """Ends this rank's part. Its thread runs until all ranks are done, so that the last ones are still watched."""
        self._say({"bye": True})

    def _say(self, word: dict[str, Any]) -> None:
        self._is_said.clear()
        self._words.put(word)
        self._wake.send(b"!")
        if self._thread is not None and self._thread.is_alive():
            self._is_said.wait(ANSWER_SECONDS)

    def _run(self, link: Hub | Spoke) -> None:
        """The thread: beats, listens and judges until all ranks are done."""
        silence = self._config.silence_seconds
        shortest = min(period for period in (silence, 60 * self._config.stall_minutes) if period)
        interval = min(LONGEST_INTERVAL, shortest / 5)
        try:
            while True:
                if silence:
                    faulthandler.dump_traceback_later(2 * silence + interval, exit=True, file=2)
                while not self._words.empty():
                    link.hear_self(self._words.get())
                    self._is_said.set()
                verdict = link.turn(self._state(), self._woken, interval)
                if verdict is not None:
                    self._obey(verdict, link)
                if link.is_over:
                    link.close()
                    return
        except Exception as error:
            self._give_up(error, link)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _give_up(self, error: Exception, link: Hub | Spoke) -> None:
        """Says that this watchdog has failed, which is a defect, and that the run goes on without it."""
        self._failed_link = link  # its connections stay open: the others would take their end for that of this process
        what = "the watchdog, which rank 0 keeps for all ranks," if self._rank == 0 else "its watchdog"
        reason = "".join(traceback.format_exception_only(error)).strip()[:200]
        say(f"[rank {self._rank}] {what} failed, and the run goes on without it: {reason}")
        with contextlib.suppress(Exception):
            link.give_up(reason)

    def _state(self) -> State:
        return State(self._step, self._doing, time.monotonic() - self._since, _place(self._main))

    def _obey(self, verdict: Verdict, link: Hub | Spoke) -> None:
        """Ends this process, unless it is the cause and reports it."""
        if verdict.rank == self._rank and verdict.is_told:
            link.part()
            link.is_over = True
            self._is_cause.set()
            return
        try:
            # The starter of local ranks prints one reason: that of the rank that found it.
            if not os.environ.get(REPORTS):
                say(f"{'' if self._rank == 0 else f'[rank {self._rank}] '}{verdict.reason}")
            elif verdict.is_own:
                report_failure(verdict.reason)
            link.part()
        finally:
            os._exit(verdict.code)


def _broadcast(invitation: Any) -> Any:
    import torch.distributed as dist

    shared = [invitation]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _place(thread: int) -> str:
    """The place in the code of a thread."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "an unknown place"
    file = "/".join(frame.f_code.co_filename.split("/")[-2:])
    return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"
