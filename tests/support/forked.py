"""Processes forked from one that has imported everything: a run then costs its steps, not ten seconds of imports.

Each is a process of its own all the same, with its own environment, standard streams, exit code and ranks. But all have
one hash seed, and find modules imported already; so tests that kill processes, and some that compare runs, start real
ones. As a module it runs processes of both kinds; as a script it is the process that forks.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, ClassVar, NoReturn

# What may differ from the process that forks: nothing that is settled when a module is imported.
FREE = {"PYTHONPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ASK_RANK", "ASK_STEP"}
SPARES = 4  # so many ranks can a starter have before it starts real ones
SWARM_SPARES = 8  # and so many members a swarm
IMPORTED = [
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "megamix.cli",
    "megamix.analysis.doctor",
    "megamix.engines.deepspeed.module",
    "megamix.engines.megatron.engine",
    "megamix.training.run",
    "megamix.training.trainer",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "transformers.models.llama.modeling_llama",
]


@dataclass(frozen=True)
class Command:
    """What ``python ARGUMENTS`` is to do: ``-m MODULE ...`` or ``SCRIPT ...``."""

    arguments: list[str]
    environment: dict[str, str]
    cwd: str
    stdout: str
    stderr: str


def run_processes(
    arguments: Sequence[object],
    environments: Sequence[dict[str, str]],
    *,
    cwd: Path,
    seconds: float,
    fork: bool = True,
    separate: bool = False,
) -> list[subprocess.CompletedProcess[str]]:
    """Runs ``python ARGUMENTS`` once with each environment, all at the same time, and waits for all.

    Args:
        fork: False for real processes. They are real as well with other variables than `FREE`, and where there is a
            GPU: CUDA cannot be used on both sides of a fork.
        separate: keep standard error apart; else it is in ``stdout``.

    Raises:
        AssertionError: they took longer than ``seconds``, and have been killed; with what they said.
    """
    with tempfile.TemporaryDirectory(prefix="megamix-test-") as folder:
        commands = [
            Command([*map(str, arguments)], environment, str(cwd), f"{folder}/out{rank}",
                    f"{folder}/{'err' if separate else 'out'}{rank}")
            for rank, environment in enumerate(environments)
        ]  # fmt: skip
        for path in {path for command in commands for path in (command.stdout, command.stderr)}:
            Path(path).touch()
        run = _fork if fork and all(map(_can_fork, environments)) else _start
        codes = run(commands, seconds)
        said = [tuple(Path(p).read_text(encoding="utf-8") for p in (c.stdout, c.stderr)) for c in commands]
    assert None not in codes, "\n".join([f"killed after {seconds} s", *(part for parts in said for part in parts)])
    return [
        subprocess.CompletedProcess(command.arguments, code or 0, out, err if separate else "")
        for command, code, (out, err) in zip(commands, codes, said, strict=True)
    ]


def _can_fork(environment: dict[str, str]) -> bool:
    from commands import ENVIRONMENT

    changed = {name for name, _ in environment.items() ^ ENVIRONMENT.items()}
    return changed <= FREE and not Path("/dev/nvidiactl").exists()


def _start(commands: Sequence[Command], seconds: float) -> list[int | None]:
    """Starts real processes; their exit codes, or None for those that were killed because time was up."""
    processes = []
    for command in commands:
        with open(command.stdout, "a") as out, open(command.stderr, "a") as err:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command.arguments],
                    env=command.environment,
                    cwd=command.cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                )
            )
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        return [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _fork(commands: Sequence[Command], seconds: float) -> list[int | None]:
    """As `_start`, of forked processes."""
    connection, lines = _forker()
    connection.sendall(json.dumps([asdict(command) for command in commands]).encode() + b"\n")
    pids = json.loads(lines.readline())
    connection.settimeout(seconds)
    try:
        return json.loads(lines.readline())
    except TimeoutError:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _forker.cache_clear()
        return [None] * len(commands)
    finally:
        connection.settimeout(None)


@functools.cache
def _forker() -> tuple[socket.socket, Any]:
    """The process that forks, one for this one; it ends when the connection does."""
    from commands import ENVIRONMENT

    ours, its = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, __file__, str(its.fileno())],
        pass_fds=[its.fileno()],
        env={**ENVIRONMENT, "DS_ACCELERATOR": "cpu"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    its.close()

    def end() -> None:
        ours.shutdown(socket.SHUT_RDWR)
        process.wait()

    atexit.register(end)
    return ours, ours.makefile("r", encoding="utf-8")


# The process that forks, and those it has forked. -------------------------------------------------------------------


class Ranks(subprocess.Popen[Any]):
    """In a forked starter: the ranks of ``python -m megamix`` are not started but are processes that wait for it."""

    waiting: ClassVar[list[tuple[int, int]]] = []  # (process, file that tells it what to be)

    @classmethod
    def prepare(cls, spares: int) -> dict[str, Any] | None:
        """Forks the processes that wait, from a starter that has done nothing yet.

        Returns:
            In the starter nothing; in a rank what it was told to be.
        """
        subprocess.Popen = cls
        for _ in range(spares):
            read, write = os.pipe()
            pid = os.fork()
            if not pid:
                for held in (write, *(file for _, file in cls.waiting)):
                    os.close(held)
                cls.waiting = []
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: as ranks, not outlive the starter
                with os.fdopen(read) as told:
                    said = told.read()
                if not said:  # the starter has ended, and did not need it
                    os._exit(0)
                rank = json.loads(said)
                for number, path in ((1, rank["stdout"]), (2, rank["stderr"])):
                    if path is not None:
                        file = os.open(path, os.O_APPEND | os.O_WRONLY)
                        os.dup2(file, number)
                        os.close(file)
                return rank
            os.close(read)
            cls.waiting.append((pid, write))
        return None

    def _execute_child(self, *given: Any) -> None:
        call = inspect.signature(super()._execute_child).bind(*given).arguments  # pyright: ignore
        outputs = [call[name] for name in ("c2pwrite", "errwrite")]
        piped = call["p2cwrite"] != -1 or any(file != -1 and not S_ISREG(os.fstat(file).st_mode) for file in outputs)
        if piped or list(call["args"][:3]) != [sys.executable, "-m", "megamix"] or not self.waiting:
            super()._execute_child(*given)  # pyright: ignore
            return
        self.pid, file = self.waiting.pop()
        with os.fdopen(file, "w") as telling:
            paths = [None if output == -1 else os.readlink(f"/proc/self/fd/{output}") for output in outputs]
            rank = {"arguments": call["args"][1:], "environment": call["env"], "stdout": paths[0], "stderr": paths[1]}
            json.dump(rank, telling)
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(call[name] for name in ends))  # pyright: ignore


def _serve(connection: socket.socket) -> Command | None:
    """Forks what the other side asks for until it is gone; in a forked process returns what that is to do."""
    for line in connection.makefile("r", encoding="utf-8"):
        pids = []
        for command in json.loads(line):
            pid = os.fork()
            if not pid:
                return Command(**command)
            pids.append(pid)
        connection.sendall(json.dumps(pids).encode() + b"\n")
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        connection.sendall(json.dumps(codes).encode() + b"\n")
    return None


def _redirect(command: Command) -> None:
    os.chdir(command.cwd)
    for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, command.stdout, os.O_APPEND | os.O_WRONLY),
                               (2, command.stderr, os.O_APPEND | os.O_WRONLY)):  # fmt: skip
        file = os.open(path, mode)
        os.dup2(file, number)
        os.close(file)


def _become(arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """Is ``python ARGUMENTS`` from here to its end."""
    os.environ.clear()
    os.environ.update(environment)
    is_module = arguments[0] == "-m"
    sys.path[0] = os.getcwd() if is_module else str(Path(arguments[0]).parent)  # this file's folder until now
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    code: Any = 0
    try:
        if is_module:
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    # The end of a process, without taking thousands of modules apart.
    threading._shutdown()  # pyright: ignore
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _main(connection: socket.socket) -> None:
    for name in IMPORTED:
        with suppress(ModuleNotFoundError):  # an extra that is not installed
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else the first collection of every process copies all memory
    command = _serve(connection)
    connection.close()
    if command is None:
        os._exit(0)
    _redirect(command)
    arguments, environment = command.arguments, command.environment
    if arguments[:2] == ["-m", "megamix"] and "RANK" not in environment:
        told = Ranks.prepare(SWARM_SPARES if "swarm" in arguments else SPARES)
        if told is not None:
            arguments, environment = told["arguments"], told["environment"]
    _become(arguments, environment)


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])))
