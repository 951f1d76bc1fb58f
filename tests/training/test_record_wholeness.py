"""A record that loses lines: the run notices where its files are moved away under it, and a resume what is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import engine_at, job
from recorded_runs import write_data, write_run
from records import lines

from megamix.analysis.summary import run_table
from megamix.core.errors import InputError, MegamixError
from megamix.core.files import AppendFile
from megamix.training.checkpoints.saving import CheckpointWriter
from megamix.training.checkpoints.store import complete_steps
from megamix.training.config import CheckpointConfig
from megamix.training.records.mean_weights import run_weights
from megamix.training.records.recorded_run import RecordedRun
from megamix.training.records.run_record import RunRecord
from megamix.training.records.wholeness import missing_from_record, record_ends, record_sizes


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    with job(tmp_path) as group:
        yield group


def move_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


def copy_in_place(path: Path) -> None:
    """A copy takes the path: what is added would go to the other file."""
    other = path.rename(path.with_name("other"))
    shutil.copy(other, path)


@pytest.mark.parametrize("act", [move_folder, copy_in_place, Path.unlink])
def test_nothing_is_added_to_a_file_that_its_path_does_not_name(tmp_path: Path, act: Callable[[Path], Any]) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    file = AppendFile(path)
    file.write_line({"step": 1})
    act(path)
    with pytest.raises(MegamixError, match=r"metrics\.jsonl was moved, removed or replaced while it was written to"):
        file.write_line({"step": 2})
    file.close()
    assert not path.is_file() or path.read_text() == '{"step": 1}\n'
    assert not (tmp_path / "run" / "other").is_file() or (tmp_path / "run" / "other").read_text() == '{"step": 1}\n'


def test_a_file_that_is_reached_by_another_path_goes_on(tmp_path: Path) -> None:
    """A run directory that is moved, with a link in its place."""
    file = AppendFile(tmp_path / "run" / "metrics.jsonl")
    (tmp_path / "run").rename(tmp_path / "disk")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    file.write_line({"step": 1})
    assert (tmp_path / "disk" / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("anew", [False, True])
def test_no_checkpoint_is_made_where_the_run_no_longer_is(
    tmp_path: Path, group: Any, asynchronous: bool, anew: bool
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = CheckpointConfig(asynchronous=asynchronous)
    writer = CheckpointWriter(run / "checkpoints", engine_at(2), config, group)
    writer.save(2, {})
    writer.wait()
    run.rename(tmp_path / "moved")
    if anew:
        run.mkdir()
    message = r"step 4 was not written: .*run was moved, removed or replaced"
    if asynchronous:
        writer.save(4, {})
        with pytest.raises(MegamixError, match=message):
            writer.wait()
    else:
        with pytest.raises(MegamixError, match=message):
            writer.save(4, {})
    assert not (run / "checkpoints").exists()
    assert complete_steps(tmp_path / "moved" / "checkpoints") == [2]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    files = {
        "metrics.jsonl": '{"step": 1}\n{"step": 2}\n{"step": 3}\n',
        "weights.jsonl": '{"step": 0}\n',
        "events.jsonl": '{"step": 0}\n',
        "statistics/from_000000001.bin": "header\n12345678",
        "shadow/odm.jsonl": '{"step": 1}\n',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "config.resolved.yaml").write_text("run_dir: run\n")
    (tmp_path / "lock").write_text("{}\n")
    sizes = record_sizes(tmp_path)
    assert sizes == {name: len(content) for name, content in files.items()}
    assert missing_from_record(tmp_path, sizes, 3) is None
    for name in files:
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 4}\n')
    assert missing_from_record(tmp_path, sizes, 3) is None

    (tmp_path / "weights.jsonl").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    (tmp_path / "statistics" / "from_000000001.bin").write_text("header\n1234567")
    (tmp_path / "shadow" / "odm.jsonl").write_text("")
    text = missing_from_record(tmp_path, sizes, 3)
    assert text is not None
    assert "of the steps up to 3" in text
    for part in (
        "metrics.jsonl has 28 of 36 bytes, up to step 2",
        "weights.jsonl is gone (12 bytes)",
        "statistics/from_000000001.bin has 14 of 15 bytes",
        "shadow/odm.jsonl has 0 of 12 bytes. ",
    ):
        assert part in text
    assert "events.jsonl" not in text


def remove_a_line(lines: list[str]) -> list[str]:
    return [*lines[:3], *lines[4:]]


def change_the_last(lines: list[str]) -> list[str]:
    return [*lines[:9], lines[9].replace("9", "8"), *lines[10:]]


def of_another_run(lines: list[str]) -> list[str]:
    return [line.replace("loss", "lass") for line in lines]


@pytest.mark.parametrize("act", [remove_a_line, change_the_last, of_another_run])
def test_lines_lost_before_others(tmp_path: Path, act: Callable[[list[str]], list[str]]) -> None:
    """The file is as large as it was or larger, as lines followed the checkpoint's."""
    path = tmp_path / "metrics.jsonl"
    written = [f'{{"step": {step}, "loss": {step}.5}}\n' for step in range(20)]
    path.write_text("".join(written[:10]))
    sizes = record_sizes(tmp_path)
    ends = record_ends(tmp_path, sizes)
    path.write_text("".join(written))
    assert missing_from_record(tmp_path, sizes, 9, ends) is None
    path.write_text("".join(act(written)))
    assert path.stat().st_size >= sizes["metrics.jsonl"]
    assert missing_from_record(tmp_path, sizes, 9) is None  # a checkpoint of before ends were kept
    text = missing_from_record(tmp_path, sizes, 9, ends)
    assert text is not None
    assert "metrics.jsonl has lost or changed bytes among its first 250" in text


