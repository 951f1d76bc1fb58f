"""The watchdog of a job's ranks: real processes, really killed, stopped and hung. Nobody else watches them here, as is
so across the nodes of torchrun or srun."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Never

import pytest
from commands import RUN_SECONDS

from megamix.core.errors import InputError, MegamixError, Preempted
from megamix.training.config import WatchdogConfig
from megamix.training.job.local_ranks import REPORTS
from megamix.training.job.watchdog import Watchdog, joining
from megamix.training.job.watchdog.joining import Invitation, invite, join

Program = Callable[[Watchdog], None]
NEVER = 0.0


@dataclass
class Ranks:
    """A job: one forked process a rank, each with a watchdog and a program of its own."""

    folder: Path
    processes: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)

    def start(self, *programs: Program, silence: float = 60.0, stall: float = NEVER) -> None:
        """Seconds, both."""
        config = WatchdogConfig(silence_seconds=silence, stall_minutes=stall / 60)
        for rank, program in enumerate(programs):
            process = os.fork()
            if not process:
                self._become(rank, program, config, len(programs))
            self.processes.append(process)

    def _become(self, rank: int, program: Program, config: WatchdogConfig, world_size: int) -> Never:
        code = 70
        try:
            said = os.open(self.folder / f"{rank}.said", os.O_CREAT | os.O_WRONLY)
            os.dup2(said, 1)
            os.dup2(said, 2)
            watchdog = Watchdog(config, rank, world_size)
            watchdog.start(self._share)
            (self.folder / f"{rank}.started").touch()
            while len(list(self.folder.glob("*.started"))) < world_size:
                time.sleep(0.01)
            try:
                program(watchdog)
            except BaseException as error:
                watchdog.fail(error)
                os.write(2, f"own: {error}\n".encode())
                code = error.exit_code if isinstance(error, MegamixError) else 1
            else:
                watchdog.close()
                code = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def _share(self, invitation: Invitation | None) -> Invitation:
        """Rank 0's, to all, in the place of a process group."""
        path = self.folder / "invitation"
        if invitation is not None:
            path.with_suffix(".new").write_text(json.dumps(asdict(invitation)))
            path.with_suffix(".new").rename(path)
        while not path.exists():
            time.sleep(0.01)
        read = json.loads(path.read_text())
        return Invitation(**{**read, "hosts": tuple(read["hosts"])})

    def wait(self, *ranks: int) -> list[int]:
        """The exit codes of some ranks, by default of all, once they have ended."""
        deadline = time.monotonic() + RUN_SECONDS
        wanted = ranks or range(len(self.processes))
        while any(rank not in self.codes for rank in wanted):
            for rank in wanted:
                if rank not in self.codes:
                    process, status = os.waitpid(self.processes[rank], os.WNOHANG)
                    if process:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline, f"ended are {self.codes}; {[self.said(rank) for rank in wanted]}"
            time.sleep(0.02)
        return [self.codes[rank] for rank in wanted]

    def wait_until_started(self) -> None:
        while len(list(self.folder.glob("*.started"))) < len(self.processes):
            time.sleep(0.01)

    def said(self, rank: int) -> str:
        return (self.folder / f"{rank}.said").read_text()


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv(REPORTS, raising=False)
    job = Ranks(tmp_path)
    yield job
    for rank, process in enumerate(job.processes):
        if rank not in job.codes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def hang(watchdog: Watchdog) -> None:
    """As in a collective that another rank will never join."""
    threading.Event().wait()


def die(watchdog: Watchdog) -> None:
    watchdog.progress(12, "saving")
    time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def stop(watchdog: Watchdog) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    hang(watchdog)


def spin(watchdog: Watchdog) -> None:
    watchdog.progress(4, "evaluating")
    while True:
        pass


def refuse(watchdog: Watchdog) -> None:
    raise InputError("bad tokens.")


def break_down(watchdog: Watchdog) -> None:
    raise ZeroDivisionError("division by zero")


def lose_connection(watchdog: Watchdog) -> None:
    raise RuntimeError("Connection closed by peer")


def after(seconds: float, program: Program) -> Program:
    def later(watchdog: Watchdog) -> None:
        time.sleep(seconds)
        program(watchdog)

    return later


def finish(watchdog: Watchdog) -> None:
    pass


