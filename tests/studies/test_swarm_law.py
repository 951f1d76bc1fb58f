"""The fit of the log-linear law: known laws are found again, and no independent optimiser finds a better fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from synthetic import known_law, mixtures, swarm_of

from megamix.studies.swarm.fit.law import LogLinearLaw, fit_log_linear, fit_weighted
from megamix.studies.swarm.fit.tables import SwarmTable

DELTA = 0.02


def huber(residual: np.ndarray, delta: float = DELTA) -> float:
    size = np.abs(residual)
    return float(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum())


def loss_at(parameters: np.ndarray, x: np.ndarray, y: np.ndarray, delta: float = DELTA) -> float:
    """Of c and A as they stand in the paper."""
    return huber(y - np.exp(parameters[0]) - np.exp(x @ parameters[1:]), delta)


def error_of(fitted: LogLinearLaw, law: LogLinearLaw) -> float:
    """Root mean square error at mixtures that no run had."""
    x = mixtures(400, len(law.domains), seed=99)
    return float(np.sqrt(((fitted.predict(x) - law.predict(x)) ** 2).mean()))


@pytest.mark.parametrize(("num_domains", "num_runs"), [(2, 12), (8, 32), (24, 64), (64, 128)])
def test_a_known_law_is_recovered(num_domains: int, num_runs: int) -> None:
    """Without noise: coefficients and floors, and predictions of other mixtures."""
    law = known_law(num_domains, 4)
    fitted = fit_log_linear(swarm_of(law, num_runs), starts=4)
    assert pytest.approx(law.A_JK, abs=1e-6) == fitted.A_JK
    assert np.exp(fitted.c_J) == pytest.approx(np.exp(law.c_J), abs=1e-6)
    assert error_of(fitted, law) < 1e-6


def test_a_law_without_a_floor() -> None:
    """c is -inf there; the nearest thing to a law that would need a floor below 0 has none."""
    law = replace(known_law(5, 3), c_J=np.full(3, -np.inf))
    fitted = fit_log_linear(swarm_of(law, 30))
    assert error_of(fitted, law) < 1e-6
    assert np.exp(fitted.c_J) == pytest.approx(np.zeros(3), abs=1e-6)
    table = swarm_of(law, 30)
    concave = replace(table, values_RJ=np.log(table.values_RJ) + 2)
    assert np.array_equal(fit_log_linear(concave).c_J, np.full(3, -np.inf))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_unit_of_a_metric_does_not_matter(scale: float) -> None:
    """With delta in the same unit."""
    table = swarm_of(known_law(6, 3), 40, noise=0.03)
    fitted = fit_log_linear(replace(table, values_RJ=scale * table.values_RJ), delta=scale * DELTA)
    x = mixtures(50, 6, seed=5)
    assert fitted.predict(x) == pytest.approx(scale * fit_log_linear(table).predict(x), rel=1e-6)


@pytest.mark.parametrize(("noise", "num_domains", "num_runs"), [(0.01, 3, 20), (0.05, 5, 24), (0.3, 4, 30)])
def test_no_other_optimiser_finds_a_better_fit(noise: float, num_domains: int, num_runs: int) -> None:
    """scipy's BFGS with numerical gradients, in c and A, from the fit, from the truth and from elsewhere."""
    law = known_law(num_domains, 2, seed=1)
    table = swarm_of(law, num_runs, noise=noise, seed=2)
    fitted = fit_log_linear(table)
    generator = np.random.default_rng(4)
    for j in range(2):
        x, y = table.ratios_RK, table.values_RJ[:, j]
        own = np.array([max(fitted.c_J[j], -20.0), *fitted.A_JK[j]])
        reached = loss_at(own, x, y)
        starts = [own, np.array([law.c_J[j], *law.A_JK[j]])]
        starts += [np.array([np.log(y.min() / 2), *generator.normal(0, 1, num_domains)]) for _ in range(3)]
        best = min(minimize(loss_at, start, args=(x, y), options={"gtol": 1e-9}).fun for start in starts)
        assert reached <= best * (1 + 1e-6)
        assert reached < loss_at(starts[1], x, y)


@pytest.mark.parametrize("ridge", [0.1, 10.0])
def test_a_ridge_is_part_of_what_is_made_small(ridge: float) -> None:
    """As `Problems` defines it: coefficients beyond log(mean - floor), squared. A huge one leaves only the mean."""
    table = swarm_of(known_law(4, 1, seed=1), 20, noise=0.1)
    x, y = table.ratios_RK, table.values_RJ[:, 0]

    def loss(parameters: np.ndarray) -> float:
        level = np.log(y.mean() - np.exp(parameters[0])) if np.exp(parameters[0]) < y.mean() else np.inf
        return loss_at(parameters, x, y) + 0.5 * ridge * DELTA**2 * float(((parameters[1:] - level) ** 2).sum())

    fitted = fit_log_linear(table, ridge=ridge)
    own = np.array([max(fitted.c_J[0], -20.0), *fitted.A_JK[0]])
    others = [own, np.array([-20.0, *np.full(4, np.log(y.mean()))]), np.array([np.log(y.min() / 2), 0, 0, 0, 0.0])]
    assert loss(own) <= min(minimize(loss, start, options={"gtol": 1e-9}).fun for start in others) * (1 + 1e-6)
    plain = fit_log_linear(table)
    assert loss(own) < loss(np.array([max(plain.c_J[0], -20.0), *plain.A_JK[0]])) * (1 - 1e-5)
    assert fit_log_linear(table, ridge=1e9).predict(x) == pytest.approx(y.mean(), abs=1e-3)


