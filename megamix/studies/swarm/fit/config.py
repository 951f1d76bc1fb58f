"""Options of ``megamix swarm fit``, which are also the key ``swarm.fit`` of a study's config."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from megamix.core.config import Config
from megamix.studies.swarm.fit.tables import Missing

Regression = Literal["log_linear", "lightgbm", "gp"]


class FitConfig(Config):
    """Options of a fit to a swarm's ratios and metrics."""

    regression: Regression = "log_linear"
    """log_linear: f_j(x) = exp(c_j) + exp(A_j . x) for metric j, x the mixture; lightgbm: boosted trees; gp: a Gaussian
    process. The last two need the extra ``swarm``."""
    means: dict[str, dict[str, float]] = pydantic.Field(default_factory=dict)
    """Weighted means that take the place of their metrics before all else: {name: {metric: weight}}."""
    families: dict[str, tuple[str, ...]] = pydantic.Field(default_factory=dict)
    """Metrics by family, for example {math: [gsm, minerva]}; a metric is in one family at most."""
    per: Literal["metric", "family"] = "metric"
    """family: one fit for the mean of each family's metrics; the metrics in no family are left out."""
    metrics: tuple[str, ...] | None = None
    """The metrics to fit; null: all, or with ``per: family`` those of the families."""
    drop_metrics: tuple[str, ...] = ()
    """Metrics to leave out, also of the families."""
    missing: Missing = "refuse"
    """What becomes of a run that is in one file only or has no number for a metric: refuse, or drop the run; drop_any:
    also one that has none for a dropped metric."""
    support_domains: tuple[str, ...] = ()
    """Fit only runs whose weights on these domains sum to 1; the other domains are left out. Empty: all."""
    support_nonzero: bool = False
    """Of those, only runs that have every one of these domains."""
    seed: int = pydantic.Field(default=0, ge=0)
    """Of starts, folds, resamples, chosen runs and trees."""
    starts: int = pydantic.Field(default=8, ge=1, le=10_000)
    """Starting points of a log-linear fit; the best end is kept."""
    delta: float = pydantic.Field(default=0.02, gt=0)
    """Where the Huber loss of a log-linear fit turns from squares to absolute values, in the metric's unit."""
    ridge: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = "auto"
    """How strongly a log-linear fit pulls the coefficients together, against wild ones where runs are few or the law is
    not quite true: adds ridge * delta^2 / 2 times the sum of their squares, as differences from a law that is the same
    for all mixtures. auto: the one of 0, 0.01, 0.1, 1, 10 that predicts runs that were not fitted best."""
    folds: int | None = pydantic.Field(default=None, ge=2)
    """Of the cross-validation; null: 5, or one for each run where there are at most 40."""
    bootstrap: int | None = pydantic.Field(default=None, ge=0, le=100_000)
    """Fits to resampled runs, for intervals; null: 100 for log_linear, 0 for the others, which have none."""
    test_runs: int = pydantic.Field(default=0, ge=0)
    """Runs that are not fitted, chosen by the seed; how they are predicted is reported."""
    train_split: float = pydantic.Field(default=1.0, gt=0)
    """How many of the other runs are fitted, chosen by the seed: up to 1 a share, above it a number."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> FitConfig:
        if self.per == "family" and not self.families:
            raise ValueError("per is family, but there are no families. Give families: {name: [metrics]}.")
        self._check_means()
        seen: dict[str, str] = {}
        for family, members in self.families.items():
            if not members:
                raise ValueError(f"family '{family}' has no metrics.")
            for metric in members:
                if metric in seen:
                    raise ValueError(f"metric '{metric}' is in '{seen[metric]}' and in '{family}'. Keep one of them.")
                seen[metric] = family
        if self.regression != "log_linear" and self.bootstrap:
            raise ValueError(
                f"bootstrap is {self.bootstrap}, but only log_linear has resampled fits; {self.regression} takes 0."
            )
        return self

    def _check_means(self) -> None:
        seen: dict[str, str] = {}
        for name, weights in self.means.items():
            if not weights or not all(0 < weight < float("inf") for weight in weights.values()):
                raise ValueError(f"means.{name}: expected metrics with weights above 0, got {weights}.")
            for metric in weights:
                if metric in seen:
                    raise ValueError(f"metric '{metric}' is in '{seen[metric]}' and in '{name}'. Keep one of them.")
                seen[metric] = name

    @property
    def resamples(self) -> int:
        """Number of fits to resampled runs."""
        if self.bootstrap is not None:
            return self.bootstrap
        return 100 if self.regression == "log_linear" else 0
