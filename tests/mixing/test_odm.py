"""ODM against the formulas of its four sources, written again in plain Python."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
from odm_reference import PRESETS, Program, Reference, close, mean_losses, odm, random_stats

from megamix.core.config import validate
from megamix.core.errors import InputError
from megamix.mixing.mixers import DomainStats, OdmConfig, with_later_keys
from megamix.mixing.mixers.odm import BEFORE_THESE_KEYS


@pytest.mark.parametrize("k", [2, 5, 22])
@pytest.mark.parametrize("preset", PRESETS)
def test_500_random_steps_follow_the_formula(preset: str, k: int) -> None:
    rng = random.Random(f"{preset}{k}")
    initial = [rng.uniform(0.2, 2) for _ in range(k)]
    mixer, reference = odm(initial, preset=preset), Reference(preset, initial)
    for step in range(1, 501):
        stats = random_stats(rng, k)
        weights = mixer.update(stats, step)
        close(weights, reference.step(step, mean_losses(stats)))
        assert weights.sum() == pytest.approx(1, abs=1e-14)
        assert mixer.changed_at(step) == bool(preset != "official" or any(reference.rewards))
    record = mixer.record()
    key = "cumulative_estimated_rewards" if preset == "exp3" else "estimated_rewards"
    np.testing.assert_allclose(record[key], reference.rewards, rtol=1e-11)
    assert record["exploration_rate"] == pytest.approx(reference.rate, rel=1e-14)
    assert np.ptp(mixer.weights) > 1e-3


@pytest.mark.parametrize(
    ("preset", "mutation"),
    # Cumulative estimates have no alpha.
    [(preset, {"clock": 1}) for preset in PRESETS]
    + [(preset, {"alpha": 0.89}) for preset in PRESETS if preset != "exp3"],
)
def test_the_comparison_notices_a_wrong_formula(preset: str, mutation: dict[str, Any]) -> None:
    rng = random.Random(1)
    initial = [1.0, 2.0, 3.0, 4.0]
    mixer, wrong = odm(initial, preset=preset), Reference(preset, initial, **mutation)
    for step in range(1, 60):
        stats = random_stats(rng, 4)
        weights, others = mixer.update(stats, step), wrong.step(step, mean_losses(stats))
    with pytest.raises(AssertionError):
        close(weights, others, rtol=1e-9)


@pytest.mark.parametrize("preset", ["official", "paper", "exp3"])
def test_300_domains(preset: str) -> None:
    rng = random.Random(2)
    initial = [rng.uniform(0.2, 2) for _ in range(300)]
    mixer, reference = odm(initial, preset=preset), Reference(preset, initial)
    for step in range(1, 41):
        stats = random_stats(rng, 300, absent=0.6)
        # exp3's naive exponentials are near their end here (R grows with 1 / pi), and so are their last digits.
        close(mixer.update(stats, step), reference.step(step, mean_losses(stats)), rtol=1e-11)


def test_an_exploration_floor_above_one_in_k_gives_uniform_weights_and_says_so() -> None:
    with pytest.warns(UserWarning, match=r"min_exploration_rate 0\.03 x 300 domains"):
        mixer = odm([1.0] * 299 + [50.0], preset="dataflex")
    for step in range(1, 5):
        np.testing.assert_allclose(mixer.update(random_stats(random.Random(step), 300), step), 1 / 300, rtol=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_domain_never_seen(preset: str) -> None:
    rng = random.Random(3)
    mixer, reference = odm([1.0] * 4, preset=preset), Reference(preset, [1.0] * 4)
    for step in range(1, 200):
        stats = random_stats(rng, 4, absent=0.0)
        stats = DomainStats(stats.nats, [*stats.tokens[:3], 0])
        close(mixer.update(stats, step), reference.step(step, mean_losses(stats)))
    if preset == "official":  # R = 0, so that only exploration is left
        assert mixer.weights[3] == pytest.approx(mixer.record()["exploration_rate"], rel=1e-12)
        assert mixer.record()["log_estimated_rewards"][3] is None


def test_official_keeps_the_weights_while_nothing_was_seen() -> None:
    mixer = odm([0.7, 0.3], preset="official")
    assert mixer.update(DomainStats([0.0, 0.0], [0, 0]), 1).tolist() == [0.7, 0.3]
    assert not mixer.changed_at(1)
    mixer.update(DomainStats([9.0, 0.0], [3, 0]), 2)
    assert mixer.changed_at(2)


@pytest.mark.parametrize("every", [1, 4, 7])
@pytest.mark.parametrize("warmup", [0, 18, 20])
@pytest.mark.parametrize("preset", PRESETS)
def test_warm_up_and_intervals_are_those_of_the_source(preset: str, warmup: int, every: int) -> None:
    """ODM's repository and DataFlex see the losses of the update's step alone, and nothing of the warm-up."""
    rng = random.Random(f"{warmup}{every}")
    initial = [0.5, 0.3, 0.2]
    mixer = odm(initial, preset=preset, warmup_steps=warmup, update_every=every)
    source = Program(preset, initial, warmup, every)
    for step in range(1, 100):
        stats = random_stats(rng, 3, absent=0.4 if step > 30 else 0.0)
        close(mixer.update(stats, step), source.step(step, stats))
        assert mixer.record()["is_warmup"] == (step <= warmup)
        assert mixer.changed_at(step) == (step > warmup and step % every == 0)
    assert np.ptp(mixer.weights) > 1e-2


@pytest.mark.parametrize("warmup", [0, 18, 20])
@pytest.mark.parametrize("preset", PRESETS)
def test_any_preset_can_see_whole_intervals_and_the_warm_up(preset: str, warmup: int) -> None:
    """The same sums as the paper's preset, for every rule; without the warm-up, from its end on."""
    rng = random.Random(warmup)
    initial = [0.5, 0.3, 0.2]
    options = {"preset": preset, "warmup_steps": warmup, "update_every": 4, "reward_over": "interval"}
    both = odm(initial, estimate_in_warmup=True, exploration_from="start", **options)
    after = odm(initial, estimate_in_warmup=False, exploration_from="start", **options)
    seen, late = Reference(preset, initial), Reference(preset, initial)
    interval: list[DomainStats] = []
    for step in range(1, 60):
        interval.append(random_stats(rng, 3, absent=0.4 if step > 30 else 0.0))
        weights, others = both.update(interval[-1], step), after.update(interval[-1], step)
        if step % 4 == 0:
            seen.step(step, mean_losses(added(interval)), move=step > warmup)
            if step > warmup:
                late.step(step, mean_losses(added(interval[-min(4, step - warmup) :])))
            interval = []
        close(weights, seen.pi)
        close(others, late.pi)


