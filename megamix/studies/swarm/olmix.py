"""Fit configs of Olmix (``olmix fit --config``).

Keys about the fit become keys of `FitConfig`. Keys about the proposal are written beside the fit, as priors.json and
propose.json, where ``megamix swarm propose DIR`` finds them. Keys without a counterpart are refused, with the reason.

As there, MMLU's subjects become the means of its four categories before anything else, families are averaged before
metrics are dropped, and the weights of the objective are not normalised against the KL.

Differences: another generator chooses runs (``n_test``, ``train_split``), so that the same seed chooses others; the law
is fitted to convergence, not for a number of steps; ``simulation`` on the log-linear law gives the minimum that its
search looks for.

Format: github.com/allenai/olmix, ``olmix/fit/config.py`` and ``configs/examples/fit``. Keys of its older versions
(``use_natural_kl``, ``keep_sources``, ``support_domains``, ``fixed_weight``) are read, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pydantic

from megamix.core.config import Config, validate
from megamix.core.config_files import apply_overrides, read_yaml
from megamix.core.errors import InputError, did_you_mean
from megamix.core.files import replace_json
from megamix.core.log import get_logger
from megamix.core.text import listed
from megamix.studies.swarm.fit.config import FitConfig
from megamix.studies.swarm.fit.fit import fit
from megamix.studies.swarm.fit.fitted import Fitted
from megamix.studies.swarm.fit.selection import Families
from megamix.studies.swarm.fit.tables import metric_names
from megamix.studies.swarm.mmlu import Means, mmlu_means
from megamix.studies.swarm.priors import FILE as PRIORS_FILE
from megamix.studies.swarm.propose.config import OPTIONS_FILE, ProposeConfig

SECTIONS = ("swarm", "priors", "eval", "proposer", "constraints", "filtering")
_FRACTION = re.compile(r"\s*([0-9.eE+-]+)\s*(?:/\s*([0-9.eE+-]+)\s*)?")
_NO_COUNTERPART = {
    "autoscale": "its law extrapolates to another number of tokens, which needs swarms of several sizes",
    "bimix": "its law is of a domain's own share and of the tokens, which needs swarms of several sizes",
    "search": "it takes the best run of the swarm without a fit",
}


def fit_from(out: Path, ratios: Path | None, metrics: Path | None, config: Path | None, overrides: list[str]) -> Fitted:
    """Fits the tables, by a config of either form and overrides of the command line.

    Args:
        ratios, metrics: the files; None: the paths in a config of Olmix, relative to the current directory.
        config: a fit config of Olmix, or a YAML file with keys of `FitConfig`.
        overrides: ``key=value``, over those of the config.

    Raises:
        InputError: a config or a table that cannot be used, or no path of one.
    """
    data = read_yaml(config) if config is not None else {}
    olmix = validate(OlmixFit, data, str(config)) if _is_olmix(data) else None
    if olmix is not None:
        ratios, metrics = ratios or olmix.swarm.ratios, metrics or olmix.swarm.metrics
        data = olmix.fit_config(mmlu_means(metric_names(metrics), str(metrics)))
    options = validate(FitConfig, apply_overrides(data, overrides), str(config or "the options of fit"))
    if ratios is None or metrics is None:
        raise InputError(
            f"no {'ratios' if ratios is None else 'metrics'}.csv is named. Give --ratios and --metrics, or --config with"
            " the section 'swarm' of a fit config of Olmix."
        )
    fitted = fit(ratios, metrics, out, options)
    if olmix is not None:
        olmix.write(out, fitted.metrics, fitted.domains)
    return fitted


def _is_olmix(data: dict[str, Any]) -> bool:
    """Whether a YAML mapping is a fit config of Olmix rather than one of `FitConfig`'s keys."""
    return any(name in data for name in SECTIONS) or isinstance(data.get("regression"), dict)


class _Swarm(Config):
    ratios: Path
    metrics: Path


class _Priors(Config):
    relative_sizes: dict[str, float] | None = None
    token_counts: dict[str, int] | None = None
    total_tokens: int | None = None

    @pydantic.model_validator(mode="after")
    def _something(self) -> _Priors:
        if not self.relative_sizes and not self.token_counts:
            raise ValueError("priors has neither relative_sizes nor token_counts. Give {domain: tokens}.")
        for name, values in (("relative_sizes", self.relative_sizes), ("token_counts", self.token_counts)):
            bad = [f"{domain} ({value})" for domain, value in (values or {}).items() if not 0 <= value < float("inf")]
            if bad or (values and not sum(values.values())):
                raise ValueError(f"{name}: expected numbers of 0 and above, some of them above: {listed(bad)}")
        return self

    @property
    def shares(self) -> dict[str, float]:
        """The prior by domain, summing to 1: relative_sizes where it is there."""
        sizes = self.relative_sizes or self.token_counts or {}
        return {domain: size / sum(sizes.values()) for domain, size in sizes.items()}


