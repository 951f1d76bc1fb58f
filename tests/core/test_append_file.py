"""The record of a run on a disk that is full: one error that names the file, whole lines, and a run that goes on."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from records import record, samples

from megamix.core.errors import MegamixError
from megamix.core.files import AppendFile
from megamix.mixing.mixers import DomainStats
from megamix.training.records.events import EVENTS, EventLog
from megamix.training.records.lines import EventLine, read_lines
from megamix.training.records.step_statistics import StatisticsWriter, read_statistics

Run = Callable[..., subprocess.CompletedProcess[str]]
FULL = Path("/dev/full")


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    """Files of this process grow to so many bytes; what goes beyond is refused in mid-write, as by a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_what_is_added_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    file = AppendFile(path)
    file.write(b"one\n")
    file.write(b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"
    file.sync()
    file.close()
    file.close()
    AppendFile(path).write(b"three\n")
    assert path.read_bytes() == b"one\ntwo\nthree\n"


def test_a_full_disk_names_file_and_remedy() -> None:
    file = AppendFile(FULL)
    with pytest.raises(
        MegamixError, match=r"cannot write /dev/full: No space left on device\. Free space .* same command"
    ):
        file.write(b"line\n")
    file.close()


def test_a_line_that_did_not_fit_leaves_no_part_of_it(tmp_path: Path, limited: Callable[[int], None]) -> None:
    file = AppendFile(tmp_path / "file")
    file.write(b"one\n")
    limited(8)
    with pytest.raises(MegamixError, match="cannot write"):
        file.write(b"a second line that is longer\n")
    assert (tmp_path / "file").read_bytes() == b"one\n"
    limited(1000)
    file.write(b"two\n")
    assert (tmp_path / "file").read_bytes() == b"one\ntwo\n"


def test_a_row_of_sums_that_did_not_fit_leaves_no_part_of_it(tmp_path: Path, limited: Callable[[int], None]) -> None:
    """Else the rows after it would be read as other numbers."""
    writer = StatisticsWriter(tmp_path, ("a", "b"), None)
    stats = DomainStats(np.array([1.0, 2.0]), np.array([3, 4]))
    writer.write(1, stats)
    (path,) = (tmp_path / "statistics").iterdir()
    limited(path.stat().st_size + 10)
    with pytest.raises(MegamixError, match=r"cannot write .*from_000000001\.bin"):
        writer.write(2, stats)
    writer.close()
    limited(10**6)
    again = StatisticsWriter(tmp_path, ("a", "b"), 1)
    again.write(2, stats)
    again.close()
    assert read_statistics(tmp_path).tokens.tolist() == [[3, 4], [3, 4]]


def test_an_event_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / EVENTS).symlink_to(FULL)
    events = EventLog(tmp_path)
    events.note("failed", 3, "what matters")
    events.close()


def test_a_run_whose_record_does_not_fit_goes_on_from_its_checkpoint(
    megamix: Run, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    """A full disk from step 5 on (the file is a link to a device that is always full): exit code 1 and one reason; with
    space again the same command makes the record of a run that never stopped. A line that was cut off before is
    mended."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    sections = {"engine": {"data": 2, "zero": 1}, "train": {"steps": 8}, "evaluate": {"every": 0, "batches": 1}}
    megamix("train", tiny_config(run_dir=str(whole), **sections))
    config = tiny_config(run_dir=str(run), **sections)
    megamix("train", config, "train.stop_after=4")
    path, kept = run / "metrics.jsonl", tmp_path / "kept"
    path.rename(kept)
    path.symlink_to(FULL)
    failed = megamix("train", config, code=1)
    assert f"cannot write {path}: No space left on device" in failed.stderr
    assert failed.stderr.count("No space left on device") == 1
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == ["step_4"]
    path.unlink()
    path.write_bytes(kept.read_bytes() + b'{"event": "train", "step": 5, "tok')
    megamix("train", config)
    assert record(run) == record(whole)
    assert samples(run) == samples(whole)
    events = [line["event"] for line in read_lines(run / EVENTS, EventLine)]
    assert events == ["started", "ended", "resumed", "incomplete", "failed", "resumed", "ended"]
    assert json.loads((run / EVENTS).read_text().splitlines()[4])["text"].startswith(f"cannot write {path}")
