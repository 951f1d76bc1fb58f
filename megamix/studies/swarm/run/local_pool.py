"""``megamix swarm run``: the members of a swarm on this machine, several at a time, each a run of its own.

A member is ``megamix train MEMBER.yaml`` in its own process, which writes what it says to SWARM/logs. Without a GPU
this process imports everything once and forks them, and a member of one rank is that rank: ten seconds of imports are
spent once instead of twice a member. With GPUs, which do not survive a fork, each is started anew, with GPUs of its
own.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from megamix.core.errors import EXIT_OK, EXIT_PREEMPTED, RankFailed
from megamix.core.log import get_logger
from megamix.core.processes import die_with_parent, free_port, num_cores
from megamix.core.text import plural
from megamix.engines.config import MegatronConfig
from megamix.studies.swarm.run.members import Member
from megamix.training.job.signals import SIGNALS

LOGS = "logs"
IMPORTED = ("megamix.cli", "megamix.training.run", "megamix.training.trainer")
"""And the engine's module, before members are forked."""


@dataclass
class Running:
    """A member that is being run.

    Attributes:
        slot: which of the members at a time it is.
        log: what it says, after ``offset`` bytes that earlier starts have said.
    """

    member: Member
    process: BaseProcess
    slot: int
    log: Path
    offset: int
    began: float


