"""A real Slurm with a controller and two nodes on this machine, in namespaces of its own.

The whole cluster is one PID namespace: closing the standard input of its first process ends every daemon and every job,
and so does the end of this process, however it comes. Each node is a PID namespace in it, with an address and a host
name, so that a node can be cut off as by a loss of power. Ports and addresses are seen by nobody else.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter", "ip")
UP_SECONDS = 60.0
JOB_SECONDS = 300.0
PREFIX = "/tmp/mmslurm"


class NoCluster(Exception):
    """This machine cannot have one; the message says why."""


class Cluster:
    """A cluster that is up; to be closed.

    Attributes:
        folder: its files, logs of the daemons among them.
        programs: a folder for PATH with Slurm's commands, of this cluster.

    Args:
        missed: seconds after which a node that says nothing is down.
    """

    def __init__(self, nodes: int = 2, missed: int = 300) -> None:
        check_machine()
        # A short path: munge's socket is in it.
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self.programs = self.folder / "bin"
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        flags = ("--pid", "--fork", "--kill-child", "--mount-proc", "--net", "--mount", "--uts")
        command = ["unshare", *flags, "bash", str(HERE / "cluster.sh"), str(self.folder), str(nodes), str(missed)]
        with (self.folder / "cluster.log").open("wb") as log:
            self._first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        try:
            self._wait_for("up", self._log_says_up)
            self._write_wrappers()
            for number in range(1, nodes + 1):
                self.start_node(number)
            self._wait_for("idle nodes", lambda: self.states() == ["idle"] * nodes)
        except BaseException:
            self.close()
            raise

    def _write_wrappers(self) -> None:
        """Slurm's commands for who is not in the namespaces."""
        self.programs.mkdir()
        for name in ("sbatch", "squeue", "scancel", "scontrol", "sinfo"):
            path = self.programs / name
            before, after = map(shlex.join, (self._inside(), self._settings()))
            path.write_text(f'#!/bin/sh\nexec {before} env --chdir="$PWD" {after} {name} "$@"\n', encoding="utf-8")
            path.chmod(0o755)

    def start_node(self, number: int) -> None:
        """Powers a node on."""
        command = [*self._inside(), "bash", str(HERE / "node.sh"), str(self.folder), str(number)]
        with (self.folder / f"node{number}.log").open("ab") as log:
            self._nodes[number] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)

    def cut_node(self, number: int) -> None:
        """Kills everything on a node, slurmd included, at once."""
        process = self._nodes.pop(number)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(UP_SECONDS)

    def states(self) -> list[str]:
        """The state of each node."""
        done = self.run("sinfo", "--noheader", "--Node", "--format", "%T", check=False)
        return done.stdout.split()

    def command(self, *arguments: object, cwd: Path | None = None) -> list[str]:
        """The command line that runs a command where the controller is; it begins in ``cwd``."""
        place = [f"--chdir={cwd}"] if cwd is not None else []
        return [*self._inside(), "env", *place, *self._settings(), *map(str, arguments)]

    def run(
        self, *arguments: object, cwd: Path | None = None, check: bool = True, environment: Mapping[str, str] = {}
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command where the controller is."""
        done = subprocess.run(
            self.command(*arguments, cwd=cwd),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=UP_SECONDS,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done

    def submit(self, *arguments: object, cwd: Path, **environment: str) -> int:
        """``sbatch ARGUMENTS``; returns the job's number."""
        return int(self.run("sbatch", "--parsable", *arguments, cwd=cwd, environment=environment).stdout)

    def field(self, job: int | str, name: str) -> str:
        """What ``scontrol show job`` says of a job under a name, for example JobState."""
        shown = self.run("scontrol", "show", "job", "-o", job).stdout
        return shown.split(f" {name}=", 1)[1].split()[0]

    def wait(self, job: int | str, *states: str, seconds: float = JOB_SECONDS) -> str:
        """Waits until a job is in one of some states, by default those it ends in; returns the state."""
        ends = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        deadline = time.monotonic() + seconds
        while (state := self.field(job, "JobState")) not in ends:
            assert time.monotonic() < deadline, self.run("scontrol", "show", "job", job).stdout
            time.sleep(0.2)
        return state

    def cancel_all(self) -> None:
        """Ends every job and waits for the nodes to be free of them."""
        jobs = self.run("squeue", "--noheader", "--format", "%A").stdout.split()
        if jobs:
            self.run("scancel", "--signal=KILL", "--full", *jobs, check=False)
            self.run("scancel", *jobs)
        self._wait_for("an empty queue", lambda: not self.run("squeue", "--noheader").stdout.strip())

    def close(self) -> None:
        """Ends the cluster and all that runs on it."""
        for process in (*self._nodes.values(), self._first):
            assert process.stdin is not None
            process.stdin.close()
        self._first.terminate()  # Its child, the first process of the namespace, goes with it.
        self._first.wait(UP_SECONDS)
        for process in self._nodes.values():
            process.wait(UP_SECONDS)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _inside(self) -> Sequence[str]:
        """What puts a command into the cluster's namespaces."""
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text(encoding="utf-8").split()
        return ("nsenter", "--target", children[0], "--mount", "--uts", "--net", "--pid", "--")

    def _settings(self) -> Sequence[str]:
        """Variables of a command in there: `programs`, of this cluster or another, is for those outside."""
        path = [folder for folder in os.environ["PATH"].split(":") if not folder.startswith(PREFIX)]
        return (f"PATH={':'.join(path)}", f"SLURM_CONF={self.folder}/etc/slurm.conf")

    def _log_says_up(self) -> bool:
        if self._first.poll() is not None:
            raise NoCluster(f"it does not start here: {self.daemon_logs()}")
        return "up\n" in (self.folder / "cluster.log").read_text(encoding="utf-8")

    def daemon_logs(self) -> str:
        """The last lines of every daemon's log."""
        paths = sorted((*self.folder.glob("*.log"), *self.folder.glob("log/*.log")))
        return "\n".join(f"{path.name}: {path.read_text(encoding='utf-8')[-600:]}" for path in paths)

    def _wait_for(self, what: str, ready: object) -> None:
        assert callable(ready)
        deadline = time.monotonic() + UP_SECONDS
        while not ready():
            assert time.monotonic() < deadline, f"waited {UP_SECONDS} s for {what}: {self.daemon_logs()}"
            time.sleep(0.05)


def check_machine() -> None:
    """Raises `NoCluster` where this machine cannot have one."""
    if os.geteuid() != 0:
        raise NoCluster("it needs root, for its namespaces and for slurmd")
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise NoCluster(f"these programs are not installed: {', '.join(missing)} (.ci/run installs them)")
    tried = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "--net", "--uts", "ip", "link", "add", "br0", "type", "bridge"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        raise NoCluster(f"namespaces or bridges are refused here: {tried.stderr.strip()}")
