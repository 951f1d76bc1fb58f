"""The convex problem of a proposal against another solver and by hand; its certificate; the search for the worst."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from reference_solvers import Floats, by_slsqp, objective, problem
from scipy.optimize import minimize

from megamix.core.errors import InputError, MegamixError
from megamix.studies.swarm.propose import solve as solver
from megamix.studies.swarm.propose.search import search_worst
from megamix.studies.swarm.propose.solve import Problem, frank_wolfe_gap, solve


@pytest.mark.parametrize("caps", [None, 1.3, 4.0])
@pytest.mark.parametrize("kl", [0.0, 0.05, 1.0])
@pytest.mark.parametrize(("size", "metrics"), [(2, 1), (3, 4), (8, 3), (24, 6), (64, 10)])
def test_the_optimum_is_that_of_another_solver(size: int, metrics: int, kl: float, caps: float | None) -> None:
    p = problem(size, metrics, kl, caps)
    ours, theirs = solve(p), by_slsqp(p)
    assert ours.x_K.sum() == pytest.approx(1, abs=1e-12)
    assert (ours.x_K >= 0).all()
    assert (ours.x_K <= p.cap_K + 1e-15).all()
    assert objective(p, ours.x_K) <= objective(p, theirs) + 1e-9
    if kl > 0:
        assert np.abs(ours.x_K - theirs).sum() <= 1e-6
        assert ours.within == pytest.approx(np.sqrt(2 * ours.gap / kl))
        assert ours.within < 1e-5
    if caps == 1.3:
        assert (ours.x_K > p.cap_K - 1e-7).any()  # some are active


def test_two_domains_by_hand() -> None:
    """The derivative along (1, -1) is 0 where bisection finds it, or the cap is reached."""
    a, b, kl, q = 1.0, -0.5, 0.3, 0.7

    def slope(x: float) -> float:
        return (a - b) * np.exp(a * x + b * (1 - x)) + kl * (np.log(x / q) - np.log((1 - x) / (1 - q)))

    low, high = 1e-12, 1 - 1e-12
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    p = Problem(np.ones(1), np.array([[a, b]]), kl, np.array([q, 1 - q]), np.zeros(2), np.ones(2))
    assert solve(p).x_K == pytest.approx([low, 1 - low], abs=1e-8)
    capped = Problem(p.v_J, p.A_JK, kl, p.prior_K, np.zeros(2), np.array([1.0, 0.6]))
    assert low < 0.4  # else the cap would not be felt
    assert solve(capped).x_K == pytest.approx([0.4, 0.6], abs=1e-9)


@pytest.mark.parametrize("kl", [0.0, 0.05])
def test_the_certificate_holds_for_any_mixture(kl: float) -> None:
    """No gap is smaller than the true distance from the minimum, in value and, by Pinsker, in weights."""
    p = problem(6, 4, kl, 2.0)
    best = by_slsqp(p)
    random = np.random.default_rng(3)
    for _ in range(200):
        x = random.dirichlet(np.ones(6))
        x = 0.5 * x + 0.5 * best
        if (x > p.cap_K).any():
            continue
        gap = frank_wolfe_gap(p, x)
        assert gap >= objective(p, x) - objective(p, best) - 1e-9
        if kl > 0:
            assert np.sqrt(2 * gap / kl) >= np.abs(x - best).sum() - 1e-6
    assert frank_wolfe_gap(p, solve(p).x_K) < 1e-12


def test_an_answer_without_a_certificate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "_by_clarabel", lambda problem, near_K, settings: (near_K, 1))
    with pytest.raises(MegamixError, match=r"could not be found: after \d+ steps the objective .* too large"):
        solve(problem(6, 4, 0.0, 2.0))


def test_without_cvxpy_a_proposal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(InputError, match=r"a proposal needs the package cvxpy, .*pip install 'megamix\[swarm\]'"):
        solve(problem(3, 2, 0.05, None))


@pytest.mark.parametrize("kl", [0.0, 1e-4, 0.05])
@pytest.mark.parametrize("caps", [None, 1.2])
def test_coefficients_of_any_size(kl: float, caps: float | None) -> None:
    """Exponents to about +-100: the gap stays tiny beside the objective."""
    for size, metrics in ((3, 2), (24, 50), (64, 50)):
        for scale in (0.01, 30.0):
            p = problem(size, metrics, kl, caps, scale)
            found = solve(p)
            assert found.gap <= 1e-9 * (objective(p, found.x_K) + kl)


def test_special_cases() -> None:
    one = solve(problem(1, 3, 0.05, None))
    assert one.x_K.tolist() == [1.0]
    p = problem(4, 2, 0.05, None)
    zero = Problem(p.v_J, p.A_JK, 0.05, np.array([0.5, 0.0, 0.3, 0.2]), p.floor_K, p.cap_K)
    assert solve(zero).x_K[1] == 0
    assert solve(Problem(p.v_J, p.A_JK, 0.0, zero.prior_K, p.floor_K, p.cap_K)).x_K[1] >= 0
    fixed = Problem(p.v_J, p.A_JK, 0.05, p.prior_K, np.array([0, 0.3, 0, 0]), np.array([1, 0.3, 1, 1]))
    found = solve(fixed)
    assert found.x_K[1] == 0.3
    reduced = minimize(
        lambda x: objective(p, np.insert(np.maximum(x, 1e-12), 1, 0.3)), [0.2, 0.2, 0.3], bounds=[(1e-9, 1)] * 3,
        constraints={"type": "eq", "fun": lambda x: x.sum() - 0.7}, method="SLSQP", options={"ftol": 1e-14},
    )  # fmt: skip
    assert np.delete(found.x_K, 1) == pytest.approx(reduced.x, abs=1e-5)
    settled = np.array([0.4, 0.3, 0.3, 0.0])
    for caps in (settled, np.array([0.4, 0.3, 0.3, 1.0])):  # no weight is free, or one for which nothing is left
        for kl in (0.0, 0.05):
            assert solve(Problem(p.v_J, p.A_JK, kl, p.prior_K, settled, caps)).x_K == pytest.approx(settled, abs=1e-12)
    tight = Problem(p.v_J, p.A_JK, 0.05, p.prior_K, np.zeros(4), np.array([0.4, 0.3, 0.2, 0.1]))
    assert solve(tight).x_K == pytest.approx([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("kl", [0.0, 0.05])
def test_the_worst_is_no_better_than_any_of_a_grid(kl: float) -> None:
    p = problem(3, 3, kl, 1.8, seed=5)
    x, starts = search_worst(p, np.zeros((0, 3)), 0)
    assert starts > 60
    assert x.sum() == pytest.approx(1)
    assert (x <= p.cap_K + 1e-12).all()

    def height(y: Floats) -> float:
        return 2 * objective(Problem(p.v_J, p.A_JK, 0.0, p.prior_K, p.floor_K, p.cap_K), y) - objective(p, y)

    steps = np.arange(0, 101) / 100
    grid = [np.array([a, b, 1 - a - b]) for a in steps for b in steps if a + b <= 1]
    highest = max(height(np.maximum(y, 0)) for y in grid if (y <= p.cap_K).all())
    assert height(x) >= highest - 1e-9
