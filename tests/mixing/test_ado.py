"""ADO against its formulas, written again over the whole history with scipy's minimiser; its curves by themselves."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import run_job
from records import lines, record
from scipy.optimize import minimize
from scipy.signal import savgol_filter
from simulated_world import World

from megamix.analysis.replay import replay
from megamix.core.errors import InputError
from megamix.data.batches import Batches
from megamix.mixing.constraints import Constraints
from megamix.mixing.mixers import DomainStats, Mixer, PartMixer, make_mixer
from megamix.mixing.mixers import ado as ado_module
from megamix.mixing.mixers.scaling_curves import Penalties, fit_curve
from megamix.mixing.weight_policy import Stages, WeightPolicy

GRID = np.array([[a, e, al] for a in range(-2, 6) for e in np.arange(-2, 2, 0.5) for al in np.arange(0, 0.8, 0.1)])
SHORT: dict[str, Any] = {"fit_from": 100, "start": 150, "refit_every": 50, "fit_every": 2, "sample_tokens": 64}
TOKENS = 64 * 32
"""Of a step: 32 samples."""


def criterion(z: Any, x: Any, y: Any) -> float:
    a, e, alpha = z
    r = np.abs(y - np.logaddexp(a - alpha * x, e))
    huber = np.where(r > 1e-3, 1e-3 * (r - 0.5e-3), 0.5 * r**2).sum()
    return huber + max(alpha - 0.8, 0) - min(alpha, 0.001) - min(e - 0.5, 0) + max(a - 6.5, 0)


def fit_by_scipy(n: Any, loss: Any) -> np.ndarray:
    x, y = np.log(n), np.log(loss)
    order = np.argsort([criterion(z, x, y) for z in GRID])
    best: Any = None
    for start in GRID[order[:4]]:
        for _ in range(4):  # a simplex that has collapsed too early is made anew
            found = minimize(
                criterion, start, (x, y), "Nelder-Mead", options={"xatol": 1e-13, "fatol": 1e-17, "maxiter": 2000}
            )
            start = found.x
        best = found if best is None or found.fun < best.fun else best
    return best.x


class Reference:
    """The published constants but those of `SHORT`; every loss is kept; t counts from 0.

    Args:
        delay: steps from a fit to the weights that follow it.
    """

    def __init__(self, initial: list[float], delay: int) -> None:
        self.delay = delay
        self.k = len(initial)
        self.mu = np.array(initial) / sum(initial)
        self.h, self.average, self.pi = self.mu.copy(), self.mu.copy(), self.mu
        self.n: list[float] = []
        self.losses: list[list[float]] = []
        self.curves: list[np.ndarray] = []
        self.coming: dict[int, list[np.ndarray]] = {}

    def step(self, nats: list[float], tokens: list[int]) -> np.ndarray:
        t, total = len(self.n), sum(tokens)
        before = self.losses[-1] if self.losses else [sum(nats) / total] * self.k
        self.losses.append([nats[i] / tokens[i] if tokens[i] else before[i] for i in range(self.k)])
        self.n.append((self.n[-1] if self.n else 0) + total / 64)
        self.h = 0.9 * self.h + 0.1 * np.array(tokens) / total
        if t >= 150 and t % 50 == 0:
            smooth = savgol_filter(np.array(self.losses), 101, 3, axis=0)[100::2]
            self.coming[t + self.delay] = [fit_by_scipy(self.n[100::2], column) for column in smooth.T]
        self.curves = self.coming.get(t, self.curves)
        if self.curves:
            q = []
            for i, (a, _, alpha) in enumerate(self.curves):
                speed = max(alpha, 0.05) * np.exp(a) * self.n[-1] ** -alpha / self.n[-1]
                q.append(self.mu[i] * np.sqrt(self.h[i]) * speed)
            q = np.maximum(np.array(q) / sum(q), 0.01)
            q = q / q.sum()
            self.pi = 0.9 * self.average + 0.1 * q
            self.average = (1 - 1 / (t + 1)) * self.average + q / (t + 1)
        return self.pi


def ado(initial: list[float], **options: Any) -> Mixer:
    return make_mixer({"name": "ado", **SHORT, **options}, [f"d{i}" for i in range(len(initial))], initial)


def steps(number: int, k: int, seed: int = 0, noise: float = 0.01) -> list[DomainStats]:
    """Losses on noisy curves of all samples so far; a domain is absent from every few steps, from the first too."""
    rng = np.random.default_rng(seed)
    floor, scale, power = rng.uniform(2, 3, k), rng.uniform(20, 60, k), rng.uniform(0.3, 0.5, k)
    found = []
    for t in range(number):
        tokens = rng.multinomial(TOKENS, rng.dirichlet(np.full(k, 4.0)))
        if k > 1:
            tokens[t % k if t % 5 == 0 else k - 1] *= t % 3 == 1
        loss = (floor + scale * (32.0 * (t + 1)) ** -power) * np.exp(noise * rng.standard_normal(k))
        found.append(DomainStats(loss * tokens, tokens))
    return found


@pytest.mark.parametrize(("k", "delay"), [(1, 0), pytest.param(3, 0, marks=pytest.mark.slow), (3, 7)])
def test_the_published_formulas(k: int, delay: int) -> None:
    """With a delay: but for the steps that curves are in force."""
    initial = [1.0 + i for i in range(k)]
    mixer, reference = ado(initial, fit_delay=delay), Reference(initial, delay)
    for step, stats in enumerate(steps(260, k, noise=0.002), 1):
        weights = mixer.update(stats, step)
        expected = reference.step(stats.nats.tolist(), stats.tokens.tolist())
        np.testing.assert_allclose(weights, expected, rtol=1e-6)
        assert mixer.changed_at(step) == (step > 150 + delay)
    record = mixer.record()
    np.testing.assert_allclose(record["curve_exponent"], [z[2] for z in reference.curves], rtol=1e-4)
    np.testing.assert_allclose(record["credit"], reference.h, rtol=1e-12)
    if k > 1:
        assert np.abs(mixer.weights - reference.mu).max() > 1e-3


def test_the_comparison_notices_a_wrong_constant() -> None:
    for option in ({"credit_memory": 0.899}, {"smoothing_degree": 1}, {"min_share": 0.2}, {"huber_delta": 0.1}):
        mixer, right = ado([1.0, 2.0, 3.0], **option), ado([1.0, 2.0, 3.0])
        for step, stats in enumerate(steps(160, 3), 1):
            same = np.allclose(mixer.update(stats, step), right.update(stats, step), rtol=1e-6)
        assert not same


@pytest.mark.parametrize("num_points", [30, 300, 1500])
def test_a_curve_without_noise_is_found(num_points: int) -> None:
    n = 32.0 * np.arange(1000, 1000 + 10 * num_points, 10)
    for a, e, alpha in ((5.0, 0.9, 0.4), (3.0, 0.6, 0.2), (6.0, 1.2, 0.7)):
        loss = np.exp(e) + np.exp(a) * n**-alpha
        found = fit_curve(n, loss, 1e-3, Penalties())
        assert np.exp(found[1]) + np.exp(found[0]) * n ** -found[2] == pytest.approx(loss, rel=1e-5)


def test_no_fit_is_worse_than_those_of_scipy() -> None:
    """Noisy losses, floors that are penalised, losses that do not fall."""
    rng = np.random.default_rng(3)
    for trial in range(4):
        n = np.linspace(3e4, 2e5, int(rng.integers(10, 80)))
        loss = np.exp(rng.uniform(0.2, 1)) + np.exp(rng.uniform(1, 5)) * n ** -rng.uniform(0, 0.6)
        loss = (loss[::-1] if trial == 3 else loss) * np.exp(0.01 * rng.standard_normal(n.size))
        x, y = np.log(n), np.log(loss)
        mine = criterion(fit_curve(n, loss, 1e-3, Penalties()), x, y)
        theirs = criterion(fit_by_scipy(n, loss), x, y)
        # Of a flat valley either may see another end.
        assert mine <= theirs + 1e-4 * (theirs + 0.001)


@pytest.mark.parametrize("delay", [0, 5])
def test_a_state_continues_bit_for_bit(delay: int) -> None:
    """At steps before, at and after fits, and while one runs; the state is small and plain."""
    whole = ado([1.0, 2.0], start=None, fit_delay=delay)
    pieces = ado([1.0, 2.0], start=None, fit_delay=delay)
    for step, stats in enumerate(steps(215, 2), 1):
        assert whole.update(stats, step).tolist() == pieces.update(stats, step).tolist()
        if step in (1, 60, 100, 101, 102, 104, 105, 106, 151, 155, 200, 201, 204):
            saved = json.loads(json.dumps(pieces.state_dict()))
            assert (saved["fit"] is not None) == (delay > 0 and step > 100 and (step - 1) % 50 < 5)
            pieces = ado([1.0, 1.0], start=None, fit_delay=delay)
            pieces.load_state_dict(saved)
    state = whole.state_dict()
    assert len(state["window"]) == 101
    assert len(state["points"]) == (215 - 1 - 50 - 100) // 2 + 1
    assert len(set(map(str, whole.weights.tolist()))) == 2
    for key, bad in (("credit", [1.0]), ("window", [[1.0]]), ("curves", [[1.0, 2.0]])):
        with pytest.raises(InputError, match="the state is not whole"):
            ado([1.0, 2.0]).load_state_dict({**state, key: bad})


def test_a_delayed_fit_keeps_no_step_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps go on while the fit is held up; the first with its curves waits for it."""
    go_on, fit = threading.Event(), ado_module.fit_curve

    def held_up(*args: Any) -> Any:
        assert go_on.wait(60)
        return fit(*args)

    monkeypatch.setattr(ado_module, "fit_curve", held_up)
    mixer, usual = ado([1.0, 2.0], fit_delay=3), ado([1.0, 2.0], fit_delay=3)
    given = steps(154, 2)
    for step, stats in enumerate(given[:153], 1):
        assert mixer.update(stats, step).tolist() == [1 / 3, 2 / 3]
    assert mixer.state_dict()["fit"]["due"] == 153
    go_on.set()
    for step, stats in enumerate(given, 1):
        expected = usual.update(stats, step).tolist()
    assert mixer.update(given[153], 154).tolist() == expected != [1 / 3, 2 / 3]


