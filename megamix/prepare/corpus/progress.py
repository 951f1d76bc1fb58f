"""Progress of a corpus build: a row per domain on a terminal, a log line per event elsewhere."""

from __future__ import annotations

import time
from collections.abc import Collection

from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from megamix.core.progress import Progress
from megamix.prepare.corpus.domain import BuiltDomain


class BuildProgress(Progress):
    """Display of the domains; `doing`, `done` and `failed` may be called from any thread."""

    def __init__(self, domains: Collection[str], skipped: Collection[str], *, enabled: bool) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<24}"),
            BarColumn(20),
            TextColumn("{task.fields[state]}"),
        )
        super().__init__(*columns, TimeElapsedColumn(), enabled=enabled)
        self._started: dict[str, float] = {}
        self._rows: dict[str, TaskID] = {}
        for name in domains:
            there = name in skipped
            state = "there already" if there else "waiting"
            self._rows[name] = self.add_task(name, start=there, total=1, completed=int(there), state=state)
        if skipped:
            self.say(f"there already: {', '.join(skipped)}")

    def doing(self, domain: str, text: str) -> None:
        """The domain begins a phase of its work."""
        self._started.setdefault(domain, time.monotonic())
        self.start_task(self._rows[domain])
        self.update(self._rows[domain], state=text, total=None)
        self.say(f"{domain}: {text}")

    def done(self, built: BuiltDomain) -> None:
        """The domain is written."""
        text = f"{built.documents:,} documents, {built.text_bytes / 1e6:.1f} MB"
        if built.warning:
            text += f"; suspicious: {built.warning}"
        self._finish(built.domain, text)
        self.say(f"{built.domain}: {text}, {time.monotonic() - self._started[built.domain]:.0f} s")

    def failed(self, domain: str, reason: str) -> None:
        """The domain is left out."""
        self._finish(domain, f"left out: {reason}")
        self.say(f"{domain}: left out: {reason}")

    def _finish(self, domain: str, text: str) -> None:
        self.update(self._rows[domain], state=text, total=1, completed=1)
        self.stop_task(self._rows[domain])
