"""Steering: its state machine against numbers worked out by hand, and the journal's promises."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamix.core.errors import InputError
from megamix.data.batches import Batches
from megamix.mixing.constraints import Constraints
from megamix.mixing.mixers import DomainStats, Mixer, OdmConfig, PartMixer, StaticConfig
from megamix.mixing.ramps import Ramp
from megamix.mixing.source_bounds import SourceBound
from megamix.mixing.steering.command import SteerCommand
from megamix.mixing.steering.course import Course, Place, steered
from megamix.mixing.steering.journal import ANSWERS, JOURNAL, Journal, append_command, read_answers, read_commands
from megamix.mixing.steering.rule import RuleMaker
from megamix.mixing.steering.steering import Steering
from megamix.mixing.weight_policy import Stages, WeightPolicy

NAMES = ("web", "code", "law")
BATCH, LAG, LENGTH = 10, 1, 4
FIRST = [0.5, 0.3, 0.2]


def bounds(floor: Any = 0.0, cap: Any = 1.0) -> Constraints:
    k, full = np.full(3, 10**6), lambda value: np.broadcast_to(np.asarray(value, float), 3).copy()
    return Constraints(NAMES, k, 10**6, full(floor), full(cap), np.full(3, np.inf), "cap")


class Run:
    """Steps of a run in which nothing is trained: what the rule asks for is given."""

    def __init__(self, folder: Path, own: Constraints | None = None, config: Any = None, state: Any = None) -> None:
        own = own or bounds()
        policy = WeightPolicy(Stages((0,), np.array([FIRST])), own, Batches.equal(BATCH), LAG)
        make = RuleMaker(config or StaticConfig(), NAMES, None)
        self.steering = Steering(policy, Journal(folder), make, LENGTH, state)
        self.mixer: Mixer = make.first(None, FIRST, ())
        self.folder, self.step, self.weights = folder, 0, np.array(FIRST)
        self.records: list[dict[str, Any]] = []

    def steer(self, **parts: Any) -> str:
        return append_command(self.folder, parts).id

    def go(self, wanted: list[float] | None = None) -> list[float]:
        """One step; the weights that follow from it."""
        given = None if wanted is None else np.array(wanted)
        found = self.steering.follow(self.step, given, self.mixer, self.weights.copy, lambda: np.zeros(3, np.int64))
        if found is not None:
            self.weights, self.mixer = found.weights, found.mixer
        self.records.append({} if found is None else found.record)
        self.step += 1
        assert self.weights.sum() == pytest.approx(1, abs=1e-12)
        return self.weights.tolist()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_set_keeps_the_ratios_of_the_others_until_the_rules_next_update(run: Run) -> None:
    assert run.go() == FIRST
    name = run.steer(set={"code": 0.65}, note="more code")
    assert run.go() == pytest.approx([0.25, 0.65, 0.1])  # 0.35 in the ratio 5 : 2
    assert run.records[-1]["commands"][0] == {
        "id": name, "who": run.records[-1]["commands"][0]["who"], "note": "more code", "what": "set code=0.65",
    }  # fmt: skip
    assert run.go() == pytest.approx([0.25, 0.65, 0.1])
    assert run.go([0.2, 0.2, 0.6]) == [0.2, 0.2, 0.6]
    (answer,) = read_answers(run.folder)
    assert (answer["step"], answer["effective_step"], answer["position"]) == (2, 3, 30)


def test_a_mixture_and_a_set_at_once_and_several_sets(run: Run) -> None:
    run.steer(mixture={"web": 0.2, "code": 0.4, "law": 0.4}, set={"web": 0.5})
    assert run.go() == pytest.approx([0.5, 0.25, 0.25])
    run.steer(set={"web": 0.1, "code": 0.2})
    assert run.go() == pytest.approx([0.1, 0.2, 0.7])


def test_pins_divide_the_rest_and_unpin_gives_it_back_to_the_rule(run: Run) -> None:
    run.steer(pin={"code": 0.6})
    assert run.go() == pytest.approx([0.4 * 5 / 7, 0.6, 0.4 * 2 / 7])
    assert run.go([0.1, 0.8, 0.1]) == pytest.approx([0.2, 0.6, 0.2])
    run.steer(set={"web": 0.3})  # beside a pin: exactly this, the rest to law
    assert run.go() == pytest.approx([0.3, 0.6, 0.1])
    run.steer(unpin=["code"])
    assert run.go([0.1, 0.8, 0.1]) == [0.1, 0.8, 0.1]


def test_a_static_run_is_what_it_was_once_unpinned(run: Run) -> None:
    run.steer(pin={"code": 0.6})
    run.go()
    run.steer(unpin=["code"])
    assert run.go() == FIRST


def test_bounds_join_those_of_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, bounds(cap=[1.0, 0.5, 1.0]))
    run.steer(bounds={"code": (0.4, 1.0), "law": (0.0, 0.1)})
    assert run.go() == pytest.approx([0.5, 0.4, 0.1])
    assert run.go([0.0, 0.9, 0.1]) == pytest.approx([0.4, 0.5, 0.1])  # law at its cap, code at the run's
    run.steer(bounds={"code": (0.0, 1.0), "law": (0.0, 1.0)})
    assert run.go([0.1, 0.2, 0.7]) == [0.1, 0.2, 0.7]


def test_a_hold_passes_the_rule_over_until_it_is_released(run: Run) -> None:
    run.steer(hold=True)
    assert run.go([0.1, 0.1, 0.8]) == [0.1, 0.1, 0.8]  # what followed from this very step is kept
    assert run.go([0.8, 0.1, 0.1]) == [0.1, 0.1, 0.8]
    assert run.records[-1] == {"held": True}
    run.steer(set={"code": 0.55})
    assert run.go([0.8, 0.1, 0.1]) == pytest.approx([0.05, 0.55, 0.4])
    run.steer(hold=False)
    assert run.go() == pytest.approx([0.05, 0.55, 0.4])
    assert run.go([0.8, 0.1, 0.1]) == [0.8, 0.1, 0.1]


def test_a_ramp_begins_and_ends_exactly(run: Run) -> None:
    """Of 2.5 steps: from position 20 on, 25 samples."""
    run.steer(pin={"code": 0.8}, ramp_tokens=25 * LENGTH)
    end = np.array([0.2 * 5 / 7, 0.8, 0.2 * 2 / 7])
    for share in (0.0, 0.4, 0.8, 1.0):
        assert run.go() == pytest.approx(((1 - share) * np.array(FIRST) + share * end).tolist(), abs=1e-15)
    assert run.records[0]["ramp"] == [20, 25.0]
    assert "ramp" not in run.records[3]
    run.go()
    assert run.records[4] == {}, "no line for a step in which nothing moves"
    ramp = Ramp(20, 25.0, np.array(FIRST))
    assert [ramp.share(position) for position in (0, 20, 44, 45, 99)] == [0.0, 0.0, 24 / 25, 1.0, 1.0]


def test_a_hold_in_a_ramp_keeps_the_weights_that_it_has_reached(run: Run) -> None:
    run.steer(pin={"code": 0.8}, ramp_tokens=20 * LENGTH)
    run.go()
    half = [0.5 * a + 0.5 * b for a, b in zip(FIRST, [0.2 * 5 / 7, 0.8, 0.2 * 2 / 7], strict=True)]
    run.steer(hold=True)
    assert run.go() == pytest.approx(half)
    assert run.go([0.1, 0.1, 0.8]) == pytest.approx(half)
    run.steer(hold=False)
    assert run.go([0.5, 0.0, 0.5])[1] == pytest.approx(0.55), "the pin stays where it was"


def test_undo_takes_back_the_last_commands_one_by_one(run: Run) -> None:
    first, second = run.steer(set={"code": 0.65}), run.steer(pin={"law": 0.5})
    assert run.go() == pytest.approx([0.5 * 25 / 90, 0.5 * 65 / 90, 0.5])
    run.steer(undo=first)  # not the last one
    run.go()
    assert read_answers(run.folder)[-1]["outcome"] == "ignored"
    run.steer(undo=second)
    assert run.go() == pytest.approx([0.25, 0.65, 0.1])
    run.steer(undo=first)
    assert run.go() == FIRST
    run.steer(undo=first)
    run.go()
    assert "none can be" in read_answers(run.folder)[-1]["text"]


def test_undo_leaves_what_the_rule_has_given_since(run: Run) -> None:
    name = run.steer(set={"code": 0.65})
    run.go()
    run.go([0.2, 0.2, 0.6])
    run.steer(undo=name)
    assert run.go() == [0.2, 0.2, 0.6]


def test_a_command_waits_for_its_step_and_can_be_cancelled(run: Run) -> None:
    run.steer(set={"code": 0.65}, at_step=5)
    gone = run.steer(set={"code": 0.0}, at_step=4)
    run.go()
    run.steer(undo=gone)
    for _ in range(2):
        assert run.go() == FIRST  # the steps 2 and 3, counted from 0, and so the first 4 altogether
    assert run.go() == pytest.approx([0.25, 0.65, 0.1])  # after 5 steps
    outcomes = [(answer["outcome"], answer["effective_step"]) for answer in read_answers(run.folder)]
    assert outcomes == [("noticed", 5), ("noticed", 4), ("applied", 3), ("cancelled", 3), ("applied", 5)]


def test_a_weight_of_0_leaves_a_domain_out_of_the_rule_and_can_come_back(tmp_path: Path) -> None:
    run = Run(tmp_path, config=OdmConfig(preset="official"))
    run.steer(set={"law": 0.0})
    run.go()
    assert isinstance(run.mixer, PartMixer)
    stats = DomainStats([30.0, 20.0, 0.0], [10, 10, 0], weights=run.weights)
    assert run.mixer.update(stats, 1)[2] == 0
    run.steer(set={"law": 0.2})
    assert run.go()[2] == pytest.approx(0.2)
    assert not isinstance(run.mixer, PartMixer)
    assert run.mixer.update(stats, 2)[2] > 0
    assert run.mixer.state_dict()["num_updates"] == 2, "the estimates go on"


def test_another_rule(run: Run) -> None:
    run.steer(mixer={"name": "odm", "preset": "official"})
    run.go()
    assert run.mixer.name == "odm"
    name = run.steer(mixer={"name": "odm", "presett": "official"})
    run.go()
    assert "Did you mean 'preset'" in read_answers(run.folder)[-1]["text"]
    assert name == read_answers(run.folder)[-1]["id"]
    run.steer(mixer={"name": "aioli"})
    run.go()
    assert read_answers(run.folder)[-1]["outcome"] == "ignored"


def test_pins_are_within_the_bounds_of_a_source_and_its_other_domains_give_way() -> None:
    web_and_code = SourceBound("text", np.array([0, 1]), 0.0, 0.6)
    place = Place(replace(bounds(cap=[1.0, 1.0, 1.0]), sources=(web_and_code,)), np.zeros(3), 0, LENGTH)
    current = np.array([0.3, 0.3, 0.4])
    with pytest.raises(InputError, match=r"source 'text': data.max_weight is 0.6, but its domains have at least 0.7"):
        steered(Course(current), SteerCommand(id="1", pin={"web": 0.7}), current, place)
    course = steered(Course(current), SteerCommand(id="1", pin={"web": 0.5}), current, place)
    assert course.weights(place) == pytest.approx([0.5, 0.1, 0.4], abs=1e-12)


def test_a_ramp_goes_by_tokens_where_samples_become_longer() -> None:
    """240 tokens from position 10 on: 20 samples of 4 tokens, then 20 of 8."""
    batches = Batches(((0, 10),), 8, ((4, 3),))
    ramp = Ramp(10, 60.0, np.array([1.0, 0.0, 0.0]))
    for position, share in ((10, 0.0), (20, 1 / 6), (30, 1 / 3), (40, 2 / 3), (50, 1.0)):
        place = Place(bounds(), np.zeros(3), position, 8, batches)
        assert ramp.share(place.on_the_way(ramp)) == pytest.approx(share, abs=1e-12)
    assert Place(bounds(), np.zeros(3), 40, 8, Batches.equal(10, 8)).on_the_way(ramp) == 40


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"set": {"cod": 0.3}}, "there is no domain 'cod'. Did you mean 'code'"),
        ({"pin": {"web": 0.7, "code": 0.5}}, "pins and lower bounds sum to 1.2, more than 1: web=0.7, code=0.5"),
        ({"pin": {"web": 0.2, "code": 0.3, "law": 0.1}}, "pins and upper bounds sum to 0.6, less than 1"),
        ({"pin": {"law": 0.5}}, "domain 'law' cannot be 0.5: its bounds are 0..0.4"),
        ({"set": {"law": 0.5}}, "domain 'law' cannot be 0.5"),
        ({"bounds": {"law": (0.5, 0.9)}}, "0.5..0.9 and data.min_weight 0, data.max_weight 0.4 leave it no weight"),
        ({"bounds": {"web": (0.0, 0.2), "code": (0.0, 0.2)}}, "sum to 0.8, less than 1"),
        ({"unpin": ("code",)}, "domain 'code' is not pinned (pinned: none)"),
        ({"mixture": {"web": 1.0}}, "no weight for code, law"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_refused_with_the_numbers(parts: dict[str, Any], said: str) -> None:
    place = Place(bounds(cap=[1.0, 1.0, 0.4]), np.zeros(3), 0, LENGTH)
    with pytest.raises(InputError) as refused:
        steered(Course(np.array(FIRST)), SteerCommand(id="1", **parts), np.array(FIRST), place)
    assert said in str(refused.value)


def test_the_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Saved before every step, in the middle of a ramp too, through JSON."""
    script = {
        1: {"set": {"code": 0.37}},
        2: {"pin": {"law": 0.123}, "ramp_tokens": 33.0 * LENGTH},
        4: {"bounds": {"web": [0.1, 0.3]}, "note": "b"},
        6: {"hold": True},
        8: {"mixer": {"name": "odm", "preset": "official"}, "hold": False},
    }
    asked = [None, [0.3, 0.3, 0.4], None, None, [0.2, 0.5, 0.3], None, [0.6, 0.2, 0.2], None, None, [0.3, 0.4, 0.3]]
    (tmp_path / "whole").mkdir()
    whole = Run(tmp_path / "whole")
    states, weights = [], []
    for step, wanted in enumerate(asked):
        states.append((json.loads(json.dumps(whole.steering.state_dict())), whole.weights.copy(), whole.mixer))
        if step in script:
            whole.steer(**script[step])
        weights.append(whole.go(wanted))
    for start, (state, held, mixer) in enumerate(states):
        again = Run(tmp_path / "whole", state=state)
        again.step, again.weights, again.mixer = start, held, mixer
        assert [again.go(wanted) for wanted in asked[start:]] == weights[start:]
        assert again.steering.state_dict() == whole.steering.state_dict()


