"""Bad days as a user has them: what the command says, and that it goes on to the record of an undisturbed run."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import engine_at, flip, job, write
from clock_backwards import __file__ as CLOCK_BACKWARDS
from jobs import run_job
from records import record, samples

from megamix.core.errors import MegamixError
from megamix.training.checkpoints.saving import CheckpointWriter
from megamix.training.checkpoints.store import complete_steps, newest
from megamix.training.config import CheckpointConfig

Run = Callable[..., subprocess.CompletedProcess[str]]
KEEP_ALL = {"checkpoint": {"keep": 100}}


@pytest.fixture
def config(tiny_config: Callable[..., Path]) -> Path:
    return tiny_config(**KEEP_ALL)


@pytest.fixture
def whole(megamix: Run, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run with the checkpoints 4, 8 and 12, made once."""
    folder = tmp_path_factory.getbasetemp() / "whole-run"
    if not folder.exists():
        megamix("train", config, f"run_dir={folder}")
    return folder


@contextmanager
def mounted(target: Path, *how: str) -> Iterator[None]:
    """A mount for a while; skips the test where that is not allowed."""
    target.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *how, str(target)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(target)], check=True)


@contextmanager
def read_only(folder: Path, view: Path) -> Iterator[None]:
    """``folder`` is also ``view``, where nothing can be written, not even by root."""
    with mounted(view, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(view)], check=True)
        yield


def message(done: subprocess.CompletedProcess[str]) -> str:
    """The one message of a failed command."""
    found = [line for line in done.stderr.splitlines() if line.startswith("megamix: ")]
    assert len(found) == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return found[0]


def test_the_disk_is_full(megamix: Run, config: Path, whole: Path, tmp_path: Path) -> None:
    """There is room for one checkpoint, not for two: the first stays, and with more room the same command goes on."""
    run = tmp_path / "run"
    size = sum(path.stat().st_size for path in (whole / "checkpoints" / "step_4").rglob("*.*"))
    with mounted(run / "checkpoints", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "none"):
        said = message(megamix("train", config, code=1))
        assert (
            f"the checkpoint of step 8 was not written: cannot write {run / 'checkpoints' / 'step_8.partial'}" in said
        )
        assert "No space left on device" in said
        assert "Free space; the same command then goes on from the checkpoint before it" in said
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_4"]
        subprocess.run(["mount", "-o", f"remount,size={size * 4}", str(run / "checkpoints")], check=True)
        log = megamix("train", config).stderr
        assert f"resuming from {run / 'checkpoints' / 'step_4'}" in log
        assert sorted(complete_steps(run / "checkpoints")) == [4, 8, 12]
        for step in (4, 8, 12):
            for path in (whole / "checkpoints" / f"step_{step}" / "layers").iterdir():
                twin = run / "checkpoints" / f"step_{step}" / "layers" / path.name
                assert twin.read_bytes() == path.read_bytes()
    assert record(run) == record(whole)
    assert samples(run) == samples(whole)


def test_a_flipped_bit(megamix: Run, config: Path, whole: Path, tmp_path: Path) -> None:
    """The older one is taken, which is said once, and the run ends as it would have; none left is refused."""
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step_12")
    flip(run / "checkpoints" / "step_8" / "layers" / "00001.safetensors")
    log = megamix("train", config).stderr
    damaged = run / "checkpoints" / "step_8"
    assert log.count(f"passing over {damaged}: layers/00001.safetensors has SHA-256") == 1
    assert log.count("passing over") == 1
    assert log.count(f"resuming from {run / 'checkpoints' / 'step_4'}") == 1
    assert record(run) == record(whole)
    assert samples(run) == samples(whole)
    for step in (4, 8, 12):
        (run / "checkpoints" / f"step_{step}" / "layers" / "00001.safetensors").unlink()
    said = message(megamix("train", config, code=3))
    assert f"every checkpoint in {run / 'checkpoints'} is damaged (step_12: layers/00001.safetensors is missing" in said
    assert record(run) == record(whole)


def test_a_clock_that_jumps_and_data_that_cannot_be_written(
    config: Path, data_dir: Path, whole: Path, tmp_path: Path
) -> None:
    """Checkpoints are due, and the newest is found, whatever the time of day is; and data is only read."""
    view, run = tmp_path / "data", tmp_path / "run"
    often = [f"data.manifest={view}", "checkpoint.every=0", "checkpoint.every_minutes=1e-9"]
    with read_only(data_dir, view):
        with pytest.raises(OSError, match="Read-only"):
            (view / "new").touch()
        run_job(1, [(config, [*often, "train.stop_after=8"]), (config, often)], script=CLOCK_BACKWARDS)
    assert record(run) == record(whole)
    assert samples(run) == samples(whole)
    # At every boundary, but for those before the first step's request can be granted.
    assert sorted(complete_steps(run / "checkpoints")) == [*range(2, 9), *range(10, 13)]
    assert newest(run / "checkpoints") == run / "checkpoints" / "step_12"
    assert not list((run / "checkpoints").glob("*.*"))


def test_a_run_dir_that_cannot_be_written(megamix: Run, config: Path, whole: Path, tmp_path: Path) -> None:
    """Said at the start, by the name of the folder; and if it comes in mid-run, by the checkpoint."""
    stopped = shutil.copytree(whole, tmp_path / "stopped")
    shutil.rmtree(stopped / "checkpoints" / "step_12")
    before = sorted((path, path.stat().st_mtime_ns) for path in stopped.rglob("*"))
    with read_only(stopped, tmp_path / "run"):
        said = message(megamix("train", config, code=2))
        assert str(tmp_path / "run") in said
        assert "Read-only file system" in said
    assert sorted((path, path.stat().st_mtime_ns) for path in stopped.rglob("*")) == before
    engine: Any = engine_at(6)
    with job(tmp_path) as group:
        write(tmp_path / "other", [4], group)
        with read_only(tmp_path / "other", tmp_path / "view"):
            writer = CheckpointWriter(tmp_path / "view", engine, CheckpointConfig(), group)
            writer.save(6, {})
            with pytest.raises(MegamixError, match=r"step 6 was not written: cannot write .*Read-only file system"):
                writer.wait()
    assert newest(tmp_path / "other") == tmp_path / "other" / "step_4"
