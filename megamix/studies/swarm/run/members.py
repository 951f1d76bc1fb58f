"""The members of a swarm: a folder with one config of an ordinary run for each.

They are what `generate` writes, and any other folder of configs with a run directory each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megamix.core.config import load_config, merge, validate
from megamix.core.errors import InputError
from megamix.core.files import replace_file
from megamix.studies.swarm.generate.levels import Floats
from megamix.training.checkpoints import store
from megamix.training.config import RunConfig

FOLDER = "members"
RUNS = "runs"


@dataclass(frozen=True)
class Member:
    """One run of a swarm."""

    path: Path
    config: RunConfig

    @property
    def name(self) -> str:
        """The name of its config, as it stands in the swarm's tables."""
        return self.path.stem

    @property
    def is_done(self) -> bool:
        """Whether its last checkpoint is that of its last step."""
        return is_done(self.config)


def is_done(config: RunConfig) -> bool:
    """Whether a run's last checkpoint is that of its last step."""
    state = store.newest_state(config.run_dir / "checkpoints")
    return state is not None and state["step"] >= config.train.steps


def members_of(folder: Path, overrides: Sequence[str]) -> list[Member]:
    """The runs of a swarm, in the order of the array's indices (that of the names' bytes).

    Raises:
        InputError: no config, one that cannot be read, or two of one run directory.
    """
    paths = sorted(folder.glob("*.yaml"), key=lambda path: path.name.encode())
    if not paths:
        raise InputError(f"{folder} holds no *.yaml: a swarm is a folder with one config for each run.")
    members = [Member(path, load_config(RunConfig, path, list(overrides))) for path in paths]
    taken: dict[Path, Path] = {}
    for member in members:
        run_dir = member.config.run_dir.absolute()
        if run_dir in taken:
            raise InputError(f"{member.path} and {taken[run_dir]} have the same run_dir, {run_dir}. Give each its own.")
        taken[run_dir] = member.path
    return members


def write_members(swarm: Path, base: dict[str, Any], domains: Sequence[str], weights_NK: Floats, source: str) -> None:
    """Writes SWARM/members/NNNN.yaml, a config for each row of weights.

    Those that are there already are left as they are. A config that was run already is not replaced by another.

    Args:
        base: the keys that all have in common.
        weights_NK: float64 [N, K].
        source: where ``base`` comes from, for messages.

    Raises:
        InputError: a config that is none, a run that was made with another one, or a folder that cannot be written to.
    """
    folder = swarm / FOLDER
    wanted: dict[Path, bytes] = {}
    for number, row in enumerate(weights_NK.tolist()):
        name = f"{number:04}"
        changes = {"run_dir": str(swarm / RUNS / name), "mixer": {"name": "static"}}
        mixture = dict(zip(domains, row, strict=True))
        config = validate(RunConfig, {**merge(base, changes), "mixer": changes["mixer"], "mixture": mixture}, source)
        wanted[folder / f"{name}.yaml"] = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode()
    present = {path: path.read_bytes() for path in folder.glob("*.yaml")} if folder.is_dir() else {}
    for path, content in present.items():
        if wanted.get(path) != content and (swarm / RUNS / path.stem).exists():
            what = "is no longer one of the swarm's" if path not in wanted else "has another config now"
            raise InputError(
                f"member {path.stem} of {swarm} was run, and {what}: its result would not be that of this swarm. Take "
                f"another run_dir for the new swarm, undo the change, or delete {swarm / RUNS} to begin anew."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in present.keys() - wanted.keys():
            path.unlink()
        for path, content in wanted.items():
            if present.get(path) != content:
                replace_file(path, content)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}. Choose another run_dir.") from error
