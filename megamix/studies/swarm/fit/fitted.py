"""Fitted swarm and its files: fit.json for people, fit.npz with the same numbers and more."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError
from megamix.core.files import read_json, replace_file, writing
from megamix.studies.swarm.fit.config import Regression
from megamix.studies.swarm.fit.law import LogLinearLaw, predict
from megamix.studies.swarm.fit.quality import Quality
from megamix.studies.swarm.fit.regressors import Model, load_model
from megamix.studies.swarm.fit.tables import SwarmTable

Array = NDArray[np.float64]
FORMAT = "megamix swarm fit"
VERSION = 1
DETAILS = ("inputs", "options", "folds", "ridge", "coefficients", "test")
JSON, NPZ = "fit.json", "fit.npz"


@dataclass(frozen=True)
class Fitted:
    """Fit to a swarm of R runs, K domains and J metrics (or families, with ``per: family``).

    Attributes:
        families: ``metrics`` by family; empty with ``per: family``, where the families are the metrics.
        table: the fitted runs.
        cross_validation: quality of the held-out predictions.
        family_cross_validation: the same for the means of the families' metrics.
        held_out_RJ: float64 [R, J], predictions of each run by a fit without it.
        boot_c_BJ: float64 [B, J], c of the fits to resampled runs; B may be 0.
        boot_A_BJK: float64 [B, J, K].
        details: further entries of fit.json, by the names of `DETAILS`.
    """

    families: dict[str, tuple[str, ...]]
    regression: Regression
    model: Model
    table: SwarmTable
    cross_validation: Quality
    family_cross_validation: Quality
    held_out_RJ: Array
    boot_c_BJ: Array
    boot_A_BJK: Array
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def domains(self) -> tuple[str, ...]:
        """The K domains, in the order of the columns of a mixture."""
        return self.table.domains

    @property
    def metrics(self) -> tuple[str, ...]:
        """The J metrics."""
        return self.table.metrics

    @property
    def law(self) -> LogLinearLaw | None:
        """The law; None for other regressions."""
        return self.model if isinstance(self.model, LogLinearLaw) else None

    def predict(self, x_NK: Array) -> Array:
        """The metrics of N mixtures, float64 [N, J]; ``x_NK`` is float64 [N, K]."""
        return self.model.predict(np.asarray(x_NK, dtype=np.float64))

    def bootstrap_predict(self, x_NK: Array) -> Array:
        """Predictions of the fits to resampled runs, float64 [B, N, J]; B may be 0."""
        return predict(x_NK, self.boot_c_BJ, self.boot_A_BJK)

    def save(self, folder: Path) -> None:
        """Writes fit.npz, then fit.json; each whole or not at all.

        Raises:
            InputError: the folder cannot be written to.
        """
        arrays = {
            "ratios_RK": self.table.ratios_RK,
            "values_RJ": self.table.values_RJ,
            "held_out_RJ": self.held_out_RJ,
            "boot_c_BJ": self.boot_c_BJ,
            "boot_A_BJK": self.boot_A_BJK,
            **self.model.arrays(),
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType]
        content = {
            "format": FORMAT,
            "version": VERSION,
            "regression": self.regression,
            "domains": self.domains,
            "metrics": self.metrics,
            "families": self.families,
            "runs": self.table.runs,
            "dropped_runs": self.table.dropped,
            "resamples": len(self.boot_c_BJ),
            "cross_validation": self.cross_validation,
            "family_cross_validation": self.family_cross_validation,
            **self.details,
        }
        with writing(f"the fit to {folder}", "Choose another folder with --out."):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / NPZ, buffer.getvalue())
            replace_file(folder / JSON, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    @classmethod
    def open(cls, folder: Path) -> Fitted:
        """Reads what `save` has written.

        Raises:
            InputError: there is no fit, or it is damaged or of another version.
        """
        folder = Path(folder)
        content, arrays = _read_content(folder / JSON), _read_arrays(folder / NPZ)
        try:
            table = SwarmTable(
                runs=tuple(content["runs"]),
                domains=tuple(content["domains"]),
                metrics=tuple(content["metrics"]),
                ratios_RK=arrays["ratios_RK"],
                values_RJ=arrays["values_RJ"],
                dropped=tuple(content["dropped_runs"]),
            )
            return cls(
                families={name: tuple(members) for name, members in content["families"].items()},
                regression=content["regression"],
                model=load_model(content["regression"], table, arrays),
                table=table,
                cross_validation=content["cross_validation"],
                family_cross_validation=content["family_cross_validation"],
                held_out_RJ=arrays["held_out_RJ"],
                boot_c_BJ=arrays["boot_c_BJ"],
                boot_A_BJK=arrays["boot_A_BJK"],
                details={key: value for key, value in content.items() if key in DETAILS},
            )
        except KeyError as error:
            raise InputError(f"the fit in {folder} has no {error}. Fit the swarm again.") from error
        except (TypeError, AttributeError, ValueError, IndexError) as error:
            raise InputError(f"the fit in {folder} is damaged: {error}. Fit the swarm again.") from error


def _read_content(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(
            f"{path.parent} has no {path.name}. Fit the swarm first: megamix swarm fit --ratios ratios.csv"
            f" --metrics metrics.csv --out {path.parent}"
        )
    content = read_json(path, lost="Fit the swarm again.", damaged="Fit the swarm again.")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a fit of `megamix swarm fit`. Name the folder given as --out.")
    if content.get("version") != VERSION:
        raise InputError(
            f"{path} has version {content.get('version')}, this megamix reads {VERSION}. Fit the swarm again."
        )
    return content


def _read_arrays(path: Path) -> Mapping[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read {path}: {error}. Fit the swarm again.") from error
