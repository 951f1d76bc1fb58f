"""Problems of proposals for tests, and independent ways to solve them: SLSQP of scipy, and cvxpy with Clarabel."""

from __future__ import annotations

import warnings
from typing import Any

import cvxpy
import numpy as np
from scipy.optimize import minimize

from megamix.studies.swarm.propose.solve import Problem

Floats = Any


def problem(size: int, metrics: int, kl: float, caps: float | None, scale: float = 2.0, seed: int = 0) -> Problem:
    """A random one; ``caps``: their sum, None for no caps."""
    random = np.random.default_rng([size, metrics, seed])
    cap_K = np.ones(size) if caps is None else np.minimum(random.dirichlet(np.full(size, 3.0)) * caps, 1.0)
    A_JK = random.normal(size=(metrics, size)) * scale
    v_J, prior_K = random.dirichlet(np.ones(metrics)), random.dirichlet(np.ones(size))
    return Problem(v_J, A_JK, kl, prior_K, np.zeros(size), cap_K / min(1.0, cap_K.sum()))


def objective(p: Problem, x: Floats) -> float:
    """Written out, not the code's."""
    total = sum(
        v * np.exp(sum(a * b for a, b in zip(row, x, strict=True))) for v, row in zip(p.v_J, p.A_JK, strict=True)
    )
    return float(total + p.kl * sum(b * np.log(b / q) for b, q in zip(x, p.prior_K, strict=True) if b > 0))


def by_slsqp(p: Problem) -> Floats:
    found = minimize(
        lambda x: objective(p, np.maximum(x, 1e-300)),
        p.cap_K / p.cap_K.sum(),
        bounds=[(1e-12, cap) for cap in p.cap_K],
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return found.x


def by_cvxpy(p: Problem) -> Floats:
    x = cvxpy.Variable(p.prior_K.size)
    smooth = p.v_J @ cvxpy.exp(p.A_JK @ x)
    whole = smooth + p.kl * cvxpy.sum(cvxpy.rel_entr(x, p.prior_K)) if p.kl else smooth
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it came less near than it was asked to
        cvxpy.Problem(cvxpy.Minimize(whole), [cvxpy.sum(x) == 1, x >= 0, x <= p.cap_K]).solve(
            solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
        )
    return np.clip(x.value, 0, p.cap_K) / np.clip(x.value, 0, p.cap_K).sum()
