"""The recommended mixer against its formulas, written again over the whole history, and against noise."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_world import World

from megamix.core.errors import InputError
from megamix.mixing.mixers import DomainStats, Mixer, make_mixer


class Reference:
    """Keeps every observation and fits each line anew, with numpy's least squares; nothing shared with megamix."""

    def __init__(
        self, initial: list[float], memory: float = 1.0, difficulty: float = 0.5, exploration: float = 0.1
    ) -> None:
        self.k, self.memory, self.difficulty, self.exploration = len(initial), memory, difficulty, exploration
        self.prior = [weight / sum(initial) for weight in initial]
        self.pi = self.prior
        self.seen: list[list[tuple[float, float]]] = [[] for _ in initial]  # (tokens, mean loss)
        self.fits: list[tuple[float, float, float] | None] = [None] * self.k
        self.slopes: list[float] | None = None
        self.rewards: list[float] = []

    def fit(self, observations: list[tuple[float, float]]) -> tuple[float, float, float] | None:
        """(g, se^2, l)."""
        tokens, y = np.array(observations).T
        given_after = np.cumsum(tokens)
        w = tokens * (given_after / given_after[-1]) ** self.memory
        number = w.sum() ** 2 / (w**2).sum()
        if number < 5:
            return None
        x = np.log(given_after - tokens / 2)
        root = np.sqrt(w / w.sum())
        design = np.stack([np.ones_like(x), x], 1)
        line, *_ = np.linalg.lstsq(design * root[:, None], y * root, rcond=None)
        residual = (w * (y - design @ line) ** 2).sum() / w.sum()
        spread = (w * (x - np.average(x, weights=w)) ** 2).sum() / w.sum()
        return -float(line[1]), residual / ((number - 2) * spread), float(line @ [1, math.log(given_after[-1])])

    def step(self, losses: list[float | None], tokens: list[int]) -> list[float]:
        for i, loss in enumerate(losses):
            if loss is not None:
                self.seen[i].append((float(tokens[i]), loss))
                self.fits[i] = self.fit(self.seen[i])
        found = [fit for fit in self.fits if fit is not None]
        if not found:
            return self.pi
        mean = sum(slope for slope, _, _ in found) / len(found)
        tau = 0.0
        if len(found) > 1:
            tau = sum((slope - mean) ** 2 for slope, _, _ in found) / (len(found) - 1)
            tau = max(0.0, tau - sum(error for _, error, _ in found) / len(found))
        slopes = [
            mean if fit is None or not tau else mean + (fit[0] - mean) * tau / (tau + fit[1]) for fit in self.fits
        ]
        slopes = [max(slope, 0.0) for slope in slopes]
        if sum(slopes):
            self.slopes = slopes
            typical = sum(slope**2 for slope in slopes) / sum(slopes)
            learning = [min(1.0, max(0.0, 4 * slope / typical - 1)) for slope in slopes]
            weighed = [(s, fit[2]) for s, fit in zip(learning, self.fits, strict=True) if fit is not None]
            middle = sum(s * loss for s, loss in weighed) / sum(s for s, _ in weighed)
            self.rewards = [
                s * (1.0 if fit is None else min(2.0, math.exp(self.difficulty * (fit[2] - middle))))
                for s, fit in zip(learning, self.fits, strict=True)
            ]
            shares = [p * reward for p, reward in zip(self.prior, self.rewards, strict=True)]
            total, e = sum(shares), self.exploration
            self.pi = [(1 - e) * share / total + e / self.k for share in shares]
        return self.pi


def recommended(initial: list[float], **options: Any) -> Mixer:
    return make_mixer({"name": "recommended", **options}, [f"d{i}" for i in range(len(initial))], initial)


def mean_losses(stats: DomainStats) -> list[float | None]:
    return [n / t if t else None for n, t in zip(stats.nats.tolist(), stats.tokens.tolist(), strict=True)]