def test_new_commands_follow_those_that_a_killed_run_had_heeded(tmp_path: Path) -> None:
    """Killed after the effect of a command at step 3, resumed from before: the command comes at step 3 again, and the
    one that is new after it."""
    killed = Run(tmp_path)
    for _ in range(2):
        killed.go()
    killed.steer(pin={"code": 0.6})
    was = killed.go()
    killed.steer(set={"web": 0.1})
    again = Run(tmp_path)
    assert [again.go(), again.go()] == [FIRST, FIRST]
    assert again.go() == pytest.approx([0.1, 0.6, 0.3])
    assert was == pytest.approx([0.4 * 5 / 7, 0.6, 0.4 * 2 / 7])
    assert [answer["step"] for answer in read_answers(tmp_path)] == [3, 3, 3]


def test_bad_lines_and_unfinished_ones_end_nothing(run: Run) -> None:
    journal = run.folder / JOURNAL
    journal.write_text('not json\n{"id": "7", "set": {"code": 2}}\n[1]\n{"id": "8"}\n{"id": "9", "hold": tr')
    assert run.go() == FIRST
    assert len(run.steering.take_notes()) == 4
    name = run.steer(hold=True)  # over the line that was cut off
    assert list(read_commands(run.folder)[0]) == [name]
    run.go()
    assert run.records[-1]["held"]
    assert run.steering.take_notes() == (
        f"steering {name} by {run.records[-1]['commands'][0]['who']}, from step 4 on: hold",
    )


