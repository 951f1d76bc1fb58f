"""`megamix inspect RUN --follow`: the view of files that grow, are cut back, or do not grow."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ENVIRONMENT, ROOT

from megamix.analysis import follow, live_run
from megamix.analysis.live_run import LiveRun
from megamix.core.errors import InputError

NAMES = ("biology", "code", "a-domain-with-a-long-name-indeed")
SECONDS = 60


class Writer:
    """Writes the files of a run as `megamix train` does."""

    def __init__(self, run: Path, steps: int = 100, names: tuple[str, ...] = NAMES) -> None:
        self.run, self.names = run, names
        run.mkdir()
        config = {"train": {"steps": steps}, "log": {"every": 10}}
        (run / "config.resolved.yaml").write_text(yaml.safe_dump(config))

    def train(self, step: int, loss: float | None = 4.0) -> None:
        losses = dict.fromkeys(self.names, loss)
        if step > 10:
            losses[self.names[0]] = None  # not seen in this interval
        self.add(
            "metrics.jsonl", event="train", step=step, tokens=step * 100, loss=loss, domain_loss=losses, step_seconds=0.5,
            data_wait_seconds=0.05, compute_seconds=0.3, communication_seconds=0.1, mixing_seconds=0.05,
            tokens_per_second=41234.5,
        )  # fmt: skip

    def evaluate(self, step: int, loss: float = 3.5) -> None:
        losses = dict.fromkeys(self.names, loss)
        self.add(
            "metrics.jsonl", event="evaluate", step=step, tokens=step * 100, domain_loss=losses, macro_loss=loss,
            worst_domain=self.names[1],
        )  # fmt: skip

    def weights(self, step: int, *weights: float) -> None:
        segment = {"start": 0, "counts": [0] * len(weights), "deficits": [0.0] * len(weights)}
        names = list(self.names)
        self.add(
            "weights.jsonl",
            step=step,
            position=8 * step,
            domain_names=names,
            domain_weights=list(weights),
            segment=segment,
        )

    def event(self, event: str, step: int, text: str = "") -> None:
        self.add("events.jsonl", time=time.time(), event=event, step=step, text=text)

    def checkpoint(self, step: int, age: float = 0.0) -> None:
        path = self.run / "checkpoints" / f"step_{step}" / "checkpoint.json"
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        os.utime(path, (time.time() - age, time.time() - age))

    def add(self, name: str, **line: Any) -> None:
        with (self.run / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(tmp_path / "run")


def looked(run: LiveRun) -> LiveRun:
    run.look()
    return run


# What is read


def test_only_whole_lines_that_are_new_are_read(writer: Writer) -> None:
    run = LiveRun(writer.run)
    assert looked(run).train is None
    writer.train(10)
    assert looked(run).step == 10
    path = writer.run / "metrics.jsonl"
    line = path.read_text().replace('"step": 10', '"step": 20')
    with path.open("a") as file:
        file.write(line[:50])
    assert looked(run).step == 10
    with path.open("a") as file:
        file.write(line[50:])
    assert looked(run).step == 20
    with path.open("a") as file:
        file.write("damaged\n[]\n")
    assert looked(run).step == 20


def test_a_domain_keeps_its_last_loss(writer: Writer) -> None:
    writer.train(10, 4.0)
    writer.train(20, 3.0)
    run = looked(LiveRun(writer.run))
    assert run.loss == {"biology": 4.0, "code": 3.0, NAMES[2]: 3.0}


@pytest.mark.parametrize("in_place", [False, True])
def test_a_file_that_a_resume_cuts_back_is_read_anew(writer: Writer, in_place: bool) -> None:
    """By another file of its name, as megamix does it, or in place; with lines added again before the next look."""
    for step in (10, 20, 30):
        writer.train(step)
        writer.weights(step, 0.2, 0.3, 0.5)
    run = looked(LiveRun(writer.run))
    assert (run.step, run.weights and run.weights["step"]) == (30, 30)
    for name in ("metrics.jsonl", "weights.jsonl"):
        path = writer.run / name
        kept = path.read_text().splitlines(keepends=True)[0]
        if in_place:
            path.write_text(kept)
        else:
            path.with_suffix(".tmp").write_text(kept + kept * 5)
            path.with_suffix(".tmp").replace(path)
    assert (looked(run).step, run.weights and run.weights["step"]) == (10, 10)


def test_of_a_long_file_only_the_end_is_read(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_run, "_TAIL", 1000)
    for step in range(1, 60):
        writer.train(step)
    run = LiveRun(writer.run)
    assert looked(run).step == 59
    writer.train(60)
    assert looked(run).step == 60


@pytest.mark.parametrize(
    ("events", "done"),
    [(["started", "ended"], True), (["started", "ended", "resumed"], False), (["started", "preempted"], False),
     (["started", "failed"], False), (["started"], False)],
)  # fmt: skip
def test_whether_a_run_is_done(writer: Writer, events: list[str], done: bool) -> None:
    writer.train(100)
    for event in events:
        writer.event(event, 100)
    assert looked(LiveRun(writer.run)).is_done == done


def test_a_run_from_before_events_were_kept_is_done_with_its_last_evaluation(writer: Writer) -> None:
    writer.train(100)
    assert not looked(LiveRun(writer.run)).is_done
    writer.evaluate(100)
    assert looked(LiveRun(writer.run)).is_done


@pytest.mark.parametrize("event", ["preempted", "failed"])
def test_of_a_run_that_has_stopped_no_time_is_left_and_no_silence_told(writer: Writer, event: str) -> None:
    writer.train(10)
    os.utime(writer.run / "metrics.jsonl", (time.time() - 500, time.time() - 500))
    writer.event(event, 10)
    run = looked(LiveRun(writer.run))
    assert (run.seconds_left, run.quiet, run.is_done) == (None, 0.0, False)
    writer.event("resumed", 10)
    assert looked(run).seconds_left == 45
    assert run.quiet > 400


def test_silence_is_told_once_it_is_unusual(writer: Writer) -> None:
    """Three minutes, or three times what lies between two lines; counted from the age of the file at first."""
    writer.train(10)
    path = writer.run / "metrics.jsonl"
    os.utime(path, (time.time() - 170, time.time() - 170))
    assert looked(LiveRun(writer.run)).quiet == 0
    os.utime(path, (time.time() - 200, time.time() - 200))
    run = looked(LiveRun(writer.run))
    assert run.quiet >= 200
    writer.train(20)
    assert looked(run).quiet == 0
    path.write_text(path.read_text().replace('"step_seconds": 0.5', '"step_seconds": 10.0'))
    os.utime(path, (time.time() - 200, time.time() - 200))
    assert looked(LiveRun(writer.run)).quiet == 0


# What is shown


def shown(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megamix", "inspect", *map(str, arguments), "--follow"],
        env=ENVIRONMENT,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def test_lines_of_a_run_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    """Not on a terminal: it waits for the run, says each new thing once, and ends by itself with exit code 0."""
    process = shown(tmp_path / "run")
    lines = _lines_of(process)
    assert next(lines).endswith("run has not begun yet: waiting for its config.resolved.yaml")
    writer = Writer(tmp_path / "run")
    assert next(lines).endswith("run is starting: it has recorded nothing yet")
    writer.weights(0, 0.2, 0.3, 0.5)
    writer.event("started", 0)
    writer.train(10)
    line = next(lines)
    if "step 10 " not in line:
        line = next(lines)
    assert (
        f" step 10 of 100 (10 %), running ({tmp_path}/run); loss 4.0000; 41,234 tokens/s, 0.5 s a step, 45 s left"
        in line
    )
    assert f"most weight on {NAMES[2]} 0.500, code 0.300, biology 0.200" in line
    writer.checkpoint(10)
    assert "; checkpoint step_10" in next(lines)
    writer.event("preempted", 10, "asked to stop")
    line = next(lines)
    assert re.search(r"\(10 %\), preempted .*; preempted at step 10 \(.*\): asked to stop", line)
    writer.event("resumed", 10)
    assert "(10 %), running " in next(lines)
    writer.evaluate(100)
    writer.event("ended", 100)
    left = [*lines]
    assert "step 100 of 100 (100 %), done " in left[-1]
    assert "loss 4.0000, validation 3.5000 at step 100 (worst code)" in left[-1]
    assert process.wait(SECONDS) == 0


def _lines_of(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    return (line.rstrip("\n") for line in process.stdout)


def view(
    run: Path, rows: int, columns: int, steps: list[tuple[str, Callable[[], object]]]
) -> tuple[list[list[str]], int]:
    """The views that a terminal of that size is shown, as lines, and the exit code.

    Args:
        steps: (a pattern to wait for on the screen, up to the end of a view; what to do then), in turn; the last may
            end it.
    """
    process, terminal = pty.fork()
    if not process:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # of a job in the background it is ignored
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        arguments = [sys.executable, "-m", "megamix", "inspect", str(run), "--follow"]
        # These would take the place of the terminal's size; xdist sets them for its workers.
        told = {name: value for name, value in ENVIRONMENT.items() if name not in ("COLUMNS", "LINES")}
        os.execve(sys.executable, arguments, {**told, "PYTHONUTF8": "1", "TERM": "xterm", "NO_COLOR": "1"})
    said, seen, deadline = b"", 0, time.monotonic() + SECONDS
    steps = steps[:]
    while True:
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                said += os.read(terminal, 65536)
            except OSError:  # the other side is closed
                break
        if steps and re.search(steps[0][0], said[seen:].decode(errors="ignore"), re.DOTALL):
            seen = len(said)
            if steps.pop(0)[1]() == CONTROL_C:
                os.write(terminal, CONTROL_C)
    os.close(terminal)
    text = said.decode()
    assert text.startswith("\x1b[?25l")
    assert text.endswith("\x1b[?25h"), "the cursor is shown again"
    drawn = re.sub(r"\x1b\[(\?25[hl]|[0-9;]*m)|\^C", "", text)  # the terminal itself echoes ^C
    views = re.split(r"\r(?:\x1b\[2K|\x1b\[1A)+", drawn)  # up to the first line of the view before
    return [part.rstrip().split("\r\n") for part in views], os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


CONTROL_C = b"\x03"


def interrupt() -> bytes:
    return CONTROL_C


def test_the_view_of_a_run_on_a_terminal(writer: Writer) -> None:
    """80 columns: everything fits, renews itself in place, and Ctrl-C ends it with exit code 0."""
    writer.weights(0, 0.2, 0.3, 0.5)
    writer.weights(10, 0.2, 0.25, 0.55)
    writer.evaluate(0)
    writer.train(10)
    writer.event("resumed", 4)
    writer.checkpoint(4, age=130)
    whole = "step {} of.*0.5500.*3.500"
    steps = [(whole.format(10), lambda: writer.train(20)), (whole.format(20), interrupt)]
    views, code = view(writer.run, 30, 80, steps)
    assert code == 0
    first, last = views[0], views[-1]
    assert first[0].startswith("step 10 of 100 (10 %), running (/")
    assert last[0].startswith("step 20 of 100 (20 %), running (/")
    assert all(len(line) <= 80 for shown in views for line in shown)
    text = "\n".join(first)
    assert "loss 4.0000, validation 3.5000 at step 0 (worst code)" in text
    assert "41,234 tokens/s, 0.5 s a step, 45 s left" in text
    assert "step: data 10 %, compute 60 %, communication 20 %, mixing 10 %" in text
    assert "checkpoint step_4, 2 min ago" in text
    assert re.search(r"resumed at step 4 \(\d\d-\d\d \d\d:\d\d:\d\d\)", text)
    biology, code_, long = first[-3:]
    assert re.fullmatch(r"biology +0\.2000 +━+╸? +4\.000 +3\.500", biology)
    assert re.fullmatch(r"code +0\.2500 +━+╸? +-0\.0500 +4\.000 +3\.500", code_)
    assert re.fullmatch(r"a-domain-with-a-long +0\.5500 +━+ +\+0\.0500 +4\.000 +3\.500", long)
    assert long.count("━") > 2 * biology.count("━")


def test_a_small_terminal_shows_the_largest_weights(tmp_path: Path) -> None:
    """And never more lines than it has, as what has scrolled off could not be renewed."""
    names = tuple(f"domain{k:02}" for k in range(40))
    writer = Writer(tmp_path / "run", names=names)
    writer.weights(0, *[k / 780 for k in range(40)])
    writer.train(10)
    views, code = view(writer.run, 14, 60, [("step 10 of.*with smaller weights", interrupt)])
    assert code == 0
    for lines in views:
        assert len(lines) < 14
        assert all(len(line) <= 60 for line in lines)
    assert views[-1][-2].startswith("domain39")
    assert re.fullmatch(r"and 3\d with smaller weights", views[-1][-1])


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="it is no directory"):
        follow.follow(tmp_path / "file")
