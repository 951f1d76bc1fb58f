"""Events of a run: ``RUN/events.jsonl``, in the order in which they happened.

A line is ``time`` (seconds since 1970), ``event``, ``step`` (steps taken) and ``text``. Events: ``started``,
``resumed``, ``incomplete`` (a resume found that the record had lost lines), ``skipped`` (a step, by the guard),
``steered`` (a command of `megamix steer`, or a line of its journal that is none), ``alert``
(`megamix.training.alerts`; with ``alert``, its kind, ``domain`` and its numbers), ``preempted``, ``failed`` and
``ended`` (as its config says).
Unlike the record it is never cut back on resume, so it shows steps that were done twice.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from megamix.core.errors import MegamixError
from megamix.core.files import AppendFile
from megamix.core.log import get_logger

EVENTS = "events.jsonl"
Event = Literal["started", "resumed", "incomplete", "skipped", "steered", "alert", "preempted", "failed", "ended"]


class EventLog:
    """Writer of the events of a run; rank 0 only."""

    def __init__(self, run_dir: Path) -> None:
        self._file = AppendFile(run_dir / EVENTS)

    def note(self, event: Event, step: int, text: str = "", **more: Any) -> None:
        """Adds an event; a failure to write is only a warning, as the event itself matters more."""
        line: dict[str, Any] = {"time": round(time.time(), 3), "event": event, "step": step, "text": text, **more}
        try:
            self._file.write_line(line)
        except MegamixError as error:
            get_logger().warning("%s", error)

    def close(self) -> None:
        self._file.close()
