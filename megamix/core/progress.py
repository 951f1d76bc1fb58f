"""Progress of long jobs: rich's bars on a terminal, log lines elsewhere, for example under Slurm."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import ProgressColumn

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
