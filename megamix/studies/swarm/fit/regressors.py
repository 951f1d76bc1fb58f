"""Regressions besides the log-linear law: boosted trees and Gaussian processes.

Both are fitted to one metric at a time, with settings for the tens to hundreds of runs that a swarm has, and are the
same for the same input: one thread, and a seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megamix.core.packages import need
from megamix.studies.swarm.fit.config import Regression
from megamix.studies.swarm.fit.law import LogLinearLaw
from megamix.studies.swarm.fit.tables import SwarmTable

Array = NDArray[np.float64]


class Model(Protocol):
    """Predicts J metrics from a mixture of K domains."""

    def predict(self, x_NK: Array) -> Array:
        """float64 [N, K] to float64 [N, J]."""
        ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Arrays to save, by name; `load_model` makes the same model of them."""
        ...


@dataclass(frozen=True)
class Trees:
    """Boosted trees by LightGBM, one model for each metric.

    Attributes:
        texts: the models in LightGBM's own text format.
    """

    texts: tuple[str, ...]

    def predict(self, x_NK: Array) -> Array:
        """float64 [N, K] to float64 [N, J]."""
        lightgbm = need("lightgbm", "the regression lightgbm")
        return np.stack([lightgbm.Booster(model_str=text).predict(x_NK, num_threads=1) for text in self.texts], axis=1)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The texts one behind the other as uint8, and their lengths in bytes as int64."""
        encoded = [text.encode("utf-8") for text in self.texts]
        return {
            "lightgbm_text": np.frombuffer(b"".join(encoded), dtype=np.uint8),
            "lightgbm_length": np.array([len(text) for text in encoded], dtype=np.int64),
        }


@dataclass(frozen=True)
class Processes:
    """Gaussian processes by scikit-learn, one for each metric: a constant times an RBF kernel, plus noise.

    Attributes:
        kernel_JH: float64 [J, 3], logarithms of the kernel's constant, length and noise variance, for values that are
            normalised to mean 0 and variance 1.
        models: scikit-learn's, one a metric.
    """

    kernel_JH: Array
    models: tuple[Any, ...]

    def predict(self, x_NK: Array) -> Array:
        """float64 [N, K] to float64 [N, J]."""
        return np.stack([model.predict(x_NK) for model in self.models], axis=1)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The kernels; the rest follows from the runs."""
        return {"gp_kernel_JH": self.kernel_JH}


def fit_trees(x_RK: Array, y_RJ: Array, seed: int) -> Trees:
    """Boosted trees for every column of ``y_RJ``."""
    lightgbm = need("lightgbm", "the regression lightgbm")
    settings = {
        "objective": "regression",
        "learning_rate": 0.05,
        "num_leaves": 8,
        "min_data_in_leaf": max(2, len(x_RK) // 20),
        "min_data_in_bin": 1,
        "feature_fraction": 0.8,
        "seed": seed,
        "deterministic": True,
        "force_col_wise": True,
        "num_threads": 1,
        "verbosity": -1,
    }
    texts = []
    for y_R in y_RJ.T:
        data = lightgbm.Dataset(x_RK, label=y_R, params={"verbosity": -1})
        texts.append(lightgbm.train(settings, data, num_boost_round=300).model_to_string())
    return Trees(tuple(texts))


def fit_processes(x_RK: Array, y_RJ: Array, seed: int, kernel_JH: Array | None = None) -> Processes:
    """Gaussian processes for every column of ``y_RJ``.

    Args:
        kernel_JH: see `Processes`; None: those of the largest marginal likelihood, from three starts.
    """
    process = need("sklearn.gaussian_process", "the regression gp")
    kernels = process.kernels
    models = []
    for j, y_R in enumerate(y_RJ.T):
        kernel = kernels.ConstantKernel(1.0, (1e-3, 1e3)) * kernels.RBF(0.5, (0.02, 20.0)) + kernels.WhiteKernel(
            0.1, (1e-8, 10.0)
        )
        if kernel_JH is not None:
            kernel = kernel.clone_with_theta(kernel_JH[j])
        model = process.GaussianProcessRegressor(
            kernel,
            optimizer=None if kernel_JH is not None else "fmin_l_bfgs_b",
            n_restarts_optimizer=0 if kernel_JH is not None else 2,
            normalize_y=True,
            random_state=seed,
        )
        with warnings.catch_warnings():
            # A search for a kernel that ends at a bound, or without progress; the best of the starts is kept.
            warnings.simplefilter("ignore")
            models.append(model.fit(x_RK, y_R))
    return Processes(np.stack([model.kernel_.theta for model in models]), tuple(models))


def load_model(regression: Regression, table: SwarmTable, arrays: Mapping[str, NDArray[Any]]) -> Model:
    """The model that `Model.arrays` was taken from.

    Raises:
        KeyError: something is missing.
    """
    if regression == "log_linear":
        return LogLinearLaw(table.domains, table.metrics, arrays["c_J"], arrays["A_JK"])
    if regression == "lightgbm":
        return Trees(_cut(arrays["lightgbm_text"].tobytes(), arrays["lightgbm_length"].tolist()))
    return fit_processes(table.ratios_RK, table.values_RJ, 0, arrays["gp_kernel_JH"])


def _cut(content: bytes, lengths: Sequence[int]) -> tuple[str, ...]:
    ends = np.cumsum(lengths).tolist()
    return tuple(content[end - length : end].decode("utf-8") for end, length in zip(ends, lengths, strict=True))
