"""Fingerprints: the settings that a run must keep on resume, compared with those that a checkpoint was made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megamix.core.errors import ResumeRefused
from megamix.data.batches import Batches
from megamix.data.tokens.manifest import digest
from megamix.engines.config import BEFORE_THESE_KEYS
from megamix.mixing.mixers import with_later_keys
from megamix.training.bounds import bound_of
from megamix.training.checkpoints.batch_change import batch_fingerprint
from megamix.training.mixture import StagedMixture, mixture_of
from megamix.training.plan import DataPlan, Plan

ACCEPTABLE = ("data", "tokenizer", "mixture", "mixer", "constraints", "batch", "sequence", "train", "precision")
"""Parts that may change in mid-run; the model's shape and what fixes the order of the data may not."""


def fingerprints(plan: Plan) -> dict[str, dict[str, Any]]:
    """Settings that must not change on resume, by the names that ``checkpoint.accept_changed`` takes;
    JSON-serialisable."""
    data = data_fingerprints(plan)
    train = plan.config.train.model_dump(
        mode="json", exclude={"stop_after", "micro_batch", "global_batch", "batch_ramp", "seed"}
    )
    return {
        **data,
        "model": plan.model.identity(),
        "train": {**train, **data["train"]},
        "precision": {"precision": plan.config.engine.precision},
    }


def data_fingerprints(plan: DataPlan) -> dict[str, dict[str, Any]]:
    """The part of `fingerprints` that decides which samples are read when."""
    config, data = plan.config, plan.config.data
    return {
        "data": {"domains": {entry.name: digest(entry) for entry in plan.entries}},
        "tokenizer": {"sha256": plan.manifest.tokenizer.sha256},
        "mixture": mixture_print(plan, plan.policy.batches),
        "mixer": plan.mixer_fingerprint(config.mixer),
        "constraints": _constraints(plan),
        "order": {
            "seed": config.train.seed,
            "seq_length": data.seq_length,
            "weight_lag": data.weight_lag,
            "sampling": data.sampling,
        },
        "batch": batch_fingerprint(plan.policy.batches),
        "train": {
            "attention": data.attention,
            "eod_mask_loss": data.eod_mask_loss,
            "reset_position_ids": data.positions_restart,
        },
    }


def sizes_ahead(batches: Batches, step: int) -> int | str:
    """The global batch from ``step`` on."""
    return batches.size(step) if batches.sizes[-1][0] <= step else batches.describe(step)


def mixture_print(plan: DataPlan, batches: Batches) -> dict[str, Any]:
    """The part of the mixture; of stages, the steps that they begin with under ``batches``."""
    mixture, stages = mixture_of(plan.config.mixture), plan.policy.stages
    if isinstance(mixture, StagedMixture):
        stages = replace(stages, steps=tuple(mixture.starts(batches)))
    return {"mixture": mixture.fingerprint(plan.domain_names, stages)}


def _constraints(plan: DataPlan) -> dict[str, Any]:
    data, constraints = plan.config.data, plan.policy.constraints
    found = data.model_dump(mode="json", include={"max_epochs", "on_exhausted"})
    for key, resolved in (("min_weight", constraints.floor), ("max_weight", constraints.cap)):
        found[key] = bound_of(getattr(data, key)).fingerprint(plan.domain_names, resolved)
    return found


def comparable(
    saved: Mapping[str, Mapping[str, Any]], mixer: Mapping[str, Any], other_domains: bool
) -> dict[str, Mapping[str, Any]]:
    """Saved `fingerprints` that can be compared with those of now: with the keys that came later, and a mixer as
    ``mixer``, the same part now.

    An objective that was not saved counts as unchanged: the mixer did not follow it, or there was none yet. So does one
    that names domains, where these differ: it cannot stay what it was.
    """
    before = dict(saved.get("mixer", {}))
    if "mixer" in before:
        before["mixer"] = with_later_keys(before["mixer"])
    was, now = before.pop("objective", None), mixer.get("objective")
    if now is not None:
        by_name = isinstance(was, Mapping) and isinstance(now, Mapping)
        before["objective"] = now if was is None or (other_domains and by_name) else was
    train = saved.get("train", {})
    if "lr" in train:  # not of another trainer than megamix's
        train = {**BEFORE_THESE_KEYS, **train}
    order = without_keys(saved.get("order", {}), "global_batch", "seq_length")
    return {**saved, "mixer": before, "train": {"attention": "sample", **train}, "order": order}


def without_keys(part: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """A part of fingerprints without some of its keys."""
    return {key: value for key, value in part.items() if key not in keys}


def changed_parts(saved: Mapping[str, Mapping[str, Any]], present: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Part -> the first key that differs."""
    found = {}
    for part, values in present.items():
        before = saved.get(part, {})
        differing = sorted(key for key in values.keys() | before.keys() if values.get(key) != before.get(key))
        if differing:
            found[part] = differing[0]
    return found


def refuse_changes(
    saved: Mapping[str, Mapping[str, Any]],
    present: Mapping[str, Mapping[str, Any]],
    changed: Mapping[str, str],
    path: Path,
) -> None:
    """Raises ResumeRefused for the first part that has changed.

    Args:
        changed: of `changed_parts`, without those that are accepted.
        path: of the checkpoint, for the message.
    """
    for part, key in changed.items():
        override = (
            f"add checkpoint.accept_changed=[{part}] to continue all the same"
            if part in ACCEPTABLE
            else "start a new run_dir"
        )
        if part == "mixture":
            override += " (where no mixture is given, it follows the mixer and the objective: give the first one)"
        before, now = saved.get(part, {}).get(key), present[part].get(key)
        raise ResumeRefused(
            f"the checkpoint {path} was made with another {part}: {key} was {_short(before)}, now {_short(now)}. "
            f"Use what the run was started with, or {override}."
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
