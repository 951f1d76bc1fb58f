"""Confidence in a proposal: predictions, their spread over resampled runs, and the distance to the nearest run.

Legend: K domains, J metrics, R runs, B resamples.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import MegamixError
from megamix.core.text import by_name
from megamix.studies.swarm.propose.question import Question

Floats = NDArray[np.float64]
LEVEL = (5.0, 95.0)
"""Percentiles that an interval reaches from and to."""
KL_FACTORS = (1, 2, 5, 10, 20)
_BEYOND = 1e-6
"""A weight above the largest tried by more than this lies outside of what was tried."""


def confidence(question: Question, x_K: Floats, resamples: int) -> dict[str, Any]:
    """Entries of mixture.json about the confidence in the mixture ``x_K``.

    Args:
        resamples: how many of the B resampled fits are solved for a mixture of their own.
    """
    fitted = question.fitted
    tried_R = fitted.table.values_RJ @ question.v_J
    best = int(np.argmin(tried_R))
    mixtures = np.stack([x_K, question.prior_K, fitted.table.ratios_RK[best]])
    values, boot = fitted.predict(mixtures), fitted.bootstrap_predict(mixtures)
    floor_K, cap_K = question.bounds
    rows = dict(zip(("proposal", "prior", "best_tried"), values, strict=True))
    predictions = {where: by_name(fitted.metrics, row) for where, row in rows.items()}
    found: dict[str, Any] = {
        "predictions": predictions,
        "objective_value": {where: float(row @ question.v_J) for where, row in rows.items()},
        "best_tried": {
            "run": fitted.table.runs[best],
            "measured": float(tried_R[best]),
            "within_bounds": bool(np.all((mixtures[2] >= floor_K - _BEYOND) & (mixtures[2] <= cap_K + _BEYOND))),
        },
        "gain_over_prior": {"value": float((values[1] - values[0]) @ question.v_J), "interval": None},
        "intervals": None,
        "weight_intervals": None,
        "distance": _distance(question, x_K),
        "with_larger_kl": alternatives(question),
    }
    if len(boot):
        spread = np.percentile(boot[:, 0], LEVEL, axis=0).T
        found["intervals"] = by_name(fitted.metrics, spread)
        gains = (boot[:, 1] - boot[:, 0]) @ question.v_J
        found["gain_over_prior"]["interval"] = np.percentile(gains, LEVEL).tolist()
        found["gain_over_prior"]["resamples"] = len(boot)
    if resamples:
        answers = []
        for A_JK in fitted.boot_A_BJK[:resamples]:
            with contextlib.suppress(MegamixError):  # a wild resample is no reason to propose nothing
                answers.append(question.answer(A_JK))
        found["weight_resamples"] = len(answers)
        if answers:
            spread = np.percentile(answers, LEVEL, axis=0).T
            found["weight_intervals"] = by_name(fitted.domains, spread)
    return found


def alternatives(question: Question) -> list[dict[str, Any]]:
    """Predicted gains with larger weights of the KL: nearer to the prior and to the runs, smaller and surer. A row for
    each weight, the question's own first."""
    fitted = question.fitted
    law = fitted.law
    if law is None or question.worst or question.kl == 0:
        return []
    rows = []
    for factor in KL_FACTORS:
        x_K = dataclasses.replace(question, kl=factor * question.kl).answer(law.A_JK)
        mixtures = np.stack([x_K, question.prior_K])
        values, boot = fitted.predict(mixtures) @ question.v_J, fitted.bootstrap_predict(mixtures) @ question.v_J
        interval = np.percentile(boot[:, 1] - boot[:, 0], LEVEL).tolist() if len(boot) else None
        apart = np.abs(fitted.table.ratios_RK - x_K).sum(axis=1).min() / 2
        rows.append(
            {
                "kl": factor * question.kl,
                "gain_over_prior": float(values[1] - values[0]),
                "interval": interval,
                "nearest_run": float(apart),
                "from_prior": float(np.abs(x_K - question.prior_K).sum() / 2),
            }
        )
    return rows


def _distance(question: Question, x_K: Floats) -> dict[str, Any]:
    """Distances to the mixtures tried: total variation, half the sum of the absolute differences."""
    table = question.fitted.table
    apart_R = np.abs(table.ratios_RK - x_K).sum(axis=1) / 2
    nearest = int(np.argmin(apart_R))
    among = np.abs(table.ratios_RK[:, None] - table.ratios_RK[None]).sum(axis=2) / 2
    np.fill_diagonal(among, np.inf)
    several = len(table.runs) > 1
    largest = table.ratios_RK.max(axis=0)
    beyond = {
        name: [float(x), float(most)]
        for name, x, most in zip(table.domains, x_K, largest, strict=True)
        if x > most + _BEYOND
    }
    return {
        "nearest_run": table.runs[nearest],
        "total_variation": float(apart_R[nearest]),
        "median_among_runs": float(np.median(among.min(axis=1))) if several else None,
        "share_as_far": float((among.min(axis=1) >= apart_R[nearest]).mean()) if several else None,
        "beyond_tried": beyond,
    }
