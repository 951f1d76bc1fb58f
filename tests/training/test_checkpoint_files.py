"""What is wrong with the files of a checkpoint is found, whatever it is; and what is only late is waited for."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import FILES, flip, job, loads, write

from megamix.core.errors import ResumeRefused
from megamix.training.checkpoints import store
from megamix.training.checkpoints.saving import load_engine
from megamix.training.checkpoints.store import (
    Listing,
    candidates,
    damage,
    newest,
    read_listing,
    read_state_json,
    write_listing,
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Checkpoints of the steps 9 and 10, in a job of one rank."""
    with job(tmp_path) as group:
        write(tmp_path / "checkpoints", [9, 10], group)
        yield tmp_path / "checkpoints"


def test_what_is_written_is_read(folder: Path) -> None:
    listing = read_listing(folder / "step_10")
    assert (listing.step, listing.holds, sorted(listing.files)) == (10, "layers", FILES)
    for step in (9, 10):
        assert damage(folder / f"step_{step}") is None
        assert read_state_json(folder / f"step_{step}") == {"step": step}
        assert loads(folder / f"step_{step}", step)
    assert not loads(folder / "step_9", 10)


def test_no_bit_of_the_listing_can_flip_unseen(tmp_path: Path) -> None:
    files = {"state.json": {"bytes": 12, "sha256": "c0" * 32}}
    write_listing(tmp_path, Listing(10, "layers", files))
    content = (tmp_path / "checkpoint.json").read_bytes()
    assert read_listing(tmp_path).files == files
    for bit in range(8 * len(content) - 8):  # not of the line's end, which means nothing
        flip(tmp_path / "checkpoint.json", bit)
        with pytest.raises(ValueError, match=r"checkpoint.json cannot be used"):
            read_listing(tmp_path)
        flip(tmp_path / "checkpoint.json", bit)
    assert (tmp_path / "checkpoint.json").read_bytes() == content


def test_a_listing_without_its_own_hash_is_an_older_one(folder: Path) -> None:
    """Version 1 is read as it was; version 2 needs the hash, 1 must not have it, and 3 is of another program."""
    path = folder / "step_10" / "checkpoint.json"
    content = json.loads(path.read_text())
    seal = content.pop("sha256")
    for version, sha256, is_good in [(1, None, True), (2, None, False), (1, seal, False), (3, seal, False)]:
        path.write_text(json.dumps({**content, "version": version, **({"sha256": sha256} if sha256 else {})}))
        assert (damage(folder / "step_10") is None) == is_good, (version, sha256)
        assert newest(folder) == folder / ("step_10" if is_good else "step_9")
    path.write_text(json.dumps({key: content[key] for key in ("format", "step", "files")} | {"version": 1}))
    assert loads(folder / "step_10", 10)


