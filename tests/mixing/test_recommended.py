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
from megamix.core.log import get_logger
from megamix.mixing.mixers import DomainStats, Mixer, make_mixer


class Reference:
    """Keeps every observation and fits each line anew, with numpy's least squares; nothing shared with megamix."""

    def __init__(
        self,
        objective: list[float],
        memory: float = 1.0,
        reach: float = 2.0,
        exploration: float = 0.05,
    ) -> None:
        self.k, self.memory, self.reach, self.exploration = len(objective), memory, reach, exploration
        self.v = [weight / sum(objective) for weight in objective]
        self.seen: list[list[tuple[float, float]]] = [[] for _ in objective]  # (tokens, mean loss)
        self.fits: list[dict[str, Any] | None] = [None] * self.k
        self.last: list[list[tuple[float, float]]] = [[] for _ in objective]  # from the first slope on
        self.lowest = [math.inf] * self.k
        self.rises = [0.0] * self.k
        self.slopes: list[float] | None = None
        self.gains: list[float] = []
        self.clipped = self.suspected = 0

    def fit(self, observations: list[tuple[float, float]]) -> dict[str, Any] | None:
        tokens, y = np.array(observations).T
        given_after = np.cumsum(tokens)
        w = tokens * (given_after / given_after[-1]) ** self.memory
        number = w.sum() ** 2 / (w**2).sum()
        if number < 8:
            return None
        x = np.log(given_after - tokens / 2)
        root = np.sqrt(w / w.sum())
        design = np.stack([np.ones_like(x), x], 1)
        line, *_ = np.linalg.lstsq(design * root[:, None], y * root, rcond=None)
        residual = (w * (y - design @ line) ** 2).sum() / w.sum()
        spread = (w * (x - np.average(x, weights=w)) ** 2).sum() / w.sum()
        return {
            "number": number,
            "line": line,
            "given": given_after[-1],
            "slope": -float(line[1]),
            "error": residual / ((number - 2) * spread),
            "token_variance": residual * w.sum() / number,
        }

    def known(self, i: int) -> dict[str, Any] | None:
        fit = self.fits[i]
        return fit if fit is not None and fit["number"] >= 30 else None

    def learns(self, i: int) -> float:
        """s before a slope counts."""
        found = [(w, max(0.0, fit["slope"])) for w, fit in zip(self.v, self.fits, strict=True) if fit is not None]
        fit = self.fits[i]
        if fit is None or not any(w * slope for w, slope in found):
            return 1.0
        c = sum(w * slope for w, slope in found) / sum(w for w, _ in found)
        self.suspected += (s := self.gate((fit["slope"] + 3 * math.sqrt(fit["error"])) / c)) < 1
        return max(0.25, s)

    @staticmethod
    def gate(x: float) -> float:
        return min(1.0, max(0.0, (x - 0.1) / 0.7, 4 * x - 1))

    def level(self, i: int, fit: dict[str, Any]) -> tuple[float, float]:
        """Two standard errors below and above the mean of the last losses."""
        tokens, y = np.array(self.last[i]).T
        age = 0.9 ** np.arange(tokens.size)[::-1]
        error = math.sqrt(fit["token_variance"] * (age**2 * tokens).sum()) / (age * tokens).sum()
        mean = float(np.average(y, weights=age * tokens))
        return mean - 2 * error, mean + 2 * error

    def within_reason(self, i: int, loss: float, tokens: float) -> float:
        fit = self.known(i)
        if fit is None:
            return loss
        expected = float(fit["line"] @ [1, math.log(fit["given"] + tokens / 2)])
        reach = 3 * math.sqrt(fit["token_variance"] / tokens)
        self.clipped += abs(loss - expected) > reach
        return min(max(loss, expected - reach), expected + reach)

    def step(self, losses: list[float | None], tokens: list[int]) -> list[float]:
        for i, loss in enumerate(losses):
            if loss is not None:
                seen = (float(tokens[i]), self.within_reason(i, loss, float(tokens[i])))
                self.seen[i].append(seen)
                if (fit := self.known(i)) is not None:
                    self.last[i].append(seen)
                    self.lowest[i] = min(self.lowest[i], self.level(i, fit)[1])
                self.fits[i] = self.fit(self.seen[i])
                if self.last[i] and (fit := self.known(i)) is not None:
                    self.rises[i] = max(0.0, min(self.level(i, fit)[0], self.seen[i][0][1]) - self.lowest[i])
        learning, slopes = [self.learns(i) for i in range(self.k)], self.drawn()
        if slopes is None:
            self.gains = self.v
            shares = [s * w for s, w in zip(learning, self.v, strict=True)]
        else:
            c = sum(weight * slope for weight, slope in zip(self.v, slopes, strict=True))
            self.gains = [weight * slope / c for weight, slope in zip(self.v, slopes, strict=True)]
            for i, slope in enumerate(slopes):
                if self.known(i) is not None:
                    learning[i] = self.gate(max(slope, self.rises[i]) / c)
            shares = [
                s * min(max(gain, w / self.reach), w * self.reach)
                for s, gain, w in zip(learning, self.gains, self.v, strict=True)
            ]
        return self.explored(shares)

    def explored(self, shares: list[float]) -> list[float]:
        """The factor by bisection."""
        least = self.exploration / self.k
        floor = [min(least, weight) if weight else least for weight in self.v]
        low, high = 0.0, 1 / max(shares)

        def at(factor: float) -> list[float]:
            return [max(factor * share, bound) for share, bound in zip(shares, floor, strict=True)]

        for _ in range(200):
            middle = (low + high) / 2
            low, high = (low, middle) if sum(at(middle)) > 1 else (middle, high)
        return at((low + high) / 2)

    def drawn(self) -> list[float] | None:
        fits = [self.known(i) for i in range(self.k)]
        found = [fit for fit in fits if fit is not None]
        if not found:
            return None
        mean, tau = sum(fit["slope"] for fit in found) / len(found), 0.0
        if len(found) > 1:
            tau = sum((fit["slope"] - mean) ** 2 for fit in found) / (len(found) - 1)
            tau = max(0.0, tau - sum(fit["error"] for fit in found) / len(found))
        slopes = [
            mean if fit is None or not tau else mean + (fit["slope"] - mean) * tau / (tau + fit["error"])
            for fit in fits
        ]
        slopes = [max(slope, 0.0) for slope in slopes]
        self.slopes = slopes if sum(slopes) else None
        return self.slopes