class _Eval(Config):
    type: Literal["offline", "inloop"] = "offline"
    tasks: dict[str, tuple[str, ...] | dict[str, str]]

    @property
    def families(self) -> dict[str, tuple[str, ...]]:
        """The metrics by family; of ``inloop`` the tasks' names are left out."""
        return {
            family: tuple(members.values() if isinstance(members, dict) else members)
            for family, members in self.tasks.items()
        }

    @pydantic.model_validator(mode="after")
    def _of_one_form(self) -> _Eval:
        for family, members in self.tasks.items():
            if isinstance(members, dict) != (self.type == "inloop"):
                wanted = "{task: metric}" if self.type == "inloop" else "a list of metrics"
                raise ValueError(f"tasks.{family}: expected {wanted}, as type is {self.type}.")
        return self


class _Regression(Config):
    type: Literal["log_linear", "lightgbm", "gp"] = "log_linear"
    seed: int = pydantic.Field(default=0, ge=0)
    n_test: int = pydantic.Field(default=0, ge=0)
    train_split: float = 1.0
    aggregate_task_families: bool = False

    @pydantic.field_validator("type", mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        if value in _NO_COUNTERPART:
            raise ValueError(f"{value} has no counterpart here: {_NO_COUNTERPART[str(value)]}. Use log_linear.")
        return value

    @pydantic.field_validator("train_split", mode="before")
    @classmethod
    def _one_split(cls, value: object) -> object:
        if isinstance(value, list):
            if len(value) != 1:
                raise ValueError(f"{value} splits several swarms, but one is fitted. Give one number.")
            return value[0]
        return value


class _Proposer(Config):
    type: Literal["exact", "simulation", "search"] = "exact"
    temperature: float | None = None
    kl_reg: float | None = pydantic.Field(default=None, ge=0)
    use_natural_kl: bool = False
    fit_only: bool = False
    """Without effect: the fit never proposes, `megamix swarm propose` does."""
    make_worst_mix: bool = False

    @pydantic.field_validator("temperature")
    @classmethod
    def _none(cls, value: float | None) -> float | None:
        if value is not None:
            raise ValueError(
                f"{value} has no counterpart here: candidates are not drawn around a prior of another temperature."
                " Leave it null, and give such a prior to `megamix swarm propose --priors`."
            )
        return value


class _Constraints(Config):
    enabled: bool = False
    target_tokens: int | None = pydantic.Field(default=None, gt=0)
    repetition_factor: float = pydantic.Field(default=4.0, gt=0)

    @pydantic.model_validator(mode="after")
    def _complete(self) -> _Constraints:
        if self.enabled and self.target_tokens is None:
            raise ValueError("constraints are enabled, but target_tokens is not given.")
        return self


class _Filtering(Config):
    keep_sources: tuple[str, ...] = ()
    support_domains: tuple[str, ...] = ()
    drop_metrics: tuple[str, ...] = ()
    fixed_weight: dict[str, float] = pydantic.Field(default_factory=dict)
    obj_weights: dict[str, float] = pydantic.Field(default_factory=dict)

    @pydantic.field_validator("fixed_weight", "obj_weights", mode="before")
    @classmethod
    def _fractions(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: _number(text) if isinstance(text, str) else text for name, text in value.items()}

    @pydantic.model_validator(mode="after")
    def _one_support(self) -> _Filtering:
        if self.keep_sources and self.support_domains:
            raise ValueError("both keep_sources and support_domains choose the domains. Give one of them.")
        return self


class OlmixFit(Config):
    """A fit config of Olmix."""

    swarm: _Swarm
    priors: _Priors
    eval: _Eval | None = None
    regression: _Regression = _Regression()
    proposer: _Proposer = _Proposer()
    constraints: _Constraints = _Constraints()
    filtering: _Filtering = _Filtering()

    @pydantic.model_validator(mode="after")
    def _together(self) -> OlmixFit:
        kind, law = self.proposer.type, self.regression.type
        if kind == "search" or (kind == "exact" and law != "log_linear"):
            wanted = "exact or simulation" if law == "log_linear" else "simulation"
            raise ValueError(f"proposer.type is {kind}, but for regression.type {law} the proposal is {wanted}.")
        if kind != "exact" and self.proposer.kl_reg is not None:
            raise ValueError(
                f"proposer.kl_reg is {self.proposer.kl_reg:g}, but proposer.type {kind} knows no KL. Leave one of them out."
            )
        if self.regression.aggregate_task_families and self.eval is None:
            raise ValueError("regression.aggregate_task_families is true, but eval does not name the families.")
        if self.constraints.enabled and not self.priors.token_counts:
            raise ValueError("constraints are enabled, but priors has no token_counts to bound the repetition by.")
        return self

    def fit_config(self, means: Means) -> dict[str, Any]:
        """The corresponding keys of `FitConfig`. Runs without a value, also of a dropped metric, are dropped.

        Args:
            means: of MMLU's subjects in the metrics (`mmlu_means`).

        Raises:
            InputError: a family of MMLU's subjects alone.
        """
        by_family = self.regression.aggregate_task_families
        return {
            "regression": self.regression.type,
            "means": means,
            **(self._family_metrics(means) if by_family else self._single_metrics(means)),
            "missing": "drop_any",
            "support_domains": self.filtering.keep_sources or self.filtering.support_domains,
            "support_nonzero": bool(self.filtering.keep_sources),
            "seed": self.regression.seed,
            "test_runs": self.regression.n_test,
            "train_split": self.regression.train_split,
        }

    def _family_metrics(self, means: Means) -> dict[str, Any]:
        """Keys of a fit to the means of families: these are taken first, so that only whole families can be dropped."""
        dropped = self.filtering.drop_metrics
        families = _without(self._families, _inside(means))
        empty = [name for name, members in families.items() if not members]
        if empty:
            raise InputError(
                f"eval.tasks.{empty[0]} has MMLU's subjects alone, which become {listed(means)} before families are taken."
                " Name these in it."
            )
        idle = [name for name in dropped if name not in families]
        if idle:
            get_logger().warning(
                "filtering.drop_metrics: eval.tasks has no family %s, so that nothing is dropped for it, as in Olmix: metrics"
                " are averaged first, then families are dropped.",
                listed(idle),
            )
        return {
            "per": "family",
            "families": {name: members for name, members in families.items() if name not in dropped},
            "drop_metrics": [one for name, members in families.items() if name in dropped for one in members],
        }

    def _single_metrics(self, means: Means) -> dict[str, Any]:
        """Keys of a fit to each metric: those of ``eval`` and MMLU's means, without the dropped ones."""
        inside = _inside(means)
        known = (
            None if self.eval is None else {name for members in self._families.values() for name in members} | {*means}
        )
        dropped = [
            name for name in self.filtering.drop_metrics if name not in inside and (known is None or name in known)
        ]
        families = _without(self._families, {*inside, *dropped})
        chosen = [name for members in families.values() for name in members]
        chosen += [name for name in means if name not in (*chosen, *dropped)]
        return {
            "families": {name: members for name, members in families.items() if members},
            "metrics": chosen if self.eval is not None else None,
            "drop_metrics": dropped,
        }

    @property
    def _families(self) -> Families:
        return self.eval.families if self.eval is not None else {}

    def propose_config(self, metrics: tuple[str, ...], domains: tuple[str, ...]) -> ProposeConfig:
        """Options of the proposal for a fit of these metrics and domains. A metric without a weight counts 1."""
        weights, fixed = self.filtering.obj_weights, self.filtering.fixed_weight
        _check_names("filtering.obj_weights", weights, metrics, "fitted metric")
        _check_names("filtering.fixed_weight", fixed, domains, "domain of the swarm")
        # Olmix adds the KL to the sum of weights times metrics, here it is added to their mean.
        total = sum(weights.get(name, 1.0) for name in metrics) if weights else 1.0
        keys: dict[str, Any] = {
            "kl": (self.proposer.kl_reg or 0.0) / (total or 1.0),
            "use_natural_kl": self.proposer.use_natural_kl,
            "worst": self.proposer.make_worst_mix,
            "seed": self.regression.seed,
        }
        if weights:
            keys["objective"] = {name: weights.get(name, 1.0) for name in metrics}
        if fixed:
            keys["fixed_weight"] = fixed
        if self.constraints.enabled:
            keys |= {"target_tokens": self.constraints.target_tokens, "repetition": self.constraints.repetition_factor}
        return ProposeConfig(**keys)

    def priors_of(self, domains: tuple[str, ...]) -> dict[str, Any]:
        """The content of priors.json for the domains of a fit: all of the prior's, unless the config chooses some."""
        shares, counts = self.priors.shares, self.priors.token_counts or {}
        for name, given in (("priors.relative_sizes", shares), ("priors.token_counts", counts)):
            absent = [domain for domain in domains if given and domain not in given]
            if absent:
                raise InputError(
                    f"{name} has no {listed(absent)}, which the swarm has." + did_you_mean(absent[0], given)
                )
            if not (self.filtering.keep_sources or self.filtering.support_domains):
                _check_names(name, given, domains, "domain of the swarm")
        total = sum(shares[domain] for domain in domains)
        content: dict[str, Any] = {"relative_sizes": {domain: shares[domain] / total for domain in domains}}
        return content | ({"token_counts": {domain: counts[domain] for domain in domains}} if counts else {})

    def write(self, folder: Path, metrics: tuple[str, ...], domains: tuple[str, ...]) -> None:
        """Writes priors.json and propose.json."""
        proposal = self.propose_config(metrics, domains).model_dump(mode="json", exclude_unset=True)
        for name, content in ((PRIORS_FILE, self.priors_of(domains)), (OPTIONS_FILE, proposal)):
            replace_json(folder / name, content)


def _inside(means: Means) -> set[str]:
    return {metric for weights in means.values() for metric in weights}


def _without(families: Families, names: set[str]) -> Families:
    return {family: tuple(name for name in members if name not in names) for family, members in families.items()}


def _check_names(key: str, given: Any, known: tuple[str, ...], what: str) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InputError(f"{key}: {listed(unknown)} is no {what}." + did_you_mean(unknown[0], known))


def _number(text: str) -> float:
    """A number or a fraction of two, such as ``7/52.0``."""
    match = _FRACTION.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        return float(match[1]) / float(match[2] or 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"got {text!r}, expected a number or a fraction such as 7/52.") from None
