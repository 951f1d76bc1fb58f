"""How far `prepare` is: a bar on a terminal, else a log line per domain and every half minute."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from megamix.core.log import get_logger

_LOG_EVERY_S = 30.0


class Rate:
    """Bytes of input, of text and tokens by second, and the time left.

    What an earlier call has done counts as done, but not as done at this pace.

    Args:
        total: Bytes of input of the whole job.
        now: The time in seconds.
    """

    def __init__(self, total: int, now: float) -> None:
        self._total, self._start, self._now = total, now, now
        self.done = 0
        self._read = self._text = self._tokens = 0

    def keep(self, num_bytes: int) -> None:
        """So many more bytes of input had been done before."""
        self.done += num_bytes

    def advance(self, num_bytes: int, text_bytes: int, tokens: int, now: float) -> None:
        """So much more has been done by the time ``now``."""
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


class Progress:
    """Shows how far the work is.

    Args:
        sizes: Bytes of input to read, by domain.
        enabled: Without it nothing is shown.
    """

    def __init__(self, sizes: Mapping[str, int], enabled: bool) -> None:
        self._sizes = sizes
        self._num_finished = self._begun_at = 0
        self._spoke = time.monotonic()
        self._rate = Rate(sum(sizes.values()), self._spoke)
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, TextColumn("{task.fields[pace]}"), console=console, disable=not console.is_terminal)
        self._bar.disable = self._bar.disable or not enabled
        self._task = self._bar.add_task("prepare", total=sum(sizes.values()), pace="")
        self._log = enabled and not console.is_terminal

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, name: str, kept_bytes: int) -> None:
        """A domain begins, ``kept_bytes`` of input after its beginning."""
        self._begun_at = self._rate.done
        self._rate.keep(kept_bytes)
        self._bar.update(self._task, completed=self._rate.done, description=name)
        if self._log and kept_bytes:
            self._say(f"{name}: going on after {kept_bytes / 1e6:.1f} MB")

    def advance(self, name: str, *, num_bytes: int, text_bytes: int, tokens: int) -> None:
        """So many more bytes of the input are done."""
        now = time.monotonic()
        self._rate.advance(num_bytes, text_bytes, tokens, now)
        self._bar.update(self._task, completed=self._rate.done, pace=str(self._rate))
        if self._log and now - self._spoke > _LOG_EVERY_S:
            done = self._rate.done - self._begun_at
            self._say(f"{name}: {done / 1e6:.1f} of {self._sizes[name] / 1e6:.1f} MB")

    def finish(self, name: str, outcome: str) -> None:
        """A domain is done. What its size in bytes left open, by rounding, is done too."""
        self._num_finished += 1
        self._rate.keep(self._begun_at + self._sizes[name] - self._rate.done)
        self._begun_at = self._rate.done
        self._bar.update(self._task, completed=self._rate.done)
        if self._log:
            self._say(f"{name}: {outcome}")

    def _say(self, what: str) -> None:
        self._spoke = time.monotonic()
        pace = f", {self._rate}" if str(self._rate) else ""
        get_logger().info("%s; %d of %d domains%s", what, self._num_finished, len(self._sizes), pace)
