"""A job whose ranks only their watchdogs watch: forked processes with a program each."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

from commands import RUN_SECONDS

from megamix.core.errors import InputError, MegamixError
from megamix.training.config import WatchdogConfig
from megamix.training.job.watchdog import Watchdog
from megamix.training.job.watchdog.joining import Invitation

Program = Callable[[Watchdog], None]
NEVER = 0.0


@dataclass
class Ranks:
    """A job: one forked process a rank, each with a watchdog and a program of its own."""

    folder: Path
    processes: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)

    def start(self, *programs: Program, silence: float = 60.0, stall: float = NEVER) -> None:
        """Seconds, both."""
        config = WatchdogConfig(silence_seconds=silence, stall_minutes=stall / 60)
        for rank, program in enumerate(programs):
            process = os.fork()
            if not process:
                self._become(rank, program, config, len(programs))
            self.processes.append(process)

    def _become(self, rank: int, program: Program, config: WatchdogConfig, world_size: int) -> NoReturn:
        code = 70
        try:
            said = os.open(self.folder / f"{rank}.said", os.O_CREAT | os.O_WRONLY)
            os.dup2(said, 1)
            os.dup2(said, 2)
            watchdog = Watchdog(config, rank, world_size)
            watchdog.start(self._share)
            (self.folder / f"{rank}.started").touch()
            while len(list(self.folder.glob("*.started"))) < world_size:
                time.sleep(0.01)
            try:
                program(watchdog)
            except BaseException as error:
                watchdog.fail(error)
                os.write(2, f"own: {error}\n".encode())
                code = error.exit_code if isinstance(error, MegamixError) else 1
            else:
                watchdog.close()
                code = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def _share(self, invitation: Invitation | None) -> Invitation:
        """Rank 0's, to all, in the place of a process group."""
        path = self.folder / "invitation"
        if invitation is not None:
            path.with_suffix(".new").write_text(json.dumps(asdict(invitation)))
            path.with_suffix(".new").rename(path)
        while not path.exists():
            time.sleep(0.01)
        read = json.loads(path.read_text())
        return Invitation(**{**read, "hosts": tuple(read["hosts"])})

    def wait(self, *ranks: int) -> list[int]:
        """The exit codes of some ranks, by default of all, once they have ended."""
        deadline = time.monotonic() + RUN_SECONDS
        wanted = ranks or range(len(self.processes))
        while any(rank not in self.codes for rank in wanted):
            for rank in wanted:
                if rank not in self.codes:
                    process, status = os.waitpid(self.processes[rank], os.WNOHANG)
                    if process:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline, f"ended are {self.codes}; {[self.said(rank) for rank in wanted]}"
            time.sleep(0.02)
        return [self.codes[rank] for rank in wanted]

    def wait_until_started(self) -> None:
        while len(list(self.folder.glob("*.started"))) < len(self.processes):
            time.sleep(0.01)

    def said(self, rank: int) -> str:
        return (self.folder / f"{rank}.said").read_text()


def hang(watchdog: Watchdog) -> None:
    """As in a collective that another rank will never join."""
    threading.Event().wait()


def die(watchdog: Watchdog) -> None:
    watchdog.progress(12, "saving")
    time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def stop(watchdog: Watchdog) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    hang(watchdog)


def spin(watchdog: Watchdog) -> None:
    watchdog.progress(4, "evaluating")
    while True:
        pass


def refuse(watchdog: Watchdog) -> None:
    raise InputError("bad tokens.")


def break_down(watchdog: Watchdog) -> None:
    raise ZeroDivisionError("division by zero")


def lose_connection(watchdog: Watchdog) -> None:
    raise RuntimeError("Connection closed by peer")


def after(seconds: float, program: Program) -> Program:
    def later(watchdog: Watchdog) -> None:
        time.sleep(seconds)
        program(watchdog)

    return later


def finish(watchdog: Watchdog) -> None:
    pass
