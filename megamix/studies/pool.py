"""The members of a study on this machine, several at a time, each an ordinary run.

A member is ``python -m megamix train MEMBER.yaml`` in a process with GPUs of its own, whose output goes to a log file.
A member of one rank is that rank, instead of starting it.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue

from megamix.core.errors import EXIT_OK, EXIT_PREEMPTED, RankFailed
from megamix.core.log import get_logger
from megamix.core.paths import argument
from megamix.core.processes import die_with_parent, free_port, num_cores
from megamix.core.text import plural
from megamix.studies.runs import Member
from megamix.training.job.signals import SIGNALS

POLL_SECONDS = 0.2


def default_at_once(member: Member) -> int:
    """As many members as the GPUs, or cores, of this machine are enough for."""
    return max(1, (len(_gpus()) or num_cores()) // member.config.engine.world_size())


def run_members(members: Sequence[Member], overrides: Sequence[str], at_once: int, logs: Path) -> int:
    """Runs the members that are not done; returns the exit code: 0, or 75 where it was asked to stop.

    A member that fails does not keep the others from running. A signal that asks to stop is passed on, the members
    save, and no others begin; a second one ends them at once.

    Args:
        at_once: members that run at a time.
        logs: a folder for their output.

    Raises:
        RankFailed: members have failed; with the reason of each.
    """
    left = [member for member in members if not member.is_done]
    done = len(members) - len(left)
    get_logger().info("%s of %s done, %d at a time", done or "none", plural(len(members), "member"), at_once)
    if not left:
        return EXIT_OK
    logs.mkdir(parents=True, exist_ok=True)
    received: list[int] = []
    previous = {number: signal.signal(number, lambda number, _frame: received.append(number)) for number in SIGNALS}
    try:
        return _Pool(len(members), done, overrides, min(at_once, len(left)), logs).run(left, received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Pool:
    """Threads that each wait for a member's process."""

    def __init__(self, total: int, done: int, overrides: Sequence[str], at_once: int, logs: Path) -> None:
        self._total, self._done, self._overrides, self._at_once, self._logs = total, done, overrides, at_once, logs
        self._slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(at_once):
            self._slots.put(slot)
        self._lock = threading.Lock()
        """Held to start a process, so that none begins after the signal, and while counts change."""
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._failed: dict[str, str] = {}
        self._stopping = False

    def run(self, members: Sequence[Member], received: list[int]) -> int:
        passed_on = 0
        with ThreadPoolExecutor(self._at_once) as executor:
            pending = {executor.submit(self._run, member) for member in members}
            try:
                while pending:
                    ended, pending = wait(pending, timeout=POLL_SECONDS)
                    for future in ended:
                        future.result()
                    if len(received) > passed_on:
                        self._pass_on(received[0], again=passed_on > 0)
                        passed_on = len(received)
            finally:
                self._signal(signal.SIGKILL)
        if received and self._done < self._total:
            get_logger().info("stopped; %d of %d members are done. The same command goes on.", self._done, self._total)
            return EXIT_PREEMPTED
        if self._failed:
            listed = "".join(f"\n  {name}: {reason}" for name, reason in self._failed.items())
            raise RankFailed(
                f"{len(self._failed)} of {plural(self._total, 'member')} failed, {self._done} are done.{listed}\n"
                f"What they said is in {self._logs}. The same command runs those again that are not done."
            )
        return EXIT_OK

    def _run(self, member: Member) -> None:
        """Runs a member to its end, unless the pool stops."""
        slot, began, path = self._slots.get(), time.monotonic(), self._logs / f"{member.name}.log"
        try:
            with path.open("ab") as log, self._lock:
                if self._stopping:
                    return
                offset = log.tell()
                self._running[member.name] = process = subprocess.Popen(
                    [sys.executable, "-m", "megamix", "train", argument(member.path), *self._overrides],
                    env=os.environ | _environment(member, slot, self._at_once),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=functools.partial(_set_apart, os.getpid()),
                )
            code = process.wait()
        finally:
            self._slots.put(slot)
        with self._lock:
            del self._running[member.name]
            self._note(member, code, time.monotonic() - began, path, offset)

    def _note(self, member: Member, code: int, seconds: float, path: Path, offset: int) -> None:
        """Notes how a member has ended."""
        log = get_logger()
        if code == EXIT_OK and member.is_done:
            self._done += 1
            log.info("member %s: done in %.0f s, %d of %d", member.name, seconds, self._done, self._total)
        elif self._stopping:
            log.info("member %s: stopped", member.name)
        else:
            self._failed[member.name] = reason = _reason(code, path, offset)
            log.error("member %s: failed: %s", member.name, reason)

    def _pass_on(self, number: int, *, again: bool) -> None:
        if again:
            get_logger().warning("asked a second time: the members are ended")
        else:
            name, running = signal.Signals(number).name, len(self._running)
            get_logger().info("%s: the members that run (%d) save and stop", name, running)
        self._signal(signal.SIGKILL if again else number)

    def _signal(self, number: int) -> None:
        """Sends a signal to the members that run, and begins no others."""
        with self._lock:
            self._stopping = True
            for process in self._running.values():
                process.send_signal(number)


def _set_apart(pool: int) -> None:
    """In a member's process: a process group of its own, so that the terminal's Ctrl-C reaches it through the pool,
    once; and an end with the pool's. `subprocess` knows of groups from Python 3.11 on."""
    os.setpgid(0, 0)
    die_with_parent(pool)


def _environment(member: Member, slot: int, at_once: int) -> dict[str, str]:
    """Variables of a member's process.

    Args:
        slot: which of the members at a time it is.
    """
    engine = member.config.engine
    ranks, gpus = engine.world_size(), _gpus()
    threads = engine.threads or max(1, num_cores() // (ranks * at_once))
    told = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if gpus:
        told["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[(slot * ranks + rank) % len(gpus)] for rank in range(ranks))
    if ranks == 1:
        told |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return told


def _gpus() -> list[str]:
    """The GPUs that this process may use, found without touching them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _reason(code: int, path: Path, offset: int) -> str:
    """Why a member has failed, in a line, from its log after ``offset`` bytes."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    with path.open("rb") as file:
        file.seek(offset)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("megamix: ") for line in lines if line.startswith("megamix: ")]
    if said and not said[-1].startswith("Traceback"):
        return said[-1]
    if code == EXIT_OK:
        return "it ended before its last step, where train.stop_after says"
    return f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"
