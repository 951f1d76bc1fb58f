"""Progress of a corpus build: a row per domain on a terminal, a log line per event elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection

import rich.console
import rich.progress

from megamix.core.log import get_logger
from megamix.prepare.corpus.domain import DomainRecord


class Progress:
    """Told of each stage of each domain, from any thread."""

    def __init__(self, domains: Collection[str], skipped: Collection[str], *, enabled: bool) -> None:
        self._enabled = enabled
        self._bars: rich.progress.Progress | None = None
        self._rows: dict[str, rich.progress.TaskID] = {}
        self._started: dict[str, float] = {}
        self._log = get_logger()
        if enabled and sys.stderr.isatty():
            self._bars = rich.progress.Progress(
                rich.progress.SpinnerColumn(),
                rich.progress.TextColumn("{task.description:<24}"),
                rich.progress.BarColumn(bar_width=20),
                rich.progress.TextColumn("{task.fields[stage]}"),
                rich.progress.TimeElapsedColumn(),
                console=rich.console.Console(stderr=True),
            )
            for domain in domains:
                there = domain in skipped
                self._rows[domain] = self._bars.add_task(
                    domain, start=False, total=1, completed=int(there), stage="there already" if there else "waiting"
                )
        elif enabled and skipped:
            self._log.info("there already: %s", ", ".join(skipped))

    def __enter__(self) -> Progress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars:
            self._bars.stop()

    def stage(self, domain: str, text: str) -> None:
        """The domain has come to a new stage."""
        self._started.setdefault(domain, time.monotonic())
        if self._bars:
            self._bars.start_task(self._rows[domain])
            self._bars.update(self._rows[domain], stage=text, total=None)
        elif self._enabled:
            self._log.info("%s: %s", domain, text)

    def done(self, record: DomainRecord) -> None:
        """The domain is written."""
        seconds = time.monotonic() - self._started[record.domain]
        text = f"{record.documents:,} documents, {record.text_bytes / 1e6:.1f} MB"
        if record.warning:
            text += f"; suspicious: {record.warning}"
        self._finish(record.domain, text, f"{text}, {seconds:.0f} s")

    def failed(self, domain: str, reason: str) -> None:
        """The domain is left out."""
        self._finish(domain, f"left out: {reason}", f"left out: {reason}")

    def _finish(self, domain: str, shown: str, logged: str) -> None:
        if self._bars:
            row = self._rows[domain]
            self._bars.update(row, stage=shown, total=1, completed=1)
            self._bars.stop_task(row)
        elif self._enabled:
            self._log.info("%s: %s", domain, logged)
