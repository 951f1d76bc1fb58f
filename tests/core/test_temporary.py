"""Temporary folders: those of killed processes go with the next start, those in use stay."""

from __future__ import annotations

import errno
import os
import signal
import stat
import tempfile
from pathlib import Path

import pytest

from megamix.core import locks
from megamix.core.temporary import temporary_folder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def start() -> tuple[int, Path]:
    """A process with a folder that it writes to."""
    told, tell = os.pipe()
    process = os.fork()
    if not process:
        with temporary_folder("mm-") as folder:
            (folder / "0").write_text("a reason")
            os.write(tell, str(folder).encode())
            signal.pause()
        os._exit(0)
    return process, Path(os.read(told, 4096).decode())


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_what_killed_processes_left_goes_with_the_next_start(place: Path) -> None:
    living, in_use = start()
    for _ in range(2):
        kill(start()[0])
    others = [place / "other-x", place / "mm-file"]
    others[0].mkdir()
    others[1].touch()
    elsewhere = place / "elsewhere"
    (elsewhere / "kept").mkdir(parents=True)
    (place / "mm-link").symlink_to(elsewhere)
    with temporary_folder("mm-") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        left = {path for path in place.glob("mm-*") if path.is_dir() and not path.is_symlink()}
        assert left == {folder, in_use}
        assert (in_use / "0").read_text() == "a reason"
    assert not folder.exists()
    assert all(path.exists() for path in (*others, elsewhere / "kept"))
    kill(living)


@pytest.mark.parametrize("error", [locks.NoLocks(errno.ENOLCK, "none"), OSError(errno.EBADF, "a folder on NFS")])
def test_where_folders_cannot_be_locked_none_is_taken_for_left_over(
    place: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def take(file: int) -> bool:
        raise error

    left_over = place / "mm-1"
    left_over.mkdir()
    monkeypatch.setattr(locks, "take", take)
    with temporary_folder("mm-") as folder:
        assert folder.is_dir()
    assert left_over.is_dir()
    assert not folder.exists()
