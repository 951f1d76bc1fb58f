"""``megamix train`` as a process to be watched and killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from commands import ENVIRONMENT, RUN_SECONDS


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megamix", "train", str(config), *overrides],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + RUN_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").is_file() and any(line["step"] >= step for line in lines_so_far(run)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} not reached; exit code {process.poll()}")


def lines_so_far(run: Path) -> list[dict[str, int]]:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_until_gone(ranks: list[int]) -> None:
    deadline = time.monotonic() + RUN_SECONDS
    while not gone(ranks):
        assert time.monotonic() < deadline, f"of {ranks} some still run"
        time.sleep(0.05)


def gone(ranks: list[int]) -> bool:
    return not any(Path(f"/proc/{rank}").exists() for rank in ranks)