def test_a_run_its_shadow_and_its_replay_agree(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """Bit for bit; and the run goes on exactly where it stops between a fit and its curves."""
    mixer = {"name": "ado", "smoothing_window": 3, "smoothing_degree": 1, "fit_from": 2, "fit_every": 1}
    mixer |= {"start": 3, "refit_every": 3, "fit_delay": 2, "sample_tokens": 64}
    written = {}
    for name in ("whole", "parts"):
        config = tiny_config(
            run_dir=str(tmp_path / name), mixer=mixer, shadow=[mixer], evaluate={"every": 0}, checkpoint={"every": 0}
        )
        written[name] = config.rename(tmp_path / f"{name}.yaml")
    run_job(1, [(written["whole"], ()), (written["parts"], ("train.stop_after=7",)), (written["parts"], ())])
    weights = lines(tmp_path / "whole" / "weights.jsonl")
    assert len({tuple(line["domain_weights"]) for line in weights}) > 5
    assert record(tmp_path / "parts")[1] == weights
    replay(tmp_path / "whole", [], tmp_path / "replayed")
    for path in ("whole/shadow/ado.jsonl", "parts/shadow/ado.jsonl", "replayed/ado.jsonl"):
        assert lines(tmp_path / path) == weights, path


def test_nothing_to_learn() -> None:
    """Steps without tokens, a domain never seen, losses that rise or stay: finite weights, and noise gets least."""
    mixer = ado([1.0, 1.0, 1.0], start=None)
    rng = np.random.default_rng(0)
    for step in range(1, 213):
        if step % 7 == 0:
            mixer.update(DomainStats([0, 0, 0], [0, 0, 0]), step)
            continue
        loss = np.array([2 + 40 * (32.0 * step) ** -0.4, 5 + 0.001 * rng.standard_normal(), 0])
        mixer.update(DomainStats(loss * 64, [64, 64, 0]), step)
        assert mixer.weights.min() > 0
    now = mixer.weights
    assert now[0] > 1 / 3 > now[1]
    flat = ado([1.0, 3.0], start=None)
    for step in range(1, 160):
        flat.update(DomainStats([64.0 * step, 64.0 * step], [64, 64]), step)
    assert flat.weights == pytest.approx([0.25, 0.75], abs=0.05)


def test_other_domains_begin_anew() -> None:
    old, new = ado([1.0, 3.0]), make_mixer({"name": "ado", **SHORT}, ["d0", "d1", "d2"], [1.0, 1.0, 1.0])
    for step, stats in enumerate(steps(210, 2), 1):
        old.update(stats, step)
    new.adopt_state(old.state_dict(), [0, 1, None], np.array([0.3, 0.5, 0.2]))
    state = new.state_dict()
    assert (state["count"], state["points"], state["curves"]) == (0, [], None)
    assert state["prior"] == pytest.approx([1 / 6, 1 / 2, 1 / 3])
    for step, stats in enumerate(steps(170, 3), 211):
        weights = new.update(stats, step)
        assert (weights.tolist() == [0.3, 0.5, 0.2]) == (step <= 210 + 150)


def test_bad_options() -> None:
    for options, message in (
        ({"smoothing_window": 100}, r"smoothing_window is 100, expected an odd number above smoothing_degree, 3"),
        ({"smoothing_window": 3}, r"smoothing_window is 3, expected an odd number above"),
        ({"fit_from": 99}, r"fit_from is 99, .* Use at least 100"),
        ({"start": 99}, r"start is 99, before fit_from, 100"),
        ({"fit_delay": 50}, r"fit_delay is 50, but the next fit begins after 50 steps"),
        ({"exponents": [0.5, 0.1]}, r"exponents is \[0\.5, 0\.1\], expected two rising numbers"),
    ):
        with pytest.raises(InputError, match=message):
            ado([1.0], **options)


def test_it_follows_what_learns() -> None:
    """Simulated domains, one of noise: less of it than in the mixture."""
    world = World(0, 4, noise=1)
    mixer = make_mixer({"name": "ado", **SHORT, "sample_tokens": 256}, [f"d{i}" for i in range(5)], [1.0] * 5)
    world.train(mixer, 280)
    assert mixer.weights[4] < 0.15


def test_the_prior_follows_a_mixture_that_moves() -> None:
    """On a ramp mu is the mixture of the step that the weights are for, also where a domain is left out."""
    stages = Stages((0, 4), np.array([[0.5, 0.3, 0.2, 0.0], [0.1, 0.3, 0.6, 0.0]]), (None, "linear"))
    names = ("a", "b", "c", "out")
    mixer = make_mixer({"name": "ado", **SHORT}, names, stages.at(0))
    assert isinstance(mixer, PartMixer)
    bounds = Constraints(names, np.full(4, 100), 1000, np.zeros(4), np.ones(4), np.full(4, np.inf), "cap")
    policy = WeightPolicy(stages, bounds, Batches.equal(10), 1)
    for step in range(5):
        wanted = policy.wanted(mixer, DomainStats([1.0, 1.0, 1.0, 0.0], [10, 10, 10, 0]), step)
        expected = stages.at(min(step + 2, 4))
        assert (None if wanted is None else wanted.tolist()) == (expected.tolist() if step < 3 else None)
        assert mixer.rule.state_dict()["prior"] == pytest.approx(expected[:3], rel=1e-14)
