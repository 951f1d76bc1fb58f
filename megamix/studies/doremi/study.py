"""The runs of DoReMi, from one config: reference and proxy of each round, and the target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamix.core.config import load_config, validate
from megamix.core.config_files import merge
from megamix.core.errors import InputError
from megamix.core.paths import literal
from megamix.studies.doremi.config import DoremiStudyConfig
from megamix.studies.runs import read_section, write_yaml
from megamix.training.config import KINDS, RunConfig
from megamix.training.plan import make_plan
from megamix.training.reference.run import check_same_data

WEIGHTS = "weights.json"
Weights = dict[str, float]
SETTLED = {"reference": ("run_dir", "mixer"), "proxy": ("run_dir",), "target": ("run_dir", "mixture")}
"""Keys of each run that a config cannot set."""


@dataclass(frozen=True)
class DoremiStudy:
    """Resolved config of ``megamix doremi``.

    Attributes:
        base: the run's config without the key ``doremi``, not validated.
        source: of the config, for messages.
    """

    base: dict[str, Any]
    config: DoremiStudyConfig
    run_dir: Path
    source: str

    @property
    def needs_reference(self) -> bool:
        """Whether there is a reference run: the proxy's config names no losses, and does not do without."""
        return "reference" not in self._mixer_keys()

    def folder(self, number: int) -> Path:
        """The folder of a round's runs; rounds count from 1."""
        return self.run_dir if number == 1 else self.run_dir / f"round_{number}"

    def reference_run(self, number: int, weights: Weights | None) -> dict[str, Any]:
        """The reference run of a round; ``weights`` are the result of the round before."""
        changes = {"mixer": {"name": "static"}, "run_dir": literal(self.folder(number) / "reference")}
        if weights is not None:
            changes["mixture"] = weights
        return _with(_with(self.base, self.config.reference), changes)

    def proxy_run(self, number: int) -> dict[str, Any]:
        """The proxy run of a round."""
        folder = self.folder(number)
        mixer = {"name": "doremi", "reference": literal(folder / "cache"), **self._mixer_keys()}
        changes = {"mixer": mixer, "run_dir": literal(folder / "proxy")}
        return _with(_with(self.base, {"mixture": "uniform", **self.config.proxy}), changes)

    def target_run(self) -> dict[str, Any]:
        """The target run."""
        changes = {"mixture": {"file": literal(self.run_dir / WEIGHTS)}, "run_dir": literal(self.run_dir / "target")}
        own = {"mixer": {"name": "static"}, **(self.config.target or {})}
        return _with(_with(self.base, own), changes)

    def write_round(self, number: int, weights: Weights | None) -> None:
        """Writes the configs of a round's runs."""
        self._write(number, "reference", self.reference_run(number, weights))
        self._write(number, "proxy", self.proxy_run(number))

    def write_target(self) -> None:
        """Writes the config of the target run."""
        self._write(1, "target", self.target_run())

    def _write(self, number: int, name: str, run: dict[str, Any]) -> None:
        config = validate(RunConfig, run, f"{self.source}, {name} run")
        write_yaml(self.folder(number) / f"{name}.yaml", config.model_dump(mode="json"))

    def _mixer_keys(self) -> dict[str, Any]:
        """Those of the base, where its mixer is doremi, under those of the proxy."""
        base, proxy = self.base.get("mixer"), self.config.proxy.get("mixer", {})
        if not isinstance(proxy, dict) or proxy.get("name", "doremi") != "doremi":
            raise InputError(
                f"{self.source}: the proxy run's mixer is {proxy!r}, expected keys of doremi, for example {{eta: 1.0}}."
            )
        return {**(base if isinstance(base, dict) and base.get("name") == "doremi" else {}), **proxy}


def read_study(config_path: Path, overrides: list[str], *, check_data: bool = True) -> DoremiStudy:
    """Reads a config, checks all runs before the first begins, and writes the configs of round 1 and the target.

    Args:
        check_data: whether the data is there already.

    Raises:
        InputError: a key or value that cannot be used, named with its run; a reference run of other data.
    """
    data, config = read_section(
        DoremiStudyConfig,
        "doremi",
        config_path,
        overrides,
        SETTLED,
        "DoReMi settles the reference run's mixer, the target's mixture, and where each run is (RUN/TASK). Remove the key, "
        "or train that run with `megamix train`.",
    )
    study = DoremiStudy(data, config, validate(RunConfig, data, str(config_path)).run_dir, str(config_path))
    study.write_round(1, None)
    proxy = make_plan(load_config(RunConfig, study.run_dir / "proxy.yaml")) if check_data else None
    if study.needs_reference and proxy is not None:
        reference = load_config(RunConfig, study.run_dir / "reference.yaml")
        check_same_data(proxy, make_plan(reference, verify=False), "the proxy run")
    if config.target is not None:
        study.write_target()
    return study


def _with(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` merged over it, but a mixer or a mixture replaced as a whole."""
    whole = {key: value for key, value in changes.items() if key in ("mixer", "mixture")}
    return {**merge(base, changes, KINDS), **whole}
