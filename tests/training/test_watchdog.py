"""The watchdog of a job's ranks: real processes, really killed, stopped and hung. Nobody else watches them here, as is
so across the nodes of torchrun or srun."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any, Never

import pytest
from watched_ranks import (
    Program,
    Ranks,
    after,
    break_down,
    die,
    finish,
    hang,
    lose_connection,
    refuse,
    spin,
    stop,
)

from megamix.core.errors import MegamixError, Preempted
from megamix.training.config import WatchdogConfig
from megamix.training.job.local_ranks import REPORTS
from megamix.training.job.watchdog import Watchdog, joining
from megamix.training.job.watchdog.joining import Invitation, invite, join

pytest_plugins = ["watched_job"]


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
        assert "step 4, evaluating, at support/watched_ranks.py:" in job.said(rank)
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


def test_without_limits_there_is_no_watchdog() -> None:
    def share(invitation: Any) -> Never:
        raise AssertionError("it must not even look for the others")

    watchdog = Watchdog(WatchdogConfig(silence_seconds=0, stall_minutes=0), 0, 2)
    watchdog.start(share)
    watchdog.progress(1, "training")
    watchdog.fail(ValueError())
    watchdog.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


# Where it listens


def test_a_rank_that_cannot_reach_rank_0_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(joining, "JOIN_SECONDS", 0.5)
    server, invitation = invite()
    server.close()
    nearby = Invitation(("127.0.0.1",), invitation.port, "", "", 0)
    with pytest.raises(MegamixError, match=r"rank 3 cannot reach rank 0's watchdog .*watchdog.silence_seconds=0"):
        join(nearby, 3)


ANYWHERE = ("::", "0.0.0.0")


@pytest.mark.parametrize(
    ("master", "known", "addresses"),
    [
        ("127.0.0.1", [], ("127.0.0.1",)),
        ("localhost", [], ("127.0.0.1",)),
        ("127.0.0.2", [], ("127.0.0.2",)),  # as any other address of this machine
        ("192.0.2.1", [], ANYWHERE),  # of a router before it
        ("head", ["127.0.1.1"], ANYWHERE),  # its own name for itself
        ("head", ["192.0.2.1"], ANYWHERE),
        ("head", ["192.0.2.1", "192.0.2.2"], ANYWHERE),
        ("head", None, ANYWHERE),
        ("", [], ANYWHERE),
    ],
)
def test_it_listens_at_the_address_of_the_job_alone_where_that_can_be_told(
    monkeypatch: pytest.MonkeyPatch, master: str, known: list[str] | None, addresses: tuple[str, ...]
) -> None:
    def getaddrinfo(host: str, port: object, **options: object) -> list[tuple[object, ...]]:
        assert host == master
        if known is None:
            raise socket.gaierror
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in known]

    monkeypatch.setenv("MASTER_ADDR", master)
    monkeypatch.setattr(joining.socket, "getaddrinfo", getaddrinfo)
    server, invitation = invite()
    assert server.getsockname()[0] in addresses
    assert not set(invitation.hosts) & {"", *ANYWHERE}
    server.close()
