"""Runs that are killed again and again, at random moments, and started again with the same command."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import RUN_SECONDS, run_megamix
from records import lines, record, samples

from megamix.core import locks
from megamix.data.tokens.manifest import Manifest

MOMENTS = ("loading", "step", "step", "checkpoint", "checkpoint")
VICTIMS = ("rank", "rank", "all", "starter")


@dataclass
class Disturbed:
    """A run and what is done to it.

    Attributes:
        fork: whether processes are forked from one that has imported everything; else they are real ones. While forked
            ranks load, they cannot be told from processes in reserve, and are not chosen.
        kills: what was done, for the messages of failures.
    """

    config: Path
    run: Path
    chance: random.Random
    fork: bool = True
    kills: list[str] = field(default_factory=list)

    def kill_once(self, moment: str | None = None, victim: str | None = None) -> bool:
        """Starts the run, kills one of its processes, or all, and waits until none is left.

        Returns:
            False where the run was done before its moment came.
        """
        moment, victim = moment or self.chance.choice(MOMENTS), victim or self.chance.choice(VICTIMS)
        wanted = 0 if moment != "step" else self._last_step() + self.chance.randint(1, 5)
        done: list[int] = []
        waiter = threading.Thread(target=lambda: done.append(self._start()))
        before = holder_of(self.run)
        waiter.start()
        starter = self._wait_for_starter(before, waiter)
        ranks = children(starter) if starter else []
        if starter and self._wait_for(moment, wanted, waiter):
            ranks = [rank for rank in children(starter) if not self.fork or num_threads(rank) > 1]
            chosen = {"rank": ranks and [self.chance.choice(ranks)], "all": [*ranks, starter], "starter": [starter]}[
                victim
            ]
            self.kills.append(f"{victim} at {moment} {wanted or ''}")
            for process in chosen:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        waiter.join(RUN_SECONDS)
        assert done, f"the starter is still there: {self.kills}"
        self._nobody_is_left(ranks)
        return done[0] != 0

    def finish(self) -> None:
        """The same command once more, undisturbed."""
        run_megamix("train", self.config, fork=self.fork)

    def _start(self) -> int:
        try:
            run_megamix("train", self.config, fork=self.fork)
        except AssertionError:  # ended by us
            return 1
        return 0

    def _last_step(self) -> int:
        return max((line["step"] for line in lines_so_far(self.run / "metrics.jsonl")), default=0)

    def _wait_for_starter(self, before: int | None, waiter: threading.Thread) -> int | None:
        """The process that has taken the lock, once it has started its ranks."""
        deadline = time.monotonic() + RUN_SECONDS
        while waiter.is_alive():
            holder = holder_of(self.run)
            if holder not in (None, before) and children(holder):
                return holder
            assert time.monotonic() < deadline, "no start"
            time.sleep(0.005)
        return None

    def _wait_for(self, moment: str, step: int, waiter: threading.Thread) -> bool:
        """Waits for the moment; False where the run ends before."""
        deadline = time.monotonic() + RUN_SECONDS
        if moment == "loading":
            time.sleep(self.chance.uniform(0, 1.5))
            return waiter.is_alive()
        left_over = set((self.run / "checkpoints").glob("*.partial"))
        while waiter.is_alive():
            if moment == "step" and self._last_step() >= step:
                return True
            if moment == "checkpoint" and set((self.run / "checkpoints").glob("*.partial")) - left_over:
                time.sleep(self.chance.uniform(0, 0.05))
                return True
            assert time.monotonic() < deadline, f"no {moment} {step}"
            time.sleep(0.001)
        return False

    def _nobody_is_left(self, ranks: list[int]) -> None:
        """Waits for the lock as well: a killed rank is a zombie, but holds it, until its last thread has ended."""
        deadline = time.monotonic() + 60  # less than a run takes, which would end them too
        with (self.run / "lock").open("rb") as file:
            while any(map(is_running, ranks)) or not locks.take(file.fileno()):
                assert time.monotonic() < deadline, f"outlived their job: {users(self.run / 'lock')}; {self.kills}"
                time.sleep(0.02)


def holder_of(run: Path) -> int | None:
    """The process that has, or had, the lock of a run."""
    with suppress(OSError, ValueError):
        return json.loads((run / "lock").read_text())["process"]
    return None


def children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def users(path: Path) -> list[int]:
    """Processes other than this one that have a file open."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if entry.samefile(path) and int(entry.parts[2]) != os.getpid():
                found.append(int(entry.parts[2]))
    return found


def num_threads(process: int) -> int:
    """A forked process that waits to be made a rank has one."""
    return len(list(Path(f"/proc/{process}/task").glob("*")))


def is_running(process: int) -> bool:
    """A dead process that nobody has waited for does not run."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def lines_so_far(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def assert_same(run: Path, undisturbed: Path, steps: int, why: object) -> None:
    """Record, samples and last checkpoint are those of the run that nobody disturbed, bit for bit."""
    assert record(run) == record(undisturbed), why
    for path in sorted((undisturbed / "samples").iterdir()):
        assert lines(run / "samples" / path.name) == lines(path), why
    listed = [json.loads((folder / f"checkpoints/step_{steps}/checkpoint.json").read_text())["files"]
              for folder in (run, undisturbed)]  # fmt: skip
    layers = [{name: file["sha256"] for name, file in files.items() if "state.json" not in name} for files in listed]
    assert layers[0] == layers[1], why
    assert len(layers[0]) >= 4, "an embedding, layers and a head"
    assert not list((run / "checkpoints").glob("*.partial")), why


def assert_no_sample_lost_or_doubled(run: Path, steps: int, batch: int, data: Path, seq_length: int) -> None:
    """Every step is there once, with its whole batch; no sample of a domain comes again before all others have."""
    read = samples(run)
    assert sorted(read) == list(range(1, steps + 1))
    assert {len(rows) for rows in read.values()} == {batch}
    by_domain: dict[int, list[int]] = {}
    for step in sorted(read):
        for domain, sample in read[step]:
            by_domain.setdefault(domain, []).append(sample)
    manifest = Manifest.load(data)
    for domain, taken in by_domain.items():
        size = manifest.open_domain(manifest.domain_names[domain]).num_windows(seq_length)
        for start in range(0, len(taken), size):
            epoch = taken[start : start + size]
            assert len(set(epoch)) == len(epoch)