def added(stats: list[DomainStats]) -> DomainStats:
    total = stats[0]
    for one in stats[1:]:
        total += one
    return total


def test_update_times_counts_changes_of_the_weights() -> None:
    rng = random.Random(7)
    mixer = odm([0.5, 0.5], preset="paper", warmup_steps=5, update_every=2, update_times=3)
    changed = []
    for step in range(1, 30):
        before = mixer.weights
        after = mixer.update(random_stats(rng, 2, absent=0), step)
        if mixer.changed_at(step):
            changed.append(step)
        else:
            assert before.tolist() == after.tolist()
    assert changed == [6, 8, 10]


def test_importance_weighting_divides_by_the_weights_the_tokens_were_drawn_with() -> None:
    rng = random.Random(8)
    initial = [0.6, 0.3, 0.1]
    lagged, unlagged = odm(initial, preset="paper"), odm(initial, preset="paper")
    reference = Reference("paper", initial)
    in_effect = [initial, initial]
    for step in range(1, 100):
        stats = random_stats(rng, 3)
        late = DomainStats(stats.nats, stats.tokens, weights=in_effect[-2])
        weights = lagged.update(late, step)
        close(weights, reference.step(step, mean_losses(stats), drawn=in_effect[-2]))
        unlagged.update(stats, step)
        in_effect.append(weights.tolist())
    assert abs(lagged.weights - unlagged.weights).max() > 1e-4