# A rank that is gone


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_rank_ends_all_others_with_its_name(job: Ranks, dead: int) -> None:
    """Whichever it is: rank 0, which judges, or another. Every survivor says who it was, where, and what it did."""
    programs = [hang, hang, hang]
    programs[dead] = die
    job.start(*programs, silence=3.0)
    codes = job.wait()
    assert codes.pop(dead) == -signal.SIGKILL
    assert codes == [1, 1]
    who = f"rank {dead} of 3 ({socket.gethostname()}, process {job.processes[dead]}) is gone: its process ended"
    for rank in {0, 1, 2} - {dead}:
        assert who in job.said(rank)
        assert "step 12, saving for " in job.said(rank)
        assert "The same command resumes the run from its last checkpoint." in job.said(rank)
        assert job.said(rank).count("megamix: ") == 1


def test_the_killed_rank_is_blamed_not_those_that_lose_its_connection(job: Ranks) -> None:
    job.start(lose_connection, hang, after(0.3, die))
    assert job.wait() == [1, 1, -signal.SIGKILL]
    for rank in (0, 1):
        assert "rank 2 of 3" in job.said(rank)
        assert "is gone" in job.said(rank)
        assert "Connection closed" not in job.said(rank)


def test_a_rank_that_is_killed_while_others_are_done_already(job: Ranks) -> None:
    """They may be waiting for it in a last barrier."""

    def done_and_waiting(watchdog: Watchdog) -> None:
        watchdog.close()
        hang(watchdog)

    job.start(done_and_waiting, done_and_waiting, after(0.5, die))
    assert job.wait() == [1, 1, -signal.SIGKILL]
    assert "rank 2 of 3" in job.said(0)
    assert "rank 2 of 3" in job.said(1)


# A rank that fails


@pytest.mark.parametrize("failing", [0, 2])
def test_a_stated_reason_is_that_of_all_ranks(job: Ranks, failing: int) -> None:
    """With its exit code; the rank that failed says it itself, the others whose it is."""
    programs: list[Program] = [lose_connection, lose_connection, lose_connection]
    programs[failing] = after(0.5, refuse)
    job.start(*programs)
    assert job.wait() == [2, 2, 2]
    assert job.said(failing) == "own: bad tokens.\n"
    for rank in {0, 1, 2} - {failing}:
        assert f"rank {failing} of 3" in job.said(rank)
        assert job.said(rank).endswith("failed after step 0: bad tokens.\n")
        assert "Connection closed" not in job.said(rank)


def test_the_same_reason_of_all_ranks(job: Ranks) -> None:
    job.start(refuse, refuse, refuse)
    assert job.wait() == [2, 2, 2]
    assert sum(job.said(rank) == "own: bad tokens.\n" for rank in range(3)) == 1
    assert all(job.said(rank).endswith("bad tokens.\n") for rank in range(3))


def test_a_defect_of_one_rank_is_told_to_all(job: Ranks) -> None:
    """Nothing better is heard of, so it is the cause."""
    job.start(hang, break_down, hang)
    assert job.wait() == [1, 1, 1]
    assert job.said(1) == "own: division by zero\n"
    for rank in (0, 2):
        assert "failed after step 0: ZeroDivisionError: division by zero" in job.said(rank)


