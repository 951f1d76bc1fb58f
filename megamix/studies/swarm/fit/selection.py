"""Selection of the runs, domains and metrics to fit, and the check that they are enough."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from megamix.core.errors import InputError, check_known, did_you_mean
from megamix.core.log import get_logger
from megamix.core.text import listed, plural
from megamix.studies.swarm.fit.config import FitConfig
from megamix.studies.swarm.fit.quality import family_means
from megamix.studies.swarm.fit.tables import SUM_TOLERANCE, SwarmTable, read_table

Families = dict[str, tuple[str, ...]]
_FEWEST_RUNS = 5


def read_selected(ratios: Path, metrics: Path, config: FitConfig) -> tuple[SwarmTable, Families]:
    """Reads the runs to fit or test, on the domains and metrics of ``config``.

    Returns:
        The table, and the families of its metrics; with ``per: family`` the table's metrics are the families.
    """
    families = {
        name: tuple(metric for metric in members if metric not in config.drop_metrics)
        for name, members in config.families.items()
    }
    for name, members in families.items():
        if not members:
            raise InputError(f"family '{name}' has no metric left: all of {listed(config.families[name])} are dropped.")
    only = config.metrics
    if only is None and config.per == "family":
        only = tuple(metric for members in families.values() for metric in members)
    table = _read_with_means(ratios, metrics, config, only)
    for name, members in families.items():
        for metric in members:
            if metric not in table.metrics:
                raise InputError(
                    f"family '{name}' has the metric '{metric}', which is not among those read from {metrics}."
                    + did_you_mean(metric, table.metrics)
                )
    if config.support_domains:
        table = _on_domains(table, config.support_domains, config.support_nonzero)
    if config.per == "family":
        values = family_means(table.values_RJ, table.metrics, families)
        return replace(table, metrics=tuple(families), values_RJ=values), {}
    return table, families


def _read_with_means(ratios: Path, metrics: Path, config: FitConfig, only: tuple[str, ...] | None) -> SwarmTable:
    """Reads a table with ``config.means`` in the place of their metrics, which ``only`` does not name."""
    means = {
        name: weights
        for name, weights in config.means.items()
        if name not in config.drop_metrics and (only is None or name in only)
    }
    inside = [metric for weights in means.values() for metric in weights]
    unused = [metric for weights in config.means.values() for metric in weights if metric not in inside]
    lost = [name for name in (*(only or ()), *config.drop_metrics) if name in inside]
    if lost:
        raise InputError(f"{listed(lost)}: no metric to choose or drop, as it is part of a mean ({listed(means)}).")
    if only is not None:
        only = (*(name for name in only if name not in means), *inside)
    drop = [name for name in config.drop_metrics if name not in config.means]
    table = read_table(ratios, metrics, missing=config.missing, only=only, drop=[*drop, *unused])
    if not means:
        return table
    kept = [place for place, name in enumerate(table.metrics) if name not in inside]
    columns = [table.values_RJ[:, kept]]
    for weights in means.values():
        places = [table.metrics.index(metric) for metric in weights]
        columns.append(np.average(table.values_RJ[:, places], axis=1, weights=list(weights.values()))[:, None])
    names = (*(table.metrics[place] for place in kept), *means)
    return replace(table, metrics=names, values_RJ=np.concatenate(columns, axis=1))


def _on_domains(table: SwarmTable, domains: tuple[str, ...], all_nonzero: bool) -> SwarmTable:
    """The runs whose weights on ``domains`` sum to 1, without the other domains."""
    check_known(domains, table.domains, "support_domains names")
    ratios = table.ratios_RK[:, [table.domains.index(name) for name in domains]]
    kept = np.abs(ratios.sum(axis=1) - 1) <= SUM_TOLERANCE
    if all_nonzero:
        kept &= (ratios > 0).all(axis=1)
    if not kept.any():
        raise InputError(
            f"none of {plural(len(kept), 'run')} lies on the support_domains {listed(domains)} alone"
            + (" with all of them above 0." if all_nonzero else ".")
        )
    get_logger().info("%d of %d runs lie on the %s asked for.", kept.sum(), len(kept), plural(len(domains), "domain"))
    picked = pick(table, np.flatnonzero(kept))
    ratios = ratios[kept]
    return replace(picked, domains=domains, ratios_RK=ratios / ratios.sum(axis=1, keepdims=True))


def pick(table: SwarmTable, places: np.ndarray) -> SwarmTable:
    """The runs at ``places``."""
    return replace(
        table,
        runs=tuple(table.runs[place] for place in places),
        ratios_RK=table.ratios_RK[places],
        values_RJ=table.values_RJ[places],
    )


def split(table: SwarmTable, config: FitConfig) -> tuple[SwarmTable, SwarmTable | None]:
    """The runs to fit and those to test on (None where there are none), chosen by the seed."""
    num_runs, num_test = len(table.runs), config.test_runs
    if num_test >= num_runs:
        raise InputError(f"test_runs is {num_test}, but there are {plural(num_runs, 'run')}. Leave some to be fitted.")
    num_fit = num_runs - num_test
    if config.train_split > 1:
        if config.train_split > num_fit or config.train_split != int(config.train_split):
            raise InputError(
                f"train_split is {config.train_split:g}, expected a share up to 1 or a whole number up to {num_fit},"
                f" which is how many runs there are{' besides those of test_runs' if num_test else ''}."
            )
        num_fit = int(config.train_split)
    else:
        num_fit = max(1, int(num_fit * config.train_split))
    order = np.random.default_rng([config.seed, 3]).permutation(num_runs)
    fitted = pick(table, np.sort(order[num_test : num_test + num_fit]))
    return fitted, pick(table, np.sort(order[:num_test])) if num_test else None


def check_enough(table: SwarmTable, config: FitConfig) -> None:
    """Refuses a table that cannot be fitted, and warns of one that hardly can.

    Raises:
        InputError: too few runs, mixtures that do not tell the domains apart, a metric without variation, or one that
            the law cannot take.
    """
    num_runs, num_domains = table.ratios_RK.shape
    log_linear, parameters = config.regression == "log_linear", num_domains + 1
    if num_runs < (parameters if log_linear else _FEWEST_RUNS):
        raise InputError(
            f"{plural(num_runs, 'run')} for {plural(num_domains, 'domain')}: "
            + (
                f"the log-linear law has {parameters} parameters a metric and takes at least as many runs, better"
                f" {2 * parameters}. Train more, or fit fewer domains (support_domains), or regression=gp."
                if log_linear
                else f"at least {_FEWEST_RUNS} are needed."
            )
        )
    if num_runs < 2 * parameters:
        get_logger().warning(
            "%d runs for %d domains are few: a law of %d parameters a metric wants %d or more.",
            num_runs, num_domains, parameters, 2 * parameters,
        )  # fmt: skip
    absent = [name for name, ratios_R in zip(table.domains, table.ratios_RK.T, strict=True) if not ratios_R.any()]
    if absent:
        raise InputError(
            f"no run has a weight above 0 for {listed(absent)}: nothing can be learned of"
            f" {'it' if len(absent) == 1 else 'them'}. Leave the column out, or train runs with it."
        )
    for name, values_R in zip(table.metrics, table.values_RJ.T, strict=True):
        if np.ptp(values_R) == 0:
            raise InputError(
                f"'{name}' is {values_R[0]:g} in every run: nothing can be learned. Drop it (drop_metrics)."
            )
        if log_linear and values_R.min() <= 0:
            raise InputError(
                f"'{name}' is {values_R.min():g} in run {table.runs[int(values_R.argmin())]}, but the log-linear law is"
                " above 0 everywhere. Add a constant to it, drop it (drop_metrics), or use regression=gp."
            )
    if log_linear:
        _check_rank(table)


def _check_rank(table: SwarmTable) -> None:
    """Runs that repeat each other's mixtures count once."""
    _, sizes, directions = np.linalg.svd(table.ratios_RK, full_matrices=False)
    rank = int((sizes > 1e-6 * sizes[0]).sum())
    if rank < len(table.domains):
        order = np.argsort(-np.abs(directions[-1]))
        names = [table.domains[k] for k in order if abs(directions[-1][k]) > 0.1]
        raise InputError(
            f"the mixtures of {plural(len(table.runs), 'run')} vary in {rank} of {len(table.domains)} directions: they do"
            f" not tell apart {listed(names)}, whose weights always move together. Train runs in which they do not."
        )
