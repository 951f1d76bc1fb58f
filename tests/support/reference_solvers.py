"""Problems of proposals for tests, and an independent solver: SLSQP of scipy."""

from __future__ import annotations

from typing import Any

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
        jac=lambda x: (p.v_J * np.exp(p.A_JK @ x)) @ p.A_JK + p.kl * (np.log(np.maximum(x, 1e-300) / p.prior_K) + 1),
        bounds=[(1e-12, cap) for cap in p.cap_K],
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return found.x
