"""Journal of a run's steering: two files in its directory, neither ever cut back.

``steering.jsonl`` holds the commands, a `SteerCommand` a line, appended by whoever steers. ``steered.jsonl`` holds the
answers of rank 0: ``id``, ``outcome``, ``step`` (steps taken, whose sums it followed), ``effective_step`` and
``position`` of the effect, ``text``. An answer is on disk before any rank is told of the effect, so a run that is
killed after it gives the command the same effect at the same step again.

Outcomes: ``noticed`` (waits for its ``at_step``), ``applied``, ``ignored`` (it cannot be done; the text says why) and
``cancelled`` (undone before its effect).
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import os
import secrets
import socket
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic

from megamix.core import locks
from megamix.core.config import first_problem
from megamix.core.errors import InputError, MegamixError
from megamix.core.files import AppendFile, parse_json, sync_folder
from megamix.core.log import get_logger
from megamix.mixing.steering.command import SteerCommand

JOURNAL, ANSWERS = "steering.jsonl", "steered.jsonl"
NOTICED, APPLIED, IGNORED, CANCELLED = "noticed", "applied", "ignored", "cancelled"


class _Answer(pydantic.BaseModel):
    """A line of the answers, as far as it is read back."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    id: str
    outcome: Literal["noticed", "applied", "ignored", "cancelled"]
    step: int
    effective_step: int
    position: int | None
    text: str

    @pydantic.model_validator(mode="after")
    def _has_a_position(self) -> _Answer:
        if self.position is None and self.outcome != NOTICED:
            raise ValueError(f"{self.outcome}, but nowhere")
        return self


def append_command(folder: Path, parts: Mapping[str, Any]) -> SteerCommand:
    """Adds a command to the journal, whole or not at all; returns it with its id.

    Args:
        parts: keys of `SteerCommand` but for id, time and who.

    Raises:
        InputError: the journal cannot be written to.
    """
    path = folder / JOURNAL
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            # A file system without locks: one writer at a time is likely all the same.
            with contextlib.suppress(locks.NoLocks):
                locks.take(file, wait=True)
            lines = _cut_back(file).count(b"\n")
            who = f"{getpass.getuser()}@{socket.gethostname()}"
            command = SteerCommand(
                id=f"{lines + 1}-{secrets.token_hex(2)}", time=round(time.time(), 3), who=who, **parts
            )
            line = json.dumps(command.model_dump(mode="json", exclude_defaults=True), allow_nan=False) + "\n"
            if os.write(file, line.encode()) < len(line.encode()):  # a disk that has just become full
                _cut_back(file)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)
        finally:
            os.close(file)
        sync_folder(folder)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}. Steer as a user who may write there."
        ) from error
    return command


def read_commands(folder: Path) -> tuple[dict[str, SteerCommand], list[str]]:
    """The commands of a journal by id, in their order, and what is wrong with other lines.

    Raises:
        OSError: the file cannot be read.
    """
    found: dict[str, SteerCommand] = {}
    problems = []
    for number, text in enumerate(_whole_lines(folder / JOURNAL), start=1):
        try:
            command = SteerCommand.model_validate(parse_json(text))
        except (ValueError, TypeError, InputError) as problem:
            problems.append(f"{JOURNAL}, line {number} is no command and is ignored: {first_problem(problem)}")
        else:
            found.setdefault(command.id, command)
    return found, problems


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """The answers to commands, in their order; none where they cannot be read, and without lines that are none."""
    found = []
    with contextlib.suppress(OSError):
        for text in _whole_lines(folder / ANSWERS):
            with contextlib.suppress(ValueError):
                line = parse_json(text)
                _Answer.model_validate(line)
                found.append(line)
    return found


