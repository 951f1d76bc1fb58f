"""Progress of `prepare`: a bar on a terminal, else a log line per domain and every half minute."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

from megamix.core.progress import Progress


class Rate:
    """Throughput and time left. What an earlier call did counts as done, but not towards the throughput.

    Args:
        total: Bytes of input of the whole job.
        now: The time in seconds.
    """

    def __init__(self, total: int, now: float) -> None:
        self._total, self._start, self._now = total, now, now
        self.done = 0
        self._read = self._text = self._tokens = 0

    def keep(self, num_bytes: int) -> None:
        """Counts bytes of input that were done before."""
        self.done += num_bytes

    def advance(self, num_bytes: int, text_bytes: int, tokens: int, now: float) -> None:
        """Counts what was done up to the time ``now``."""
        self.done += num_bytes
        self._read += num_bytes
        self._text += text_bytes
        self._tokens += tokens
        self._now = now

    def __str__(self) -> str:
        seconds = self._now - self._start
        if not self._tokens or seconds <= 0:
            return ""
        pace = [
            f"{self._text / seconds / 1e6:.1f} MB/s of text",
            f"{self._read / seconds / 1e6:.1f} MB/s of input",
            f"{self._tokens / seconds:,.0f} tokens/s",
        ]
        left = (self._total - self.done) * seconds / max(self._read, 1)
        if left > 0:
            pace.append(f"about {_words(left)} left")
        return ", ".join(pace)


def _words(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class PrepareProgress(Progress):
    """Display of one bar over all domains.

    Args:
        sizes: Bytes of input to read, by domain.
        enabled: False shows and logs nothing.
    """

    def __init__(self, sizes: Mapping[str, int], enabled: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        super().__init__(*columns, TextColumn("{task.fields[pace]}"), enabled=enabled)
        self._sizes = sizes
        self._num_finished = self._begun_at = 0
        self._rate = Rate(sum(sizes.values()), time.monotonic())
        self._bar = self.add_task("prepare", total=sum(sizes.values()), pace="")

    def begin(self, name: str, kept_bytes: int) -> None:
        """A domain begins, of which ``kept_bytes`` of input were done before."""
        self._begun_at = self._rate.done
        self._rate.keep(kept_bytes)
        self.update(self._bar, completed=self._rate.done, description=name)
        if kept_bytes:
            self._report(f"{name}: going on after {kept_bytes / 1e6:.1f} MB")

    def add(self, name: str, *, num_bytes: int, text_bytes: int, tokens: int) -> None:
        """Counts input of the domain that is done."""
        self._rate.advance(num_bytes, text_bytes, tokens, time.monotonic())
        self.update(self._bar, completed=self._rate.done, pace=str(self._rate))
        done = self._rate.done - self._begun_at
        self._report(f"{name}: {done / 1e6:.1f} of {self._sizes[name] / 1e6:.1f} MB", at_intervals=True)

    def finish(self, name: str, outcome: str) -> None:
        """A domain is done, and with it the bytes of its size that rounding left over."""
        self._num_finished += 1
        self._rate.keep(self._begun_at + self._sizes[name] - self._rate.done)
        self._begun_at = self._rate.done
        self.update(self._bar, completed=self._rate.done)
        self._report(f"{name}: {outcome}")

    def _report(self, what: str, *, at_intervals: bool = False) -> None:
        pace = f", {self._rate}" if str(self._rate) else ""
        self.say(f"{what}; {self._num_finished} of {len(self._sizes)} domains{pace}", at_intervals=at_intervals)