def recommended(initial: list[float], objective: Any = None, **options: Any) -> Mixer:
    names = [f"d{i}" for i in range(len(initial))]
    return make_mixer({"name": "recommended", "reach": 2.0, **options}, names, initial, objective)


def mean_losses(stats: DomainStats) -> list[float | None]:
    return [n / t if t else None for n, t in zip(stats.nats.tolist(), stats.tokens.tolist(), strict=True)]


@pytest.mark.parametrize("options", [{}, {"memory": 2.5, "exploration": 0.3, "reach": 1.2}, {"memory": 0.0}], ids=str)
@pytest.mark.parametrize("k", [2, 7])
def test_250_steps_follow_the_formula(k: int, options: dict[str, float]) -> None:
    objective = [1.0 + i for i in range(k - 1)] + [0.0]
    mixer = recommended([1.0] * k, objective, **options)
    reference, world = Reference(objective, **options), World(k, k - 1, noise=1)
    for step in range(1, 251):
        stats = world.step(mixer.weights)
        if step == 120:  # a strange sample
            stats = DomainStats(stats.nats + 50.0 * stats.tokens * (np.arange(k) == 0), stats.tokens)
        weights = mixer.update(stats, step)
        expected = reference.step(mean_losses(stats), stats.tokens.tolist())
        np.testing.assert_allclose(weights, expected, rtol=1e-7)
        assert weights.sum() == pytest.approx(1, abs=1e-14)
        assert mixer.changed_at(step)
    record = mixer.record()
    assert reference.slopes is not None
    assert reference.clipped > 0
    np.testing.assert_allclose(record["learning_slope"], reference.slopes, rtol=1e-7)
    np.testing.assert_allclose(record["estimated_rewards"], reference.gains, rtol=1e-7)
    np.testing.assert_allclose(record["loss_rise"], reference.rises, rtol=1e-7, atol=1e-9)
    stalled = []
    for i in range(k):
        fit = reference.known(i)
        slope, error = record["loss_slope"][i], record["loss_slope_error"][i]
        if fit is None:
            assert slope is error is None
            continue
        assert slope == pytest.approx(fit["slope"], rel=1e-7)
        assert error == pytest.approx(math.sqrt(fit["error"]), rel=1e-7)
        if slope <= 2 * error:
            stalled.append(f"d{i}")
    assert record["stalled"] == stalled


