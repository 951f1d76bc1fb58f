"""``megamix inspect RUN --follow``: a live view of a run, from its files alone, so from any node that sees them.

Legend: K domains.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megamix.analysis.live_run import LiveRun
from megamix.core.errors import InputError
from megamix.core.text import number
from megamix.training.records.recorded_run import CONFIG

_PARTS = {"data": "data_wait_seconds", "compute": "compute_seconds", "communication": "communication_seconds"}
_PARTS["mixing"] = "mixing_seconds"


def follow(run_dir: Path, interval: float = 1.0) -> None:
    """Shows a run until it is done or the user presses Ctrl-C; waits for one that has not begun.

    On a terminal the view renews itself in place; elsewhere there is a line for every new line of metrics.jsonl.

    Args:
        interval: seconds between two looks at the files.

    Raises:
        InputError: ``run_dir`` is no directory.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"{run_dir} is not a run: it is no directory. Give the run_dir of a `megamix train`.")
    run = LiveRun(run_dir)
    with _interrupts() as asked, _screen() if sys.stdout.isatty() else _log() as show:
        while True:
            run.look()
            show(run)
            if run.is_done:
                return
            with suppress(Empty):
                asked.get(timeout=interval)
                return


@contextmanager
def _interrupts() -> Iterator[SimpleQueue[int]]:
    """A queue that Ctrl-C puts an entry into; as an exception it could come amid a view and have it drawn twice."""
    asked: SimpleQueue[int] = SimpleQueue()
    before = signal.signal(signal.SIGINT, lambda number, _: asked.put(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _log() -> Iterator[Callable[[LiveRun], None]]:
    """Prints a line whenever there is something new to say."""
    said = ""

    def show(run: LiveRun) -> None:
        nonlocal said
        new = _waiting(run) or "; ".join(
            filter(None, (_progress(run), _losses(run), _speed(run), _largest(run), *_notes(run, ages=False)))
        )
        if new != said:
            said = new
            print(f"{time.strftime('%H:%M:%S')} {said}", flush=True)

    yield show


@contextmanager
def _screen() -> Iterator[Callable[[LiveRun], None]]:
    """A view that renews itself in place."""
    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        yield lambda run: live.update(_view(run, live.console.height), refresh=True)


def _view(run: LiveRun, height: int) -> Group:
    """The run, in fewer than ``height`` lines."""
    waiting = _waiting(run)
    if waiting:
        return Group(_line(waiting))
    facts = (_losses(run), _speed(run), _split(run), *_notes(run, ages=True))
    lines = [_line(text) for text in (_progress(run), *filter(None, facts), "")]
    bar = Table.grid()
    bar.add_row(ProgressBar(total=run.steps or 1, completed=run.step, width=77))
    return Group(lines[0], bar, *lines[1:], *_domains(run, max(height - len(lines) - 3, 1)))


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="crop")


def _domains(run: LiveRun, rows: int) -> list[Any]:
    """A table of the K domains, or of those with the largest weights where there are fewer rows."""
    if run.weights is None:
        return []
    weights = _named(run.weights)
    before = _named(run.before) if run.before else weights
    validation = run.evaluation["domain_loss"] if run.evaluation else {}
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("domain", no_wrap=True, overflow="crop", max_width=20)
    table.add_column("weight", no_wrap=True)
    table.add_column(max_width=30)  # the one to shrink on a narrow screen
    for name in ("change", "loss", "validation"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = set(sorted(weights, key=lambda name: -weights[name])[: rows if len(weights) <= rows else max(rows - 1, 1)])
    most = max(weights.values()) or 1.0
    for name in (name for name in weights if name in shown):
        change = weights[name] - before.get(name, weights[name])
        table.add_row(
            Text(name), f"{weights[name]:.4f}",
            ProgressBar(total=most, completed=weights[name], finished_style="bar.complete"),
            f"{change:+.4f}" if abs(change) >= 5e-5 else "",
            number(run.loss.get(name), 3), number(validation.get(name), 3),
        )  # fmt: skip
    left = len(weights) - len(shown)
    return [table, *([_line(f"and {left} with smaller weights")] if left else [])]


def _waiting(run: LiveRun) -> str:
    if not run.config:
        return f"{run.run_dir} has not begun yet: waiting for its {CONFIG}"
    if run.train is None and run.evaluation is None:
        return f"{run.run_dir} is starting: it has recorded nothing yet"
    return ""


def _progress(run: LiveRun) -> str:
    assert run.config is not None
    share = f"{100 * run.step // run.steps} %" if run.steps else "-"
    state = run.event["event"] if run.event is not None else "running"
    words = {"preempted": "preempted", "failed": "failed", "ended": "done"}
    return f"step {run.step:,} of {run.steps:,} ({share}), {words.get(state, 'running')} ({run.run_dir})"


def _losses(run: LiveRun) -> str:
    parts = []
    if run.train is not None:
        parts.append(f"loss {run.train['loss']:.4f}")
    if run.evaluation is not None:
        step, macro = run.evaluation["step"], number(run.evaluation.get("macro_loss"))
        mean = f"validation {macro}"
        if run.evaluation.get("objective_loss") is not None:
            mean = f"objective {number(run.evaluation['objective_loss'])}, {mean}"
        parts.append(f"{mean} at step {step:,} (worst {run.evaluation.get('worst_domain')})")
    return ", ".join(parts)


def _speed(run: LiveRun) -> str:
    if run.train is None:
        return ""
    left = "" if run.seconds_left is None else f", {_time(run.seconds_left)} left"
    seconds = f", {run.train['step_seconds']:.3g} s a step" if "step_seconds" in run.train else ""
    return f"{run.train['tokens_per_second']:,.0f} tokens/s{seconds}{left}"


def _split(run: LiveRun) -> str:
    """The parts of a step; nothing for a record without them."""
    if run.train is None or any(key not in run.train for key in _PARTS.values()):
        return ""
    total = sum(run.train[key] for key in _PARTS.values()) or 1.0
    return "step: " + ", ".join(f"{name} {100 * run.train[key] / total:.0f} %" for name, key in _PARTS.items())


def _largest(run: LiveRun) -> str:
    """The three largest weights."""
    if run.weights is None:
        return ""
    weights = sorted(_named(run.weights).items(), key=lambda item: -item[1])[:3]
    return "most weight on " + ", ".join(f"{name} {weight:.3f}" for name, weight in weights)


def _notes(run: LiveRun, *, ages: bool) -> list[str]:
    """Checkpoint, last event and silence.

    Args:
        ages: whether to say how long ago a checkpoint was; it makes the line another one every time.
    """
    notes = []
    if run.checkpoint is not None:
        step, written = run.checkpoint
        notes.append(f"checkpoint step_{step}" + (f", {_time(time.time() - written)} ago" if ages else ""))
    elif ages:
        notes.append("no checkpoint yet")
    if run.notable is not None:
        at = time.strftime("%m-%d %H:%M:%S", time.localtime(run.notable["time"]))
        text = f": {run.notable['text']}" if run.notable.get("text") else ""
        notes.append(f"{run.notable['event']} at step {run.notable['step']:,} ({at}){text}")
    if run.quiet:
        notes.append(f"no new line for {run.quiet / 60:.0f} min")
    return notes


def _named(line: dict[str, Any]) -> dict[str, float]:
    return dict(zip(line["domain_names"], line["domain_weights"], strict=True))


def _time(seconds: float) -> str:
    """``42 s``, ``7 min``, ``2 h 05 min``."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