@pytest.mark.parametrize(("number", "goes_on"), [(errno.ENOLCK, True), (errno.EIO, False)])
def test_a_journal_without_locks_is_written_and_one_whose_lock_fails_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, goes_on: bool
) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    said = nullcontext() if goes_on else pytest.raises(InputError, match=r"cannot write .*steering.jsonl: Input/output")
    with said:
        append_command(tmp_path, {"hold": True})
    assert len(read_commands(tmp_path)[0]) == goes_on


@pytest.mark.parametrize(
    "changes",
    [
        {"id": None},
        {"id": [3]},
        {"outcome": 3},
        {"step": "2"},
        {"effective_step": None},
        {"position": None},
        {"text": 3},
    ],
)
def test_an_answer_of_other_types_is_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    answer = {"id": "1-a", "outcome": "applied", "step": 2, "effective_step": 3, "position": 24, "text": ""}
    missing = {key: value for key, value in answer.items() if key not in changes}
    lines = [{**answer, **changes}, missing, answer, {**answer, "outcome": "noticed", "position": None}]
    (tmp_path / ANSWERS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_answers(tmp_path) == lines[2:]
    assert Journal(tmp_path).read() == []


def test_no_effect_without_its_answer_on_disk(run: Run) -> None:
    """The folder of the answers cannot be written to: the command waits, and comes once it can."""
    (run.folder / ANSWERS).mkdir()
    run.steer(set={"code": 0.65})
    assert run.go() == FIRST
    (run.folder / ANSWERS).rmdir()
    assert run.go() == pytest.approx([0.25, 0.65, 0.1])


def test_a_run_that_nobody_steers_is_what_it_was(tmp_path: Path) -> None:
    """The same weights as without steering, and no file."""
    own = bounds(floor=[0.0, 0.25, 0.0])
    run = Run(tmp_path, own)
    assert run.go([0.9, 0.05, 0.05]) == own.apply(np.array([0.9, 0.05, 0.05]), np.zeros(3), 20).tolist()
    assert run.steering.state_dict() == {"handled": [], "course": None, "past": [], "stirred": False}
    assert not list(tmp_path.iterdir())


def test_a_command_is_there_whole_or_not_at_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that becomes full in the middle of a line: refused, and nothing of it stays."""
    first = run.steer(hold=True)
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:20]))
    with pytest.raises(InputError, match="No space left"):
        run.steer(hold=False)
    monkeypatch.undo()
    assert list(read_commands(run.folder)[0]) == [first]
    assert (run.folder / JOURNAL).read_bytes().endswith(b"}\n")
