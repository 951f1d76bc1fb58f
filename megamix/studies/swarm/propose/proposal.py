"""Proposal and its file, DIR/mixture.json: weights, method, confidence, and the chain of updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from megamix.core.config import first_problem
from megamix.core.errors import InputError
from megamix.core.files import read_json, replace_json, writing
from megamix.mixing.weight_files import SWARM_MIXTURE, read_swarm_weights

FORMAT = "megamix swarm mixture"
VERSION = 1


@dataclass(frozen=True)
class Proposal:
    """Proposed mixture.

    Attributes:
        weights: {domain: weight}, which sum to 1.
        predicted: {metric: value} at these weights.
        details: further entries of mixture.json, JSON-serialisable: prior, bounds, objective, optimality, confidence.
        history: the chain of updates, oldest first; see `history_entry`. The last entry is this mixture's.
    """

    weights: dict[str, float]
    predicted: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()


def history_entry(
    directory: Path, found: Mapping[str, float], weights: Mapping[str, float], runs: int, update: Any = None
) -> dict[str, Any]:
    """One link of the chain of updates.

    Args:
        found: the weights found, of virtual domains where some were frozen.
        weights: the weights of the real domains.
        runs: number of proxy runs.
        update: `Update.summary` where the mixture is an update of another.
    """
    return {
        "directory": str(directory),
        "runs": runs,
        "update": update,
        "found": dict(found),
        "weights": dict(weights),
    }


def write_proposal(directory: Path, proposal: Proposal) -> Path:
    """Writes DIR/mixture.json and returns its path.

    Raises:
        InputError: it cannot be written.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "weights": proposal.weights,
        "predicted": proposal.predicted,
        **proposal.details,
        "history": list(proposal.history),
    }
    path = directory / SWARM_MIXTURE
    with writing(path, "Choose another directory."):
        replace_json(path, content)
    return path


def read_proposal(directory: Path) -> Proposal:
    """Reads DIR/mixture.json.

    Raises:
        InputError: there is none, or it is not one that `write_proposal` has written.
    """
    read_swarm_weights(directory)  # which refuses what are no weights
    path = directory / SWARM_MIXTURE
    content = read_json(path)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise InputError(
            f"{path} has format {content.get('format')!r}, version {content.get('version')!r}, expected {FORMAT!r}, version "
            f"{VERSION}. Make it anew: megamix swarm propose {directory}."
        )
    known = ("format", "version", "weights", "predicted", "history")
    details = {key: value for key, value in content.items() if key not in known}
    try:
        parts = {key: content.get(key) for key in ("weights", "predicted", "history")}
        return pydantic.TypeAdapter(Proposal).validate_python({**parts, "details": details})
    except ValueError as error:
        raise InputError(
            f"{path} is damaged: {first_problem(error)}. Make it anew: megamix swarm propose {directory}."
        ) from error
