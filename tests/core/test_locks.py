"""File locks: shared and not, and on a file system that has none."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from megamix.core import locks
from megamix.core.errors import InputError


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_only_shared_locks_go_together(tmp_path: Path, first: bool, second: bool) -> None:
    path = tmp_path / "lock"
    together = nullcontext() if first and second else pytest.raises(InputError, match=r"^held$")
    with locks.hold(path, "held", shared=first), together, locks.hold(path, "held", shared=second):
        pass
    with locks.hold(path, "held"):
        pass


def test_a_file_system_without_locks_is_named_and_does_not_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    said: list[str] = []
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks.get_logger(), "info", lambda text, *values: said.append(text % values))
    with locks.hold(tmp_path / "lock", "held"):
        pass
    assert said == [f"{tmp_path} cannot be locked: see that each job runs only once at a time"]
    with (tmp_path / "lock").open() as file, pytest.raises(OSError, match=os.strerror(errno.ENOLCK)):
        locks.take(file.fileno())