@pytest.mark.parametrize(
    "options", [{}, {"memory": 2.5, "exploration": 0.3, "difficulty": 0.5}, {"memory": 0.0}], ids=str
)
@pytest.mark.parametrize("k", [2, 7])
def test_250_steps_follow_the_formula(k: int, options: dict[str, float]) -> None:
    initial = [1.0 + i for i in range(k)]
    mixer, reference, world = recommended(initial, **options), Reference(initial, **options), World(k, k - 1, noise=1)
    for step in range(1, 251):
        stats = world.step(mixer.weights)
        weights = mixer.update(stats, step)
        expected = reference.step(mean_losses(stats), stats.tokens.tolist())
        np.testing.assert_allclose(weights, expected, rtol=1e-7)
        assert weights.sum() == pytest.approx(1, abs=1e-14)
        assert mixer.changed_at(step) == (reference.slopes is not None)
    record = mixer.record()
    assert reference.slopes is not None
    np.testing.assert_allclose(record["learning_slope"], reference.slopes, rtol=1e-7)
    np.testing.assert_allclose(record["estimated_rewards"], reference.rewards, rtol=1e-7)
    slopes, errors, losses = zip(*(fit for fit in reference.fits if fit is not None), strict=True)
    np.testing.assert_allclose(record["loss_slope"], slopes, rtol=1e-7)
    np.testing.assert_allclose(record["loss_slope_error"], np.sqrt(errors), rtol=1e-7)
    np.testing.assert_allclose(record["fitted_loss"], losses, rtol=1e-9)
    assert record["stalled"] == [
        f"d{i}" for i, (slope, error) in enumerate(zip(slopes, errors, strict=True)) if slope <= 2 * math.sqrt(error)
    ]


def test_the_comparison_notices_a_wrong_memory() -> None:
    mixer, wrong, world = recommended([1.0] * 4), Reference([1.0] * 4, memory=1.01), World(3, 4)
    for step in range(1, 100):
        stats = world.step(mixer.weights)
        mixer.update(stats, step)
        wrong.step(mean_losses(stats), stats.tokens.tolist())
    slopes = np.array([fit[0] for fit in wrong.fits if fit is not None])
    assert np.abs(mixer.record()["loss_slope"] - slopes).max() > 1e-4


def on_lines(mixer: Mixer, *lines: tuple[float, float]) -> None:
    """60 steps of 100 tokens a domain, whose losses lie on height - slope ln n without any noise."""
    for step in range(60):
        x = math.log(100 * step + 50)
        mixer.update(DomainStats([100 * (high - slope * x) for high, slope in lines], [100] * len(lines)), step + 1)


def test_exact_lines_are_found() -> None:
    """Slopes of 0.5, 0.2 and 0.1: the typical one is 0.3 / 0.8 = 0.375, so the second learns with 4 x 0.2 / 0.375 - 1
    and the third with 4 x 0.1 / 0.375 - 1; without difficulty that is all there is."""
    mixer = recommended([1.0] * 3, exploration=0.0, difficulty=0.0)
    on_lines(mixer, (9, 0.5), (7, 0.2), (3, 0.1))
    np.testing.assert_allclose(mixer.record()["loss_slope"], [0.5, 0.2, 0.1], rtol=1e-9)
    present = [high - slope * math.log(6000) for high, slope in ((9, 0.5), (7, 0.2), (3, 0.1))]
    np.testing.assert_allclose(mixer.record()["fitted_loss"], present, rtol=1e-9)
    expected = np.array([1, 1, 4 * 0.1 / 0.375 - 1])
    np.testing.assert_allclose(mixer.weights, expected / expected.sum(), rtol=1e-7)
    assert mixer.record()["stalled"] == []


def test_harder_domains_come_more_often_up_to_a_ceiling() -> None:
    """Equal slopes, so all learn: losses that are ln 1.5 and 3 below and above the mean, in an uneven mixture."""
    mixer = recommended([1.0, 2.0, 30.0, 4.0], exploration=0.0, difficulty=1.0)
    apart = math.log(1.5)
    on_lines(mixer, (9 - apart, 0.5), (9 + apart, 0.5), (9 - 3, 0.5), (9 + 3, 0.5))
    expected = np.array([1 / 1.5, 2 * 1.5, 30 * math.exp(-3), 4 * 2])
    np.testing.assert_allclose(mixer.weights, expected / expected.sum(), rtol=1e-7)