def test_only_the_rank_that_finds_the_cause_reports_it_to_a_starter(
    job: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that one reason is printed: by the starter of local ranks, from what lies in the folder."""
    reports = tmp_path / "reports"
    reports.mkdir()
    monkeypatch.setenv(REPORTS, str(reports))
    job.start(*[as_rank(rank, program) for rank, program in enumerate((hang, die, hang))])
    assert job.wait() == [1, -signal.SIGKILL, 1]
    assert [path.name for path in reports.iterdir()] == ["0"]
    assert "rank 1 of 3" in (reports / "0").read_text()
    assert [job.said(rank) for rank in range(3)] == ["", "", ""]


def as_rank(rank: int, program: Program) -> Program:
    def run(watchdog: Watchdog) -> None:
        os.environ["RANK"] = str(rank)
        program(watchdog)

    return run


# A rank that is silent, or does not get on


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_and_ends_when_it_goes_on(job: Ranks, stopped: int) -> None:
    programs = [hang, hang, hang]
    programs[stopped] = stop
    job.start(*programs, silence=3.0)
    others = sorted({0, 1, 2} - {stopped})
    assert job.wait(*others) == [1, 1]
    for rank in others:
        assert f"rank {stopped} of 3" in job.said(rank)
        assert re.search(r"has not been heard of for \d+ s \(watchdog.silence_seconds\)", job.said(rank))
    os.kill(job.processes[stopped], signal.SIGCONT)
    assert job.wait(stopped) == [1]


def test_a_rank_that_hangs_in_c_code_with_pythons_lock(job: Ranks) -> None:
    """No thread of Python's can run there: the others end for its silence, it by Python's own timer."""
    job.start(hang, lambda watchdog: ctypes.PyDLL(None).sleep(1000), hang, silence=2.0)
    assert job.wait() == [1, 1, 1]
    assert "rank 1 of 3" in job.said(0)
    assert "Timeout" in job.said(1)
    assert "test_watchdog.py" in job.said(1)


def test_a_job_that_does_not_get_on_ends_and_says_where_each_rank_is(job: Ranks) -> None:
    """One rank spins in Python, and the others wait for it: all three live and are heard of."""
    job.start(hang, spin, hang, stall=3.0)
    assert job.wait() == [1, 1, 1]
    for rank in range(3):
        assert "nothing has advanced for 0.05 min (watchdog.stall_minutes). rank 1 (" in job.said(rank)
        assert "step 4, evaluating, at training/test_watchdog.py:" in job.said(rank)
        assert " in spin; ranks 0, 2 (" in job.said(rank)
        assert " in wait. " in job.said(rank)


def test_a_slow_job_goes_on(job: Ranks) -> None:
    """Longer than both limits as a whole, in steps that are shorter."""

    def work(watchdog: Watchdog) -> None:
        for step in range(14):
            watchdog.progress(step, "training")
            time.sleep(0.4)

    def wait_for_it(watchdog: Watchdog) -> None:
        time.sleep(5.6)

    job.start(wait_for_it, work, wait_for_it, silence=5.0, stall=5.0)
    assert job.wait() == [0, 0, 0]
    assert [job.said(rank) for rank in range(3)] == ["", "", ""]


@pytest.mark.parametrize("first", [0, 2])
def test_ranks_that_end_one_after_the_other_are_no_alarm(job: Ranks, first: int) -> None:
    order = [0, 1, 2] if first == 0 else [2, 1, 0]
    job.start(*[after(0.7 * order[rank], finish) for rank in range(3)])
    assert job.wait() == [0, 0, 0]
    assert [job.said(rank) for rank in range(3)] == ["", "", ""]


def test_a_preempted_rank_is_no_failure(job: Ranks) -> None:
    def be_preempted(watchdog: Watchdog) -> None:
        raise Preempted("saved.")

    job.start(be_preempted, after(0.5, be_preempted), after(1.0, be_preempted))
    assert job.wait() == [75, 75, 75]
    assert [job.said(rank) for rank in range(3)] == ["own: saved.\n"] * 3


# Who takes part


def test_strangers_at_the_port_are_left_out(job: Ranks) -> None:
    """Noise, another job's rank, and one that says nothing: none of them is heard or takes a rank's place."""
    job.start(hang, hang, after(2.0, die))
    job.wait_until_started()
    read = json.loads((job.folder / "invitation").read_text())
    address = ("127.0.0.1", read["port"])
    strangers = [socket.create_connection(address) for _ in range(4)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strangers[1].sendall(b'{"hello": 1, "secret": "guessed", "host": "x", "process": 1}\n{"fail": "x", "code": 9}\n')
    strangers[2].sendall(b"[1]\n\xff\xfe\n")
    time.sleep(0.5)
    strangers[3].close()
    assert job.wait() == [1, 1, -signal.SIGKILL]
    assert "rank 2 of 3" in job.said(0)
    for stranger in strangers:
        stranger.close()


def test_a_rank_that_cannot_reach_rank_0_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(joining, "JOIN_SECONDS", 0.5)
    server, invitation = invite()
    server.close()
    nearby = Invitation(("127.0.0.1",), invitation.port, "", "", 0)
    with pytest.raises(MegamixError, match=r"rank 3 cannot reach rank 0's watchdog .*watchdog.silence_seconds=0"):
        join(nearby, 3)


def test_a_job_on_one_machine_listens_to_that_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    server, _ = invite()
    assert server.getsockname()[0] == "127.0.0.1"
    server.close()
    monkeypatch.setenv("MASTER_ADDR", "head")
    server, invitation = invite()
    assert invitation.hosts[0] == "head"
    assert server.getsockname()[0] in ("::", "0.0.0.0")
    server.close()


def test_without_limits_there_is_no_watchdog() -> None:
    def share(invitation: Any) -> Never:
        raise AssertionError("it must not even look for the others")

    watchdog = Watchdog(WatchdogConfig(silence_seconds=0, stall_minutes=0), 0, 2)
    watchdog.start(share)
    watchdog.progress(1, "training")
    watchdog.fail(ValueError())
    watchdog.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
