"""Changed training settings of a resumed run, and what they do to its learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamix.engines.config import BEFORE_THESE_KEYS, TrainConfig


def train_change(saved: Mapping[str, Any], train: TrainConfig, step: int) -> str | None:
    """What changed, the learning rate of the next step before and after, and the schedules; None: nothing.

    Args:
        saved: the part ``train`` of the checkpoint's `fingerprints`.
        train: the settings now.
        step: steps taken.
    """
    known = {**BEFORE_THESE_KEYS, **saved}
    keys = [key for key in TrainConfig.model_fields if key in known and known[key] != getattr(train, key)]
    if not keys:
        return None
    before = train.model_copy(update={key: known[key] for key in keys})
    was, now = before.lr_at(step), train.lr_at(step)
    moved = "as before" if was == now else f"{was:.3g} before"
    old, new = before.learning_rate.describe(), train.learning_rate.describe()
    schedule = f"the schedule is {new}" + (f"; it was {old}" if old != new else "")
    settings = ", ".join(f"{key} {_text(known[key])} -> {_text(getattr(train, key))}" for key in keys)
    return f"changed since step {step}: {settings}. Learning rate of step {step + 1}: {now:.3g}, {moved}; {schedule}"


def _text(value: object) -> str:
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