def test_a_mixture_without_what_learns_stays() -> None:
    """Only the second domain learns, and the mixture gives it nothing: there is no share to go by."""
    mixer = recommended([1.0, 0.0], exploration=0.5)
    on_lines(mixer, (9, -0.5), (9, 0.5))
    assert mixer.weights.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("noise", [0, 1])
def test_noise_is_left_and_nothing_is_lost_without_it(noise: int) -> None:
    """Over five worlds: clearly better than official where a domain is noise, at least as good where none is."""
    gains, noise_shares = [], []
    for seed in range(5):
        losses = []
        for config in ({"name": "recommended"}, {"name": "odm", "preset": "official"}):
            world = World(seed, noise=noise)
            k = world.num_domains
            mixer = make_mixer(config, [f"d{i}" for i in range(k)], [1.0] * k)
            losses.append(world.train(mixer, 500))
            if noise:
                noise_shares.append(world.tokens[-1] / world.tokens.sum())
        gains.append(losses[1] - losses[0])
    if noise:
        assert max(noise_shares[::2]) < 0.08 < 0.2 < min(noise_shares[1::2])
        assert min(gains) > 0.05
    else:
        assert np.mean(gains) > 0


def test_noise_is_said_to_stall() -> None:
    mixer, world = recommended([1.0] * 5), World(1, 4, noise=1)
    world.train(mixer, 400)
    assert mixer.record()["stalled"] == ["d4"]
    assert mixer.weights[4] < 0.06 < mixer.weights[:4].min()


def test_the_weights_stay_until_slopes_are_known() -> None:
    mixer, world = recommended([6.0, 3.0, 1.0]), World(2, 3)
    # With memory 1 observations of equal size weigh 1, 2, 3, ..., and (sum w)^2 / sum w^2 reaches 5 at the seventh.
    for step in range(1, 9):
        weights = mixer.update(DomainStats(world.step(mixer.weights).nats, [4096] * 3), step)
        assert mixer.changed_at(step) == (step >= 7)
        assert (weights.tolist() == [0.6, 0.3, 0.1]) == (step < 7)


def test_constant_losses_change_nothing() -> None:
    mixer = recommended([0.7, 0.3])
    for step in range(1, 100):
        assert mixer.update(DomainStats([311.7, 95.3], [100, 40]), step).tolist() == [0.7, 0.3]
    assert mixer.record()["loss_slope"] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert not mixer.has_updated


def test_rising_losses_earn_the_exploration_only() -> None:
    mixer = recommended([1.0, 1.0, 1.0])
    on_lines(mixer, (9, 0.5), (3, -0.5), (9, 0.5))
    assert mixer.weights == pytest.approx([0.45 + 0.1 / 3, 0.1 / 3, 0.45 + 0.1 / 3])


def test_one_domain_keeps_all_the_weight() -> None:
    mixer = recommended([3.0])
    for step in range(1, 30):
        assert mixer.update(DomainStats([400.0 / step], [100]), step).tolist() == [1.0]


def test_a_domain_never_seen_has_the_mean_slope_of_the_others() -> None:
    mixer, world = recommended([1.0] * 4), World(4, 4)
    for step in range(1, 100):
        stats = world.step(mixer.weights)
        mixer.update(DomainStats(stats.nats, [*stats.tokens[:3], 0]), step)
    record = mixer.record()
    assert record["loss_slope"][3] is None
    assert record["learning_slope"][3] == pytest.approx(np.mean(record["loss_slope"][:3]))
    assert record["estimated_rewards"][3] == pytest.approx(1.0)
    assert mixer.weights[3] > 0.15


