"""Domain statistics, the frame of all mixers, and weights within bounds."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamix.core.config import Config, validate
from megamix.core.errors import InputError
from megamix.mixing.mixers import (
    MIXERS,
    DomainStats,
    Mixer,
    MixerConfig,
    ScheduleConfig,
    StaticConfig,
    make_mixer,
    normalise_weights,
    project_to_capped_simplex,
)

# Domain statistics


def test_statistics_are_checked_copies() -> None:
    nats = np.array([6.0, 5.0, 0.0])
    stats = DomainStats(nats=nats, tokens=np.array([3.0, 2.0, 0.0], dtype=np.float32))
    nats[0] = 99
    assert stats.nats.tolist() == [6.0, 5.0, 0.0]
    assert stats.nats.dtype == np.float64
    assert stats.tokens.dtype == np.int64
    assert stats.seen.tolist() == [True, True, False]
    np.testing.assert_array_equal(stats.loss, [2.0, 2.5, math.nan])
    assert stats.excess_loss is None
    with pytest.raises(ValueError, match="read-only"):
        stats.tokens[0] = 1
    with pytest.raises(AttributeError):
        stats.nats = nats  # type: ignore[misc]


def test_nats_of_an_absent_domain_do_not_count() -> None:
    stats = DomainStats([7.0, 2.0], [0, 1], excess_nats=[5.0, 1.0]) + DomainStats([3.0, 2.0], [1, 1], [1.0, 1.0])
    assert stats.loss.tolist() == [3.0, 2.0]
    assert stats.excess_loss is not None
    assert stats.excess_loss.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("absent", [math.nan, math.inf, -math.inf])
def test_whatever_is_given_for_an_absent_domain_is_set_to_0(absent: float) -> None:
    """A mean over no tokens is NaN, and so is a sum of such means."""
    stats = DomainStats(nats=[absent, 1.0], tokens=[0, 1], excess_nats=[absent, 0.5])
    assert stats.nats.tolist() == [0.0, 1.0]
    assert stats.excess_nats is not None
    assert stats.excess_nats.tolist() == [0.0, 0.5]
    with pytest.raises(InputError, match="excess_nats of domain 0 is"):
        DomainStats(nats=[1.0, 1.0], tokens=[1, 0], excess_nats=[absent, 0.5])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nats": [1.0], "tokens": [1, 2]}, "nats has shape (1,)"),
        ({"nats": [1.0, math.nan], "tokens": [1, 2]}, "nats of domain 1 is nan"),
        ({"nats": [1.0, math.inf], "tokens": [1, 2]}, "nats of domain 1 is inf"),
        ({"nats": [1.0, 1.0], "tokens": [1, -2]}, "tokens of domain 1 is -2"),
        ({"nats": [1.0, 1.0], "tokens": [1, 1.5]}, "tokens of domain 1 is 1.5"),
        ({"nats": [1.0, 1.0], "tokens": [1, math.nan]}, "tokens of domain 1 is nan"),
        ({"nats": [1.0, 1.0], "tokens": [1, 1e30]}, "tokens of domain 1 is 1e+30"),
        ({"nats": [1.0, 1.0], "tokens": ["1", "2"]}, "tokens is not a sequence of counts"),
        ({"nats": ["x", 1.0], "tokens": [1, 2]}, "nats is not a sequence of numbers"),
        ({"nats": [], "tokens": []}, "tokens has shape (0,)"),
        ({"nats": [[1.0]], "tokens": [[1]]}, "tokens has shape (1, 1)"),
        ({"nats": [1.0, 1.0], "tokens": [1, 1], "excess_nats": [1.0]}, "excess_nats has shape (1,)"),
        ({"nats": [1.0, 1.0], "tokens": [1, 1], "weights": [7.0, 3.0]}, "sum to 10"),
        ({"nats": [1.0, 1.0], "tokens": [1, 1], "weights": [1.5, -0.5]}, "not negative"),
        ({"nats": [1.0, 1.0], "tokens": [1, 1], "non_finite": [1]}, "non_finite has shape (1,)"),
    ],
)
def test_bad_statistics_are_named(fields: dict[str, typing.Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        DomainStats(**fields)
    assert message in str(error.value)


def test_statistics_add() -> None:
    first = DomainStats([6.0, 0.0], [3, 0], excess_nats=[1.0, 0.0], weights=[0.9, 0.1], non_finite=[0, 1])
    second = DomainStats([2.0, 8.0], [1, 4], excess_nats=[0.5, 2.0], weights=[0.5, 0.5])
    total = first + second
    assert total.nats.tolist() == [8.0, 8.0]
    assert total.tokens.tolist() == [4, 4]
    assert total.loss.tolist() == [2.0, 2.0]  # not the mean of means
    assert total.excess_nats is not None
    assert total.excess_nats.tolist() == [1.5, 2.0]
    assert total.non_finite is not None
    assert total.non_finite.tolist() == [0, 1]
    np.testing.assert_allclose(total.weights, [(0.9 * 3 + 0.5 * 5) / 8, (0.1 * 3 + 0.5 * 5) / 8])
    same = second + second
    assert same.weights is not None
    assert same.weights.tolist() == [0.5, 0.5]
    empty = DomainStats([0.0, 0.0], [0, 0], excess_nats=[0.0, 0.0], weights=[0.2, 0.8])
    for sum_ in (first + empty, empty + first):
        np.testing.assert_array_equal(sum_.weights, first.weights)
    largest = DomainStats([1e308], [1]) + DomainStats([1e308], [1])
    assert np.isfinite(largest.nats).all()
    with pytest.raises(InputError, match="of 2 and of 1 domains"):
        first + largest
    with pytest.raises(InputError, match="with and without excess_nats"):
        first + DomainStats([1.0, 1.0], [1, 1], weights=[0.5, 0.5])


# The frame


class RecordingConfig(ScheduleConfig):
    """A mixer of one's own for these tests."""

    name: typing.Literal["recording"] = "recording"


