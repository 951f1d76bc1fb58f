"""``megamix swarm fit``: fits a law to ratios.csv and metrics.csv, and measures its predictions and its uncertainty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.files import sha256_of
from megamix.core.log import get_logger
from megamix.core.text import Report, Table, by_name, listed, number, plural
from megamix.studies.swarm.fit.config import FitConfig
from megamix.studies.swarm.fit.fitted import Fitted
from megamix.studies.swarm.fit.huber import Problems, minimise
from megamix.studies.swarm.fit.law import LogLinearLaw, fit_log_linear, fit_weighted, log_floor, predict
from megamix.studies.swarm.fit.quality import GOOD_RANKS, Quality, family_quality, fold_of_runs, quality
from megamix.studies.swarm.fit.regressors import Model, fit_processes, fit_trees
from megamix.studies.swarm.fit.selection import check_enough, read_selected, split
from megamix.studies.swarm.fit.tables import SwarmTable

Array = NDArray[np.float64]
RIDGES = (0.0, 0.01, 0.1, 1.0, 10.0)


def fit(ratios: Path, metrics: Path, out: Path, config: FitConfig) -> Fitted:
    """Fits a swarm and writes fit.json, fit.npz and plots to ``out``; the same input gives the same files.

    Raises:
        InputError: see `learn`.
    """
    from megamix.studies.swarm.fit.plots import plot_fit

    fitted = learn(ratios, metrics, config)
    fitted.save(out)
    plot_fit(fitted, out)
    return fitted


def learn(ratios: Path, metrics: Path, config: FitConfig) -> Fitted:
    """Fits a swarm and writes nothing.

    Raises:
        InputError: see `read_table` and `check_enough`.
    """
    chosen, families = read_selected(ratios, metrics, config)
    table, test = split(chosen, config)
    check_enough(table, config)
    fold_R = fold_of_runs(len(table.runs), config.folds, config.seed)
    ridge, held_out_RJ = choose_ridge(table, fold_R, config)
    model = fit_model(table, config, ridge)
    boot_c_BJ, boot_A_BJK = bootstrap(table, model, config, ridge)
    return Fitted(
        families=families,
        regression=config.regression,
        model=model,
        table=table,
        cross_validation=quality(table.values_RJ, held_out_RJ, table.metrics),
        family_cross_validation=family_quality(table.values_RJ, held_out_RJ, table.metrics, families),
        held_out_RJ=held_out_RJ,
        boot_c_BJ=boot_c_BJ,
        boot_A_BJK=boot_A_BJK,
        details={
            "inputs": {name: _file(path) for name, path in (("ratios", ratios), ("metrics", metrics))},
            "options": config.model_dump(mode="json"),
            "folds": int(fold_R.max()) + 1,
            "ridge": ridge,
            "coefficients": _coefficients(model),
            "test": None if test is None else _tested(model, test),
        },
    )


def choose_ridge(table: SwarmTable, fold_R: NDArray[np.intp], config: FitConfig) -> tuple[float, Array]:
    """Chooses the ridge of `RIDGES` with the smallest held-out error, unless the config gives one.

    The error is the mean absolute one over all metrics, in each metric's standard deviation. One number for all metrics
    hardly flatters the quality of these predictions.

    Returns:
        The ridge, and the result of `cross_validate` with it.
    """
    if config.regression != "log_linear" or config.ridge != "auto":
        ridge = 0.0 if config.ridge == "auto" else config.ridge
        return ridge, cross_validate(table, fold_R, config, ridge)
    spread_J = table.values_RJ.std(axis=0)
    held_out = [cross_validate(table, fold_R, config, ridge) for ridge in RIDGES]
    errors = [float((np.abs(one - table.values_RJ) / spread_J).mean()) for one in held_out]
    best = int(np.argmin(errors))
    return RIDGES[best], held_out[best]


def fit_model(table: SwarmTable, config: FitConfig, ridge: float) -> Model:
    """Fits the regression of ``config`` to all runs of a table."""
    if config.regression == "log_linear":
        return fit_log_linear(table, starts=config.starts, seed=config.seed, delta=config.delta, ridge=ridge)
    return _fit_other(table.ratios_RK, table.values_RJ, config)


def _fit_other(x_RK: Array, y_RJ: Array, config: FitConfig) -> Model:
    return (fit_trees if config.regression == "lightgbm" else fit_processes)(x_RK, y_RJ, config.seed)


def cross_validate(table: SwarmTable, fold_R: NDArray[np.intp], config: FitConfig, ridge: float = 0.0) -> Array:
    """Held-out predictions, float64 [R, J]: each run's by a fit without its fold, started from no fit that saw it."""
    x_RK, y_RJ = table.ratios_RK, table.values_RJ
    held_out_RJ = np.empty_like(y_RJ)
    num_folds, num_metrics = int(fold_R.max()) + 1, len(table.metrics)
    if config.regression != "log_linear":
        for fold in range(num_folds):
            model = _fit_other(x_RK[fold_R != fold], y_RJ[fold_R != fold], config)
            held_out_RJ[fold_R == fold] = model.predict(x_RK[fold_R == fold])
        return held_out_RJ
    # All folds of all metrics at once: a run that is left out has weight 0.
    kept_FR = (fold_R[None, :] != np.arange(num_folds)[:, None]).astype(np.float64)
    floor_P, A_PK = fit_weighted(
        x_RK, np.tile(y_RJ.T, (num_folds, 1)), np.repeat(kept_FR, num_metrics, axis=0),
        starts=config.starts, seed=config.seed, delta=config.delta, ridge=ridge,
    )  # fmt: skip
    c_FJ, A_FJK = log_floor(floor_P).reshape(num_folds, -1), A_PK.reshape(num_folds, num_metrics, -1)
    for fold in range(num_folds):
        held_out_RJ[fold_R == fold] = predict(x_RK[fold_R == fold], c_FJ[fold], A_FJK[fold])
    return held_out_RJ