@pytest.mark.parametrize("reach", [1.0, 3.0])
def test_suspicions_follow_the_formula(reach: float) -> None:
    """Five domains with steep to rising losses, tokens by chance; three come in half of the steps or fewer."""
    slopes, often = np.array([0.5, 0.4, 0.12, -0.2, 0.02]), np.array([1.0, 0.5, 1.0, 0.5, 0.3])
    mixer, reference = recommended([1.0] * 5, reach=reach), Reference([1.0] * 5, reach=reach)
    random, given_tokens = np.random.default_rng(3), np.zeros(5)
    for step in range(1, 61):
        tokens = (random.random(5) < often) * 128 * random.integers(1, 5, 5)
        given_tokens += tokens
        means = 9 - slopes * np.log(np.maximum(given_tokens, 1)) + 0.03 * random.standard_normal(5)
        weights = mixer.update(DomainStats(means * tokens, tokens), step)
        losses = [float(mean) if t else None for mean, t in zip(means, tokens, strict=True)]
        np.testing.assert_allclose(weights, reference.step(losses, tokens.tolist()), rtol=1e-7)
    assert reference.suspected > 20


def test_the_comparison_notices_a_wrong_memory() -> None:
    mixer, wrong, world = recommended([1.0] * 4), Reference([1.0] * 4, memory=1.01), World(3, 4)
    for step in range(1, 100):
        stats = world.step(mixer.weights)
        mixer.update(stats, step)
        wrong.step(mean_losses(stats), stats.tokens.tolist())
    slopes = np.array([fit["slope"] for fit in map(wrong.known, range(4)) if fit is not None])
    assert np.abs(mixer.record()["loss_slope"] - slopes).max() > 1e-4


def on_lines(mixer: Mixer, *lines: tuple[float, float]) -> None:
    """60 steps of 100 tokens a domain, whose losses lie on height - slope ln n without any noise."""
    for step in range(60):
        x = math.log(100 * step + 50)
        mixer.update(DomainStats([100 * (high - slope * x) for high, slope in lines], [100] * len(lines)), step + 1)


def test_exact_lines_are_found() -> None:
    """Slopes of 0.5, 0.3 and 0.1 under the objective 1:1:2: gains are 0.125, 0.075 and 0.05, so shares 0.5, 0.3 and
    0.2; the objective's slope is 0.25, so the third learns with 4 x 0.1 / 0.25 - 1, and the reach gives it 0.25."""
    mixer = recommended([1.0] * 3, objective=[1, 1, 2], exploration=0.0)
    on_lines(mixer, (9, 0.5), (7, 0.3), (3, 0.1))
    np.testing.assert_allclose(mixer.record()["loss_slope"], [0.5, 0.3, 0.1], rtol=1e-9)
    np.testing.assert_allclose(mixer.record()["estimated_rewards"], [0.5, 0.3, 0.2], rtol=1e-7)
    expected = np.array([0.5, 0.3, 0.25 * 0.6])
    np.testing.assert_allclose(mixer.weights, expected / expected.sum(), rtol=1e-7)
    assert mixer.record()["stalled"] == []


