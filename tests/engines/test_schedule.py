"""Learning rates against their formulas, at the boundaries, and what a change of settings does to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megamix.core.config import validate
from megamix.core.errors import InputError
from megamix.engines.config import TrainConfig
from megamix.training.checkpoints.fingerprints import changed_parts, comparable
from megamix.training.checkpoints.train_change import train_change

LR, LOW = 3e-3, 2e-4


def settings(steps: int = 100, **changed: Any) -> TrainConfig:
    given = {
        "steps": steps,
        "global_batch": 4,
        "micro_batch": 2,
        "lr": LR,
        "min_lr": LOW,
        "warmup_steps": 10,
        **changed,
    }
    return validate(TrainConfig, given, "train")


def rates(train: TrainConfig) -> np.ndarray:
    return np.array([train.lr_at(step) for step in range(train.steps)])


def rise(number: int) -> np.ndarray:
    return LR * np.arange(1, number + 1) / number


def test_cosine_is_what_it_was() -> None:
    """The formula in the words of every run so far, to the last bit: a resume must not bend one."""
    train = settings(warmup=0.05, warmup_steps=None)
    for step in range(5, 130):
        progress = (step - 5) / 94
        was = LOW + (LR - LOW) * 0.5 * (1 + float(np.cos(np.pi * min(1.0, progress))))
        assert train.lr_at(step) == pytest.approx(was, rel=1e-15)
    assert (train.lr_at(4), train.lr_at(5), train.lr_at(99)) == (LR, LR, LOW)


def test_linear() -> None:
    expected = np.concatenate([rise(10), np.linspace(LR, LOW, 90)])
    np.testing.assert_allclose(rates(settings(schedule="linear")), expected, rtol=1e-13)


@pytest.mark.parametrize("changed", [{"schedule": "constant"}, {"schedule": "wsd", "decay_steps": 0}])
def test_level_to_the_end(changed: dict[str, Any]) -> None:
    np.testing.assert_array_equal(rates(settings(**changed)), np.concatenate([rise(10), np.full(90, LR)]))


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("linear", lambda x: 1 - x),
        ("sqrt", lambda x: 1 - np.sqrt(x)),
        ("cosine", lambda x: np.cos(np.pi * x / 2) ** 2),
    ],
)
def test_wsd(shape: str, left: Any) -> None:
    """Step 80, the last before the decay, has the peak; the 20 after it have less, and the last has min_lr."""
    train = settings(schedule="wsd", decay_steps=20, decay_shape=shape)
    fall = LOW + (LR - LOW) * left(np.arange(1, 21) / 20)
    np.testing.assert_allclose(rates(train), np.concatenate([rise(10), np.full(70, LR), fall]), rtol=1e-12)
    assert (train.lr_at(79), train.lr_at(99), train.lr_at(500)) == (LR, LOW, LOW)
    assert train.lr_at(80) < LR


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"steps": 1, "warmup_steps": 0}, [LR]),
        ({"steps": 1, "warmup_steps": 1}, [LR]),
        ({"steps": 1, "warmup_steps": 0, "schedule": "wsd", "decay_steps": 1}, [LOW]),
        ({"steps": 2, "warmup_steps": 0}, [LR, LOW]),
        ({"steps": 2, "warmup_steps": 0, "schedule": "linear"}, [LR, LOW]),
        ({"steps": 2, "warmup_steps": 1, "schedule": "wsd", "decay_steps": 1}, [LR, LOW]),
        ({"steps": 2, "warmup_steps": 0, "schedule": "wsd", "decay_steps": 2}, [(LR + LOW) / 2, LOW]),
        ({"steps": 3, "warmup_steps": 3, "schedule": "wsd"}, [LR / 3, 2 * LR / 3, LR]),
        ({"steps": 20, "warmup_steps": 0, "schedule": "wsd"}, [LR] * 18 + [(LR + LOW) / 2, LOW]),
    ],
)
def test_short_runs(changed: dict[str, Any], expected: list[float]) -> None:
    np.testing.assert_allclose(rates(settings(**changed)), expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"decay_steps": 5}, "decay_steps is 5, but schedule cosine has no decay of its own. Use schedule: wsd"),
        ({"warmup_steps": 101}, "warm-up of 101 steps do not fit into steps 100"),
        ({"schedule": "wsd", "decay_steps": 91}, "warm-up of 10 steps and decay of 91 do not fit into steps 100"),
        ({"schedule": "wsdx"}, "Input should be 'cosine', 'linear', 'constant' or 'wsd'"),
    ],
)
def test_what_no_schedule_can_be(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        settings(**changed)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({}, "cosine, up to 0.003 in 10 steps, down to 0.0002 at step 100"),
        ({"schedule": "constant", "warmup_steps": 0}, "constant, 0.003, level to the end"),
        (
            {"schedule": "wsd", "decay_steps": 20},
            "wsd, up to 0.003 in 10 steps, level to step 80, down to 0.0002 at step 100 (linear)",
        ),
    ],
)
def test_descriptions(changed: dict[str, Any], text: str) -> None:
    assert settings(**changed).learning_rate.describe() == text


def saved(train: TrainConfig) -> dict[str, Any]:
    return {**train.model_dump(mode="json", exclude={"stop_after"}), "attention": "sample", "eod_mask_loss": False}


def test_a_bent_cosine_is_said_with_both_rates() -> None:
    before, after = settings(), settings(steps=200)
    said = train_change(saved(before), after, 60)
    assert said == (
        f"changed since step 60: steps 100 -> 200. Learning rate of step 61: {after.lr_at(60):.3g}, {before.lr_at(60):.3g} "
        "before; the schedule is cosine, up to 0.003 in 10 steps, down to 0.0002 at step 200; it was cosine, up to 0.003 "
        "in 10 steps, down to 0.0002 at step 100"
    )
    assert train_change(saved(before), before, 60) is None


def test_a_decay_begun_late_changes_nothing_before_it() -> None:
    level = settings(steps=1000, schedule="wsd", decay_steps=0)
    late = settings(steps=340, schedule="wsd", decay_steps=40)
    assert rates(late)[:300].tolist() == rates(level)[:300].tolist()
    said = train_change(saved(level), late, 299)
    assert said is not None
    assert "Learning rate of step 300: 0.003, as before;" in said
    said = train_change(saved(level), late, 300)
    assert said is not None
    assert f"Learning rate of step 301: {LR - (LR - LOW) / 40:.3g}, 0.003 before;" in said


def test_settings_of_before_these_keys_are_those_of_a_cosine() -> None:
    """A checkpoint of then is continued without a word, and refused where the schedule is another."""
    new = ("schedule", "warmup_steps", "decay_steps", "decay_shape")
    train = settings(warmup_steps=None)
    older = {key: value for key, value in saved(train).items() if key not in new}
    assert train_change(older, train, 5) is None
    for changed, parts in (({}, {}), ({"schedule": "constant"}, {"train": "schedule"})):
        present = {"train": saved(settings(warmup_steps=None, **changed)), "mixer": {}}
        assert changed_parts(comparable({"train": older}, {}, False), present) == parts
    of_another_trainer = {"train": {"attention": "sample", "eod_mask_loss": False}}
    assert comparable(of_another_trainer, {}, False)["train"] == of_another_trainer["train"]