class RecordingMixer(Mixer):
    """Keeps what it is shown; puts weight 3 on the first domain."""

    name = "recording"

    def __init__(self, *arguments: typing.Any) -> None:
        super().__init__(*arguments)
        self.shown: list[tuple[int, DomainStats]] = []

    def _observe(self, stats: DomainStats, step: int) -> None:
        self.shown.append((step, stats))

    def _new_weights(self, step: int) -> np.ndarray | None:
        return np.array([3.0] + [1.0] * (self.num_domains - 1))


def recording(**options: int) -> RecordingMixer:
    return RecordingMixer(RecordingConfig(**options), ["a", "b"], [1.0, 1.0])


ONE = DomainStats([2.0, 3.0], [1, 1])


def test_the_frame_sums_between_updates_and_in_the_warm_up() -> None:
    mixer = recording(update_every=3, warmup_steps=3)
    for step in range(1, 8):
        mixer.update(ONE, step)
        assert mixer.weights.tolist() == ([0.5, 0.5] if step < 6 else [0.75, 0.25])
    assert [(step, stats.tokens.tolist()) for step, stats in mixer.shown] == [(3, [3, 3]), (6, [3, 3])]
    assert [stats.weights.tolist() for _, stats in mixer.shown if stats.weights is not None] == [[0.5, 0.5]] * 2
    assert mixer.changed_at(6)
    assert not mixer.changed_at(3)
    assert not mixer.changed_at(7)


def test_an_interval_ends_although_its_last_step_was_skipped() -> None:
    mixer = recording(update_every=3)
    for step in (1, 2, 4, 5, 6):
        mixer.update(ONE, step)
    assert [(step, stats.tokens.tolist()) for step, stats in mixer.shown] == [(4, [3, 3]), (6, [2, 2])]


def test_returned_weights_are_copies() -> None:
    mixer = recording()
    mixer.update(ONE, 1)[:] = 7
    mixer.weights[:] = 7
    assert mixer.weights.tolist() == [0.75, 0.25]