def test_by_default_domains_that_learn_keep_the_weights_of_the_objective() -> None:
    """Slopes of 0.5, 0.3 and 0, the last one noise."""
    mixer = make_mixer({"name": "recommended", "exploration": 0.0}, ["a", "b", "c"], [1.0] * 3, [1, 1, 2])
    on_lines(mixer, (9, 0.5), (7, 0.3), (3, 0.0))
    np.testing.assert_allclose(mixer.weights, [0.5, 0.5, 0.0], rtol=1e-12)


def test_exploration_takes_nothing_from_domains_that_learn() -> None:
    """0.05 / 4 is above the third's weight in the objective, which it keeps; the fourth has none there."""
    v = np.array([0.6, 0.396, 0.004, 0.0])
    mixer = make_mixer({"name": "recommended"}, ["a", "b", "c", "d"], [1.0] * 4, v)
    on_lines(mixer, (9, 0.5), (7, 0.5), (8, 0.5), (9, 0.5))
    first_two = v[:2] / v[:2].sum() * (1 - 0.0125 - 0.004)
    np.testing.assert_allclose(mixer.weights, [*first_two, 0.004, 0.0125], rtol=1e-12)
    dozen = np.array([10, 12, 19, 14, 13, 11, 11, 18, 6, 16, 13, 1]) / 144
    mixer = make_mixer({"name": "recommended"}, [f"d{i}" for i in range(12)], dozen, dozen)
    started = mixer.weights.tolist()
    assert mixer.objective.sum() != 1  # by a rounding error
    on_lines(mixer, *[(9, 0.5)] * 12)
    assert mixer.weights.tolist() == started  # to the last bit, or samples would come in another order
    all_count = make_mixer({"name": "recommended"}, ["a", "b", "c"], [1.0] * 3, v[:3])
    on_lines(all_count, (9, 0.5), (7, 0.5), (8, 0.5))
    np.testing.assert_allclose(all_count.weights, v[:3], rtol=1e-14)
    on_lines(
        left := make_mixer({"name": "recommended"}, ["a", "b", "c"], [1.0] * 3, v[:3]), (9, 0.5), (7, 0.0), (8, 0.0)
    )
    np.testing.assert_allclose(left.weights, [1 - 0.05 / 3 - 0.004, 0.05 / 3, 0.004], rtol=1e-12)


def test_before_slopes_are_known_the_objective_decides() -> None:
    mixer = recommended([1.0, 5.0], [1, 3], exploration=0.0)
    assert mixer.update(DomainStats([500.0, 400.0], [100, 100]), 1) == pytest.approx([0.25, 0.75])
    assert mixer.record()["learning_slope"] is None


def test_one_strange_sample_moves_no_weight_far() -> None:
    """A sample with ten times the loss, in one step: in units of the change without the bound on its influence."""
    weights = []
    for strange in (0.0, 45.0):
        mixer, world = recommended([1.0] * 4), World(9, 4)
        for step in range(1, 202):
            stats = world.step(np.full(4, 0.25))
            if step == 201:
                stats = DomainStats(stats.nats + strange * stats.tokens * (np.arange(4) == 1), stats.tokens)
            mixer.update(stats, step)
        weights.append(mixer.weights)
    assert 0 < np.abs(weights[1] - weights[0]).max() < 0.02


def test_an_objective_that_nothing_learns_for_keeps_the_weights() -> None:
    """The objective's domain gets worse; the other one learns, and shares no text with it."""
    mixer = recommended([1.0, 1.0], objective=[1.0, 0.0])
    on_lines(mixer, (9, 0.5), (9, 0.5))
    before = mixer.weights
    for step in range(61, 2000):
        mixer.update(DomainStats([1200.0 + step, 100 * (9 - 0.5 * math.log(100 * step))], [100, 100]), step)
    assert mixer.weights.tolist() == pytest.approx(before.tolist())


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
    assert mixer.weights[4] < 0.04 < mixer.weights[:4].min()


