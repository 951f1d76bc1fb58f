"""Checkpoints are taken when they are asked for and written while training goes on; what goes wrong is told, by all."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
import torch
from checkpoint_files import TinyEngine, engine_at, flip, job, loads, write
from checkpoint_ranks import run
from commands import ENVIRONMENT, RUN_SECONDS, SUPPORT
from torch.distributed.checkpoint.api import CheckpointException

from megamix.core.errors import InputError, MegamixError, Preempted, ResumeRefused
from megamix.engines.base import OwnFormat
from megamix.training.checkpoints import saving
from megamix.training.checkpoints.saving import CheckpointWriter, load_engine
from megamix.training.checkpoints.store import complete_steps, damage, newest, read_listing, read_state_json
from megamix.training.config import CheckpointConfig


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    with job(tmp_path) as group:
        yield group


class Disk:
    """Lets nothing be written until it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_ready = threading.Event()
        self.is_asked = threading.Event()
        write = saving.save_file

        def wait_and_write(*arguments: Any) -> None:
            self.is_asked.set()
            assert self.is_ready.wait(60)
            write(*arguments)

        monkeypatch.setattr(saving, "save_file", wait_and_write)


def test_training_goes_on_while_it_is_written(tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is of the moment of the call, though weights and state change while the disk is slow."""
    disk, engine = Disk(monkeypatch), engine_at(4)
    state = {"counts": [1, 2]}
    with CheckpointWriter(tmp_path / "c", engine, CheckpointConfig(), group) as writer:
        writer.save(4, state)
        assert writer.last_step == 4
        assert disk.is_asked.wait(60)
        engine.go_to(5)
        state["counts"][0] = 100
        writer.check()
        assert [path.name for path in (tmp_path / "c").iterdir()] == ["step_4.partial"]
        disk.is_ready.set()
        writer.wait()
        assert loads(tmp_path / "c" / "step_4", 4)
        assert json.loads((tmp_path / "c" / "step_4" / "state.json").read_text()) == {"counts": [1, 2], "step": 4}
        writer.save(5, state)
    assert loads(tmp_path / "c" / "step_5", 5)


def test_with_asynchronous_off_it_is_there_when_save_returns(tmp_path: Path, group: Any) -> None:
    writer = CheckpointWriter(tmp_path / "c", engine_at(4), CheckpointConfig(asynchronous=False), group)
    writer.save(4, {})
    assert loads(tmp_path / "c" / "step_4", 4)


def test_a_failure_in_the_background_is_raised_by_every_call(
    tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "c", [4], group)
    monkeypatch.setattr(saving, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    writer = CheckpointWriter(tmp_path / "c", engine_at(5), CheckpointConfig(), group)
    writer.save(5, {})
    said = r"step 5 was not written: cannot write .*/c/step_5.partial/layers/00000.safetensors: No space left on device"
    for ask in (writer.wait, writer.wait, writer.check, lambda: writer.save(6, {})):
        with pytest.raises(MegamixError, match=said):
            ask()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step_4"]  # what was written takes up no space


def block(folder: Path, engine: Any, group: Any, error: BaseException) -> CheckpointWriter:
    """Asks for a checkpoint, then fails with ``error``."""
    writer = CheckpointWriter(folder, engine, CheckpointConfig(), group)
    with writer:
        writer.save(5, {})
        raise error


def test_the_end_of_the_block(tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits; where the block fails, for a while; and a failure to write explains what is no error of megamix's."""
    disk, engine = Disk(monkeypatch), engine_at(5)
    monkeypatch.setattr(saving, "LEAVE_SECONDS", 0.05)
    with pytest.raises(ZeroDivisionError):
        block(tmp_path / "c", engine, group, ZeroDivisionError())
    assert not complete_steps(tmp_path / "c")  # given up, and the error was not held up for it
    threading.Timer(0.3, disk.is_ready.set).start()
    with pytest.raises(Preempted):
        block(tmp_path / "d", engine, group, Preempted())
    assert loads(tmp_path / "d" / "step_5", 5)  # waited for, however long
    monkeypatch.setattr(saving, "LEAVE_SECONDS", 60)
    engine.held[1]["weight"][3] = torch.nan
    for raised, seen in [(RuntimeError(), MegamixError), (InputError(), InputError)]:
        with pytest.raises(seen) as caught:
            block(tmp_path / "e", engine, group, raised)
        assert ("not finite" in str(caught.value)) == isinstance(raised, RuntimeError)


STUCK = """
import sys, threading
from pathlib import Path
from checkpoint_files import engine_at, job
from megamix.training.checkpoints import saving
from megamix.training.config import CheckpointConfig
saving.save_file = lambda *_: threading.Event().wait()
saving.LEAVE_SECONDS = 0.1
with job(Path(sys.argv[1])) as group, saving.CheckpointWriter(Path(sys.argv[1]) / "c", engine_at(1), CheckpointConfig(), group) as writer:
    writer.save(1, {})
    raise ValueError("of the main thread")
"""


def test_a_process_ends_though_its_checkpoint_does_not(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path)], env=ENVIRONMENT, cwd=SUPPORT, timeout=RUN_SECONDS,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "ValueError: of the main thread" in done.stderr


