"""``RUN/events.jsonl``: what happened to a run, in the order in which it happened.

A line is ``time`` (seconds since 1970), ``event``, ``step`` (steps taken) and ``text``. Events: ``started``,
``resumed``, ``skipped`` (a step, by the guard), ``preempted``, ``failed`` and ``ended`` (as its config says).
Unlike the run's record it is never cut back on resume: it also tells what was done twice.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from megamix.core.errors import MegamixError
from megamix.core.files import AppendFile
from megamix.core.log import get_logger

EVENTS = "events.jsonl"
Event = Literal["started", "resumed", "skipped", "preempted", "failed", "ended"]


class EventLog:
    """Adds to the events of a run; rank 0 only."""

    def __init__(self, run_dir: Path) -> None:
        self._file = AppendFile(run_dir / EVENTS)

    def note(self, event: Event, step: int, text: str = "") -> None:
        """Adds one; where it cannot be written there is a warning: what it tells of matters more."""
        line: dict[str, Any] = {"time": round(time.time(), 3), "event": event, "step": step, "text": text}
        try:
            self._file.write_line(line)
        except MegamixError as error:
            get_logger().warning("%s", error)

    def close(self) -> None:
        self._file.close()
