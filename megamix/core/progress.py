"""Progress of long jobs: rich's bars on a terminal, log lines elsewhere, for example under Slurm."""

from __future__ import annotations

import sys
import threading
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars

from megamix.core.log import get_logger

LOG_EVERY_S = 30.0


class Progress(Bars):
    """Bars of rich on a terminal. Elsewhere they stay hidden, and `say` logs.

    Args:
        enabled: False shows and logs nothing.
    """

    def __init__(self, *columns: ProgressColumn, enabled: bool = True) -> None:
        terminal = sys.stderr.isatty()
        super().__init__(*columns, console=Console(stderr=True), disable=not (enabled and terminal))
        self._logs = enabled and not terminal
        self._said = time.monotonic()

    def say(self, text: str, *, at_intervals: bool = False) -> None:
        """Logs ``text`` where no bars are shown.

        Args:
            at_intervals: Leave the line out if the last one is less than `LOG_EVERY_S` old.
        """
        now = time.monotonic()
        if self._logs and not (at_intervals and now - self._said <= LOG_EVERY_S):
            self._said = now
            get_logger().info("%s", text)


class ReadProgress(Progress):
    """Display of the bytes read of files."""

    def __init__(self, total: int, enabled: bool) -> None:
        columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        super().__init__(*columns, enabled=enabled)
        self._total, self._done = total, 0
        self._start = time.monotonic()
        self._counting = threading.Lock()
        self._bar = self.add_task("reading", total=total)

    def add(self, num_bytes: int) -> None:
        """Counts bytes that were read; called from several threads."""
        with self._counting:
            self._done += num_bytes
            self.update(self._bar, completed=self._done)
            rate = self._done / (time.monotonic() - self._start)
            self.say(
                f"{self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB read, {rate / 1e6:.0f} MB/s, "
                f"about {(self._total - self._done) / rate:.0f} s left",
                at_intervals=True,
            )