def default_at_once(member: Member) -> int:
    """As many members as the GPUs, or cores, of this machine are enough for."""
    return max(1, (len(_gpus()) or num_cores()) // member.config.engine.world_size())


def run_members(members: Sequence[Member], overrides: Sequence[str], at_once: int, logs: Path) -> int:
    """Runs the members that are not done; returns the exit code: 0, or 75 where it was asked to stop.

    A member that fails does not keep the others from running. Signals that ask to stop are passed on, the members save,
    and no others are begun; a second one ends them at once.

    Args:
        at_once: members that run at a time.
        logs: a folder for what they say.

    Raises:
        RankFailed: members have failed; with the reason of each.
    """
    left = deque(member for member in members if not member.is_done)
    log = get_logger()
    log.info("%s of %s done, %d at a time", _count(len(members) - len(left)), plural(len(members), "member"), at_once)
    if not left:
        return EXIT_OK
    logs.mkdir(parents=True, exist_ok=True)
    received: list[int] = []
    previous = {number: signal.signal(number, lambda number, _frame: received.append(number)) for number in SIGNALS}
    try:
        return _Pool(members, left, overrides, at_once, logs, received).run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Pool:
    """The members that run, those that are to run, and those that have failed."""

    def __init__(
        self,
        members: Sequence[Member],
        left: deque[Member],
        overrides: Sequence[str],
        at_once: int,
        logs: Path,
        received: list[int],
    ) -> None:
        self._total = len(members)
        self._left = left
        self._overrides = overrides
        self._at_once = min(at_once, len(left))
        self._logs = logs
        self._received = received
        self._running: list[Running] = []
        self._failed: dict[str, str] = {}
        self._done = len(members) - len(left)
        self._context = _context(left[0])

    def run(self) -> int:
        passed_on = 0
        try:
            while self._running or (self._left and not self._received):
                while self._left and not self._received and len(self._running) < self._at_once:
                    self._start(self._left.popleft())
                wait([running.process.sentinel for running in self._running], timeout=0.2)
                for running in [running for running in self._running if running.process.exitcode is not None]:
                    self._end(running)
                if len(self._received) > passed_on:
                    self._pass_on(self._received[0], again=passed_on > 0)
                    passed_on = len(self._received)
        finally:
            for running in self._running:
                running.process.kill()
                running.process.join()
        if self._received and self._done < self._total:
            get_logger().info("stopped; %d of %d members are done. The same command goes on.", self._done, self._total)
            return EXIT_PREEMPTED
        if self._failed:
            listed = "".join(f"\n  {name}: {reason}" for name, reason in self._failed.items())
            raise RankFailed(
                f"{len(self._failed)} of {plural(self._total, 'member')} failed, {self._done} are done.{listed}\n"
                f"What they said is in {self._logs}. The same command runs those again that are not done."
            )
        return EXIT_OK

    def _start(self, member: Member) -> None:
        slot = next(slot for slot in range(self._at_once) if slot not in [running.slot for running in self._running])
        path = self._logs / f"{member.name}.log"
        offset = path.stat().st_size if path.exists() else 0
        arguments = ["train", str(member.path), *self._overrides]
        process = self._context.Process(  # pyright: ignore[reportAttributeAccessIssue]
            target=_be_member, args=(arguments, _environment(member, slot, self._at_once), str(path))
        )
        process.start()
        self._running.append(Running(member, process, slot, path, offset, time.monotonic()))

    def _end(self, running: Running) -> None:
        """Takes note of how a member has ended."""
        self._running.remove(running)
        code, name = running.process.exitcode, running.member.name
        seconds = time.monotonic() - running.began
        log = get_logger()
        if code == EXIT_OK and running.member.is_done:
            self._done += 1
            log.info("member %s: done in %.0f s, %d of %d", name, seconds, self._done, self._total)
        elif self._received:
            log.info("member %s: stopped", name)
        else:
            self._failed[name] = reason = _reason(running)
            log.error("member %s: failed: %s", name, reason)

    def _pass_on(self, number: int, *, again: bool) -> None:
        log = get_logger()
        if again:
            log.warning("asked a second time: the members are ended")
        else:
            log.info("%s: the members that run (%d) save and stop", signal.Signals(number).name, len(self._running))
        for running in self._running:
            if again:
                running.process.kill()
            elif running.process.pid is not None and running.process.exitcode is None:
                os.kill(running.process.pid, number)


def _context(member: Member) -> BaseContext:
    """How processes are started: see the module's docstring.

    This process must not have used torch or any thread of its own before it forks: importing starts none.
    """
    if _gpus():
        return multiprocessing.get_context("spawn")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it looked for another and found none
    engine = "megatron" if isinstance(member.config.engine, MegatronConfig) else "deepspeed_module"
    for name in (*IMPORTED, f"megamix.engines.{engine}"):
        importlib.import_module(name)
    return multiprocessing.get_context("fork")


def _environment(member: Member, slot: int, at_once: int) -> dict[str, str]:
    """What a member's process is told by variables."""
    engine = member.config.engine
    ranks, gpus = engine.world_size(), _gpus()
    threads = engine.threads or max(1, num_cores() // (ranks * at_once))
    told = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if gpus:
        told["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[(slot * ranks + rank) % len(gpus)] for rank in range(ranks))
    if ranks == 1:  # it is the rank, instead of starting one
        told |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return told


def _gpus() -> list[str]:
    """The GPUs that this process may use, found without touching them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _be_member(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Is ``python -m megamix ARGUMENTS`` from here to its end."""
    os.setpgrp()  # a terminal's Ctrl-C is passed on by the process that waits, once
    die_with_parent()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for number in (1, 2):
        os.dup2(file, number)
    os.environ.update(environment)
    if "torch" in sys.modules:  # imported before the fork, with another environment
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = ["megamix", *arguments]
    runpy.run_module("megamix", run_name="__main__", alter_sys=True)


def _reason(running: Running) -> str:
    """Why a member has failed, in a line."""
    code = running.process.exitcode
    if code is not None and code < 0:
        return f"ended by {signal.Signals(-code).name}"
    with running.log.open("rb") as file:
        file.seek(running.offset)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("megamix: ") for line in lines if line.startswith("megamix: ")]
    if said and not said[-1].startswith("Traceback"):
        return said[-1]
    if code == EXIT_OK:
        return "it ended before its last step, where train.stop_after says"
    return f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"


def _count(number: int) -> str:
    return str(number) if number else "none"
