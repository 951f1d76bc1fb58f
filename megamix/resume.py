"""Whether a run may continue from a checkpoint, and from which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megamix import checkpoint
from megamix.errors import InputError, ResumeRefused
from megamix.plan import Plan
from megamix.run_config import RunConfig


def fingerprints(plan: Plan) -> dict[str, dict[str, Any]]:
    """What the run is made of, by the names that ``checkpoint.accept_changed`` takes; JSON-serialisable."""
    config = plan.config
    train = config.train.model_dump(mode="json", exclude={"stop_after", "micro_batch", "global_batch", "seed"})
    return {
        "data": {"fingerprint": plan.manifest.fingerprint, "domains": list(plan.domain_names)},
        "tokenizer": {"sha256": plan.manifest.tokenizer.sha256},
        "model": plan.model.model_dump(mode="json", exclude={"preset"}),
        "mixer": {"mixer": config.mixer.model_dump(mode="json"), "mixture": config.mixture},
        "order": {
            "seed": config.train.seed,
            "global_batch": config.train.global_batch,
            "seq_length": config.data.seq_length,
            "weight_lag": config.data.weight_lag,
            "max_epochs": config.data.max_epochs,
        },
        "train": train,
        "precision": {"precision": config.engine.precision},
    }


def check_same_run(
    saved: Mapping[str, Mapping[str, Any]],
    present: Mapping[str, Mapping[str, Any]],
    accepted: Sequence[str],
    path: Path,
) -> None:
    """Refuses a resume that would not continue the same run.

    Raises:
        ResumeRefused: something differs that ``accepted`` does not name.
    """
    for part, values in present.items():
        before = saved.get(part, {})
        differing = sorted(key for key in values.keys() | before.keys() if values.get(key) != before.get(key))
        if differing and part not in accepted:
            key = differing[0]
            override = (
                f"add checkpoint.accept_changed=[{part}] to continue all the same"
                if part in ACCEPTABLE
                else "start a new run_dir"
            )
            raise ResumeRefused(
                f"the checkpoint {path} was made with another {part}: {key} was {_short(before.get(key))}, now {_short(values.get(key))}. "
                f"Use what the run was started with, or {override}."
            )


ACCEPTABLE = ("data", "tokenizer", "mixer", "train", "precision")
"""Parts that may change in mid-run; the model's shape and what fixes the order of the data may not."""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def find_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint to continue from by ``checkpoint.resume``; None to start anew.

    Raises:
        InputError: a given path is no checkpoint.
        ResumeRefused: ``never``, but the run directory holds a checkpoint.
    """
    folder = config.run_dir / "checkpoints"
    wish = config.checkpoint.resume
    if wish == "auto":
        return checkpoint.newest(folder)
    if wish == "never":
        if checkpoint.complete_steps(folder):
            raise ResumeRefused(
                f"{config.run_dir} holds checkpoints of a run, and checkpoint.resume is never. Choose another run_dir, remove that one, "
                "or resume it (checkpoint.resume=auto)."
            )
        return None
    path = Path(wish)
    if not (path / "checkpoint.json").is_file():
        raise InputError(
            f"checkpoint.resume: {path} is no complete checkpoint. Give auto, never or a RUN/checkpoints/step_N directory."
        )
    return path