def test_weights_that_change_within_an_interval_are_averaged_over_its_tokens() -> None:
    mixer, reference = odm([0.5, 0.5], preset="paper", update_every=2), Reference("paper", [0.5, 0.5])
    mixer.update(DomainStats([30.0, 5.0], [10, 10], weights=[0.5, 0.5]), 1)
    weights = mixer.update(DomainStats([90.0, 6.0], [45, 15], weights=[0.75, 0.25]), 2)
    drawn = [(0.5 * 20 + 0.75 * 60) / 80, (0.5 * 20 + 0.25 * 60) / 80]
    close(weights, reference.step(2, [120 / 55, 11 / 25], drawn=drawn))


def test_tokens_of_a_domain_with_weight_zero_count_by_their_share() -> None:
    mixer, reference = odm([1.0, 0.0], preset="paper"), Reference("paper", [1.0, 0.0])
    weights = mixer.update(DomainStats([300.0, 20.0], [90, 10]), 1)
    close(weights, reference.step(1, [300 / 90, 2.0], drawn=[1.0, 0.1]))
    assert mixer.record()["estimated_rewards"][1] == pytest.approx(0.1 * 2.0 / 0.1)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stop", [0, 1, 5, 13, 14, 37])
def test_a_state_continues_bit_for_bit(preset: str, stop: int) -> None:
    options = {"preset": preset, "update_every": 3, "warmup_steps": 7, "update_times": 9}
    rng = random.Random(9)
    steps = [random_stats(rng, 6, absent=0.5) for _ in range(60)]
    whole, resumed = odm([1.0] * 6, **options), odm([1.0] * 6, **options)
    for step in range(1, stop + 1):
        whole.update(steps[step - 1], step)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
    assert resumed.weights.tobytes() == whole.weights.tobytes()
    for step in range(stop + 1, 61):
        ours, theirs = resumed.update(steps[step - 1], step), whole.update(steps[step - 1], step)
        assert ours.tobytes() == theirs.tobytes()
        assert resumed.record() == whole.record()
        assert resumed.changed_at(step) == whole.changed_at(step)
    assert resumed.state_dict() == whole.state_dict()


def test_a_state_of_other_estimates_is_refused() -> None:
    mixer = odm([1.0, 1.0], preset="official")
    with pytest.raises(InputError, match="reward 'loss', the config says 'exp_loss'"):
        mixer.load_state_dict(odm([1.0, 1.0], preset="paper").state_dict())
    with pytest.raises(InputError, match="estimate 'cumulative', the config says 'moving_average'"):
        odm([1.0, 1.0], preset="paper").load_state_dict(odm([1.0, 1.0], preset="exp3").state_dict())
    state = mixer.state_dict()
    del state["estimates"]
    with pytest.raises(InputError, match=r"not whole.*estimates"):
        mixer.load_state_dict(state)


def test_dataflex_bounds_its_rewards() -> None:
    initial = [0.996, 0.003, 0.001]
    mixer, reference = odm(initial, preset="dataflex"), Reference("dataflex", initial)
    for step in range(1, 30):  # 15 x 4 / 0.001 is 60000
        stats = DomainStats([3.0, 3.0, 4.0], [1, 1, 1], weights=initial)
        close(mixer.update(stats, step), reference.step(step, [3.0, 3.0, 4.0], drawn=initial))
    assert mixer.record()["estimated_rewards"][1:] == [1e4, 1e4]