def test_a_resume_says_what_is_missing_and_no_other_does(
    megamix: Callable[..., Any], tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = tiny_config(
        checkpoint={"every": 2}, log={"every": 1}, evaluate={"every": 0, "batches": 1}, mixer={"name": "static"}
    )
    assert "is not whole" not in megamix("train", config, "train.stop_after=2").stderr
    assert "is not whole" not in megamix("train", config, "train.stop_after=4").stderr
    # Checkpoints that were moved to another disk are this run's all the same.
    shutil.move(run / "checkpoints", tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    (run / "weights.jsonl").unlink()
    whole = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(whole[:3]))
    said = megamix("train", config, "train.stop_after=6").stderr
    assert "is not whole: of the steps up to 4, " in said
    assert "weights.jsonl is gone" in said
    assert "up to step 2" in said
    assert [line["event"] for line in lines(run / "events.jsonl")].count("incomplete") == 1
    assert "is not whole" not in megamix("train", config, "train.stop_after=8").stderr
    # The weights are on record again, from where they began to hold.
    record = RecordedRun.open(run)
    (line,) = record.ledger.lines
    assert (line["step"], line["position"], sum(line["segment"]["counts"])) == (4, 0, 0)
    assert run_weights(record, "initial") == record.natural_shares()


def test_a_record_whose_first_weights_are_lost(tmp_path: Path) -> None:
    """Samples are counted all the same, as every line says them; what the run began with is not known."""
    manifest = write_data(tmp_path / "data")
    taken = write_run(tmp_path / "run", manifest.folder / "manifest.json")
    path = tmp_path / "run" / "weights.jsonl"
    whole = run_weights(RecordedRun.open(tmp_path / "run"), "realised")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[2:]))
    record = RecordedRun.open(tmp_path / "run")
    assert record.ledger.starts[0] > 0
    assert run_weights(record, "realised") == whole
    assert list(record.ledger.counts(record.position).values()) == taken[-1]
    with pytest.raises(InputError, match="the weights that the run began with are not on record"):
        run_weights(record, "initial")
    assert all(row.initial_weight is None for row in run_table(record).rows)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "weights.jsonl", "weights.bin", "odm_weights.jsonl", "shadow/a.jsonl"]
)
def test_a_folder_where_a_file_of_the_record_belongs(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "in it").mkdir(parents=True)
    with pytest.raises(MegamixError, match=rf"cannot write .*{Path(name).name}: Is a directory"):
        RunRecord(tmp_path, ("a", "b"), None)


def test_a_record_that_begins_anew_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for resumed, said in ((None, 0), (3, 0), (None, 1)):
        caplog.clear()
        RunRecord(tmp_path, ("a", "b"), resumed).close()
        assert caplog.text.count("begins anew, and so does its record") == said