@pytest.mark.parametrize("step", [0, -1, 1, 2, 3, 2.5, "4", None])
def test_steps_count_from_one_and_grow(step: typing.Any) -> None:
    mixer = recording()
    if step not in (0, -1):
        for earlier in (1, 2, 3):
            mixer.update(ONE, earlier)
    with pytest.raises(InputError, match="step"):
        mixer.update(ONE, step)


def test_statistics_of_other_domains_are_refused() -> None:
    with pytest.raises(InputError, match=r"3 domains, expected 2 \(a, b\)"):
        recording().update(DomainStats([1.0] * 3, [1] * 3), 1)


def test_a_mixer_that_computes_nonsense_is_named() -> None:
    mixer = recording()
    mixer._new_weights = lambda step: np.array([math.nan, 1.0])  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"mixer 'recording', weights of step 1: the weight of domain 'a' is .*nan"):
        mixer.update(ONE, 1)


def test_a_state_names_what_differs() -> None:
    state = json.loads(json.dumps(make_mixer({"name": "static"}, ["a", "b"], [1, 3]).state_dict()))
    with pytest.raises(InputError, match="of mixer 'static', this is mixer 'recording'"):
        recording().load_state_dict(state)
    for domains, message in (
        (["a", "c"], "only in the state: b; only here: c"),
        (["a", "b", "c"], "only here: c"),
        (["b", "a"], "another order"),
    ):
        with pytest.raises(InputError, match=message):
            make_mixer({"name": "static"}, domains, [1] * len(domains)).load_state_dict(state)
    fresh = make_mixer({"name": "static"}, ["a", "b"], [1, 1])
    fresh.load_state_dict(state)
    assert fresh.weights.tolist() == [0.25, 0.75]
    for key in ("weights", "step", "pending"):
        with pytest.raises(InputError, match=f"not whole.*{key}"):
            fresh.load_state_dict({name: value for name, value in state.items() if name != key})


