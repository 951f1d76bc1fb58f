"""Runs that are killed and steered again and again, at random moments, and started again with the same command."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import RUN_SECONDS, run_megamix
from records import lines, record, samples

from megamix.core import locks
from megamix.data.tokens.manifest import Manifest
from megamix.mixing.steering.journal import ANSWERS, JOURNAL, append_command

PHASES = ("locking", "loading", "started", "step", "evaluation", "checkpoint", "sealing", "naming")
"""Of a run's life, each as it begins: the lock is taken, ranks load, the record goes on, a step, an evaluation, the
first file of a checkpoint, its last one, its final name (older ones are removed then)."""
MOMENTS = ("loading", "step", "step", "checkpoint", "checkpoint")
VICTIMS = ("rank", "rank", "all", "starter")
COMMANDS: tuple[dict[str, Any], ...] = (
    {"set": {"code": 0.4}},
    {"pin": {"topics": 0.2}, "ramp_tokens": 4e3},
    {"unpin": ("topics",)},
    {"bounds": {"tables": (0.1, 0.3)}},
    {"hold": True},
    {"hold": False},
    {"mixer": {"name": "odm", "preset": "paper"}},
)
"""What the runs are told. A command that cannot be done where it comes is ignored, which is recorded too."""


@dataclass
class Disturbed:
    """A run and what is done to it.

    Attributes:
        fork: whether processes are forked from one that has imported everything; else they are real ones. While forked
            ranks load, they cannot be told from processes in reserve, and are not chosen.
        evaluate_every: steps between evaluations, as in the config.
        is_steered: whether each start is given commands: one as its ranks load, one as something is killed.
        is_patient: whether to wait until nothing of a killed job is left; else the next start meets what is.
        kills: what was done, for the messages of failures.
    """

    config: Path
    run: Path
    chance: random.Random
    fork: bool = True
    is_patient: bool = True
    evaluate_every: int = 10
    is_steered: bool = False
    kills: list[str] = field(default_factory=list)

    def kill_once(
        self, moment: str | None = None, victim: str | None = None, number: signal.Signals = signal.SIGKILL
    ) -> bool:
        """Starts the run, kills one of its processes, or all, and waits until none is left.

        Args:
            moment: one of `PHASES`; by default chance decides between some of them.
            victim: rank, all or starter; the starter as well where no rank is there yet.
            number: what they are killed by.

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
        self.steer()
        if starter and self._wait_for(moment, wanted, waiter):
            ranks = [rank for rank in children(starter) if not self.fork or num_threads(rank) > 1]
            rank = [self.chance.choice(ranks)] if ranks else [starter]
            chosen = {"rank": rank, "all": [*ranks, starter], "starter": [starter]}[victim]
            self.kills.append(f"{victim} at {moment} {wanted or ''} ({number.name})")
            self.steer()
            for process in chosen:
                with suppress(ProcessLookupError):
                    os.kill(process, number)
        waiter.join(RUN_SECONDS)
        assert done, f"the starter is still there: {self.kills}"
        if self.is_patient:
            self.nobody_is_left(ranks)
        return done[0] != 0

    def steer(self) -> None:
        """Gives the run a command, where it is steered."""
        if self.is_steered:
            append_command(self.run, self.chance.choice(COMMANDS))

    def tell(self, other: Path) -> None:
        """Gives another run, before its start, the same commands, and the steps of their effects."""
        other.mkdir()
        for name in (JOURNAL, ANSWERS):
            shutil.copy(self.run / name, other / name)

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
        if moment == "locking":
            return waiter.is_alive()
        if moment == "loading":
            time.sleep(self.chance.uniform(0, 1.5))
            return waiter.is_alive()
        seen = self._seen()
        while waiter.is_alive():
            if self._has_come(moment, step, seen):
                if moment == "checkpoint":
                    time.sleep(self.chance.uniform(0, 0.05))
                return True
            assert time.monotonic() < deadline, f"no {moment} {step}"
            time.sleep(0.001)
        return False

    def _seen(self) -> dict[str, Any]:
        """What tells the phases from each other."""
        checkpoints = self.run / "checkpoints"
        return {
            "started": len(lines_so_far(self.run / "events.jsonl")),
            "evaluation": self._last_step(),
            "checkpoint": set(checkpoints.glob("*.partial")),
            "sealing": set(checkpoints.glob("*.partial/checkpoint.json")),
            "naming": {path for path in checkpoints.glob("step_*") if not path.suffix},
        }

    def _has_come(self, moment: str, step: int, seen: dict[str, Any]) -> bool:
        if moment == "step":
            return self._last_step() >= step
        now = self._seen()
        if moment == "started":
            return now[moment] > seen[moment]
        if moment == "evaluation":
            last = lines_so_far(self.run / "metrics.jsonl")[-1:]
            return bool(last) and last[0]["event"] == "train" and self._is_evaluated(last[0]["step"], seen[moment])
        return bool(now[moment] - seen[moment])

    def _is_evaluated(self, step: int, before: int) -> bool:
        return step > before and step % self.evaluate_every == 0

    def nobody_is_left(self, ranks: Sequence[int] = ()) -> None:
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
