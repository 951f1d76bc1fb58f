"""Five updates of a mixture by full reuse and by recomputation, on a known law with noise: what each costs and loses.

    python tests/benchmarks/bench_swarm_reuse.py

Every run has the law's values plus noise of 0.02 nats. "lost" is the true objective, KL included, at the proposal minus
its minimum, the mean over seeds; "natural" that of the prior.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from synthetic import known_law, mixtures

from megamix.core.text import Table
from megamix.studies.swarm.fit.law import LogLinearLaw, fit_log_linear
from megamix.studies.swarm.fit.tables import SwarmTable
from megamix.studies.swarm.propose.config import UpdateConfig
from megamix.studies.swarm.propose.proposal import Proposal
from megamix.studies.swarm.propose.reuse import Update, default_members, resolve_update
from megamix.studies.swarm.propose.solve import Problem, solve

KL, NOISE, SEEDS = 0.05, 0.02, 8
FIRST = [f"d{number}" for number in range(10)]
UPDATES = (
    {"add": ("d10",)},
    {"revise": ("d3",)},
    {"partition": {"d5": ("d11", "d12")}},
    {"remove": ("d1",)},
    {"add": ("d13", "d14")},
)
UNIVERSE = [*FIRST, "d10", "d11", "d12", "d13", "d14", "revised d3"]
Tokens = dict[str, float]


def coefficients(law: LogLinearLaw, domains: list[str], revised: bool) -> np.ndarray:
    """float64 [J, K] of those domains; a revised one has other data."""
    names = ["revised d3" if name == "d3" and revised else name for name in domains]
    return law.A_JK[:, [UNIVERSE.index(name) for name in names]]


def problem(A_JK: np.ndarray, prior: np.ndarray) -> Problem:
    metrics, size = A_JK.shape
    return Problem(np.full(metrics, 1 / metrics), A_JK, KL, prior, np.zeros(size), np.ones(size))


def found_by_swarm(A_JK: np.ndarray, c_J: np.ndarray, matrix: np.ndarray, prior: np.ndarray, seed: int) -> np.ndarray:
    """The real weights that a swarm over the rows of ``matrix`` [V, K] leads to, by a fit to noisy runs."""
    size = len(matrix)
    x = mixtures(default_members(size), size, seed, strength=1.0)
    exact = np.exp(c_J) + np.exp(x @ matrix @ A_JK.T)
    values = exact + NOISE * np.random.default_rng([seed, 3]).normal(size=exact.shape)
    names = tuple(f"v{number}" for number in range(size))
    metrics = tuple(f"m{number}" for number in range(len(A_JK)))
    table = SwarmTable(tuple(map(str, range(len(x)))), names, metrics, x, values)
    q = np.array([np.exp(row[row > 0] @ np.log(prior[row > 0] / row[row > 0])) for row in matrix])
    return solve(problem(fit_log_linear(table, starts=2).A_JK, q)).x_K @ matrix


def one_chain(seed: int) -> list[tuple[str, int, int, float, float, float]]:
    """A row for each step: what, runs of both ways, what both lose, and what the prior loses."""
    law, random = known_law(len(UNIVERSE), 6, seed=seed), np.random.default_rng(seed)
    tokens: Tokens = {name: float(random.uniform(1, 10)) for name in UNIVERSE}
    domains, mixture, rows, revised = list(FIRST), {}, [], False
    for number, change in enumerate(({}, *UPDATES)):
        config = UpdateConfig(previous="before", **change) if change else None
        if config is not None:
            gone = {*config.remove, *config.partition}
            parts = [part for given in config.partition.values() for part in given]
            domains = [name for name in domains if name not in gone] + [*config.add, *parts]
            revised = revised or "d3" in config.revise
        counts = {name: tokens[name] for name in domains}
        prior = np.array(list(counts.values())) / sum(counts.values())
        A_JK = coefficients(law, domains, revised)
        truth = problem(A_JK, prior)
        anew = found_by_swarm(A_JK, law.c_J, np.eye(len(domains)), prior, 100 * seed + number)
        plan: Update | None = None if config is None else resolve_update(config, Proposal(mixture, {}), counts)
        if plan is None:
            kept, runs = anew, default_members(len(domains))
        elif plan.settled:
            kept, runs = plan.expand(np.ones(1)), 0
        else:
            kept = found_by_swarm(A_JK, law.c_J, plan.matrix, prior, 100 * seed + number + 50)
            runs = default_members(len(plan.virtual))
        mixture = dict(zip(domains, kept.tolist(), strict=True))
        least = truth.value(solve(truth).x_K)
        what = ", ".join(f"{key} {', '.join(value)}" for key, value in change.items()) or "first swarm"
        lost = [truth.value(x) - least for x in (kept, anew, prior)]
        rows.append((what, runs, default_members(len(domains)), *lost))
    return rows


def main() -> None:
    chains = [one_chain(seed) for seed in range(SEEDS)]
    rows = []
    for step in zip(*chains, strict=True):
        means = [np.mean([row[column] for row in step]) for column in (3, 4, 5)]
        rows.append((step[0][0], str(step[0][1]), str(step[0][2]), *(f"{value:.4f}" for value in means)))
    reuse, anew = (sum(row[column] for row in chains[0]) for column in (1, 2))
    last = [np.mean([row[column] for chain in chains for row in chain[1:]]) for column in (3, 4, 5)]
    rows.append(("all; lost: mean of the updates", str(reuse), str(anew), *(f"{value:.4f}" for value in last)))
    columns = ("step", "runs, reuse", "runs, anew", "lost, reuse", "lost, anew", "lost, natural")
    print(Table(columns, rows, footer=1).text())
    updates = sum(row[1] for row in chains[0][1:]) / sum(row[2] for row in chains[0][1:])
    print(f"\nreuse takes {1 - reuse / anew:.0%} fewer runs in all, {1 - updates:.0%} fewer in the updates")


if __name__ == "__main__":
    main()