def test_static_weights_never_change() -> None:
    mixer = make_mixer(StaticConfig(), ["a", "b"], {"b": 1, "a": 3})
    for step in range(1, 20):
        assert mixer.update(ONE, step).tolist() == [0.75, 0.25]
        assert not mixer.changed_at(step)
    assert mixer.record() == {"is_warmup": False}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "omd"}, "unknown mixer 'omd'. Did you mean 'odm'?"),
        ({"name": ["odm"]}, "unknown mixer"),
        ({}, "needs the key 'name'"),
        ({"name": "static", "warmup_step": 1}, "unknown key 'warmup_step'"),
    ],
)
def test_bad_mixer_configs_are_named(config: dict[str, typing.Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        make_mixer(config, ["a"], [1.0])
    assert message in str(error.value)


@pytest.mark.parametrize("domains", [[], ["a", "a"]])
def test_domains_are_named_once(domains: list[str]) -> None:
    with pytest.raises(InputError, match=r"no domains|more than once"):
        make_mixer({"name": "static"}, domains, [1.0] * len(domains))


def test_the_union_of_configs_and_the_registry_agree() -> None:
    union = typing.get_args(typing.get_args(MixerConfig)[0])
    assert {config for config, _ in MIXERS.values()} == set(union)
    for name, (config, mixer) in MIXERS.items():
        assert config.model_fields["name"].default == name == mixer.name
        for field, information in config.model_fields.items():
            assert information.description, f"{name}.{field} has no docstring"

    class Run(Config):
        mixer: MixerConfig

    assert validate(Run, {"mixer": {"name": "odm", "preset": "exp3"}}, "run").mixer.name == "odm"
    with pytest.raises(InputError, match=r"mixer\.name: unknown mixer 'omd'\. Did you mean 'odm'"):
        validate(Run, {"mixer": {"name": "omd"}}, "run")
    with pytest.raises(InputError, match="Did you mean 'update_every'"):
        validate(Run, {"mixer": {"name": "odm", "update_evry": 2}}, "run")


def test_mixers_need_neither_torch_nor_engines() -> None:
    code = (
        "import megamix.mixing, sys\n"
        "print([m for m in sys.modules if m.startswith(('torch', 'deepspeed', 'megamix.engines', 'megamix.data'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# Weights given by a user


def test_weights_by_order_and_by_name() -> None:
    assert normalise_weights([1, 3], ["a", "b"], "mixture").tolist() == [0.25, 0.75]
    assert normalise_weights({"b": 3, "a": 1}, ["a", "b"], "mixture").tolist() == [0.25, 0.75]
    assert normalise_weights([0.7, 0.3], ["a", "b"], "mixture").tolist() == [0.7, 0.3]
    assert normalise_weights([1e308, 1e308, 0], ["a", "b", "c"], "mixture").tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (0.5, "mixture: 0.5 are no weights"),
        ("12", "mixture: '12' are no weights"),
        ([1.0], "mixture: 1 weights for 2 domains (web, code)"),
        ([1.0, -0.5], "mixture: the weight of domain 'code' is -0.5"),
        ([math.nan, 1.0], "mixture: the weight of domain 'web' is nan"),
        ([math.inf, 1.0], "mixture: the weight of domain 'web' is inf"),
        (["1", 1.0], "mixture: the weight of domain 'web' is '1'"),
        ([None, 1.0], "mixture: the weight of domain 'web' is None"),
        ([True, 1.0], "mixture: the weight of domain 'web' is True"),
        ([0, 0.0], "mixture: the weights of all 2 domains (web, code) are 0"),
        ({"web": 1}, "mixture: no weight for code"),
        ({"web": 1, "code": 1, "cod": 1}, "mixture: there is no domain 'cod'. Did you mean 'code'?"),
    ],
)
def test_bad_weights_are_named(weights: typing.Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        normalise_weights(weights, ["web", "code"], "mixture")
    assert message in str(error.value)


# Projection


def bisected(weights: np.ndarray, floor: np.ndarray, cap: np.ndarray) -> np.ndarray:
    """clip(lambda w, floor, cap) with sum 1 by bisecting log lambda: slow, and nothing like the code under test."""
    low, high = -800.0, 800.0
    for _ in range(300):
        middle = (low + high) / 2
        if np.clip(np.exp(min(middle, 700)) * weights, floor, cap).sum() < 1:
            low = middle
        else:
            high = middle
    return np.clip(np.exp(low) * weights, floor, cap)


@st.composite
def bounded_weights(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights with zeros and ties, and feasible bounds, some of them tight."""
    k = draw(st.integers(1, 12))
    share = st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-6, 1.0))
    numbers = st.lists(share, min_size=k, max_size=k)
    weights = np.array(draw(numbers))
    floor, room = np.array(draw(numbers)), np.array(draw(numbers))
    floor *= draw(st.floats(0, 0.99)) / max(floor.sum(), 1e-9)
    cap = floor + room
    if cap.sum() < 1:
        cap += (1 - cap.sum()) / k * draw(st.sampled_from([1 + 1e-9, 1.5]))
    return weights, np.minimum(floor, 1), cap


@settings(max_examples=400, deadline=None)
@given(bounded_weights())
def test_projection_properties(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    weights, floor, cap = case
    result = project_to_capped_simplex(weights, floor, cap)
    assert result.sum() == pytest.approx(1, abs=1e-9)
    assert (result >= floor - 1e-9).all()
    assert (result <= cap + 1e-9).all()
    asked = weights > 0
    reach = np.minimum(cap, 1)[asked].sum() + floor[~asked].sum()
    if reach > 1 + 1e-6:
        assert result[~asked].tolist() == floor[~asked].tolist()
        if asked.any():
            expected = bisected(weights, floor, np.minimum(cap, 1))
            np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-9)
    elif reach < 1 - 1e-6:  # the rest goes to the others in proportion to their room
        np.testing.assert_allclose(result[asked], np.minimum(cap, 1)[asked], atol=1e-9)
        room = (np.minimum(cap, 1) - floor)[~asked]
        np.testing.assert_allclose((result - floor)[~asked], room * (1 - reach) / room.sum(), atol=1e-9)
    np.testing.assert_allclose(project_to_capped_simplex(result, floor, cap + 1e-9), result, atol=1e-8)


def test_projection_by_hand() -> None:
    assert project_to_capped_simplex([0.5, 0.3, 0.2], 0, 1).tolist() == [0.5, 0.3, 0.2]
    np.testing.assert_allclose(project_to_capped_simplex([0.6, 0.3, 0.1], 0, [0.2, 1, 1]), [0.2, 0.6, 0.2])
    np.testing.assert_allclose(project_to_capped_simplex([0.8, 0.15, 0.05], [0, 0, 0.24], 1), [0.64, 0.12, 0.24])
    np.testing.assert_allclose(project_to_capped_simplex([8, 1.5, 0.5], 0, math.inf), [0.8, 0.15, 0.05])
    # A cap sets weight free that lifts one domain off its floor.
    np.testing.assert_allclose(
        project_to_capped_simplex([0.9, 0.08, 0.02], [0, 0.1, 0.1], [0.3, 1, 1]), [0.3, 0.56, 0.14]
    )
    # Nobody asked for the last two, but the first may only have 0.4.
    np.testing.assert_allclose(project_to_capped_simplex([1, 0, 0], 0, [0.4, 0.3, 0.9]), [0.4, 0.15, 0.45])
    np.testing.assert_allclose(project_to_capped_simplex([0, 0], 0, [0.25, 1]), [0.2, 0.8])
    assert project_to_capped_simplex([1, 0], 0, [1.0, 1]).tolist() == [1, 0]
    full = project_to_capped_simplex([1, 1, 1, 0], 0, [0.7, 0.2, 0.1, 1])  # these caps sum to 1 - 1e-16
    assert full.tolist() == [0.7, 0.2, 0.1, 0]  # and rounding is no reason to wake a domain
    for tiny in (1e-250, 1e-310):
        result = project_to_capped_simplex([tiny, 1.0], 0, [1, 0.5])
        np.testing.assert_allclose(result, [0.5, 0.5])
        result = project_to_capped_simplex([tiny, 1.0], [0.1, 0], [1, 0.5])
        np.testing.assert_allclose(result, [0.5, 0.5])
    np.testing.assert_allclose(project_to_capped_simplex([5e-324, 0.0], 0.1, 1), [0.9, 0.1])


def test_projection_of_300_domains_keeps_ratios() -> None:
    rng = np.random.default_rng(1)
    weights = rng.dirichlet(np.full(300, 0.05))
    result = project_to_capped_simplex(weights, 1e-4, 0.02)
    free = (result > 1e-4) & (result < 0.02)
    assert 0 < free.sum() < 300
    assert result.sum() == pytest.approx(1, abs=1e-12)
    ratio = result[free] / weights[free]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, 0.5], 0, [0.25, 0.5]), "the caps sum to 0.75, less than 1"),
        (([0.5, 0.5], [0.75, 0.5], 1), "the floors sum to 1.25, more than 1: 'web' 0.75, 'code' 0.5"),
        (([0.5, 0.5], [0.1, 0.5], [1, 0.25]), "'code' (floor 0.5, cap 0.25)"),
        (([0.5, math.nan], 0, 1), "weight of 'code' is nan"),
        (([0.5, -1], 0, 1), "weight of 'code' is -1.0"),
        (([0.5, 0.5], 0, [1, math.nan]), "cap of 'code' is nan"),
        (([0.5, 0.5], [0, -0.5], 1), "floor of 'code' is -0.5"),
        (([0.5, 0.5], [0, 0, 0], 1), "3 values of floor for 2 domains"),
        (([], 0, 1), "one weight a domain"),
    ],
)
def test_impossible_bounds_are_named(arguments: tuple[typing.Any, ...], message: str) -> None:
    with pytest.raises(InputError) as error:
        project_to_capped_simplex(*arguments, ["web", "code"])
    assert message in str(error.value)