def test_slopes_count_from_thirty_observations_on() -> None:
    mixer, world = recommended([6.0, 3.0, 1.0]), World(2, 3)
    # With memory 1 observations of equal size weigh 1, 2, 3, ..., and (sum w)^2 / sum w^2 = 3 n (n + 1) / (4 n + 2).
    for step in range(1, 45):
        mixer.update(DomainStats(world.step(mixer.weights).nats, [4096] * 3), step)
        known = 3 * step * (step + 1) / (4 * step + 2) >= 30
        assert (mixer.record()["learning_slope"] is None) != known
    assert known


def early(mixer: Mixer, steps: int, *lines: tuple[float, float]) -> list[list[float]]:
    """As `on_lines`, from the first step on; the weights after each."""
    weights = []
    for step in range(steps):
        x = math.log(100 * step + 50)
        stats = DomainStats([100 * (high - slope * x) for high, slope in lines], [100] * len(lines))
        weights.append(mixer.update(stats, step + 1).tolist())
    return weights


def test_noise_is_suspected_from_eight_observations_on_and_keeps_a_quarter_until_thirty() -> None:
    """3 n (n + 1) / (4 n + 2) observations count as much as equal ones: 8 at n = 11, 30 at n = 40."""
    mixer = recommended([1.0] * 3, exploration=0.0, reach=1.0)
    weights = early(mixer, 45, (9, 0.5), (7, 0.3), (7, -0.1))
    for before in weights[:10]:
        assert before == pytest.approx([1 / 3] * 3)
    assert mixer.record()["suspected"] == []
    for suspected in weights[10:39]:
        assert suspected == pytest.approx([4 / 9, 4 / 9, 1 / 9])
    for known in weights[39:]:
        assert known == pytest.approx([0.5, 0.5, 0.0])


def test_noise_that_is_the_first_with_thirty_observations_stays_suspected() -> None:
    """The others come in two of three steps, so that for some steps the only slope that counts is not above 0."""
    mixer = recommended([1.0] * 3, exploration=0.0, reach=1.0)
    tokens, alone = np.zeros(3), 0
    for step in range(1, 70):
        new = np.array([100, 100, 100]) if step % 3 else np.array([0, 0, 100])
        means = np.array([9.0, 7.0, 7.0]) - np.array([0.5, 0.3, -0.1]) * np.log(tokens + 50)
        tokens += new
        weights = mixer.update(DomainStats(means * new, new), step)
        slopes = mixer.record()["loss_slope"]
        alone += slopes[2] is not None and slopes[0] is slopes[1] is None
        assert step < 20 or weights[2] < 0.12
    assert alone > 5
    assert weights[2] == 0


def test_an_early_slope_counts_against_a_domain_only_as_far_as_it_is_certain() -> None:
    """0.4 of the typical slope, exact: s = 4 x 0.4 - 1; within three of its standard errors of half of it: s = 1."""
    slope = 0.4 * 0.5 / (2 - 0.4)
    mixer = recommended([1.0] * 2, exploration=0.0, reach=1.0)
    weights = early(mixer, 12, (9, 0.5), (7, slope))
    s = 4 * slope / ((0.5 + slope) / 2) - 1
    assert 0.25 < s < 1
    assert weights[-1] == pytest.approx([1 / (1 + s), s / (1 + s)], rel=1e-5)
    assert mixer.record()["suspected"] == ["d1"]

    mixer = recommended([1.0] * 2, exploration=0.0, reach=1.0)
    for step in range(12):
        x, spread = math.log(100 * step + 50), 0.3 * (-1) ** step
        mixer.update(DomainStats([100 * (9 - 0.5 * x), 100 * (7 - slope * x + spread)], [100, 100]), step + 1)
    assert mixer.weights == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("at", range(8, 14))