losses = st.one_of(st.floats(-1e308, 1e308), st.floats(0, 12), st.sampled_from([0.0, 1e-300, 1e308, 5.0]))
counts = st.one_of(st.integers(0, 2**62), st.integers(0, 3), st.just(4096))


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 4),
    data=st.data(),
    memory=st.floats(0, 10),
    difficulty=st.floats(0, 10),
    exploration=st.floats(0, 1),
)
def test_nothing_overflows(k: int, data: st.DataObject, memory: float, difficulty: float, exploration: float) -> None:
    mixer = recommended([1.0] * k, memory=memory, difficulty=difficulty, exploration=exploration)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, data.draw(st.integers(1, 15)) + 1):
            draw = st.lists(st.tuples(losses, counts), min_size=k, max_size=k)
            nats, tokens = zip(*data.draw(draw), strict=True)
            weights = mixer.update(DomainStats(nats, tokens), step)
            assert (weights >= exploration / k * (1 - 1e-9)).all() or not mixer.has_updated
            assert weights.sum() == pytest.approx(1, abs=1e-12)
            json.dumps([mixer.record(), mixer.state_dict()], allow_nan=False)


@pytest.mark.parametrize("stop", [0, 1, 13, 37])
def test_a_state_continues_bit_for_bit(stop: int) -> None:
    options = {"update_every": 3, "warmup_steps": 7, "update_times": 9}
    world = World(5, 5, noise=1)
    steps = [world.step(np.full(6, 1 / 6)) for _ in range(60)]
    whole, resumed = recommended([1.0] * 6, **options), recommended([1.0] * 6, **options)
    for step in range(1, stop + 1):
        whole.update(steps[step - 1], step)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
    for step in range(stop + 1, 61):
        ours, theirs = resumed.update(steps[step - 1], step), whole.update(steps[step - 1], step)
        assert ours.tobytes() == theirs.tobytes()
        assert resumed.record() == whole.record()
    assert whole.has_updated
    assert resumed.state_dict() == whole.state_dict()


def test_a_state_that_is_not_whole_is_refused() -> None:
    mixer = recommended([1.0, 1.0])
    state = mixer.state_dict()
    for key, value in (("prior", [1.0]), ("tokens", [1.0]), ("tokens", [1.0, math.inf]), ("sums", {"w": [0.0, 0.0]})):
        with pytest.raises(InputError, match="not whole"):
            mixer.load_state_dict({**state, key: value})


def test_other_domains_keep_what_is_known() -> None:
    """A domain in two parts, one gone, one new: parts have the slope of the whole and share its place in the mixture,
    the new one has the means."""
    before, world = recommended([6.0, 2.0, 1.0]), World(6, 3)
    world.train(before, 200)
    slopes = before.record()["loss_slope"]
    after = recommended([1.0] * 4)
    after.adopt_state(before.state_dict(), [2, 0, 0, None], np.array([0.4, 0.2, 0.2, 0.2]))
    assert after.record()["loss_slope"] == [slopes[2], slopes[0], slopes[0], None]
    assert after.weights.tolist() == [0.4, 0.2, 0.2, 0.2]
    assert after.state_dict()["prior"] == pytest.approx([1 / 9, 3 / 9, 3 / 9, 3 / 9])
    assert after.record()["learning_slope"][3] == pytest.approx(np.mean([slopes[2], slopes[0], slopes[0]]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"memry": 1.0}, "Did you mean 'memory'?"),
        ({"memory": -0.1}, "memory"),
        ({"memory": math.inf}, "memory"),
        ({"difficulty": -1}, "difficulty"),
        ({"difficulty": 11}, "difficulty"),
        ({"exploration": 1.1}, "exploration"),
        ({"exploration": math.nan}, "exploration"),
        ({"update_every": 0}, "update_every"),
    ],
)
def test_bad_options_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        recommended([1.0, 1.0], **bad)
    assert message in str(error.value)


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(InputError, match="nats of domain 1 is nan"):
        recommended([1.0, 1.0]).update(DomainStats([1.0, math.nan], [1, 1]), 1)