def test_given_keys_win_over_the_preset() -> None:
    config = validate(OdmConfig, {"preset": "dataflex", "reward_scale": 1.0, "reward_clip": None}, "test")
    assert (config.reward_scale, config.reward_clip) == (1.0, None)
    assert (config.exponent_clip, config.min_exploration_rate, config.policy) == (5.0, 0.03, "gibbs")
    # A resolved config, which spells everything out, means the same when read again.
    assert validate(OdmConfig, config.model_dump(), "test") == config
    assert OdmConfig() == OdmConfig(preset="official")
    assert OdmConfig().warmup_steps == 0


def test_a_record_without_the_later_keys_means_what_it_did() -> None:
    """Every preset of 0.1 saw whole intervals and the warm-up; a config that a user writes names few keys."""
    for preset in PRESETS:
        now = OdmConfig.model_validate({"preset": preset, "warmup_steps": 8}).model_dump()
        record = {key: value for key, value in now.items() if key not in BEFORE_THESE_KEYS}
        assert OdmConfig.model_validate(record).model_dump() == {**now, **BEFORE_THESE_KEYS}
        assert OdmConfig.model_validate({**record, "reward_over": "step"}).reward_over == "step"
        del record["alpha"]
        assert OdmConfig.model_validate(record).model_dump() == now
        assert with_later_keys(now) == now
    assert with_later_keys({"name": "odm", "alpha": 0.5}) == {"name": "odm", "alpha": 0.5, **BEFORE_THESE_KEYS}
    assert with_later_keys({"name": "ado"}) == {"name": "ado"}


def test_the_record_has_dataflex_names() -> None:
    mixer = odm([0.5, 0.5], preset="exp3", warmup_steps=2, alpha=0.5)
    before = {"cumulative_estimated_rewards": [0.0, 0.0], "exploration_rate": 0.5, "alpha": 0.5, "warmup_steps": 2}
    for step in (1, 2):
        mixer.update(DomainStats([8.0, 4.0], [2, 2]), step)
        assert mixer.record() == {"is_warmup": True, **before}
    mixer.update(DomainStats([8.0, 4.0], [2, 2]), 3)
    after = {"cumulative_estimated_rewards": [0.8, 0.4], "exploration_rate": pytest.approx(math.sqrt(math.log(2) / 6))}
    assert mixer.record() == {"is_warmup": False, **before, **after}


def test_clips_and_floor_act() -> None:
    clipped = odm([0.5, 0.5], preset="official", reward_clip=3.0)
    clipped.update(DomainStats([50.0, 2.0], [1, 1]), 1)
    assert clipped.record()["estimated_rewards"] == pytest.approx([3.0, 0.1 * math.exp(2.0)])
    floored = odm([0.5, 0.5], preset="paper", min_exploration_rate=0.2)
    for step in range(1, 1000):
        floored.update(DomainStats([9.0, 1.0], [1, 1]), step)
    assert floored.record()["exploration_rate"] == 0.2
    bounded = odm([0.5, 0.5], preset="paper", exponent_clip=1.0, reward_scale=1e6)
    bounded.update(DomainStats([9.0, 1.0], [1, 1]), 1)
    weights = bounded.update(DomainStats([9.0, 1.0], [1, 1]), 100)
    rate = math.sqrt(math.log(2) / 200)
    assert weights[1] == pytest.approx((1 - 2 * rate) / (1 + math.e) + rate)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"alphaa": 0.9}, "unknown key 'alphaa'. Did you mean 'alpha'?"),
        ({"preset": "officcial"}, "unknown 'officcial'. Did you mean 'official'?"),
        ({"alpha": 1.0}, "alpha"),
        ({"alpha": -0.1}, "alpha"),
        ({"reward": "accuracy"}, "reward"),
        ({"reward_scale": 0}, "reward_scale"),
        ({"reward_clip": math.nan}, "reward_clip"),
        ({"update_every": 0}, "update_every"),
        ({"update_times": -2}, "update_times"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"min_exploration_rate": 1.5}, "min_exploration_rate"),
    ],
)
def test_bad_options_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        odm([1.0, 1.0], **bad)
    assert message in str(error.value)