@pytest.mark.parametrize("part", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_ruined_model_is_not_saved(tmp_path: Path, group: Any, part: str, value: float) -> None:
    write(tmp_path, [3], group)
    engine = engine_at(4)
    engine.held[1][part][7:9] = value
    writer = CheckpointWriter(tmp_path, engine, CheckpointConfig(), group)
    writer.save(4, {})
    with pytest.raises(MegamixError, match=rf"step 4 .* 2 of 50 values of {part}/h.1 \(layer 1\) are not finite"):
        writer.wait()
    assert newest(tmp_path) == tmp_path / "step_3"
    assert complete_steps(tmp_path) == [3]


def test_a_ruined_state_is_not_saved(tmp_path: Path, group: Any) -> None:
    writer = CheckpointWriter(tmp_path, engine_at(4), CheckpointConfig(asynchronous=False), group)
    with pytest.raises(MegamixError, match="the run's state has a number that is not finite"):
        writer.save(4, {"mixer": {"loss": [1.0, float("nan")]}})
    assert not complete_steps(tmp_path)


def test_which_checkpoints_stay(tmp_path: Path, group: Any) -> None:
    """The newest ``keep``, and those that ``keep_every`` divides; against a count of its own."""
    numbers = random.Random(5)
    for case in range(12):
        keep, keep_every = numbers.randint(1, 4), numbers.choice([0, 0, 2, 5, 7])
        steps = sorted(numbers.sample(range(1, 30), numbers.randint(1, 7)))
        folder = tmp_path / str(case)
        write(folder, steps, group, keep=keep, keep_every=keep_every)
        wanted = {step for rank, step in enumerate(reversed(steps)) if rank < keep}
        wanted |= {step for step in steps if keep_every and step % keep_every == 0}
        assert {path.name for path in folder.iterdir()} == {f"step_{step}" for step in wanted}, (
            keep,
            keep_every,
            steps,
        )
        assert all(loads(folder / f"step_{step}", step) for step in wanted)


def test_what_is_saved_while_steps_are_left_out_takes_the_place_of_no_other(tmp_path: Path, group: Any) -> None:
    """Two good ones, a row of skipped steps that is saved step by step, through restarts, and a good one at last."""

    def there() -> list[int]:
        return sorted(complete_steps(tmp_path))

    write(tmp_path, [2, 4, 6], group, keep=2)
    for steps, wanted in (([7, 8, 9], [4, 6, 9]), ([10], [4, 6, 10])):
        write(tmp_path, steps, group, {"guard": {"skips": 9, "in_a_row": 1}}, keep=2)
        assert there() == wanted
    assert newest(tmp_path) == tmp_path / "step_10"
    write(tmp_path, [12], group, {"guard": {"skips": 9, "in_a_row": 0}}, keep=2)
    assert there() == [6, 10, 12]
    write(tmp_path, [14], group, keep=2)
    assert there() == [12, 14]


def test_a_damaged_one_takes_the_place_of_no_other(tmp_path: Path, group: Any) -> None:
    write(tmp_path, [2, 4, 6], group, keep=2)
    flip(tmp_path / "step_6" / "checkpoint.json")
    write(tmp_path, [8], group, keep=2)
    assert sorted(complete_steps(tmp_path)) == [4, 6, 8]


def test_a_copy_under_another_name_is_no_checkpoint_of_that_step(tmp_path: Path, group: Any) -> None:
    """It sorts nowhere, is not resumed from, and is left to whoever made it; under a name without a step it is one."""
    write(tmp_path, [2, 4], group)
    shutil.copytree(tmp_path / "step_4", tmp_path / "step_99999")
    copy = shutil.copytree(tmp_path / "step_4", tmp_path / "good")
    assert newest(tmp_path) == tmp_path / "step_4"
    with pytest.raises(ResumeRefused, match=r"step_99999 is damaged: it was taken after step 4, not 99999"):
        read_state_json(tmp_path / "step_99999")
    assert read_state_json(copy) == {"step": 4}
    write(tmp_path, [6], group, keep=1)
    assert sorted(complete_steps(tmp_path)) == [6, 99999]


def test_checkpoints_of_a_course_that_the_run_has_left(tmp_path: Path, group: Any) -> None:
    """Resumed from step 4 though there are those of 8 and 12: the first new one stays, they do not."""
    write(tmp_path, [4, 8, 12], group)
    write(tmp_path, [6], group, keep=2)
    assert sorted(complete_steps(tmp_path)) == [4, 6]
    assert newest(tmp_path) == tmp_path / "step_6"


def test_leftovers_of_killed_runs_are_cleared_away(tmp_path: Path, group: Any) -> None:
    """Whatever a kill can leave, the next checkpoint clears away; one that had no name for a moment has it again."""
    write(tmp_path, [2, 4, 6], group)
    for name in ("step_3.partial", "step_8.partial", "step_1.removed", "step_4.before", "step_4.before.removed"):
        (tmp_path / name / "layers").mkdir(parents=True)
        (tmp_path / name / "layers" / "00000.safetensors").write_text("half a file")
    (tmp_path / "step_6").rename(tmp_path / "step_6.before")
    (tmp_path / "notes.partial").write_text("not ours")
    write(tmp_path, [8], group)
    assert {path.name for path in tmp_path.iterdir()} == {
        "step_2",
        "step_4",
        "step_6",
        "step_8",
        "notes.partial",
        "store",
    }
    assert all(loads(tmp_path / f"step_{step}", step) for step in (2, 4, 6, 8))


def test_all_ranks_know_what_went_wrong_on_one(tmp_path: Path) -> None:
    """One of two cannot write, or cannot rename: both say the same, and the checkpoint before is the newest."""
    (code, first), (other, second) = run("fail", tmp_path)
    assert (code, other) == (0, 0)
    assert first == second
    saved, unwritten, unnamed = first[:3]
    assert saved == "(None, None)"
    assert re.search(
        r"MegamixError: .* step 2 was not written: cannot write .*0000[23].safetensors: .*File too large", unwritten
    )
    assert re.search(r"MegamixError: .* step 3 was not written: cannot write .*step_3.partial: Read-only file", unnamed)
    assert [message.replace("False", "True") for message in first[3:]] == first[:3]
    for is_async in ("True", "False"):
        folder = tmp_path / is_async
        assert [path.name for path in folder.iterdir()] == ["step_1"]
        assert damage(folder / "step_1") is None
        assert sorted(read_listing(folder / "step_1").files) == [
            *(f"layers/0000{layer}.safetensors" for layer in range(4)),
            "state.json",
        ]


def test_a_rank_that_dies_does_not_keep_the_others(tmp_path: Path) -> None:
    (code, said), (killed, _) = run("die", tmp_path)
    assert (code, killed) == (0, -signal.SIGKILL)
    assert said.startswith("RankFailed: the checkpoint of step 2 was given up: another rank is gone")
    assert newest(tmp_path / "c") == tmp_path / "c" / "step_1"


class OwnEngine(TinyEngine, OwnFormat):
    """Writes one file of its own."""

    own_format = "tiny"

    @property
    def saves_own_format(self) -> bool:
        return True

    def own_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for layer, parts in self.held.items():
            for part, tensor in parts.items():
                yield f"{part} of {layer}", tensor

    problem: Exception | None = None

    def save_own(self, folder: Path) -> None:
        torch.save(self.held, folder / "all.pt")
        if self.problem is not None:
            raise self.problem

    def load_own(self, folder: Path, steps: int) -> None:
        self.held, self.optimizer_steps = torch.load(folder / "all.pt", weights_only=True), steps


def test_a_format_of_its_own_is_written_at_once_and_checked_as_well(tmp_path: Path, group: Any) -> None:
    engine: Any = OwnEngine()
    engine.go_to(4)
    writer = CheckpointWriter(tmp_path, engine, CheckpointConfig(), group)
    writer.save(4, {})
    path = tmp_path / "step_4"
    assert sorted(read_listing(path).files) == ["state.json", "tiny/all.pt"]
    other: Any = OwnEngine()
    load_engine(path, other, 4)
    assert other.equals(engine)
    engine.held[2]["exp_avg"][5] = torch.inf
    with pytest.raises(MegamixError, match=r"1 of 50 values of exp_avg of 2 \(rank 0\) are not finite"):
        writer.save(5, {})
    assert [path.name for path in tmp_path.glob("step*")] == ["step_4"]
    engine.held[2]["exp_avg"][5] = 0.0
    full = OSError(28, "No space left on device")
    gathered = CheckpointException("written", {0: (full, StackSummary()), 1: (full, StackSummary())})
    for problem in (full, gathered, RuntimeError("Worker failure: No space left on device")):
        engine.problem = problem
        with pytest.raises(
            MegamixError, match=r"step 5 was not written: .*step_5.partial/tiny: .*No space left on dev"
        ):
            writer.save(5, {})
        assert [path.name for path in tmp_path.glob("step*")] == ["step_4"]
    flip(path / "tiny" / "all.pt")
    with pytest.raises(ResumeRefused, match=r"tiny/all.pt has SHA-256"):
        load_engine(path, other, 4)


def test_each_file_of_such_a_format_is_hashed_once() -> None:
    """Also where a rank does not see what others have written yet; a rank always sees its own."""
    seen = [["a", "b", "c"], ["b", "c", "d"], ["c", "e"]]
    shared = saving._shared_out(seen)
    assert sorted(shared) == ["a", "b", "c", "d", "e"]
    assert all(name in seen[rank] for name, rank in shared.items())
    everybody = saving._shared_out([[str(number) for number in range(12)]] * 3)
    assert sorted(everybody.values()) == sorted(list(range(3)) * 4)
