"""Local ranks: the place of a process in its job, and starting the ranks where no launcher has.

torchrun and srun start one process per rank, and their environment says which one this is. Otherwise `run_local` starts
the ranks, watches them, and ends all of them when one dies.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamix.core.errors import EXIT_FAILED, EXIT_OK, EXIT_PREEMPTED, InputError, RankFailed
from megamix.core.processes import die_with_parent, free_port, num_cores
from megamix.core.temporary import temporary_folder
from megamix.training.job.signals import SIGNALS

# A rank that fails of itself closes its connections, so that the others fail too; they get this long to say their own
# reason.
GRACE_SECONDS = 5.0
REPORTS = "MEGAMIX_FAILURE_REPORTS"
"""Environment variable of ranks started here: the folder in which a failing rank leaves its reason."""


def job_world_size() -> int | None:
    """Ranks of the job of this process; None where no launcher has started ranks.

    Puts Slurm's view of the job into the variables that torchrun sets.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    # srun sets this in every task; a batch script outside srun has it not.
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "0"))
    if "SLURM_PROCID" not in os.environ or tasks < 2:
        return None
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    os.environ["WORLD_SIZE"] = str(tasks)
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_host(os.environ.get("SLURM_STEP_NODELIST", "localhost"))
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))
    return tasks


def job_rank() -> int:
    """The rank of this process in its job; 0 outside of a job."""
    return int(os.environ.get("RANK", "0"))


def data_checks(world_size: int | None) -> dict[str, Any]:
    """The part of this rank in checking the data, as arguments of `make_plan`; none for a rank started here, whose
    starter has just done it."""
    if REPORTS in os.environ:
        return {"verify": False}
    rank = job_rank()
    return {"verify": rank == 0, "share": (rank, world_size or 1)}


def _first_host(nodes: str) -> str:
    try:
        found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"the head node of '{nodes}' cannot be found: {error}. Set MASTER_ADDR to the name of the first node."
        ) from error
    return found.stdout.split()[0]


def run_local(
    arguments: Sequence[str], ranks: int, threads: int | None, files: Sequence[int] = (), **variables: str
) -> int:
    """Runs ``python -m megamix ARGUMENTS`` once per rank and waits for all of them.

    Signals that ask to stop are passed on; the ranks save and end with code 75. A second one ends them at once.

    Args:
        files: descriptors that the ranks keep open.
        variables: of their environment.

    Returns:
        The exit code of the job: 0, the code of the rank that failed first, or 75 where it was asked to stop.

    Raises:
        RankFailed: a rank was ended by a signal, or this process was asked to stop twice.
    """
    environment = {
        **os.environ,
        **variables,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    environment.setdefault("OMP_NUM_THREADS", str(threads or max(1, num_cores() // ranks)))
    with temporary_folder("megamix-ranks-") as reports:
        environment[REPORTS] = str(reports)
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "megamix", *arguments],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                pass_fds=tuple(files),
                preexec_fn=functools.partial(die_with_parent, os.getpid()),
            )
            for rank in range(ranks)
        ]
        received: list[int] = []
        previous = {number: signal.signal(number, lambda number, _frame: received.append(number)) for number in SIGNALS}
        try:
            return _watch(processes, received, reports)
        finally:
            _end(processes)
            for number, handler in previous.items():
                signal.signal(number, handler)


def report_failure(message: str) -> None:
    """Reports why this process fails: to the starter of the ranks, which prints one reason, else to standard error."""
    folder = os.environ.get(REPORTS)
    if folder:
        # Without it its starter is gone, or this process has no more files to open.
        with contextlib.suppress(OSError):
            (Path(folder) / os.environ["RANK"]).write_text(message, encoding="utf-8")
            return
    with contextlib.suppress(OSError):  # the exit code is left
        print(f"megamix: {message}", file=sys.stderr)


def _watch(processes: list[subprocess.Popen[bytes]], received: list[int], reports: Path) -> int:
    """Waits for the first rank that fails, or for all to finish; passes the first signal of ``received`` on."""
    passed_on = False
    while True:
        codes = [process.poll() for process in processes]
        if all(code == EXIT_OK for code in codes):
            return EXIT_OK
        if passed_on and -received[0] in codes:
            name = signal.Signals(received[0]).name
            print(f"megamix: stopped by {name} before all ranks were ready to heed it.", file=sys.stderr)
            return EXIT_PREEMPTED
        if any(code not in (None, EXIT_OK) for code in codes):
            return _explain(processes, reports)
        if len(received) > 1:
            raise RankFailed(f"stopped by {signal.Signals(received[1]).name}, asked a second time.")
        if received and not passed_on:
            passed_on = True
            for process in processes:
                process.send_signal(received[0])
        time.sleep(0.05)


def _explain(processes: list[subprocess.Popen[bytes]], reports: Path) -> int:
    """Prints the reason of the rank that probably failed first; returns its exit code."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    codes = {rank: process.returncode for rank, process in enumerate(processes)}
    running = [str(rank) for rank, code in codes.items() if code is None]
    others = f" Ending the ranks that still run ({', '.join(running)})." if running else ""
    failed = [rank for rank, code in codes.items() if code not in (None, EXIT_OK)]
    # A rank that the watchdog of another told to end leaves no reason of its own.
    rank = min(failed, key=lambda rank: (_blame(codes[rank]), not (reports / str(rank)).is_file()))
    code = codes[rank]
    who = f"rank {rank} of {len(processes)}"
    if code < 0:
        raise RankFailed(
            f"{who} was ended by signal {signal.Signals(-code).name}.{others} "
            "The same command resumes the run from its last checkpoint."
        )
    report = reports / str(rank)
    message = report.read_text(encoding="utf-8") if report.is_file() else f"ended with exit code {code}."
    print(f"megamix: {message}" if code != EXIT_FAILED else f"megamix: {who}: {message}{others}", file=sys.stderr)
    return code


def _blame(code: int) -> int:
    """Orders exit codes by how likely they are the cause: a stated reason, a signal, then what may follow from another
    rank's end: gloo and NCCL abort, or raise, when a peer is gone. A rank that stopped as it was asked to is none."""
    if code == EXIT_PREEMPTED:
        return 3
    if code in (EXIT_FAILED, -signal.SIGABRT):
        return 2
    return 1 if code < 0 else 0


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Kills the ranks that still run: other signals only make them wait for the next step, which never comes.

    Nothing is lost by that, as files are there whole or not at all.
    """
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
