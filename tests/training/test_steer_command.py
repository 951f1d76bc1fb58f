"""``megamix steer``: what is refused, what is told, and how a run answers."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from recorded_runs import BATCH, SEQ, STEPS, write_data, write_run
from typer.testing import CliRunner, Result

from megamix.cli import app
from megamix.core.errors import InputError, MegamixError
from megamix.mixing.steering.journal import ANSWERS, JOURNAL, Journal, read_commands
from megamix.training.job.lock import RunLock

AT = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steered") / "data"
    write_data(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Path:
    write_run(tmp_path / "run", data / "manifest.json", AT)
    return tmp_path / "run"


def steer(run: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["steer", str(run), *options])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "wob=0.3"], "there is no domain 'wob'. Did you mean 'web'?"),
        (["--set", "web"], "--set web: expected DOMAIN=VALUE"),
        (["--set", "web=1.5"], "--set web=1.5: expected a number from 0 to 1."),
        (["--set", "web=0.1", "--set", "web=0.2"], "names the domain 'web' twice"),
        (["--pin", "web=0.7", "--pin", "_books=0.5"], "sum to 1.2, more than 1: web=0.7, _books=0.5"),
        (["--bounds", "web=0.4"], "expected LOW..HIGH"),
        (["--bounds", "web=0.4..0.1"], "0.4 is above 0.1"),
        (["--bounds", "web=..0.1", "--bounds", "_books=..0.1", "--bounds", "c_$1$=..0.1"], "sum to 0.3, less than 1"),
        (["--unpin", "web"], "domain 'web' is not pinned (pinned: none)"),
        (["--undo"], "was given no command that could be taken back"),
        (["--note", "nothing"], "there is nothing to do"),
        (["--hold", "--release"], "are opposites"),
        (["--mixer", "odm"], "expected a mixer as in a config"),
        (["--mixer", "{name: odm, presett: paper}"], "Did you mean 'preset'"),
        (["--mixer", "{name: doremi, reference: /nowhere}"], "the run reads no reference losses"),
        (["--mixture", "/nowhere"], "/nowhere"),
        (["--hold", "--at-step", "40"], f"the run stands after step 0 and ends after step {STEPS}"),
    ],
)  # fmt: skip
def test_bad_commands_are_refused_with_the_numbers(run: Path, options: list[str], said: str) -> None:
    result = steer(run, *options)
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception)
    assert not (run / JOURNAL).exists()


def test_no_run_and_one_that_is_done(tmp_path: Path, data: Path) -> None:
    assert "is not a run: there is no such directory" in str(steer(tmp_path / "no", "--hold").exception)
    write_run(tmp_path / "done", data / "manifest.json", STEPS)
    (tmp_path / "done" / "checkpoints" / f"step_{STEPS}").mkdir(parents=True)
    (tmp_path / "done" / "checkpoints" / f"step_{STEPS}" / "checkpoint.json").write_text("{}")
    assert f"is done: all its {STEPS} steps are" in str(steer(tmp_path / "done", "--hold").exception)


def test_nobody_trains(run: Path) -> None:
    """The command is there for the next start; what it would do is shown, and the next one knows of it."""
    result = steer(run, "--pin", "web=0.5", "--note", "why not")
    assert result.exception is None, result.exception
    (command,) = read_commands(run)[0].values()
    assert (command.pin, command.note, command.id[:2]) == ({"web": 0.5}, "why not", "1-")
    assert f"command {command.id}: pin web=0.5\nnobody trains {run} now" in result.output
    assert "-> 0.5000" in result.output
    assert "pinned at 0.5" in str(steer(run, "--set", "web=0.1").exception)
    assert "sum to 1.1" in str(steer(run, "--pin", "_books=0.6").exception)
    undone = steer(run, "--undo")
    assert undone.exception is None
    assert list(read_commands(run)[0].values())[-1].undo == command.id
    assert "no command that could be taken back" in str(steer(run, "--undo").exception)
    assert steer(run, "--set", "web=0.1").exception is None


def test_an_online_rule_is_named_beside_a_set(run: Path) -> None:
    assert "the rule odm goes on from there" in steer(run, "--mixture", "uniform").output
    assert "the rule" not in steer(run, "--set", "web=0.1", "--hold").output


def test_a_ramp_that_the_run_does_not_finish_is_said(run: Path) -> None:
    left = BATCH * SEQ * STEPS
    assert "the run ends within" not in steer(run, "--set", "web=0.1", "--ramp", str(left)).output
    said = f"the run ends within the ramp: of its {left + 1:g} tokens about {left:,} are left"
    assert said in steer(run, "--set", "web=0.1", "--ramp", str(left + 1)).output


def answered(run: Path, outcome: str) -> threading.Thread:
    """Rank 0 of a run, as far as answers go: it answers the next command."""

    def act() -> None:
        journal = Journal(run)
        while not (due := journal.due(21, 23, ())):
            time.sleep(0.01)
        journal.answer(due[0].id, outcome, 21, 23, 184, "because")

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_the_answer_is_waited_for(run: Path) -> None:
    with RunLock(run):
        thread = answered(run, "applied")
        result = steer(run, "--hold")
        thread.join()
        assert result.output.splitlines()[-1] == "in force from step 24 on (sample 184)"
        # Another command of which the run says that it cannot be done.
        (run / JOURNAL).unlink()
        thread = answered(run, "ignored")
        result = steer(run, "--release")
        thread.join()
        assert isinstance(result.exception, InputError)
        assert "ignored" in str(result.exception)
        assert "because" in str(result.exception)


def test_no_answer_in_time(run: Path) -> None:
    with RunLock(run):
        result = steer(run, "--hold", "--timeout", "0")
        assert type(result.exception) is MegamixError
        assert "stays in its journal" in str(result.exception)
        assert "not waited for" in steer(run, "--release", "--no-wait").output
    assert not (run / ANSWERS).exists()
    assert len([json.loads(line) for line in (run / JOURNAL).read_text().splitlines()]) == 2
