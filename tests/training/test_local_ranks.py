"""Starting and watching ranks: what a job says and returns, and that nothing outlives it.

`run_local` starts ``python -m megamix``; here a small script takes the place of that interpreter, so that each rank
runs a few lines of the test's own, in a real process of its own.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from commands import ROOT, RUN_SECONDS

from megamix.core.errors import RankFailed
from megamix.training.job import local_ranks
from megamix.training.job.local_ranks import report_failure, run_local

pytestmark = pytest.mark.usefixtures("outside_of_a_job")
SLEEP = f"time.sleep({2 * RUN_SECONDS})"  # longer than any wait for its end
PRELUDE = """\
import json, os, signal, sys, time
from pathlib import Path
here = Path(__file__).parent
rank = int(os.environ["RANK"])
others_ready = lambda: len(list(here.glob("*.pid"))) == int(os.environ["WORLD_SIZE"])
(here / f"{rank}.new").write_text(str(os.getpid()))
(here / f"{rank}.new").rename(here / f"{rank}.pid")
while not others_ready():
    time.sleep(0.01)
def die():
    (here / "died").touch()
    os.kill(os.getpid(), signal.SIGKILL)
def fail(code, reason):
    (here / "died").touch()
    (Path(os.environ["MEGAMIX_FAILURE_REPORTS"]) / str(rank)).write_text(reason)
    sys.exit(code)
"""


@dataclass
class Job:
    """Ranks with programs of their own, one string of Python each."""

    folder: Path

    def write(self, *programs: str) -> Path:
        """Writes the ranks' programs; returns what takes the place of the Python interpreter."""
        script = self.folder / "rank.py"
        script.write_text(f"{PRELUDE}\nexec({list(programs)!r}[rank])\n", encoding="utf-8")
        interpreter = self.folder / "python"
        command = f"exec {shlex.quote(sys.executable)} -S {shlex.quote(str(script))}"
        interpreter.write_text(f'#!/bin/sh\n[ "$1 $2" = "-m megamix" ] || exit 99\nshift 2\n{command} "$@"\n')
        interpreter.chmod(0o755)
        return interpreter

    def run(self, *programs: str) -> int:
        with mock.patch.object(sys, "executable", str(self.write(*programs))):
            return run_local(["train", "x.yaml"], len(programs), None)

    def start(self, *programs: str) -> subprocess.Popen[str]:
        """The same in a process of its own, to which signals can be sent; returns once all ranks run."""
        driver = (
            "import sys; from megamix.training.job.local_ranks import run_local; from megamix.core.errors import RankFailed\n"
            f"sys.executable = {str(self.write(*programs))!r}\n"
            f"try: sys.exit(run_local([], {len(programs)}, None))\n"
            "except RankFailed as error: sys.exit(f'RankFailed: {error}')\n"
        )
        process = subprocess.Popen([sys.executable, "-c", driver], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: len(self.pids()) == len(programs), "all ranks run")
        return process

    def ended_early(self) -> bool:
        """Whether nobody waited for what sleeps, or for the end of `long_grace`, after the last rank failed."""
        return time.time() - (self.folder / "died").stat().st_mtime < RUN_SECONDS

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.folder.glob("*.pid")]

    def running(self) -> list[int]:
        return [pid for pid in self.pids() if is_running(pid)]


