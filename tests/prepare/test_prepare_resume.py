"""A prepare that is killed at any moment goes on without a lost or doubled document, and ends with the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, RUN_SECONDS
from json_lines import jsonl
from prepared import contents, stdlib_texts, tree, write_corpus

from megamix.core.errors import InputError, RankFailed
from megamix.data.tokens.indexed import IndexedTokens
from megamix.prepare.encoders import Encoders
from megamix.prepare.pipeline import prepare
from megamix.prepare.progress import Rate

OPTIONS = {"validation_fraction": 0.1, "block_bytes": 5000, "journal_bytes": 4000}
needs_proc = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for worker processes in /proc")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare([str(corpus)], out, tokenizer="train:600", workers=1, progress=False, **OPTIONS)
    return out


SCRIPT = """
import importlib, json, sys, time
module = importlib.import_module("megamix.prepare.pipeline")
if __name__ == "__main__":
    corpus, out, tokenizer, seconds, options = sys.argv[1:]
    def slowly(*arguments, **options):
        for block in read_piece(*arguments, **options):
            time.sleep(float(seconds))
            yield block
    read_piece, module.read_piece = module.read_piece, slowly
    module.prepare([corpus], out, tokenizer=tokenizer, workers=2, **json.loads(options))
"""


def start(corpus: Path, out: Path, tokenizer: Path, seconds: float = 0.02, **options: int) -> subprocess.Popen[bytes]:
    """A process group of its own that reads a block every so many seconds."""
    (script := out.parent / "main.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    arguments = [str(corpus), str(out), str(tokenizer), str(seconds), json.dumps({**OPTIONS, **options})]
    command = [sys.executable, str(script), *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)


def children(pid: int) -> set[int]:
    """The processes below ``pid``."""
    found: set[int] = set()
    for task in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = task.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found |= {int(task.parent.name)} | children(int(task.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + RUN_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.01)


def newest_mark(out: Path) -> int:
    """When a journal got its newest mark, in ns of the clock; 0 where none has one of its own yet."""
    with contextlib.suppress(FileNotFoundError):
        times = [path.stat().st_mtime_ns for path in out.glob("*/*.journal") if path.read_bytes().count(b"\n") > 2]
        return max(times, default=0)
    return 0


@pytest.mark.slow
def test_killed_at_random_moments(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    """The whole process group gets SIGKILL, again and again, until a call lives long enough."""
    out, chance = tmp_path / "out", random.Random(3)
    marks: list[int] = []
    for attempt in range(100):
        process = start(corpus, out, prepared / "tokenizer.json")
        begun = time.time_ns()
        # Half of the kills come when there is new work to lose, the others also while everything starts.
        wait_for(
            lambda attempt=attempt, begun=begun: (
                (out / "manifest.json").exists() or attempt % 2 or newest_mark(out) > begun
            ),
            process,
        )
        try:
            process.wait(chance.uniform(0, 0.4) if attempt < 14 else RUN_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, errors.decode()
            break
        marks += [path.read_bytes().count(b"\n") for path in out.glob("*/*.journal")]
        for index in out.rglob("*.idx"):
            assert IndexedTokens(index.with_suffix("")).num_tokens > 0
    assert len(marks) >= 5
    assert max(marks) > 2, "no kill found work to keep"
    assert contents(out) == contents(prepared)


@needs_proc
def test_kept_work_is_not_done_again_and_workers_end(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(corpus, out, prepared / "tokenizer.json")
    journal = out / "code" / "prepare.journal"
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 4, process)
    below = children(process.pid)
    assert below
    process.kill()
    process.communicate()
    deadline = time.monotonic() + RUN_SECONDS
    while any(alive(pid) for pid in below):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    assert not (out / "manifest.json").exists()
    done = json.loads(journal.read_text().splitlines()[-1])
    assert done["block"] > 2
    safe_bytes = 2 * done["train"]["tokens"]
    head = (out / "code" / "train.bin.tmp").read_bytes()[:safe_bytes]
    assert head == (prepared / "code" / "train.bin").read_bytes()[:safe_bytes]
    second = start(corpus, out, prepared / "tokenizer.json", seconds=0.0)
    _, errors = second.communicate(timeout=RUN_SECONDS)
    assert second.returncode == 0
    assert f"code: going on after {done['file_bytes'] / 1e6:.1f} MB" in errors.decode()
    assert "books: unchanged, kept" in errors.decode()
    assert "books: going on" not in errors.decode()
    assert contents(out) == contents(prepared)


def test_every_safe_point_leads_to_the_same_bytes(corpus: Path, prepared: Path, tmp_path: Path, monkeypatch) -> None:
    """Stops after every mark in turn, with all that was written behind it lost or half there."""
    from megamix.prepare.journal import Journal

    class Stopped(Exception):
        pass

    add = Journal.add
    out = tmp_path / "out"
    num_stops = 0

    def add_and_stop(journal: Journal, mark) -> None:
        nonlocal num_stops
        add(journal, mark)
        num_stops += 1
        raise Stopped

    monkeypatch.setattr(Journal, "add", add_and_stop)
    options = {**OPTIONS, "tokenizer": str(prepared / "tokenizer.json"), "workers": 1, "progress": False}
    options["journal_bytes"] = 40_000
    while not (out / "manifest.json").exists():
        try:
            prepare([str(corpus)], out, **options)
        except Stopped:
            for path in out.glob("*/*.tmp"):
                with open(path, "ab") as file:
                    file.write(b"rest of a write")
            for path in out.glob("*/*.journal"):
                with open(path, "ab") as file:
                    file.write(b'{"share": 1, "blo')
        if num_stops > 12:
            monkeypatch.setattr(Journal, "add", add)
    assert num_stops > 12
    assert contents(out) == contents(prepared)


def test_damage_costs_only_what_comes_after_it(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    texts = stdlib_texts("email", 20)
    for number in range(3):
        (tmp_path / "in" / f"{number}.jsonl").write_bytes(jsonl(texts[number::3]))
    good = (tmp_path / "in" / "1.jsonl").read_bytes()
    (tmp_path / "in" / "1.jsonl").write_bytes(good + b"broken\n")
    inputs = [f"mail={tmp_path / 'in'}"]
    options = {**OPTIONS, "tokenizer": str(prepared / "tokenizer.json"), "workers": 1, "progress": False}
    with pytest.raises(InputError, match=r"1\.jsonl, line 8: not valid JSON"):
        prepare(inputs, tmp_path / "out", **options)
    lines = [json.loads(line) for line in (tmp_path / "out/mail/prepare.journal").read_text().splitlines()]
    (tmp_path / "in" / "1.jsonl").write_bytes(good)
    node = (tmp_path / "out/mail/train.bin.tmp").stat().st_ino
    seen: list[int] = []
    from megamix.prepare import parts

    writer = parts.PartWriter.__init__

    def watch(self, *arguments) -> None:
        writer(self, *arguments)
        seen.append(self.mark.num_files)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.PartWriter, "__init__", watch)
        prepare(inputs, tmp_path / "out", **options)
    assert lines[-1]["num_files"] == 2  # the damaged file had been begun,
    assert seen == [1]  # and only the first one's work is kept
    assert (tmp_path / "out/mail/train.bin").stat().st_ino == node
    prepare(inputs, tmp_path / "fresh", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@needs_proc
def test_killed_worker_is_an_error_that_keeps_work(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(corpus, out, prepared / "tokenizer.json")
    journal = out / "code" / "prepare.journal"
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 4, process)
    for pid in children(process.pid) - {pid for pid in children(process.pid) if children(pid)}:
        try:
            if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        except OSError:
            continue
    _, errors = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 1
    assert RankFailed.__name__ in errors.decode()
    assert "tokenising processes died" in errors.decode()
    assert journal.exists()
    prepare([str(corpus)], out, tokenizer=str(prepared / "tokenizer.json"), workers=1, progress=False, **OPTIONS)
    assert contents(out) == contents(prepared)


def die_while_sending() -> bytes:
    """Runs in a worker: its next message ends in the middle, as if it had been killed there."""

    def half(connection: Connection, message: bytes) -> None:
        os.write(connection.fileno(), bytes(message)[: len(message) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Connection._send = half
    return b"a result"


def test_worker_killed_while_it_sends_is_noticed() -> None:
    """The pool alone would read on for ever; the other workers live and hold the pipe."""
    with Encoders(2) as encoders:
        assert encoders._pool is not None
        with pytest.raises(BrokenProcessPool):
            encoders._result(encoders._pool.submit(die_while_sending))


def test_two_at_once(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    process = start(corpus, tmp_path / "out", prepared / "tokenizer.json")
    wait_for((tmp_path / "out" / "books").exists, process)
    with pytest.raises(InputError, match="another prepare is writing"):
        prepare([str(corpus)], tmp_path / "out", workers=1)
    _, errors = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0
    assert "3 of 3 domains" in errors.decode()


def test_journal_without_its_files(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(corpus, out, prepared / "tokenizer.json")
    journal = out / "code" / "prepare.journal"
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (out / "code" / "validation.bin.tmp").unlink()
    prepare([str(corpus)], out, tokenizer=str(prepared / "tokenizer.json"), workers=1, progress=False, **OPTIONS)
    assert contents(out) == contents(prepared)
    assert not [name for name in tree(out) if name.endswith((".tmp", ".journal"))]


def test_rate_and_time_left_do_not_count_kept_work() -> None:
    rate = Rate(total=1000_000_000, now=50.0)
    assert str(rate) == ""
    rate.keep(400_000_000)
    rate.advance(100_000_000, 300_000_000, 50_000_000, now=60.0)
    assert str(rate) == "30.0 MB/s of text, 10.0 MB/s of input, 5,000,000 tokens/s, about 50 s left"
    rate.advance(500_000_000, 0, 0, now=np.inf)
    assert "left" not in str(rate)
