"""Proposal of a mixture: the best by a fit, near the prior and within bounds.

    minimise  sum_j v_j f_j(x) + kl * KL(x || prior)     over  sum x = 1, 0 <= x_k <= cap_k

For the log-linear law the problem is convex and solved exactly (`megamix.studies.swarm.propose.solve`). For trees,
Gaussian processes and the worst mixture the answer is the best of a search (`megamix.studies.swarm.propose.search`).

Source: Olmix, Chen et al., arXiv 2602.12237, section 3.

Legend: K domains of the fit, J metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.config import validate
from megamix.core.config_files import read_yaml
from megamix.core.errors import InputError
from megamix.core.text import by_name
from megamix.studies.swarm.fit.fitted import Fitted
from megamix.studies.swarm.fit.quality import quality_of
from megamix.studies.swarm.propose.confidence import confidence
from megamix.studies.swarm.propose.config import OPTIONS_FILE, ProposeConfig
from megamix.studies.swarm.propose.proposal import Proposal, history_entry, write_proposal
from megamix.studies.swarm.propose.question import (
    Caps,
    Prior,
    Question,
    check_feasible,
    find_caps,
    find_prior,
    objective_weights,
    read_objective,
)
from megamix.studies.swarm.propose.report import draw
from megamix.studies.swarm.propose.reuse import Update
from megamix.studies.swarm.propose.search import search, search_worst
from megamix.studies.swarm.propose.solve import divergence, solve

Floats = NDArray[np.float64]


def propose(
    fitted: Fitted,
    prior: Mapping[str, float],
    *,
    kl: float = 0.05,
    caps: Mapping[str, float] | None = None,
    objective: Mapping[str, float] | None = None,
    fixed: Mapping[str, float] | None = None,
    kl_prior: Mapping[str, float] | None = None,
    worst: bool = False,
    seed: int = 0,
    resamples: int = 20,
) -> Proposal:
    """Finds the best mixture by a fit.

    Args:
        prior: {domain: share} of all K domains, sum 1.
        caps: {domain: largest weight}; feasible (`check_feasible`).
        objective: {metric or family: weight}; default: all metrics alike.
        fixed: {domain: weight}.
        kl_prior: q of the KL term, if not the prior.
        worst: the largest objective (minus the KL) instead of the smallest.
        resamples: fits to resampled runs that are solved, too, for intervals of the weights; not for the worst.

    Raises:
        InputError: an unknown metric.
        MegamixError: no solution was found.
    """
    names, fixed = fitted.domains, fixed or {}
    question = Question(
        fitted,
        v_J=objective_weights(objective, fitted),
        prior_K=np.array([prior[name] for name in names], np.float64),
        kl_prior_K=np.array([(kl_prior or prior)[name] for name in names], np.float64),
        kl=kl,
        floor_K=np.array([fixed.get(name, 0.0) for name in names]),
        cap_K=np.array([fixed.get(name, min((caps or {}).get(name, 1.0), 1.0)) for name in names]),
        worst=worst,
        seed=seed,
    )
    x_K, optimality = _best(question)
    used = {metric: v for metric, v in by_name(fitted.metrics, question.v_J).items() if v > 0}
    details: dict[str, Any] = {
        "worst": worst,
        "objective": used,
        "kl": {"weight": kl, "divergence": divergence(x_K, question.kl_prior_K) if kl > 0 else None},
        "prior": {"shares": by_name(names, question.prior_K)},
        "caps": None if caps is None else by_name(names, np.minimum(question.cap_K, 1.0)),
        "fixed": dict(fixed),
        "optimality": optimality,
        "fit": {
            "regression": fitted.regression,
            "runs": len(fitted.table.runs),
            "cross_validation": fitted.cross_validation,
            # A metric mostly follows from its own domain's weight; the objective is what is left of opposite effects.
            "objective": quality_of(fitted.table.values_RJ @ question.v_J, fitted.held_out_RJ @ question.v_J),
        },
        **confidence(question, x_K, 0 if worst else min(resamples, len(fitted.boot_c_BJ))),
    }
    return Proposal(by_name(names, x_K), by_name(fitted.metrics, fitted.predict(x_K[None])[0]), details)


def _best(question: Question) -> tuple[Floats, dict[str, Any]]:
    """Solves or searches. Returns the mixture and its optimality."""
    law, tried = question.fitted.law, question.fitted.table.ratios_RK
    if law is not None and not question.worst:
        found = solve(question.problem(law.A_JK))
        return found.x_K, {
            "method": "convex, interior point",
            "duality_gap": found.gap,
            "stationarity": found.residual,
            "weights_within": found.within if np.isfinite(found.within) else None,
            "steps": found.steps,
        }
    if law is not None:
        x_K, starts = search_worst(question.problem(law.A_JK), tried, question.seed)
        return x_K, {"method": f"search: the best of local maxima from {starts} starts, seed {question.seed}"}
    sign = -1.0 if question.worst else 1.0
    floor_K, cap_K = question.bounds

    def value(x_NK: Floats) -> Floats:
        distance = np.array([divergence(x, question.kl_prior_K) for x in x_NK]) if question.kl > 0 else 0.0
        return sign * (question.fitted.predict(x_NK) @ question.v_J) + question.kl * distance

    x_K, looked = search(value, question.prior_K, floor_K, cap_K, tried, question.seed)
    return x_K, {"method": f"search: the best of {looked} mixtures, seed {question.seed}"}


def read_options(directory: Path, given: Mapping[str, Any]) -> ProposeConfig:
    """The options in DIR/propose.json, where there is one, with those ``given`` over them.

    Raises:
        InputError: an option that there is not, or a value that it cannot have.
    """
    path = Path(directory) / OPTIONS_FILE
    stored = read_yaml(path) if path.is_file() else {}
    return validate(ProposeConfig, {**stored, **given}, f"{path} and options" if stored else "options")


def folder_of(directory: Path, options: ProposeConfig) -> Path:
    """Where mixture.json is written: DIR, or DIR/worst, so that nobody trains on the worst mixture by mistake."""
    return Path(directory) / "worst" if options.worst else Path(directory)


def propose_in(directory: Path, options: ProposeConfig) -> tuple[Proposal, Path]:
    """Proposes a mixture by the fit in ``directory``, and writes mixture.json and mixture.png there.

    Where the directory has an update.json (`Update`), the fit's domains are virtual and the mixture is of the real
    ones.

    Returns:
        The proposal, and the path of mixture.json.

    Raises:
        InputError: no fit, or options that cannot be met.
    """
    directory = Path(directory)
    fitted, update = Fitted.open(directory), Update.open(directory)
    if update is not None and set(update.virtual) != set(fitted.domains):
        raise InputError(
            f"{directory}: update.json is of the domains {', '.join(update.virtual)}, the fit of {', '.join(fitted.domains)}. Draw the "
            "swarm again after a change of the update."
        )
    prior, amount = find_prior(directory, fitted, options, update)
    caps = find_caps(options, amount, fitted, update)
    check_feasible(options, caps, prior)
    objective = read_objective(options.objective) if isinstance(options.objective, Path) else options.objective
    found = propose(
        fitted,
        prior.shares,
        kl=options.kl,
        caps=None if caps is None else caps.largest,
        objective=objective,
        fixed=options.fixed_weight,
        kl_prior=prior.kl,
        worst=options.worst,
        seed=options.seed,
        resamples=options.resamples,
    )
    proposal = _of_real_domains(directory, found, update, prior, caps, options, len(fitted.table.runs))
    folder = folder_of(directory, options)
    folder.mkdir(exist_ok=True)
    path = write_proposal(folder, proposal)
    draw(proposal, folder)
    return proposal, path


def _of_real_domains(
    directory: Path,
    found: Proposal,
    update: Update | None,
    prior: Prior,
    caps: Caps | None,
    options: ProposeConfig,
    runs: int,
) -> Proposal:
    """Adds the chain of updates, and expands an update to the real domains."""
    details = dict(found.details)
    details["prior"] = {"source": prior.source, **details["prior"]}
    if caps is not None:
        details["caps_from"] = f"repetition {options.repetition:g} in {options.target_tokens:g} tokens"
    weights = found.weights
    if update is not None:
        x = np.array([found.weights[name] for name in update.virtual])
        weights = by_name(update.domains, update.expand(x))
        details["virtual"] = found.weights
    entry = history_entry(directory, found.weights, weights, runs, None if update is None else update.summary)
    return Proposal(weights, found.predicted, details, (*(() if update is None else update.history), entry))


def propose_settled(directory: Path, update: Update) -> tuple[Proposal, Path]:
    """Writes the mixture of an update that frees no weight (`Update.settled`): the old weights, renormalised."""
    weights = by_name(update.domains, update.expand(np.ones(1)))
    entry = history_entry(directory, {update.virtual[0]: 1.0}, weights, 0, update.summary)
    details = {"optimality": {"method": "the old weights, renormalised: no proxy runs"}}
    proposal = Proposal(weights, {}, details, (*update.history, entry))
    return proposal, write_proposal(directory, proposal)