def is_running(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + RUN_SECONDS
    while not done():
        assert time.monotonic() < deadline, f"{what}: not after {RUN_SECONDS} s"
        time.sleep(0.02)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    left = job.running()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == [], "ranks outlived their job"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits, where their length is not what is tested."""
    monkeypatch.setattr(local_ranks, "GRACE_SECONDS", 1.0)


@pytest.fixture
def long_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """So long that a wait in vain shows on the slowest machine."""
    monkeypatch.setattr(local_ranks, "GRACE_SECONDS", 2.0 * RUN_SECONDS)


def test_all_ranks_succeed(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    """Code 0, no word, the ranks' environment, and the caller's signal handlers as they were."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    save = "(here / f'{rank}.json').write_text(json.dumps([dict(os.environ), sys.argv[1:], sys.stdin.read()]))"
    assert job.run(*[f"time.sleep(0.2 * rank); {save}"] * 3) == 0
    assert capfd.readouterr() == ("", "")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    saved = [json.loads((job.folder / f"{rank}.json").read_text()) for rank in range(3)]
    for rank, (environ, arguments, stdin) in enumerate(saved):
        assert (environ["RANK"], environ["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (environ["WORLD_SIZE"], environ["LOCAL_WORLD_SIZE"]) == ("3", "3")
        assert environ["MASTER_ADDR"] == "127.0.0.1"
        assert int(environ["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 3)
        assert (arguments, stdin) == (["train", "x.yaml"], "")
    assert len({environ["MASTER_PORT"] for environ, _, _ in saved}) == 1
    assert not Path(saved[0][0][local_ranks.REPORTS]).exists(), "the folder of reports is gone"
    assert "RANK" not in os.environ


def test_a_stated_reason_is_printed_once(job: Job, hasty: None, capfd: pytest.CaptureFixture[str]) -> None:
    """One rank finds bad input while another still works: its words alone, its exit code, and the other is ended."""
    assert job.run(SLEEP, "fail(2, 'weights sum to 0.')", "") == 2
    assert capfd.readouterr().err == "megamix: weights sum to 0.\n"


def test_the_same_reason_from_all_ranks_is_printed_once(
    job: Job, long_grace: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert job.run(*["fail(3, 'other data than before.')"] * 3) == 3
    assert capfd.readouterr().err == "megamix: other data than before.\n"
    assert job.ended_early(), "nobody is left to wait for"


def test_a_stated_reason_goes_before_what_follows_from_it(
    job: Job, hasty: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ranks that fail because another has gone (exit code 1) are not the cause, even if they are seen first."""
    assert job.run("fail(1, 'connection closed')", "time.sleep(0.3); fail(2, 'bad tokens.')") == 2
    assert capfd.readouterr().err == "megamix: bad tokens.\n"


def test_a_defect_names_its_rank(job: Job, hasty: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert job.run(SLEEP, "fail(1, 'Traceback: boom')", SLEEP) == 1
    assert capfd.readouterr().err == ("megamix: rank 1 of 3: Traceback: boom Ending the ranks that still run (0, 2).\n")


def test_a_rank_that_says_nothing(job: Job, hasty: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert job.run("", "time.sleep(0.3); sys.exit(7)") == 7
    assert capfd.readouterr().err == "megamix: ended with exit code 7.\n"


def test_a_killed_rank_ends_the_others(job: Job) -> None:
    """With the real waits: SIGKILL (as the kernel's when memory runs out) is named with its rank; the sleeping others
    are gone when `run_local` returns."""
    with pytest.raises(RankFailed) as error:
        job.run(SLEEP, "die()", SLEEP)
    assert job.ended_early()
    assert "rank 1 of 3 was ended by signal SIGKILL." in str(error.value)
    assert "Ending the ranks that still run (0, 2)" in str(error.value)
    assert len(job.pids()) == 3
    assert job.running() == []


def test_the_others_get_less_than_20_seconds() -> None:
    """The use of that time is tested below."""
    assert local_ranks.GRACE_SECONDS < 20


def test_ranks_that_ignore_signals_are_ended(job: Job, hasty: None) -> None:
    deaf = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); (here / f'deaf{{rank}}').touch(); {SLEEP}"
    after_both = "\nwhile len(list(here.glob('deaf*'))) < 2: time.sleep(0.01)\n"
    with pytest.raises(RankFailed, match="rank 2 of 3 was ended by signal SIGKILL"):
        job.run(deaf, deaf, after_both + "die()")
    assert job.ended_early()
    assert job.running() == []


def test_the_killed_rank_is_blamed_not_its_survivors(
    job: Job, long_grace: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Survivors lose their connection and fail with exit code 1 and a reason of their own: they are not the cause, and
    nobody waits longer than they take."""
    survivor = "time.sleep(0.5); fail(1, 'connection reset by peer')"
    with pytest.raises(RankFailed, match=r"rank 2 of 3 was ended by signal SIGKILL\. The same command resumes"):
        job.run(survivor, survivor, "die()")
    assert job.ended_early()
    assert "connection reset" not in capfd.readouterr().err


def test_the_killed_rank_is_blamed_not_those_that_abort(job: Job) -> None:
    """Communication libraries end their process with SIGABRT when a peer is gone."""
    with pytest.raises(RankFailed, match="rank 1 of 2 was ended by signal SIGKILL"):
        job.run("time.sleep(0.5); os.abort()", "die()")


# What a rank does that heeds signals: 75 once it was asked, as after a checkpoint.
HEED = """\
import signal
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: asked.append(number))
(here / f"heeds{rank}").touch()
while not asked: time.sleep(0.01)
"""


def start_heeding(job: Job, *programs: str) -> subprocess.Popen[str]:
    parent = job.start(*(HEED + program for program in programs))
    wait_until(lambda: len(list(job.folder.glob("heeds*"))) == len(programs), "all ranks heed signals")
    return parent


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_is_passed_on_and_waited_for(job: Job, number: signal.Signals) -> None:
    slow = "time.sleep(1.0); fail(75, f'saved after signal {int(asked[0])}')"
    parent = start_heeding(job, slow, "fail(75, 'saved, too')")
    parent.send_signal(number)
    _, err = parent.communicate(timeout=RUN_SECONDS)
    assert parent.returncode == 75
    assert err == f"megamix: saved after signal {int(number)}\n"
    assert job.running() == []


def test_ranks_that_finish_all_the_same_are_done(job: Job) -> None:
    parent = start_heeding(job, "pass", "pass")
    parent.send_signal(signal.SIGUSR1)
    assert parent.wait(timeout=RUN_SECONDS) == 0


def test_a_rank_that_fails_while_it_stops_is_a_failure(job: Job) -> None:
    parent = start_heeding(job, "time.sleep(0.5); fail(75, 'saved')", "fail(2, 'the disk is full.')")
    parent.send_signal(signal.SIGTERM)
    _, err = parent.communicate(timeout=RUN_SECONDS)
    assert (parent.returncode, err) == (2, "megamix: the disk is full.\n")


def test_ranks_that_do_not_heed_signals_yet_end_at_once(job: Job) -> None:
    """They have not begun to train: nothing is lost, and the job may be requeued."""
    parent = job.start(SLEEP, HEED + SLEEP)
    parent.send_signal(signal.SIGUSR1)
    _, err = parent.communicate(timeout=RUN_SECONDS)
    assert parent.returncode == 75
    assert err == "megamix: stopped by SIGUSR1 before all ranks were ready to heed it.\n"
    assert job.running() == []


def test_a_second_signal_ends_all_ranks_at_once(job: Job) -> None:
    parent = start_heeding(job, SLEEP, SLEEP)
    parent.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    parent.send_signal(signal.SIGTERM)
    _, err = parent.communicate(timeout=RUN_SECONDS)
    assert (parent.returncode, err) == (1, "RankFailed: stopped by SIGTERM, asked a second time.\n")
    assert job.running() == []


def test_ranks_die_with_a_parent_that_is_killed(job: Job) -> None:
    """SIGKILL leaves the parent no time for anything: the kernel ends the ranks, even those deaf to SIGTERM."""
    parent = job.start(SLEEP, f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}")
    assert len(job.running()) == 2
    parent.kill()
    parent.communicate(timeout=RUN_SECONDS)
    wait_until(lambda: job.running() == [], "the ranks die")


def test_a_failure_outside_of_a_job_goes_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_failure("no such file.")
    assert capsys.readouterr().err == "megamix: no such file.\n"
    os.environ.update({local_ranks.REPORTS: str(tmp_path), "RANK": "3"})
    report_failure("no such file.")
    assert capsys.readouterr().err == ""
    assert (tmp_path / "3").read_text() == "no such file."
