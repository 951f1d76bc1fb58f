"""State of a run in a checkpoint: state.json, or megamix's part of another trainer's checkpoint."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pydantic

from megamix.core.config import first_problem
from megamix.core.errors import ResumeRefused
from megamix.mixing.shadow import ShadowState
from megamix.training.checkpoints import store

VERSION = 1
"""Of the state. What megamix 0.1 wrote has none."""


@dataclass(frozen=True)
class GuardState:
    """Steps that the guard left out.

    Attributes:
        skips: in all.
        in_a_row: the last ones, up to this step.
    """

    skips: int = 0
    in_a_row: int = 0


@dataclass(frozen=True)
class RunState:
    """State of a run but for its model and optimizer; complete on rank 0 only.

    Attributes:
        step: steps taken.
        fingerprints: settings that must not change, see `megamix.training.checkpoints.fingerprints.fingerprints`.
        sampler: of `Sampler.state_dict`.
        mixer: of `Mixer.state_dict`; None on other ranks.
        shadow: by name.
        steering: of `Steering.state_dict`; None where nobody can steer the run.
        manifest: path of the data set.
        total_samples: of the whole run, as its weights were bounded by; None in checkpoints of before it was kept.
        record, record_ends: sizes and ends of the files of the record (`megamix.training.records.wholeness`); None
            where there is none, or in checkpoints of before they were kept.
        loss_scale: of `LossScale.state_dict`; None without fp16.
        seed, interval: ``train.seed`` and the sums of the log's interval; None in another trainer than megamix's.
    """

    step: int
    fingerprints: dict[str, dict[str, Any]]
    sampler: dict[str, Any]
    shadow: dict[str, ShadowState]
    guard: GuardState
    manifest: str
    mixer: dict[str, Any] | None = None
    steering: dict[str, Any] | None = None
    total_samples: int | None = None
    record: dict[str, int] | None = None
    record_ends: dict[str, str] | None = None
    seed: int | None = None
    interval: dict[str, Any] | None = None
    loss_scale: dict[str, Any] | None = None

    @property
    def optimizer_steps(self) -> int:
        """Steps that the optimizer has taken: all but those that the guard left out."""
        return self.step - self.guard.skips

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable; see `from_json`."""
        return {"version": VERSION, **{key: value for key, value in asdict(self).items() if value is not None}}

    @classmethod
    def from_json(cls, data: Any, where: Path) -> RunState:
        """The state that `to_json`, or megamix 0.1, has written.

        Args:
            where: file or checkpoint, for messages.

        Raises:
            ResumeRefused: it is of a newer version, or is no such state.
        """
        version = data.get("version", 0) if isinstance(data, dict) else 0
        if version not in range(VERSION + 1):
            raise ResumeRefused(
                f"the state in {where} is of version {version!r}; this megamix reads versions up to {VERSION}. Continue "
                "with the megamix that wrote it, or a newer one."
            )
        try:
            found = {field.name: data[field.name] for field in fields(cls) if field.name in data}
            return _adapter().validate_python({"shadow": {}, "guard": {}, **found})
        except (TypeError, ValueError) as problem:
            raise ResumeRefused(
                f"{where} holds no state of a run ({first_problem(problem)}). Continue from another checkpoint."
            ) from problem


@functools.cache
def _adapter() -> pydantic.TypeAdapter[RunState]:
    return pydantic.TypeAdapter(RunState)


def read_state(path: Path, patience: float = 0.0) -> RunState:
    """The state in a checkpoint; see `store.read_state_json`."""
    return RunState.from_json(store.read_state_json(path, patience), path)


def newest_state(folder: Path) -> RunState | None:
    """The state in the `store.newest` checkpoint in ``folder``; None where there is none.

    Raises:
        ResumeRefused: there are checkpoints, and all are damaged.
    """
    path = store.newest(folder)
    return None if path is None else read_state(path)