def test_one_strange_sample_early_makes_no_domain_suspected(at: int) -> None:
    """A loss of 15 where 6 was expected, in one of the first steps: its line is then uncertain, so its weight stays."""
    mixer = recommended([1.0] * 3, exploration=0.0, reach=1.0)
    random = np.random.default_rng(at)
    for step in range(1, 30):
        x = math.log(100 * step - 50)
        means = 9 - 0.4 * x + 0.02 * random.standard_normal(3)
        means[1] += 9.0 * (step == at)
        weights = mixer.update(DomainStats(100 * means, [100] * 3), step)
        assert weights.min() > 0.3


def test_rising_losses_of_all_make_nobody_suspected() -> None:
    mixer = recommended([1.0] * 2, exploration=0.0, reach=1.0)
    for weights in early(mixer, 30, (3, -0.5), (3, -0.1)):
        assert weights == pytest.approx([0.5, 0.5])


def test_constant_losses_give_the_objective() -> None:
    mixer = recommended([0.5, 0.5], objective=[0.7, 0.3], exploration=0.0)
    for step in range(1, 100):
        assert mixer.update(DomainStats([311.7, 95.3], [100, 40]), step) == pytest.approx([0.7, 0.3])
    assert mixer.record()["loss_slope"] == pytest.approx([0.0, 0.0], abs=1e-9)


def test_a_slow_domain_with_most_of_the_objective_keeps_its_best_share() -> None:
    """Eleven small domains with four times its slope: the best share of the large one is 0.6 x 0.12 / 0.272 = 0.26."""
    mixer = make_mixer({"name": "recommended"}, [f"d{i}" for i in range(12)], [6.6] + [0.4] * 11)
    on_lines(mixer, (9, 0.12), *[(9, 0.5)] * 11)
    assert 0.26 < mixer.weights[0] < 0.6
    slower = make_mixer({"name": "recommended", "exploration": 0.0}, ["a", "b"], [1.0, 1.0])
    on_lines(slower, (9, 0.1), (9, 0.9))  # a fifth of the objective's slope, 0.5
    assert slower.weights[0] == pytest.approx((0.1 / 0.7) / (1 + 0.1 / 0.7))


def test_one_steep_domain_leaves_the_others_their_weights() -> None:
    """As when it comes late: 14 times the slope of nine others; and one that is not of the objective counts nothing."""
    mixer = make_mixer({"name": "recommended", "exploration": 0.0}, [f"d{i}" for i in range(10)], [1.0] * 10)
    on_lines(mixer, *[(9, 0.05)] * 9, (9, 0.7))
    assert mixer.weights[:9].min() > 0.08
    names, objective = ["a", "b", "c"], [1.0, 1.0, 0.0]
    mixer = make_mixer({"name": "recommended", "exploration": 0.0}, names, [1.0] * 3, objective)
    on_lines(mixer, (9, 0.1), (9, 0.15), (9, 3.0))
    np.testing.assert_allclose(mixer.weights, [0.5, 0.5, 0.0], atol=1e-12)


@pytest.mark.parametrize("first", [7.0, 0.9])
def test_what_is_learnt_is_left_and_taken_back_when_it_is_forgotten(first: float) -> None:
    """Losses of constant mean after the first, which then rise by 0.5 nats; noise, with a first loss like the others,
    rises too and was never learnt. One strange sample is no rise."""
    rng, weights, rises = np.random.default_rng(0), [], []
    mixer = make_mixer({"name": "recommended"}, ["a", "b", "c"], [1.0] * 3)
    for step in range(1, 361):
        falling, noise = 9 - 0.4 * math.log(100 * step), 0.05 * rng.standard_normal(3)
        flat = 1.0 + 0.5 * (step > 300) + 5.0 * (step == 250) if step > 1 else first
        tokens = [100, 100, 100 if step < 150 or step % 4 == 0 or step == 250 else 0]
        mixer.update(DomainStats((np.array([falling, falling, flat]) + noise) * tokens, tokens), step)
        weights.append(mixer.weights[2])
        rises.append(mixer.record()["loss_rise"])
    assert max(weights[200:300]) < 0.02
    assert max(rise for row in rises for rise in row[:2]) < 0.05
    assert (weights[-1] > 0.2) == (rises[-1][2] > 0.1) == (first > 2)
    assert weights[-1] > 0.2 or weights[-1] < 0.05


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
    assert mixer.weights[3] == pytest.approx(0.25, rel=0.2)


