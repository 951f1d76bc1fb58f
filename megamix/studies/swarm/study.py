"""The config of a swarm, resolved: its domains, its runs, and what draws its mixtures.

Legend: K domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megamix.core.config import validate
from megamix.core.config_files import merge
from megamix.core.errors import InputError
from megamix.core.files import replace_file, writing
from megamix.core.paths import literal
from megamix.mixing.mixers import normalise_weights
from megamix.mixing.sources import weights_by_domain
from megamix.studies.runs import read_section, write_yaml
from megamix.studies.swarm.collect import CONFIG, FOLDER
from megamix.studies.swarm.config import SwarmStudyConfig
from megamix.studies.swarm.generate.levels import Floats
from megamix.studies.swarm.generate.mixtures import MixtureSpace
from megamix.studies.swarm.propose.proposal import read_proposal
from megamix.studies.swarm.propose.question import read_amounts
from megamix.studies.swarm.propose.reuse import EXISTING, Update, default_members, resolve_update
from megamix.training.config import KINDS, RunConfig
from megamix.training.plan import Plan, make_plan

RUNS = "runs"
SETTLED = {"proxy": ("run_dir", "mixer", "mixture"), "target": ("run_dir", "mixture")}
"""Keys of each run that a config cannot set."""


@dataclass(frozen=True)
class SwarmStudy:
    """Resolved config of ``megamix swarm``.

    Attributes:
        base: the run's config without the key ``swarm``, not validated.
        source: of the config, for messages.
    """

    base: dict[str, Any]
    config: SwarmStudyConfig
    run_dir: Path
    source: str

    @cached_property
    def proxy(self) -> dict[str, Any]:
        """Keys that the configs of all members share."""
        shared = merge(self.base, self.config.proxy, KINDS)
        return {**shared, "mixture": "natural", "mixer": {"name": "static"}}

    @cached_property
    def plan(self) -> Plan:
        """Plan of a member, with the natural mixture."""
        return make_plan(validate(RunConfig, self.proxy, f"{self.source}, proxy run"))

    @cached_property
    def target(self) -> RunConfig | None:
        """Config of the target run; None without one."""
        if self.config.target is None:
            return None
        run = merge({**self.base, "mixer": {"name": "static"}}, self.config.target, KINDS)
        settled = {"mixture": {"from_swarm": literal(self.run_dir)}, "run_dir": literal(self.run_dir / "target")}
        settled["mixer"] = self.config.target.get("mixer", {"name": "static"})
        return validate(RunConfig, {**run, **settled}, f"{self.source}, target run")

    @cached_property
    def target_tokens(self) -> int | None:
        """Tokens of the target run."""
        return None if self.target is None else tokens_of(self.target)

    @cached_property
    def update(self) -> Update | None:
        """The update of an old mixture; None where a new one is made."""
        asked = self.config.update
        return None if asked is None else resolve_update(asked, read_proposal(asked.previous), self.token_counts)

    @property
    def is_settled(self) -> bool:
        """Whether there is no swarm, for the update leaves no weight to be found."""
        return self.update is not None and self.update.settled

    @cached_property
    def token_counts(self) -> dict[str, int]:
        """{domain: training tokens}."""
        return {entry.name: entry.train.tokens for entry in self.plan.entries}

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """The K domains whose weights the swarm finds: of an update the virtual ones."""
        return tuple(self.token_counts) if self.update is None else self.update.virtual

    @cached_property
    def space(self) -> MixtureSpace:
        """Draws the mixtures of the members."""
        generate = self.config.generate
        tokens = {name: float(count) for name, count in self.token_counts.items()}
        bounds = tokens if self.update is None else self.update.caps(tokens)
        of_run: dict[object, float | None] = {"member": tokens_of(self.plan.config), "target": self.target_tokens}
        repeated = of_run.get(generate.repetition_tokens, generate.repetition_tokens)
        if repeated is None:
            raise InputError(
                f"{self.source}: swarm.generate.repetition_tokens is target, but there is no target run. Set swarm.target, or "
                "give a number of tokens."
            )
        return MixtureSpace(self.domains, self._prior(), generate, bounds, float(repeated))

    @cached_property
    def num_members(self) -> int:
        """Number of mixtures to try."""
        if self.is_settled:
            return 0
        return self.config.generate.members or default_members(len(self.domains))

    @cached_property
    def centre(self) -> dict[str, float]:
        """{domain: share} of all real domains, around which members are drawn and near which a proposal is held. The
        frozen domains of an update divide the share of `existing` as in the prior, not as in the old mixture."""
        found = dict(zip(self.domains, self.space.centre.tolist(), strict=True))
        if self.update is None:
            return found
        frozen = {name: self._real_shares[name] for name in self.update.inner}
        total, share = sum(frozen.values()), found.pop(EXISTING, 0.0)
        found |= {name: share * part / total for name, part in frozen.items()}
        return {name: found[name] for name in self.token_counts}

    @cached_property
    def _given_shares(self) -> Mapping[str, float] | None:
        """The prior as the config gives it; None: natural."""
        given = self.config.priors
        if given == "natural":
            return None
        return read_amounts(given).shares if isinstance(given, Path) else weights_by_domain(given, "swarm.priors")

    @property
    def _real_shares(self) -> Mapping[str, float]:
        """A prior of the real domains; the natural one where the config gives none of those."""
        given = self._given_shares
        return given if given is not None and given.keys() == self.token_counts.keys() else self.token_counts

    def _prior(self) -> Floats:
        """float64 [K]."""
        given, update = self._given_shares, self.update
        if given is None:
            given = self.token_counts if update is None else update.prior
        elif update is not None and given.keys() == set(update.domains):
            given = update.contract_prior(given)
        return normalise_weights(given, self.domains, f"{self.source}: swarm.priors ({self.config.priors})")


def tokens_of(config: RunConfig) -> int:
    """Tokens that a run trains on."""
    return config.batches.tokens(config.train.steps)


def read_study(config_path: Path, overrides: list[str]) -> SwarmStudy:
    """Reads a config and checks it before the first task begins; writes DIR/swarm.yaml.

    Raises:
        InputError: a key or value that cannot be used, named with its run.
    """
    source = str(config_path)
    data, config = read_section(
        SwarmStudyConfig,
        "swarm",
        config_path,
        overrides,
        SETTLED,
        "a swarm settles the mixtures of its runs, where they are, and that the proxies' mixer is static. Remove the key.",
    )
    if config.propose.worst:
        raise InputError(
            f"{source}: swarm.propose.worst cannot be set: the target would be trained on it. Remove it, and take `megamix swarm "
            "propose DIR --worst` after the swarm."
        )
    run_dir = validate(RunConfig, {**data, "mixture": "natural"}, source).run_dir
    study = SwarmStudy(data, config, run_dir, source)
    study.space.check()
    write_yaml(run_dir / CONFIG, {**study.base, "swarm": config.model_dump(mode="json")})
    return study


def write_members(swarm: Path, base: dict[str, Any], domains: Sequence[str], weights_NK: Floats, source: str) -> None:
    """Writes SWARM/members/NNNN.yaml, a config for each row of weights.

    A file that holds its config already is left alone. A config that was run already is not replaced by another.

    Args:
        base: the keys that all members share.
        weights_NK: float64 [N, K].
        source: of ``base``, for messages.

    Raises:
        InputError: an invalid config, a run that was made with another one, or a folder that cannot be written to.
    """
    folder = swarm / FOLDER
    wanted: dict[Path, bytes] = {}
    for number, row in enumerate(weights_NK.tolist()):
        name = f"{number:04}"
        changes = {"run_dir": literal(swarm / RUNS / name), "mixer": {"name": "static"}}
        mixture = dict(zip(domains, row, strict=True))
        config = validate(
            RunConfig, {**merge(base, changes, KINDS), "mixer": changes["mixer"], "mixture": mixture}, source
        )
        wanted[folder / f"{name}.yaml"] = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode()
    present = {path: path.read_bytes() for path in folder.glob("*.yaml")} if folder.is_dir() else {}
    for path, content in present.items():
        if wanted.get(path) != content and (swarm / RUNS / path.stem).exists():
            what = "is no longer one of the swarm's" if path not in wanted else "has another config now"
            raise InputError(
                f"member {path.stem} of {swarm} was run, and {what}: its result would not be that of this swarm. Take "
                f"another run_dir for the new swarm, undo the change, or delete {swarm / RUNS} to begin anew."
            )
    with writing(f"to {folder}", "Choose another run_dir."):
        folder.mkdir(parents=True, exist_ok=True)
        for path in present.keys() - wanted.keys():
            path.unlink()
        for path, content in wanted.items():
            if present.get(path) != content:
                replace_file(path, content)
