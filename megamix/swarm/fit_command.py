"""What ``megamix swarm fit`` is asked for: files and options, or a config of Olmix that has both."""

from __future__ import annotations

from pathlib import Path

from megamix.config import apply_overrides, read_yaml, validate
from megamix.errors import InputError
from megamix.swarm.fit import fit
from megamix.swarm.fit_config import FitConfig
from megamix.swarm.fitted import Fitted
from megamix.swarm.olmix import OlmixFit, is_olmix


def fit_from(out: Path, ratios: Path | None, metrics: Path | None, config: Path | None, overrides: list[str]) -> Fitted:
    """Fits what the command line says.

    Args:
        ratios, metrics: the files; None: those that a config of Olmix names, as seen from the current directory.
        config: a fit config of Olmix, or a YAML file with keys of `FitConfig`.
        overrides: ``key=value``, over those of the config.

    Raises:
        InputError: also where a file is named nowhere.
    """
    data = read_yaml(config) if config is not None else {}
    olmix = validate(OlmixFit, data, str(config)) if is_olmix(data) else None
    if olmix is not None:
        data = olmix.fit_config()
        ratios, metrics = ratios or olmix.swarm.ratios, metrics or olmix.swarm.metrics
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
