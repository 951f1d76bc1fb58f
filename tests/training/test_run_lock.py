"""One job at a time in a run directory: real processes that hold its lock, and are killed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Never

import pytest
from commands import ENVIRONMENT, ROOT

from megamix.core.errors import InputError, MegamixError
from megamix.training.job import lock
from megamix.training.job.lock import RunLock

Holder = Callable[..., int]


@pytest.fixture
def holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Holder]:
    """Starts a process that holds the lock of a run, with variables of its environment; returns it once it does."""
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", lock.HELD):
        monkeypatch.delenv(name, raising=False)
    started: list[int] = []

    def hold(run: Path, **environment: str) -> int:
        process = os.fork()
        if not process:
            _hold(run, environment, tmp_path / "held")
        started.append(process)
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        (tmp_path / "held").unlink()
        return process

    yield hold
    for process in started:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def _hold(run: Path, environment: dict[str, str], held: Path) -> Never:
    try:
        os.environ.update(environment)
        with RunLock(run):
            held.touch()
            time.sleep(1000)
    finally:
        os._exit(1)


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_second_job_is_refused_with_the_first_named(holder: Holder, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = holder(run)
    with pytest.raises(InputError) as refused, RunLock(run):
        pass
    assert f"another job works in {run}: process {first} on {socket.gethostname()}, since 20" in str(refused.value)
    assert refused.value.exit_code == 2
    with RunLock(tmp_path / "other"):
        pass


def test_a_killed_job_leaves_no_lock(holder: Holder, tmp_path: Path) -> None:
    for _ in range(3):
        kill(holder(tmp_path / "run"))
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "lock").read_text())["process"] == os.getpid()


def test_a_job_that_ends_gives_the_lock_back(holder: Holder, tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        pass
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path / "run"):
        raise ZeroDivisionError
    holder(tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"[1, 2]", b'{"process": ', b"null"])
def test_what_stands_in_the_file_does_not_matter(holder: Holder, tmp_path: Path, content: bytes) -> None:
    """Of a job long gone, or half written by one that is there."""
    path = tmp_path / "run" / "lock"
    path.parent.mkdir()
    path.write_bytes(content)
    with RunLock(path.parent):
        pass
    holder(path.parent)
    path.write_bytes(content)
    with pytest.raises(InputError, match="another job works in"), RunLock(path.parent):
        pass


def test_a_requeued_job_waits_for_the_lock_of_its_earlier_start(
    holder: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node is gone, and the file server has not noticed yet."""
    first = holder(tmp_path / "run", SLURM_JOB_ID="7")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(InputError, match=r"Slurm job 7"), RunLock(tmp_path / "run"):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    timer = threading.Timer(0.5, lambda: kill(first))
    timer.start()
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "lock").read_text())["slurm_restart"] == "1"
    timer.join()


def test_a_requeued_job_does_not_wait_for_ever(holder: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder(tmp_path / "run", SLURM_JOB_ID="7")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.5)
    with pytest.raises(InputError, match="Slurm job 7"), RunLock(tmp_path / "run"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_filesystem_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    said: list[str] = []
    logger = lock.get_logger()
    monkeypatch.setattr(logger, "warning", lambda text, *values: said.append(text % values))
    with RunLock(tmp_path / "run"):
        pass
    assert said == [
        f"{tmp_path / 'run' / 'lock'} cannot be locked ({os.strerror(number)}): nothing keeps a second job from writing "
        "there too"
    ]


def test_a_filesystem_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(MegamixError, match=r"cannot lock .*run/lock: Input/output error"), RunLock(tmp_path / "run"):
        pass


def test_the_lock_of_a_killed_job_is_waited_for_while_threads_of_it_hold_it(holder: Holder, tmp_path: Path) -> None:
    """Here what holds it is a process that was given its file, as a rank's threads do for seconds after the kill."""
    run = tmp_path / "run"
    kill(holder(run))
    file = os.open(run / "lock", os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    timer = threading.Timer(1.0, lambda: os.close(file))
    timer.start()
    with RunLock(run):
        assert json.loads((run / "lock").read_text())["process"] == os.getpid()
    timer.join()


def test_the_lock_is_for_all_who_may_write_there(tmp_path: Path) -> None:
    """Its mode follows the umask: a group that shares a run shares its lock."""
    before = os.umask(0o002)
    try:
        with RunLock(tmp_path / "run"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "run" / "lock").stat().st_mode) == 0o664


def test_a_run_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"cannot write to .*file/run: .* Choose another"),
        RunLock(tmp_path / "file" / "run"),
    ):
        pass


def test_ranks_keep_the_lock_of_their_starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They need not take it, and it holds until the last of them has ended, also if the starter is killed."""
    run = tmp_path / "run"
    code = "import sys; from pathlib import Path; from megamix.training.job.lock import RunLock\n"
    code += f"with RunLock(Path({str(run)!r})): print('mine', flush=True); sys.stdin.read()"
    with ExitStack() as starter:
        lock = starter.enter_context(RunLock(run))
        rank = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**ENVIRONMENT, **lock.environment},
            pass_fds=lock.files,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert rank.stdout is not None
        assert rank.stdout.readline() == "mine\n"
    with pytest.raises(InputError, match="another job works in"), RunLock(run):
        pass
    rank.communicate()
    with RunLock(run):
        pass
