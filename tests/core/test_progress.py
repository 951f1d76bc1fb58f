"""Progress display: bars on a terminal and no log lines, log lines elsewhere and no bars."""

from __future__ import annotations

import io
import time

import pytest
from rich.progress import BarColumn, TextColumn

from megamix.core.progress import LOG_EVERY_S, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, *, enabled: bool) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    with Progress(TextColumn("{task.description}"), BarColumn(), enabled=enabled) as progress:
        bar = progress.add_task("reading", total=2)
        progress.update(bar, completed=1)
        progress.say("half of it")
    return stream.getvalue()


def test_bars_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert "reading" in shown(monkeypatch, Terminal(), enabled=True)
    assert logged == []
    assert "reading" not in shown(monkeypatch, io.StringIO(), enabled=True)
    assert logged == ["half of it"]


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_nothing_where_it_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch, logged: list[str], stream: io.StringIO
) -> None:
    assert shown(monkeypatch, stream, enabled=False) == ""
    assert logged == []


def test_lines_at_intervals(monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    now = [100.0]
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress()
    for at, text in ((100.0, "too soon"), (100.1 + LOG_EVERY_S, "due"), (100.2 + LOG_EVERY_S, "too soon again")):
        now[0] = at
        progress.say(text, at_intervals=True)
    progress.say("always")
    assert logged == ["due", "always"]
