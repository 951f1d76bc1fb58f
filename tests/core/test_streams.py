"""A command whose output cannot be written, or whose path no file system takes: one error, and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import ENVIRONMENT, ROOT, SUPPORT

LONG = "a" * 5000
CLOSED = "megamix: cannot write to standard output: it is closed. Send it elsewhere.\n"
FULL = "megamix: cannot write to standard output: No space left on device. Send it elsewhere.\n"
TOO_LONG = f"megamix: {LONG[:120]}...: File name too long. Give a shorter path.\n"

CASES: dict[str, tuple[dict[str, Any], int, str]] = {
    "doctor >&-": ({"arguments": ["doctor"], "closed": [1]}, 1, CLOSED),
    "doctor > /dev/full": ({"arguments": ["doctor"], "full": [1]}, 1, FULL),
    "--help > /dev/full": ({"arguments": ["--help"], "full": [1]}, 1, FULL),
    "doctor >&- 2>&-": ({"arguments": ["doctor"], "closed": [1, 2]}, 1, ""),
    "inspect missing 2> /dev/full": ({"arguments": ["inspect", "missing"], "full": [2]}, 2, ""),
    **{
        f"{' '.join([name, *more])} TOO LONG": ({"arguments": [name, *more, LONG]}, 2, TOO_LONG)
        for name, *more in (["inspect"], ["plot"], ["report"], ["replay"], ["inspect", "--follow"])
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and standard error of every case."""
    folder = tmp_path_factory.mktemp("streams")
    cases = json.dumps([case for case, _, _ in CASES.values()])
    command = [sys.executable, str(SUPPORT / "closed_streams.py"), str(folder), cases]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = [path.read_text() if (path := folder / f"{number}.2").exists() else "" for number in range(len(CASES))]
    return dict(zip(CASES, zip(json.loads(done.stdout), said, strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_one_error_and_its_exit_code(found: dict[str, tuple[int, str]], name: str) -> None:
    _, code, said = CASES[name]
    assert found[name] == (code, said)


def test_a_file_opened_later_does_not_become_a_closed_stream(tmp_path: Path) -> None:
    """What prints must not print into a file that took the free number."""
    code = (
        "from megamix.core.streams import open_streams; open_streams(); "
        f"file = open({str(tmp_path / 'file')!r}, 'w'); assert file.fileno() > 2; file.write('kept')"
    )
    done = subprocess.run(["sh", "-c", f'{sys.executable} -c "{code}" <&- >&- 2>&-'], env=ENVIRONMENT, timeout=300)
    assert (done.returncode, (tmp_path / "file").read_text()) == (0, "kept")
