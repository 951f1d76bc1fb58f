"""What bounds the weights: against a brute-force projection, over whole runs, and what cannot be met refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from megamix.core.errors import InputError
from megamix.data import Blend
from megamix.mixing.constraints import Constraints
from megamix.training.config import DataConfig
from megamix.training.mix_plan import read_constraints

NAMES = ("web", "code", "mail", "wiki")
SAMPLES = np.array([300, 60, 20, 120])


def constraints(total: int = 400, **data: Any) -> Constraints:
    config = DataConfig.model_validate({"manifest": "data", "seq_length": 16, **data})
    return read_constraints(config, NAMES, SAMPLES, total)


def nearest(weights: np.ndarray, floor: np.ndarray, cap: np.ndarray) -> np.ndarray:
    """The point of the capped simplex with the least KL divergence from ``weights``, by a general solver."""
    found = minimize(
        lambda x: float((x * np.log(np.maximum(x, 1e-300) / weights)).sum()),
        np.clip(weights, floor, cap),
        bounds=list(zip(floor, cap, strict=True)),
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x


def test_no_constraint_changes_nothing() -> None:
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    assert constraints().apply(weights, [0, 0, 0, 0], 0) is weights
    assert constraints(max_epochs=0.1, on_exhausted="repeat").apply(weights, [0, 0, 0, 0], 0) is weights
    assert constraints(max_epochs=0.1, on_exhausted="stop").apply(weights, [0, 0, 0, 0], 0) is weights


@pytest.mark.parametrize("seed", range(12))
def test_floor_cap_and_epochs_together_are_the_nearest_weights(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(4, 0.5)) + 1e-6
    weights /= weights.sum()
    bounds = constraints(max_epochs={"mail": 2, "code": 1}, min_weight=0.05, max_weight={"web": 0.6, "wiki": 0.9})
    counts, position = np.array([90, 30, 15, 65]), 200
    # What is left of code and mail, over the 200 samples left.
    cap = np.minimum([0.6, 1.0, 1.0, 0.9], [1.0, 30 / 200, 25 / 200, 1.0])
    result = bounds.apply(weights, counts, position)
    assert result == pytest.approx(nearest(weights, np.full(4, 0.05), cap), abs=2e-6)
    assert result.sum() == pytest.approx(1, abs=1e-12)
    assert (result >= 0.05 - 1e-12).all()
    assert (result <= cap + 1e-12).all()


def test_a_used_up_domain_goes_below_its_floor() -> None:
    bounds = constraints(max_epochs={"mail": 1}, min_weight=0.04)
    assert bounds.apply(np.full(4, 0.25), [0, 0, 0, 0], 0)[2] == pytest.approx(0.05)
    used_up = bounds.apply(np.full(4, 0.25), [100, 50, 20, 30], 200)
    assert used_up.tolist() == pytest.approx([1 / 3, 1 / 3, 0.0, 1 / 3])


@pytest.mark.parametrize("position", [396, 399, 400, 401, 10**6])
def test_bounds_hold_at_the_last_sample_and_past_it(position: int) -> None:
    """Past the end there are no samples left to divide by: the caps by epochs are those of the whole run."""
    bounds = constraints(max_epochs={"code": 0.5, "mail": 2}, min_weight=0.02, max_weight={"web": 0.6})
    counts = np.array([240, 29, 38, max(position, 400) - 307])
    left, ahead = np.array([math.inf, 1.0, 2.0, math.inf]), 400 - position
    by_epochs = np.minimum(left / ahead, 1) if ahead > 0 else np.array([1, 30 / 400, 40 / 400, 1])
    cap = np.minimum([0.6, 1, 1, 1], by_epochs)
    result = bounds.apply(np.array([0.3, 0.3, 0.3, 0.1]), counts, position)
    assert result == pytest.approx(nearest(np.array([0.3, 0.3, 0.3, 0.1]), np.full(4, 0.02), cap), abs=2e-6)


def test_past_the_end_of_a_run_that_used_everything_up() -> None:
    bounds = constraints(500, max_epochs=1)
    assert bounds.apply(np.full(4, 0.25), SAMPLES, 500) == pytest.approx(SAMPLES / 500)
    # Weights of 0 that a rule asks for do not lift the others above their caps: 60 and 20 of 500 samples, at most.
    alone = bounds.apply(np.array([0.0, 0.5, 0.5, 0.0]), SAMPLES, 500)
    assert alone == pytest.approx(SAMPLES / 500)


def test_what_whole_samples_leave_open_at_the_end_goes_to_no_domain_of_weight_0() -> None:
    """Of the last 10 samples the caps of those asked for leave one open."""
    bounds = constraints(440, max_epochs=1)
    weights = bounds.apply(np.array([0.5, 0.25, 0.0, 0.25]), [296, 58, 0, 117 - 41], 430)
    assert weights[2] == 0
    short = bounds.apply(np.array([0.5, 0.25, 0.0, 0.25]), [297, 57, 0, 117], 430)
    assert short.tolist() == pytest.approx([1 / 3, 1 / 3, 0.0, 1 / 3])
    # Where a bound of the weights themselves leaves it open, somebody has to take it.
    forced = constraints(400, max_weight=0.3).apply(np.array([0.5, 0.5, 0.0, 0.0]), [0] * 4, 0)
    assert forced.tolist() == pytest.approx([0.3, 0.3, 0.2, 0.2])


def test_what_is_left_of_a_changed_run() -> None:
    bounds = constraints(400, max_epochs={"code": 0.5}, max_weight={"web": 0.4, "mail": 0.1, "wiki": 0.45})
    bounds.check_from([80, 15, 20, 85], 200)  # 15 of code, 190 of the others
    with pytest.raises(InputError, match=r"goes on for 200 samples after 200, but of these .* allow 190"):
        bounds.check_from([70, 30, 20, 80], 200)
    bounds.check_from([170, 30, 40, 160], 400)


def read_in_a_run(bounds: Constraints, seed: int, sampling: Any, lag: int) -> np.ndarray:
    """How often each domain is read in a run that asks for random weights in every step, which act ``lag`` steps after
    the next; int64 [K]."""
    rng, batch = np.random.default_rng(seed), 8
    start = bounds.apply(rng.dirichlet(np.ones(4)), np.zeros(4), 0)
    blend = Blend(SAMPLES, start, seed, sampling=sampling)
    for position in range(0, bounds.total_samples, batch):
        blend.take(batch)
        at = position + (1 + lag) * batch
        if at < bounds.total_samples:
            blend.set_weights(bounds.apply(rng.dirichlet(np.full(4, 0.3)), blend.counts_at(at), at), at=at)
    assert blend.counts.sum() == bounds.total_samples
    return blend.counts


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["low_discrepancy", "iid"]), st.integers(0, 3))
def test_no_domain_is_read_too_often_whatever_the_mixer_asks(seed: int, sampling: Any, lag: int) -> None:
    """A run that uses almost everything up, with random weights at every step: feasible to the end."""
    counts = read_in_a_run(
        constraints(480, max_epochs=1, min_weight={"wiki": 0.1}, max_weight={"web": 0.7}), seed, sampling, lag
    )
    # Whole samples differ from the weights by at most (K - 1)/2, with a step's worth of chance where it is drawn.
    slack = 1.5 if sampling == "low_discrepancy" else 5 * math.sqrt(8)
    assert (counts <= SAMPLES + slack).all()


def test_max_epochs_binds_in_such_runs() -> None:
    """Without it the same runs read the smallest domain far more often, so the test above can fail."""
    for seed in range(3):
        assert read_in_a_run(constraints(480), seed, "low_discrepancy", 1)[2] > 2 * SAMPLES[2]


def test_limits_of_a_run_that_stops() -> None:
    assert constraints().limits is None
    limits = constraints(max_epochs={"mail": 2.5}, on_exhausted="stop").limits
    assert limits is not None
    assert limits[2] == 50
    assert limits[0] > 10**18


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"max_epochs": {"mailx": 1}}, r"data\.max_epochs: there is no domain 'mailx'\. Did you mean 'mail'"),
        ({"max_epochs": 0}, r"data\.max_epochs is 0.*expected a number above 0"),
        ({"max_epochs": {"mail": -1}}, r"data\.max_epochs of domain 'mail' is -1.*above 0"),
        ({"max_epochs": math.nan}, r"data\.max_epochs is nan"),
        ({"min_weight": 1.2}, r"data\.min_weight is 1\.2, expected a number from 0 to 1"),
        ({"min_weight": math.nan}, r"data\.min_weight is nan"),
        ({"max_weight": {"web": math.inf}}, r"data\.max_weight of domain 'web' is inf"),
        ({"min_weight": 0.3}, r"data\.min_weight sums to 1\.2 over 4 domains, more than 1"),
        ({"max_weight": 0.2}, r"data\.max_weight sums to 0\.8 over 4 domains, less than 1"),
        (
            {"min_weight": {"code": 0.5}, "max_weight": 0.4},
            r"'code': data\.min_weight 0\.5 is above data\.max_weight 0\.4",
        ),
        ({"max_epochs": 0.5}, r"max_epochs 0\.5 allows 250 samples of the 4 domains .* asks for 400"),
        (
            {"max_epochs": {"mail": 1}, "min_weight": {"mail": 0.2}},
            r"'mail': data\.min_weight 0\.2 asks for 80 samples of the run's 400, but data\.max_epochs 1 allows 20",
        ),
        (
            {"max_epochs": {"code": 1, "mail": 1, "wiki": 1}, "max_weight": {"web": 0.4}},
            r"data\.max_epochs and data\.max_weight allow 360 samples .* asks for 400",
        ),
        ({"on_exhausted": "stop"}, r"on_exhausted is stop, but data\.max_epochs does not say"),
    ],
)
def test_what_cannot_be_met_is_refused_with_its_numbers(data: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        constraints(**data)


TOPICS = ("web:news", "web:forums", "web:blogs", "code", "wiki:en", "wiki:fr", "mail")
GROUPS = {"web": [0, 1, 2], "wiki": [4, 5]}


def of_topics(samples: Any = None, total: int = 400, **data: Any) -> Constraints:
    config = DataConfig.model_validate({"manifest": "data", "seq_length": 16, **data})
    return read_constraints(config, TOPICS, np.full(7, 100) if samples is None else np.array(samples), total)


@pytest.mark.parametrize("seed", range(40))
def test_bounds_of_sources_give_the_nearest_weights(seed: int) -> None:
    """Against a general solver, with bounds of sources and domains that can be met together."""
    rng = np.random.default_rng(seed)
    weights, inside = rng.dirichlet(np.full(7, 0.7)) + 1e-5, rng.dirichlet(np.full(7, 2.0))
    weights /= weights.sum()
    floor = inside * rng.choice([0.0, 0.5, 0.9], 7)
    cap = np.minimum(inside * rng.choice([1.05, 2.0, 20.0], 7), 1.0)
    low = {name: inside[own].sum() * rng.choice([0.5, 0.98]) for name, own in GROUPS.items()}
    high = {name: min(inside[own].sum() * rng.choice([1.02, 2.0]), 1.0) for name, own in GROUPS.items()}
    bounds = of_topics(
        min_weight={**dict(zip(TOPICS, floor.tolist(), strict=True)), **low},
        max_weight={**dict(zip(TOPICS, cap.tolist(), strict=True)), **high},
    )
    result = bounds.apply(weights, np.zeros(7), 0)
    limits = [
        {"type": "ineq", "fun": lambda x, own=own, sign=sign, bound=bound: sign * (x[own].sum() - bound)}
        for name, own in GROUPS.items()
        for sign, bound in ((1, low[name]), (-1, high[name]))
    ]
    found = minimize(
        lambda x: float((x * np.log(np.maximum(x, 1e-300) / weights)).sum()),
        inside,
        jac=lambda x: np.log(np.maximum(x, 1e-300) / weights) + 1,
        bounds=list(zip(floor, cap, strict=True)),
        constraints=[{"type": "eq", "fun": lambda x: x.sum() - 1}, *limits],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    assert result == pytest.approx(found.x, abs=5e-6)
    assert result.sum() == pytest.approx(1, abs=1e-12)
    assert ((result >= floor - 1e-12) & (result <= cap + 1e-12)).all()
    for name, own in GROUPS.items():
        assert low[name] - 1e-12 <= result[own].sum() <= high[name] + 1e-12
    assert bounds.apply(result, np.zeros(7), 0) == pytest.approx(result, abs=1e-12)


def test_a_source_at_its_bound_keeps_the_ratios_of_its_topics_and_the_others_theirs() -> None:
    weights = np.array([0.3, 0.2, 0.1, 0.2, 0.1, 0.05, 0.05])
    result = of_topics(max_weight={"web": 0.3}).apply(weights, np.zeros(7), 0)
    assert result == pytest.approx([0.15, 0.1, 0.05, 0.35, 0.175, 0.0875, 0.0875], rel=1e-12)
    result = of_topics(min_weight={"wiki": 0.6}).apply(weights, np.zeros(7), 0)
    assert result == pytest.approx([*weights[:4] * (0.4 / 0.85), 0.4, 0.2, 0.05 * 0.4 / 0.85], rel=1e-12)
    # A source that nothing was asked for has its least weight all the same.
    none = np.array([0.4, 0.2, 0.1, 0.2, 0.0, 0.0, 0.1])
    result = of_topics(min_weight={"wiki": 0.5}).apply(none, np.zeros(7), 0)
    assert result == pytest.approx([*none[:4] / 2, 0.25, 0.25, 0.05], rel=1e-12)
    within = np.full(7, 1 / 7)
    assert of_topics(min_weight={"wiki": 0.1}, max_weight={"web": 0.5}).apply(within, np.zeros(7), 0) is within


def test_epochs_of_topics_bound_their_source_over_a_whole_run() -> None:
    """The topics of a source that must have half of the samples are used up one after the other, and no other limit is
    left by more than whole samples."""
    bounds = of_topics(
        [20, 30, 400, 400, 400, 400, 400], 400, max_epochs=1.0, min_weight={"web": 0.5}, max_weight={"wiki": 0.1}
    )
    weights = np.array([0.3, 0.1, 0.001, 0.2, 0.2, 0.1, 0.099])
    blend = Blend(bounds.num_samples, bounds.apply(weights, np.zeros(7), 0), 1)
    for position in range(0, 400, 10):
        blend.set_weights(bounds.apply(weights, blend.counts, position), at=position)
        blend.take(10)
    assert (blend.counts <= bounds.num_samples + 1).all()
    assert blend.counts[:3].sum() >= 0.5 * 400 - 3
    assert blend.counts[4:6].sum() <= 0.1 * 400 + 3


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"min_weight": {"web": 0.6}, "max_weight": {"web": 0.5}}, "source 'web': data.min_weight 0.6 is above data.max_weight 0.5"),
        ({"max_weight": {"web": 1.5}}, "data.max_weight of source 'web' is 1.5, expected a number from 0 to 1"),
        ({"max_weight": {"wob": 0.5}}, "data.max_weight: there is no domain 'wob'"),
        ({"max_epochs": {"web": 2}}, "data.max_epochs: there is no domain 'web'"),
        ({"max_weight": {"web": 0.3}, "min_weight": {"web:news": 0.2, "web:blogs": 0.15}}, "its domains have at least 0.35 together"),
        ({"min_weight": {"wiki": 0.5}, "max_weight": {"wiki:en": 0.2, "wiki:fr": 0.2}}, "its domains have at most 0.4 together"),
        ({"min_weight": {"wiki": 0.5, "web": 0.4, "code": 0.2}}, "sum to 1.1, more than 1"),
        ({"max_weight": {"wiki": 0.3, "web": 0.3, "code": 0.1, "mail": 0.1}}, "sum to 0.8, less than 1"),
        ({"min_weight": {"wiki": 0.9}, "max_epochs": 1.0}, "asks for 360 samples of the run's 400, but data.max_epochs allows 200"),
    ],
)  # fmt: skip
def test_bounds_of_sources_that_cannot_be_met(data: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem.replace(".", r"\.")):
        of_topics(**data)


def test_a_source_left_out_cannot_have_a_least_weight() -> None:
    with pytest.raises(
        InputError, match=r"without wiki:en, wiki:fr.*source 'wiki': data\.min_weight is 0\.2, but its domains"
    ):
        of_topics(min_weight={"wiki": 0.2}).check_without(["wiki:en", "wiki:fr"])
