"""File locks: shared and not, of holders that are dying, and on file systems that have none or fail."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest

from megamix.core import locks
from megamix.core.errors import InputError, MegamixError
from megamix.core.processes import process_began


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_only_shared_locks_go_together(tmp_path: Path, first: bool, second: bool) -> None:
    path = tmp_path / "lock"
    together = nullcontext() if first and second else pytest.raises(InputError, match=r"^held$")
    with locks.hold(path, "held", shared=first), together, locks.hold(path, "held", shared=second):
        pass
    with locks.hold(path, "held"):
        pass


# Holders that are dying


@contextmanager
def held_by_what_is_left(path: Path) -> Iterator[Callable[[], None]]:
    """The lock of a process that is killed, which another has been given, as ranks are; gives what ends the other."""
    told, tell = os.pipe()
    process = os.fork()
    if not process:
        with locks.hold(path, "held"):
            other = os.fork()
            if other:
                os.write(tell, str(other).encode())
            signal.pause()
    other = int(os.read(told, 100))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    try:
        yield lambda: os.kill(other, signal.SIGKILL)
    finally:
        with suppress(ProcessLookupError):
            os.kill(other, signal.SIGKILL)


def test_the_lock_of_a_dead_process_is_waited_for(tmp_path: Path) -> None:
    """Something of it still holds it for a moment: its threads, or what it has started."""
    path = tmp_path / "lock"
    with held_by_what_is_left(path) as end:
        with path.open("rb") as file:
            assert not locks.take(file.fileno())
        timer = threading.Timer(1.0, end)
        timer.start()
        with locks.hold(path, "held"):
            assert json.loads(path.read_text())["process"] == os.getpid()
        timer.join()


def test_what_outlives_its_process_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "DYING_SECONDS", 0.3)
    path = tmp_path / "lock"
    with (
        held_by_what_is_left(path),
        pytest.raises(InputError, match=r"^held$"),
        locks.hold(path, "held"),
    ):
        pass


def test_a_living_holder_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", pytest.fail)
    with (
        locks.hold(tmp_path / "lock", "held"),
        pytest.raises(InputError, match=r"^held$"),
        locks.hold(tmp_path / "lock", "held"),
    ):
        pass


def test_who_is_dead() -> None:
    here, process = socket.gethostname(), os.getpid()
    began = process_began(process)
    assert began is not None
    assert not locks.is_dead({})
    assert not locks.is_dead({"host": here, "process": process, "began": began})
    assert not locks.is_dead({"host": here, "process": process})
    assert locks.is_dead({"host": here, "process": process, "began": began - 1}), "another with its number"
    assert locks.is_dead({"host": here, "process": 2**22 + 1})
    assert not locks.is_dead({"host": "elsewhere", "process": 2**22 + 1})
    assert not locks.is_dead({"host": here, "process": "7"})


# File systems


def failing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_does_not_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    said: list[str] = []
    failing(monkeypatch, number)
    monkeypatch.setattr(locks.get_logger(), "info", lambda text, *values: said.append(text % values))
    with locks.hold(tmp_path / "lock", "held"):
        pass
    assert said == [f"{tmp_path} cannot be locked: see that each job runs only once at a time"]
    with (tmp_path / "lock").open() as file, pytest.raises(locks.NoLocks, match=os.strerror(number)):
        locks.take(file.fileno())


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EINVAL, errno.EBADF])
def test_a_file_system_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """And not taken for one without locks, where two jobs may go on."""
    failing(monkeypatch, number)
    path = tmp_path / "lock"
    with (
        pytest.raises(MegamixError, match=f"cannot lock {path}: {os.strerror(number)}") as failed,
        locks.hold(path, "held"),
    ):
        pass
    assert failed.value.exit_code == 1
    with path.open() as file, pytest.raises(OSError, match=os.strerror(number)) as raised:
        locks.take(file.fileno())
    assert not isinstance(raised.value, locks.NoLocks)
