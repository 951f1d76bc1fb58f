"""Everything a GPU can say about the loss, from one command: half an hour on any NVIDIA machine.

    python kernels/bench/acceptance.py --out runs/acceptance                # and the same again after an interruption
    python kernels/bench/acceptance.py --out runs/tiny --device cpu         # tiny, interpreted: checks this script

Every measurement is a task with a process of its own, so that an error which spoils a process costs one row. Rows are
appended to OUT/results.jsonl as they come, with the machine, the versions and the date; a task that has rows there is
not run again (--retry: those that failed are). At the end, or when --minutes are over, OUT/results.csv and
OUT/page.md are written from them; what was not measured is named there.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import page  # pyright: ignore[reportMissingImports]
import running  # pyright: ignore[reportMissingImports]
import torch
from tasks import Task, all_tasks  # pyright: ignore[reportMissingImports]

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Results:
    """Rows in OUT/results.jsonl: one measured figure each, or the reason for none."""

    path: Path

    def rows(self) -> list[dict[str, Any]]:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:  # the end of a run that was killed
                continue
        return rows

    def append(self, rows: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            # A leading line feed ends a line that a killed run left.
            file.write("\n" + "\n".join(json.dumps(row) for row in rows) + "\n")

    def finished(self, *, retry: bool) -> set[str]:
        """Keys of the tasks that need not run again."""
        newest = {row["task"]: row for row in self.rows()}
        return {key for key, row in newest.items() if not (retry and row["metric"] == "failed")}


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions, which every row carries."""
    found: dict[str, Any] = {"device": "CPU (times mean nothing)", "driver": None}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
        found["device"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    for package in page.PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def run_task(task: Task, device: str, out: Path, limit: float) -> list[dict[str, Any]]:
    """Returns the figures of one task, from a process of its own; a failure is a row too."""
    file = out / f"task-{os.getpid()}.json"
    paths = [str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    request = json.dumps({**task.arguments, "kind": task.kind, "device": device, "out": str(out), "file": str(file)})
    command = [sys.executable, str(HERE / "measure.py"), request]
    if task.ranks:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(task.ranks)]
        command = [sys.executable, *launcher, *command[1:]]
    ended = running.run(command, variables, limit)
    try:
        if ended.code is None:
            return [{"metric": "failed", "note": f"took more than {limit:.0f} s"}]
        if ended.code or not file.exists():
            said = (ended.stderr.strip() or "nothing").splitlines()[-1]
            return [{"metric": "failed", "note": f"exit {ended.code}: {said[:160]}"}]
        return json.loads(file.read_text(encoding="utf-8"))
    finally:
        file.unlink(missing_ok=True)


def write_tables(results: Results, tasks: list[Task], out: Path) -> None:
    rows = results.rows()
    if rows:
        names = list(dict.fromkeys(name for row in rows for name in row))
        with (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    (out / "page.md").write_text(page.make(rows, [task.key for task in tasks]), encoding="utf-8")
    print(f"{out / 'page.md'}, {out / 'results.csv'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--minutes", type=float, default=30, help="no task begins later, and none goes on")
    parser.add_argument("--only", default="", help="comma-separated beginnings of tasks' names, as --list prints them")
    parser.add_argument("--retry", action="store_true", help="try failed tasks again")
    parser.add_argument("--list", action="store_true", help="print the tasks and end")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU; --device cpu checks the script")
    begun, wanted = time.monotonic(), tuple(arguments.only.split(","))
    gpus = torch.cuda.device_count() if arguments.device == "cuda" else 0
    tasks = [task for task in all_tasks(arguments.device, gpus) if task.key.startswith(wanted)]
    if arguments.list:
        print("\n".join(task.key for task in tasks))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out / "results.jsonl")
    finished, found = results.finished(retry=arguments.retry), environment(arguments.device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for task in tasks:
            left = arguments.minutes * 60 - (time.monotonic() - begun)
            if task.key in finished or left <= 0:
                continue
            # The interpreter takes as long as it takes.
            limit = left if arguments.device == "cpu" else min(task.limit_s, left)
            rows = run_task(task, arguments.device, arguments.out, limit)
            date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            results.append(
                [{"task": task.key, "kind": task.kind, **task.labels, **row, "date": date, **found} for row in rows]
            )
            print(f"{task.key}: " + "; ".join(page.cell(row) for row in rows), flush=True)
    finally:
        write_tables(results, tasks, arguments.out)


if __name__ == "__main__":
    main()