losses = st.one_of(st.floats(-1e308, 1e308), st.floats(0, 12), st.sampled_from([0.0, 1e-300, 1e308, 5.0]))
counts = st.one_of(st.integers(0, 2**62), st.integers(0, 3), st.just(4096))


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 4),
    data=st.data(),
    memory=st.floats(0, 10),
    reach=st.floats(1, 1000),
    exploration=st.floats(0, 1),
)
def test_nothing_overflows(k: int, data: st.DataObject, memory: float, reach: float, exploration: float) -> None:
    mixer = recommended([1.0] * k, memory=memory, reach=reach, exploration=exploration)
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
    for key, value in (
        ("tokens", [1.0]),
        ("tokens", [1.0, math.inf]),
        ("sums", {"w": [0.0, 0.0]}),
    ):
        with pytest.raises(InputError, match="not whole"):
            mixer.load_state_dict({**state, key: value})


def test_other_domains_keep_what_is_known() -> None:
    """A domain in two parts, one gone, one new: parts have the slope of the whole, the new one has the mean."""
    before, world = recommended([6.0, 2.0, 1.0]), World(6, 3)
    world.train(before, 200)
    slopes = before.record()["loss_slope"]
    after = recommended([1.0] * 4)
    after.adopt_state(before.state_dict(), [2, 0, 0, None], np.array([0.4, 0.2, 0.2, 0.2]))
    assert after.record()["loss_slope"] == [slopes[2], slopes[0], slopes[0], None]
    assert after.weights.tolist() == [0.4, 0.2, 0.2, 0.2]
    levels = before.state_dict()["lowest"]
    assert after.state_dict()["lowest"] == [levels[2], 0.0, 0.0, 0.0]
    assert after.record()["learning_slope"][3] == pytest.approx(np.mean([slopes[2], slopes[0], slopes[0]]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"memry": 1.0}, "Did you mean 'memory'?"),
        ({"memory": -0.1}, "memory"),
        ({"memory": math.inf}, "memory"),
        ({"reach": 0.5}, "reach"),
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


def test_what_0_1_recorded_is_read(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config with the key of the first rule, and a state of it, whose sums are the same."""
    monkeypatch.setattr(get_logger(), "propagate", True)
    mixer = recommended([1.0, 1.0], difficulty=0.5)
    assert "difficulty is of the rule that 0.1 had" in caplog.text
    mixer.load_state_dict({**mixer.state_dict(), "prior": [0.5, 0.5], "tokens": [7.0, 9.0]})
    assert mixer.state_dict()["tokens"] == [7.0, 9.0]


def test_a_state_of_before_there_were_rises_is_read() -> None:
    mixer, world = recommended([1.0] * 3), World(1, 3)
    world.train(mixer, 60)
    old = {key: value for key, value in mixer.state_dict().items() if key not in ("recent", "lowest", "first")}
    for new in (recommended([1.0] * 3), recommended([1.0] * 3)):
        new.load_state_dict(old)
        assert new.record()["loss_slope"] == mixer.record()["loss_slope"]
        assert new.record()["loss_rise"] == [0.0] * 3
        new.adopt_state(old, [0, 1, None], np.full(3, 1 / 3))
        world.train(new, 0)
        new.update(world.step(new.weights), 61)