@dataclass
class Journal:
    """Commands of a run, as rank 0 sees them.

    Attributes:
        is_live: whether commands that were never answered are due; else only answered ones, where they took effect.
    """

    folder: Path
    is_live: bool = True

    def __post_init__(self) -> None:
        self._commands: dict[str, SteerCommand] = {}
        self._seen: tuple[int, ...] | None = None
        self._told: set[str] = set()
        self._problems: list[str] = []
        self._file: AppendFile | None = None
        answers = read_answers(self.folder)
        # The order of effects in a step is that of the answers; the last one to a command counts.
        self._recorded = {line["id"]: line["step"] for line in answers if line.get("outcome") != NOTICED}
        self._noticed = {line["id"] for line in answers}

    def read(self) -> list[SteerCommand]:
        """All commands so far."""
        self._look()
        return list(self._commands.values())

    def due(self, step: int, effective_step: int, handled: Collection[str]) -> list[SteerCommand]:
        """The commands whose effect follows from a step, in order.

        Those with an answer come where they did; a command without one, and without ``at_step``, follows after all
        that had come before it.

        Args:
            step: steps taken.
            handled: ids of commands that had their effect.
        """
        self._look()
        waiting = [command for name, command in self._commands.items() if name not in handled]
        if not waiting:
            return []
        places = {name: number for number, name in enumerate(self._recorded)}
        ahead = {each.id: self._recorded[each.id] for each in waiting if self._recorded.get(each.id, -1) >= step}
        again = sorted((each for each in waiting if ahead.get(each.id) == step), key=lambda each: places[each.id])
        if not self.is_live:
            return again
        is_behind = any(at > step for at in ahead.values())
        found = []
        for command in (each for each in waiting if each.id not in ahead):
            if effective_step >= (command.at_step or 0) and not (is_behind and command.at_step is None):
                found.append(command)
            elif command.at_step is not None and command.id not in self._noticed:
                self._noticed.add(command.id)
                self.answer(command.id, NOTICED, step, command.at_step, None)
        return [*again, *found]

    def is_waiting(self, name: str, handled: Collection[str]) -> bool:
        """Whether a command had no effect yet."""
        return name in self._commands and name not in handled

    def answer(
        self, name: str, outcome: str, step: int, effective_step: int, position: int | None, text: str = ""
    ) -> bool:
        """Makes an answer safe on disk; False, and a warning, where that fails: the command is then not to have its
        effect yet."""
        if not self.is_live:
            return True
        line: dict[str, Any] = {"id": name, "outcome": outcome, "step": step, "effective_step": effective_step}
        line |= {"position": position, "time": round(time.time(), 3), "text": text}
        try:
            if self._file is None:
                self._file = _open_answers(self.folder)
            self._file.write_line(line)
            self._file.sync()
        except (OSError, MegamixError) as problem:
            self._file = None
            self._warn(f"steering {name} waits: {problem}")
            return False
        return True

    def take_problems(self) -> list[str]:
        """What is wrong with lines that are no commands, since the last call."""
        found, self._problems = self._problems, []
        return found

    def _look(self) -> None:
        """Reads the journal where it has changed."""
        try:
            status = (self.folder / JOURNAL).stat()
            seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if seen == self._seen:
                return
            self._commands, problems = read_commands(self.folder)
        except FileNotFoundError:
            return
        except OSError as problem:
            self._warn(f"{self.folder / JOURNAL} cannot be read: {problem.strerror or problem}")
            return
        self._seen = seen
        for problem in problems if self.is_live else ():
            if self._warn(problem):
                self._problems.append(problem)

    def _warn(self, text: str) -> bool:
        """Logs a text, the first time; returns whether it was."""
        is_new = text not in self._told
        if is_new:
            self._told.add(text)
            get_logger().warning("%s", text)
        return is_new


def _open_answers(folder: Path) -> AppendFile:
    path = folder / ANSWERS
    if path.is_file():
        file = os.open(path, os.O_RDWR)
        try:
            _cut_back(file)
        finally:
            os.close(file)
    return AppendFile(path)


def _cut_back(file: int) -> bytes:
    """Drops a last line that was cut off in writing, which nobody has read; returns the others."""
    data = os.pread(file, os.fstat(file).st_size, 0)
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.ftruncate(file, len(whole))
    return whole


def _whole_lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
