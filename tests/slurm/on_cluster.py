"""Jobs in which a stand-in takes the place of Python, and the commands that submit them."""

from __future__ import annotations

import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import Cluster
from typer.testing import CliRunner

from megamix.cli import app

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "slurm"
STAND_IN = Path(__file__).parent / "stand_in.py"
Launch = Callable[..., str]
SECONDS = 300.0  # a job that is requeued may wait for two minutes before Slurm begins it again


def wait_until(what: str, ready: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Fails when it takes longer than ``seconds``."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


class StandIn:
    """A job whose programs are the stand-in.

    Args:
        folder: new; the job begins in it, and logs into ``logs``.
    """

    def __init__(self, slurm: Cluster, folder: Path, **environment: str) -> None:
        folder.mkdir(exist_ok=True)
        self.slurm, self.folder, self.job = slurm, folder, 0
        self.environment = {
            "STAND_IN": str(folder),
            "STAND_IN_PYTHON": sys.executable,
            "MEGAMIX_PYTHON": str(STAND_IN),
            **environment,
        }

    def submit(self, *options: str, script: str = "train.sbatch", arguments: tuple[str, ...] = ("a.yaml",)) -> StandIn:
        """Submits a script of ``slurm/``."""
        command = (*options, SCRIPTS / script, *arguments)
        self.job = self.slurm.submit(*command, cwd=self.folder, **self.environment)
        return self

    def tell(self, name: str, text: str = "yes") -> None:
        """Puts a word for the stand-in."""
        (self.folder / name).write_text(text, encoding="utf-8")

    def events(self, event: str, command: str = "train", restart: int | None = None) -> list[dict[str, Any]]:
        """What the processes of one start of the job, or of all, have left."""
        path = self.folder / "events.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        found = [json.loads(line) for line in lines]
        return [
            line
            for line in found
            if (line["event"], line["command"]) == (event, command)
            and restart in (None, int(line["SLURM_RESTART_COUNT"] or 0))
        ]

    def wait_for(self, event: str, number: int, command: str = "train", restart: int | None = None) -> None:
        """Waits for so many processes to leave an event."""

        def ready() -> bool:
            return len(self.events(event, command, restart)) >= number

        wait_until(f"{number} x {event} of {command}, start {restart}: {self.said()}", ready)

    def said(self) -> str:
        """What the job's script has said."""
        return "\n".join(path.read_text(encoding="utf-8") for path in sorted(self.folder.glob("*.out")))

    def logs(self) -> dict[str, str]:
        """What the ranks have said, by node."""
        paths = sorted((self.folder / "logs").glob(f"{self.job}-*.log"))
        return {path.stem.split("-", 1)[1]: path.read_text(encoding="utf-8") for path in paths}

    def ended(self) -> tuple[str, str, int]:
        """(state, exit code, restarts) once the job has ended."""
        state = self.slurm.wait(self.job)
        code = self.slurm.field(self.job, "ExitCode").split(":")[0]
        return state, code, int(self.slurm.field(self.job, "Restarts"))


def command(*arguments: object) -> str:
    """What ``megamix ARGUMENTS`` prints."""
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def commands(printed: str) -> dict[str, list[str]]:
    """The words of each sbatch command of a dry run, by its step."""
    lines = printed.splitlines()
    found = {}
    for title, line in itertools.pairwise(lines):
        if " sbatch " in line and not line.startswith("#"):
            words = shlex.split(line)
            found[title.removeprefix("# ")] = words[words.index("sbatch") :]
    return found
