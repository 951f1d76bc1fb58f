"""The configs of a swarm's members."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megamix.core.config import merge, validate
from megamix.core.errors import InputError
from megamix.core.files import replace_file
from megamix.studies.swarm.generate.levels import Floats
from megamix.training.config import KINDS, RunConfig

FOLDER = "members"
RUNS = "runs"


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
        changes = {"run_dir": str(swarm / RUNS / name), "mixer": {"name": "static"}}
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in present.keys() - wanted.keys():
            path.unlink()
        for path, content in wanted.items():
            if present.get(path) != content:
                replace_file(path, content)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}. Choose another run_dir.") from error
