"""Current state of a run that may be going on, from its files.

Each look reads only what was added to a file since the last one, the first look no more than its end; a file that a
resume has cut back is read anew.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamix.core.config_files import read_yaml
from megamix.core.errors import InputError
from megamix.core.files import parse_json
from megamix.training.checkpoints.store import LISTING, complete_steps
from megamix.training.records.events import EVENTS
from megamix.training.records.lines import EventLine, MetricsLine, StepLine, WeightsLine, checked
from megamix.training.records.recorded_run import CONFIG, METRICS, WEIGHTS
from megamix.training.records.wide_lines import WideReader, side_path

QUIET_SECONDS = 180.0
_TAIL = 2**20  # bytes read of the end of a file that is there already
_NOTABLE = ("resumed", "incomplete", "skipped", "alert", "preempted", "failed")


class _Tail:
    """Reads the lines that are added to a .jsonl file."""

    def __init__(self, path: Path, kind: type[StepLine]) -> None:
        self._path = path
        self._kind = kind
        self._arrays = WideReader(side_path(path))
        self._file: tuple[int, int] | None = None  # device and inode
        self._offset = 0
        self.modified = 0.0

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The whole lines added since the last call, and whether the file was begun anew."""
        try:
            # Opened anew each time: on NFS that is when another node's changes are looked for.
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                self.modified = status.st_mtime
                anew = self._file != (status.st_dev, status.st_ino) or status.st_size < self._offset
                if anew:
                    self._arrays = WideReader(side_path(self._path))
                    self._file = (status.st_dev, status.st_ino)
                    self._offset = max(0, status.st_size - _TAIL)
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return [], False
        whole = data[: data.rfind(b"\n") + 1]
        texts = whole.split(b"\n")[:-1]
        if anew and self._offset:
            texts = texts[1:]  # begins in the middle of a line
        self._offset += len(whole)
        return [line for text in texts if (line := _parse(text, self._kind, self._arrays)) is not None], anew


def _parse(text: bytes, kind: type[StepLine], reader: WideReader) -> dict[str, Any] | None:
    """A line; None where it is not what a run writes."""
    try:
        line = parse_json(text)
        return checked(line, kind, reader) if isinstance(line, dict) else None
    except (ValueError, InputError):
        return None


@dataclass
class LiveRun:
    """Current state of a run.

    Attributes:
        config: config.resolved.yaml; None until it is there.
        train: the last ``train`` line.
        evaluation: the last ``evaluate`` line.
        loss: by domain, each domain's last training loss.
        weights: the last line of weights.jsonl; ``before`` is the one before it.
        event: the last line of events.jsonl; ``notable`` is the last one that a user may want to know.
        checkpoint: step of the last checkpoint, and the time it was written (seconds since 1970).
    """

    run_dir: Path
    config: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    loss: dict[str, float] = field(default_factory=dict)
    weights: dict[str, Any] | None = None
    before: dict[str, Any] | None = None
    event: dict[str, Any] | None = None
    notable: dict[str, Any] | None = None
    checkpoint: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        self._metrics = _Tail(self.run_dir / METRICS, MetricsLine)
        self._ledger = _Tail(self.run_dir / WEIGHTS, WeightsLine)
        self._events = _Tail(self.run_dir / EVENTS, EventLine)
        self._heard: float | None = None

    def look(self) -> None:
        """Reads the new lines of all files.

        Raises:
            InputError: the config is not that of a run.
        """
        try:
            config = read_yaml(self.run_dir / CONFIG)
        except InputError:  # not there yet, or being written
            return
        self.config = _checked(config, self.run_dir / CONFIG)
        self._read_metrics()
        lines, anew = self._ledger.read()
        if anew:
            self.weights = self.before = None
        for line in lines:
            self.before, self.weights = self.weights, line
        for line in self._events.read()[0]:
            self.event = line
            if line.get("event") in _NOTABLE:
                self.notable = line
        self.checkpoint = _last_checkpoint(self.run_dir / "checkpoints")

    def _read_metrics(self) -> None:
        lines, anew = self._metrics.read()
        if anew:
            self.train = self.evaluation = None
            self.loss = {}
        for line in lines:
            if line.get("event") == "train":
                self.train = line
                self.loss |= {name: loss for name, loss in line["domain_loss"].items() if loss is not None}
            elif line.get("event") == "evaluate":
                self.evaluation = line
        now = time.monotonic()
        if lines:
            # Lines from before the first look have the file's age.
            age = max(0.0, time.time() - self._metrics.modified) if self._heard is None else 0.0
            self._heard = now - age

    @property
    def steps(self) -> int:
        """Steps of the whole run, from its config."""
        return self.config["train"]["steps"] if self.config else 0

    @property
    def step(self) -> int:
        """Steps taken, as far as recorded."""
        lines = [line for line in (self.train, self.evaluation) if line is not None]
        return max((int(line["step"]) for line in lines), default=0)

    @property
    def is_done(self) -> bool:
        """Whether the run has ended; one that was stopped or has failed may go on."""
        if self.event is not None:
            return self.event["event"] == "ended"
        return bool(self.config) and self.evaluation is not None and self.evaluation["step"] >= self.steps

    @property
    def is_going_on(self) -> bool:
        """Whether its files say so; a killed process records no end."""
        return not self.is_done and (self.event is None or self.event["event"] not in ("preempted", "failed"))

    @property
    def seconds_left(self) -> float | None:
        if self.train is None or "step_seconds" not in self.train or not self.is_going_on:
            return None
        return (self.steps - self.step) * self.train["step_seconds"]

    @property
    def quiet(self) -> float:
        """Seconds without a new line of metrics.jsonl; 0 while that is nothing unusual."""
        if self._heard is None or not self.is_going_on or not self.config:
            return 0.0
        between = self.config["log"]["every"] * self.train.get("step_seconds", 0.0) if self.train else 0.0
        silence = time.monotonic() - self._heard
        return silence if silence > max(QUIET_SECONDS, 3 * between) else 0.0


def _checked(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config, whose keys that are read here have been checked; a custom mixer's code may be missing."""
    for section, key in (("train", "steps"), ("log", "every")):
        values = config.get(section)
        value = values.get(key) if isinstance(values, dict) else None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**53:
            raise InputError(
                f"{path}: {section}.{key} is {value!r}, expected a whole number above 0. Put back the file that the run "
                "wrote."
            )
    return config


def _last_checkpoint(folder: Path) -> tuple[int, float] | None:
    try:
        step = max(complete_steps(folder))
        return step, (folder / f"step_{step}" / LISTING).stat().st_mtime
    except (OSError, ValueError):
        return None
