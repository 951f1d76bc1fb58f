"""The fixture of a job that only its watchdogs watch."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from watched_ranks import Ranks

from megamix.training.job.local_ranks import REPORTS


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
