"""ODM where floating point ends: no loss and no combination of parameters gives weights that are not finite."""

from __future__ import annotations

import json
import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odm_reference import PRESETS, Reference, close, mean_losses, odm, random_stats

from megamix.mixing.mixers import DomainStats


@pytest.mark.parametrize("preset", PRESETS)
def test_one_domain_keeps_all_the_weight(preset: str) -> None:
    mixer = odm([3.0], preset=preset)
    for step, loss in enumerate((4.0, 1e4, 1e308, 0.0), start=1):
        assert mixer.update(DomainStats([loss], [1]), step).tolist() == [1.0]


@pytest.mark.parametrize("loss", [709.0, 1e4, 1e6, 1e308])
@pytest.mark.parametrize(
    "options",
    [
        *({"preset": preset} for preset in PRESETS),
        {"preset": "official", "policy": "gibbs"},
        {"preset": "official", "estimate": "cumulative", "importance_weighting": True},
        {"preset": "official", "policy": "gibbs", "estimate": "cumulative", "exponent_clip": 5.0},
        {"preset": "paper", "policy": "linear"},
        {"preset": "official", "alpha": 0.0},
    ],
    ids=str,
)
def test_no_loss_overflows(options: dict[str, Any], loss: float) -> None:
    mixer = odm([0.1, 0.2, 0.3, 0.4], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 30):
            stats = DomainStats([loss, 2.0, loss if step % 3 else 0.0, 0.0], [1, 1, 1, 0])
            weights = mixer.update(stats, step)
            assert np.isfinite(weights).all()
            assert (weights >= 0).all()
            assert weights.sum() == pytest.approx(1, abs=1e-12)
            state = json.dumps([mixer.record(), mixer.state_dict()], allow_nan=False)
            assert "Infinity" not in state
    assert weights[0] >= weights[1]
    if options == {"preset": "official"}:
        rate = mixer.record()["exploration_rate"]
        assert weights[1] == pytest.approx(rate, rel=1e-9)  # exp(loss) of the others is all that counts
        assert weights[0] + weights[2] == pytest.approx(1 - 2 * rate, rel=1e-9)
        assert mixer.record()["rewards_overflowed"] == (loss > 710)


@settings(max_examples=120, deadline=None)
@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "alpha": st.floats(0, 0.999),
            "reward": st.sampled_from(["loss", "exp_loss"]),
            "reward_scale": st.one_of(st.floats(1e-300, 1e300), st.just(1.0)),
            "importance_weighting": st.booleans(),
            "estimate": st.sampled_from(["moving_average", "cumulative"]),
            "reward_clip": st.none() | st.floats(1e-300, 1e308),
            "policy": st.sampled_from(["gibbs", "linear"]),
            "exponent_clip": st.none() | st.floats(1e-6, 1e308),
            "min_exploration_rate": st.floats(0, 0.2),
        },
    ),
    preset=st.sampled_from(PRESETS),
    data=st.data(),
)
def test_no_combination_of_parameters_overflows(preset: str, options: dict[str, Any], data: st.DataObject) -> None:
    mixer = odm([1.0, 1e-12, 3.0], preset=preset, **options)
    loss = st.one_of(st.floats(0, 12), st.floats(-1e308, 1e308), st.sampled_from([709.8, 1e308, 0.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, data.draw(st.integers(1, 8)) + 1):
            losses = data.draw(st.lists(loss, min_size=3, max_size=3))
            tokens = data.draw(st.lists(st.sampled_from([0, 1, 1, 4096]), min_size=3, max_size=3))
            nats = [max(-1e308, min(1e308, value * count)) for value, count in zip(losses, tokens, strict=True)]
            weights = mixer.update(DomainStats(nats, tokens), step)
            assert (weights >= 0).all()
            assert weights.sum() == pytest.approx(1, abs=1e-12)
            json.dumps([mixer.record(), mixer.state_dict()], allow_nan=False)


def test_log_rewards_equal_plain_ones_next_to_the_overflow() -> None:
    rng = random.Random(4)
    mixer, reference = odm([1.0] * 5, preset="official"), Reference("official", [1.0] * 5)
    for step in range(1, 500):
        stats = random_stats(rng, 5, low=600, high=700)
        # A logarithm near 700 has 1e-13 to give away, which exp turns into a relative error.
        close(mixer.update(stats, step), reference.step(step, mean_losses(stats)), rtol=1e-10)


def test_huge_losses_are_compared_by_their_logarithms() -> None:
    """exp(1000) and exp(1001): as softmax would, to all digits, where exp itself has none."""
    mixer = odm([0.5, 0.5], preset="official")
    for step in range(1, 20):
        weights = mixer.update(DomainStats([1000.0, 1001.0], [1, 1]), step)
    rate = math.sqrt(math.log(2) / (2 * 19))
    assert weights[0] == pytest.approx((1 - 2 * rate) / (1 + math.e) + rate, rel=1e-12)