@pytest.mark.parametrize("name", [*FILES, "checkpoint.json"])
def test_a_file_that_is_gone_cut_off_or_changed(folder: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Gone or shorter: passed over. A changed bit: at once in the small files, and on reading in the others."""
    path = folder / "step_10" / name
    content = path.read_bytes()
    path.unlink()
    assert name in str(damage(folder / "step_10"))
    path.write_bytes(content[: len(content) // 2])
    assert name in str(damage(folder / "step_10"))
    assert newest(folder) == folder / "step_9"
    path.write_bytes(content)
    assert newest(folder) == folder / "step_10"
    flip(path)
    if name.endswith(".json"):
        assert name in str(damage(folder / "step_10"))
        assert newest(folder) == folder / "step_9"
    else:
        assert damage(folder / "step_10") is None
        with pytest.raises(ResumeRefused, match=rf"step_10 is damaged: {name} has SHA-256"):
            loads(folder / "step_10", 10)
    if name != "state.json":
        with pytest.raises(ResumeRefused, match=f"step_10 is damaged: {name}"):
            loads(folder / "step_10", 10)


def test_a_run_does_not_start_anew_where_all_are_damaged(folder: Path, tmp_path: Path) -> None:
    (folder / "step_12.partial" / "layers").mkdir(parents=True)
    for step in (9, 10):
        (folder / f"step_{step}" / "layers" / "00001.safetensors").unlink()
    with pytest.raises(ResumeRefused, match=r"step_10: layers/00001.* is missing.*step_9: layers/00001.*to start anew"):
        newest(folder)
    assert newest(tmp_path / "nowhere") is None
    (tmp_path / "only" / "step_3.partial").mkdir(parents=True)
    assert newest(tmp_path / "only") is None


def test_the_newest_is_that_of_the_last_step(folder: Path) -> None:
    """By number, 10 after 9, whatever the clock said when each was written."""
    now = time.time()
    for name, when in {"step_9": now + 10**6, "step_10": now - 10**6}.items():
        for path in (folder / name, *(folder / name).rglob("*")):
            os.utime(path, (when, when))
    for name in ("step_11x", "step_011", "step_²", "other"):
        (folder / name).mkdir()
    (folder / "step_12").write_text("no directory")
    assert [path.name for path in candidates(folder)] == ["step_10", "step_9"]
    assert newest(folder) == folder / "step_10"


def later(seconds: float, before: Path, after: Path) -> subprocess.Popen[bytes]:
    """Another process gives a file or folder its name after a while."""
    return subprocess.Popen(["sh", "-c", f"sleep {seconds}; mv '{before}' '{after}'"])


def test_a_late_file_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "step_10"
    layer, hidden = path / "layers" / "00001.safetensors", folder / "hidden"
    layer.rename(hidden)
    with later(2, hidden, layer) as moving:
        assert "00001.safetensors is missing" in str(damage(path))
        assert loads(path, 10)  # by the stated time of a run
        assert moving.wait() == 0
    path.rename(hidden)
    with later(1, hidden, path):
        assert "cannot be used" in str(damage(path))
        assert damage(path, patience=30) is None
    monkeypatch.setattr("megamix.training.checkpoints.saving.PATIENCE_SECONDS", 0.2)
    layer.unlink()
    with pytest.raises(ResumeRefused, match=r"00001.safetensors is missing"):
        loads(path, 10)


def test_a_stale_handle_is_asked_for_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look, looks = Path.is_file, itertools.count()

    def stale(path: Path) -> bool:
        if next(looks) in (0, 3):
            raise OSError(errno.ESTALE, "Stale file handle")
        return look(path)

    monkeypatch.setattr(Path, "is_file", stale)
    assert damage(folder / "step_10", patience=30) is None
    assert next(looks) > 4


class Trap:
    """Says that it was unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def test_nothing_is_unpickled(folder: Path, tmp_path: Path) -> None:
    """Pickles that lie in the folder, under any name that might be looked for, are not even opened."""
    trap = pickle.dumps(Trap(str(tmp_path / "sprung")))
    path = folder / "step_10"
    places = [path, path / "layers"]
    names = [
        "model.pt",
        "00000.pt",
        "00000",
        "common.pt",
        ".metadata",
        "state.pkl",
        "pytorch_model.bin",
        "optimizer.pt",
    ]
    planted = {place / name for place in places for name in names}
    for each in planted:
        each.write_bytes(trap)
    opened: set[Path] = set()
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open":
            opened.add(Path(str(arguments[0])))
        assert not watching or event != "pickle.find_class", arguments

    sys.addaudithook(watch)
    try:
        assert newest(folder) == path
        assert read_state_json(path) == {"step": 10}
        assert loads(path, 10)
    finally:
        watching = False
    assert {path / name for name in [*FILES, "checkpoint.json"]} <= opened
    assert not planted & opened
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()  # the trap works


def test_a_file_of_another_model_is_said_to_be_that(folder: Path) -> None:
    class Deeper:
        def layers_to_load(self) -> list[int]:
            return [3]

    engine: Any = Deeper()
    with pytest.raises(ResumeRefused, match=r"has no layers/00003.*of another model"):
        load_engine(folder / "step_10", engine, 10)
    with pytest.raises(ResumeRefused, match=r"has no layers/00003.*of another model"):
        store.verify(folder / "step_10", "layers/00003.safetensors")