def bootstrap(table: SwarmTable, model: Model, config: FitConfig, ridge: float) -> tuple[Array, Array]:
    """Log-linear fits to runs drawn with replacement, each from the fit to all.

    Returns:
        c, float64 [B, J], and A, float64 [B, J, K]; B is 0 for the other regressions.
    """
    (num_runs, num_domains), num_metrics = table.ratios_RK.shape, len(table.metrics)
    if not config.resamples or not isinstance(model, LogLinearLaw):
        return np.empty((0, num_metrics)), np.empty((0, num_metrics, num_domains))
    generator = np.random.default_rng([config.seed, 4])
    times_BR = generator.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=config.resamples).astype(float)
    problems = Problems(
        table.ratios_RK,
        np.tile(table.values_RJ.T, (config.resamples, 1)),
        np.repeat(times_BR, num_metrics, axis=0),
        config.delta,
        ridge,
    )
    floor_P, A_PK = np.tile(np.exp(model.c_J), config.resamples), np.tile(model.A_JK, (config.resamples, 1))
    found = minimise(problems, floor_P, A_PK)
    c_BJ = log_floor(found.floor_P).reshape(config.resamples, num_metrics)
    return c_BJ, found.a_PK.reshape(config.resamples, num_metrics, num_domains)


def report(fitted: Fitted, out: Path) -> Report:
    """Report of a fit: its held-out predictions and its files. Warns of poor ranks."""
    spread = by_name(fitted.metrics, fitted.table.values_RJ.std(axis=0))
    rows = [_row(name, fitted.cross_validation[name], spread[name]) for name in fitted.metrics]
    rows += [_row(f"family {name}", one, None) for name, one in fitted.family_cross_validation.items()]
    rows.append(_row("mean", {key: _mean(fitted.cross_validation, key) for key in ("r2", "spearman", "rmse")}, None))
    num_runs, folds = len(fitted.table.runs), fitted.details["folds"]
    ridge = f" (ridge {fitted.details['ridge']:g})" if fitted.regression == "log_linear" else ""
    parts: list[str | Table] = [
        f"{fitted.regression}{ridge}: {plural(num_runs, 'run')}, {plural(len(fitted.domains), 'domain')},"
        f" {plural(len(fitted.metrics), 'metric')}; each run predicted by a fit without it"
        f" ({'leaving one out' if folds == num_runs else f'{folds} folds'}):",
        Table(["metric", "R2", "rank correlation", "RMSE", "spread (sd)"], rows, footer=1),
    ]
    if fitted.details["test"]:
        tested = [_row(name, one, None) for name, one in fitted.details["test"].items()]
        parts += [
            f"{plural(fitted.details['options']['test_runs'], 'run')} kept out of everything:",
            Table(["metric", "R2", "rank correlation", "RMSE", "spread (sd)"], tested),
        ]
    _warn_of_poor_ranks(fitted.cross_validation)
    parts.append(f"Written to {out}: fit.json, fit.npz, and plots. Next: megamix swarm propose {out}")
    return Report(parts)


def _row(name: str, one: dict[str, float | None], spread: float | None) -> list[str]:
    return [name, number(one["r2"], 3), number(one["spearman"], 3), number(one["rmse"]), number(spread)]


def _mean(found: Quality, key: str) -> float | None:
    """Over the metrics; None where one of them has none."""
    values = [one[key] for one in found.values()]
    return sum(value for value in values if value is not None) / len(values) if None not in values else None


def _warn_of_poor_ranks(found: Quality) -> None:
    poor = [f"{name} ({number(one['spearman'], 2)})" for name, one in found.items() if not _good(one["spearman"])]
    if poor:
        get_logger().warning(
            "the rank correlation of runs that were not fitted is below %g for %d of %d metrics: %s. There the fit hardly"
            " tells a good mixture from a bad one; more runs, longer ones, or ones that differ more would help.",
            GOOD_RANKS, len(poor), len(found), listed(poor),
        )  # fmt: skip


def _good(spearman: float | None) -> bool:
    return spearman is not None and spearman >= GOOD_RANKS


def _file(path: Path) -> dict[str, str]:
    return {"path": str(path), "sha256": sha256_of(Path(path))}


def _coefficients(model: Model) -> dict[str, Any] | None:
    """The law's coefficients by name: each metric's floor, exp(c), and A by domain."""
    if not isinstance(model, LogLinearLaw):
        return None
    return {
        metric: {"floor": float(np.exp(c)), "A": by_name(model.domains, a_K)}
        for metric, c, a_K in zip(model.metrics, model.c_J, model.A_JK, strict=True)
    }


def _tested(model: Model, test: SwarmTable) -> Quality:
    return quality(test.values_RJ, model.predict(test.ratios_RK), test.metrics)
