"""Swarms of a known law, for tests: f_j(x) = exp(c_j) + exp(A_j . x), with noise or without."""

from __future__ import annotations

import numpy as np

from megamix.studies.swarm.fit.law import LogLinearLaw
from megamix.studies.swarm.fit.tables import SwarmTable


def known_law(num_domains: int, num_metrics: int, seed: int = 0) -> LogLinearLaw:
    """Floors of 0.5 to 1.5 nats and coefficients of -1.5 to 1 around 0.5: losses of about 2 to 4 nats."""
    generator = np.random.default_rng([seed, num_domains, num_metrics])
    return LogLinearLaw(
        domains=tuple(f"d{k}" for k in range(num_domains)),
        metrics=tuple(f"m{j}" for j in range(num_metrics)),
        c_J=np.log(generator.uniform(0.5, 1.5, num_metrics)),
        A_JK=0.5 + generator.uniform(-1.5, 1.0, (num_metrics, num_domains)),
    )


def mixtures(num_runs: int, num_domains: int, seed: int = 0, strength: float = 0.5) -> np.ndarray:
    """float64 [R, K]: draws of a Dirichlet distribution with all parameters ``strength``, and no weight below 1e-6."""
    generator = np.random.default_rng([seed, num_runs, num_domains, 7])
    drawn = np.maximum(generator.dirichlet(np.full(num_domains, strength), size=num_runs), 1e-6)
    return drawn / drawn.sum(axis=1, keepdims=True)


def swarm_of(
    law: LogLinearLaw, num_runs: int, *, noise: float = 0.0, seed: int = 0, strength: float = 0.5
) -> SwarmTable:
    """Runs on drawn mixtures with the law's values.

    Args:
        noise: standard deviation added to every value, in the metric's unit.
    """
    ratios = mixtures(num_runs, len(law.domains), seed, strength)
    values = law.predict(ratios)
    values = values + noise * np.random.default_rng([seed, 11]).normal(size=values.shape)
    runs = tuple(f"{number:04d}" for number in range(num_runs))
    return SwarmTable(runs, law.domains, law.metrics, ratios, values)
