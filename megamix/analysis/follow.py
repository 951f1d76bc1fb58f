"""``megamix inspect RUN --follow``: a run as it goes on, from its files alone, so from any node that sees them.

Legend: K domains.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO

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
    screen = _Screen(sys.stdout) if sys.stdout.isatty() else _Log(sys.stdout)
    try:
        while True:
            run.look()
            screen.show(run)
            if run.is_done:
                return
            time.sleep(interval)
    except KeyboardInterrupt:
        return
    finally:
        screen.close()


class _Log:
    """A line for every new line of metrics.jsonl, and one for what keeps it waiting."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._said = ""

    def show(self, run: LiveRun) -> None:
        said = _waiting(run) or "; ".join(
            part
            for part in (_progress(run), _losses(run), _speed(run), _largest(run), *_notes(run, ages=False))
            if part
        )
        if said != self._said:
            self._said = said
            print(f"{time.strftime('%H:%M:%S')} {said}", file=self._out, flush=True)

    def close(self) -> None:
        pass


class _Screen:
    """A view that renews itself in place."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._drawn = 0
        encoding = getattr(out, "encoding", None) or "ascii"
        self._signs = "█·▲▼" if _can_write("█·▲▼", encoding) else "#.+-"
        out.write("\x1b[?25l")  # hides the cursor

    def show(self, run: LiveRun) -> None:
        size = shutil.get_terminal_size()
        lines = [_waiting(run)] if _waiting(run) else self._lines(run, size.columns, size.lines)
        lines = lines[: max(size.lines - 1, 1)]  # what has scrolled off cannot be renewed
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        self._out.write(up + "".join(f"\x1b[2K{line[: size.columns - 1]}\n" for line in lines) + "\x1b[J")
        self._out.flush()
        self._drawn = len(lines)

    def close(self) -> None:
        self._out.write("\x1b[?25h")
        self._out.flush()

    def _lines(self, run: LiveRun, columns: int, rows: int) -> list[str]:
        width = min(columns, 80) - 3
        done = run.step / run.steps if run.steps else 0.0
        lines = [
            _progress(run),
            f"[{self._bar(done, width)}]",
            *[part for part in (_losses(run), _speed(run), _split(run)) if part],
            *_notes(run, ages=True),
            "",
        ]
        return lines + self._domains(run, columns, rows - len(lines) - 2)

    def _bar(self, share: float, width: int) -> str:
        full = round(min(max(share, 0.0), 1.0) * width)
        return self._signs[0] * full + self._signs[1] * (width - full)

    def _domains(self, run: LiveRun, columns: int, rows: int) -> list[str]:
        """A line for each of the K domains, or for those with the largest weights where the screen is too low."""
        if run.weights is None:
            return []
        weights = _named(run.weights)
        before = _named(run.before) if run.before else weights
        validation = run.evaluation["domain_loss"] if run.evaluation else {}
        shown = list(weights)
        left = len(shown) - max(rows - 1, 1)
        if left > 0:
            largest = set(sorted(weights, key=lambda name: -weights[name])[: max(rows - 2, 1)])
            shown = [name for name in shown if name in largest]
        name_width = min(max(map(len, shown)), 20)
        bar = max(6, min(30, columns - name_width - 46))
        most = max(weights.values()) or 1.0
        lines = [f"{'domain':{name_width}} weight {'':{bar}}  change    loss  validation"]
        for name in shown:
            change = weights[name] - before.get(name, weights[name])
            arrow = " " if abs(change) < 5e-5 else self._signs[2 if change > 0 else 3]
            moved = f"{arrow}{abs(change):.4f}" if arrow != " " else " " * 7
            drawn = self._bar(weights[name] / most, bar)
            losses = f"{number(run.loss.get(name), 3):>6}  {number(validation.get(name), 3):>10}"
            lines.append(f"{name[:name_width]:{name_width}} {weights[name]:.4f} {drawn} {moved:>7}  {losses}")
        return lines + ([f"and {len(weights) - len(shown)} with smaller weights"] if left > 0 else [])


def _can_write(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


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
    words = {"started": "running", "resumed": "running", "skipped": "running", "ended": "done"}
    return f"step {run.step:,} of {run.steps:,} ({share}), {words.get(state, state)} ({run.run_dir})"


def _losses(run: LiveRun) -> str:
    parts = []
    if run.train is not None:
        parts.append(f"loss {run.train['loss']:.4f}")
    if run.evaluation is not None:
        step, macro = run.evaluation["step"], number(run.evaluation.get("macro_loss"))
        parts.append(f"validation {macro} at step {step:,} (worst {run.evaluation.get('worst_domain')})")
    return ", ".join(parts)


def _speed(run: LiveRun) -> str:
    if run.train is None:
        return ""
    left = "" if run.seconds_left is None else f", {_time(run.seconds_left)} left"
    return f"{run.train['tokens_per_second']:,.0f} tokens/s, {run.train['step_seconds']:.3g} s a step{left}"


def _split(run: LiveRun) -> str:
    """What a step is made of; nothing for a record that does not say."""
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