def test_more_runs_make_up_for_noise() -> None:
    """Error falls about as one over the square root of the number of runs, and is far below the noise."""
    law = known_law(8, 6)
    few, many = (error_of(fit_log_linear(swarm_of(law, num, noise=0.05)), law) for num in (40, 640))
    assert many < 0.4 * few
    assert many < 0.02


def test_one_bad_run_does_little_harm() -> None:
    """A loss that is wrong by 2 nats: with least squares (a delta that no residual reaches) it bends the whole law."""
    law = known_law(6, 4)
    table = swarm_of(law, 40, noise=0.005)
    values = table.values_RJ.copy()
    values[7] += 2.0
    bad = replace(table, values_RJ=values)
    clean, robust = error_of(fit_log_linear(table), law), error_of(fit_log_linear(bad), law)
    squares = error_of(fit_log_linear(bad, delta=1e3), law)
    assert robust < 2 * clean
    assert squares > 10 * robust


def test_the_same_input_gives_the_same_law_and_any_start_the_same_fit() -> None:
    table = swarm_of(known_law(7, 5), 40, noise=0.02)
    first = fit_log_linear(table)
    assert np.array_equal(first.A_JK, fit_log_linear(table).A_JK)
    assert np.array_equal(first.c_J, fit_log_linear(table).c_J)
    for other in (fit_log_linear(table, seed=1), fit_log_linear(table, starts=1)):
        assert other.predict(table.ratios_RK) == pytest.approx(first.predict(table.ratios_RK), abs=1e-6)
    # A metric's law does not depend on the metrics beside it.
    alone = SwarmTable(table.runs, table.domains, ("m3",), table.ratios_RK, table.values_RJ[:, 3:4])
    assert fit_log_linear(alone).A_JK[0] == pytest.approx(first.A_JK[3], rel=1e-5, abs=1e-5)


def test_more_starts_find_better_fits() -> None:
    """Where the law is not quite true (a loss falls with the logarithm of a domain's share), there are local minima."""
    x = mixtures(16, 6, seed=1, strength=0.2)
    noise = np.random.default_rng(0).normal(0, 0.3, (16, 6))
    y = 4 - 0.5 * np.log(0.003 + x) + noise
    names = tuple("abcdef")
    table = SwarmTable(tuple(str(run) for run in range(16)), names, names, x, y)

    def losses(starts: int) -> np.ndarray:
        law = fit_log_linear(table, starts=starts)
        return np.array([huber(y[:, j] - law.predict(x)[:, j]) for j in range(6)])

    one, many = losses(1), losses(24)
    assert (many <= one * (1 + 1e-9)).all()
    assert (many < 0.95 * one).any()


def test_weights_of_runs_count_them() -> None:
    """0 is a run that is not there, 2 a run twice."""
    table = swarm_of(known_law(4, 2), 30, noise=0.05)
    times = np.array([2, 0, 1, 1, 1] * 6)
    options = {"starts": 4, "seed": 0, "delta": DELTA}
    weighted = fit_weighted(table.ratios_RK, table.values_RJ.T, np.tile(times.astype(float), (2, 1)), **options)
    rows = np.repeat(np.arange(30), times)
    plain = fit_weighted(table.ratios_RK[rows], table.values_RJ[rows].T, np.ones((2, len(rows))), **options)
    for one, other in zip(weighted, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
    unweighted = fit_weighted(table.ratios_RK, table.values_RJ.T, np.ones((2, 30)), **options)
    assert not np.allclose(unweighted[1], weighted[1], atol=1e-3)


def test_a_domain_that_no_counted_run_has_counts_as_the_mean() -> None:
    """As happens in a fold: its coefficient is that of an average mixture, not 0 or anything large."""
    table = swarm_of(known_law(4, 1, seed=3), 30, noise=0.01)
    ratios = table.ratios_RK.copy()
    ratios[:, 3] = 0
    ratios /= ratios.sum(axis=1, keepdims=True)
    _, coefficients = fit_weighted(ratios, table.values_RJ.T, np.ones((1, 30)), starts=2, seed=0, delta=DELTA)
    assert coefficients[0, :3].min() <= coefficients[0, 3] <= coefficients[0, :3].max()


def test_predictions_are_finite() -> None:
    law = LogLinearLaw(("a", "b"), ("m",), np.array([-np.inf]), np.array([[5000.0, -5000.0]]))
    assert law.predict(np.eye(2)).ravel().tolist() == [np.exp(700.0), 0.0]
