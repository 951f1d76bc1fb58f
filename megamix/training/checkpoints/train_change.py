"""Changed training settings of a resumed run, and what they do to its learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamix.data.batches import Batches
from megamix.engines.config import BEFORE_THESE_KEYS, TrainConfig


def train_change(
    saved: Mapping[str, Any], train: TrainConfig, step: int, batches: tuple[Batches, Batches] | None = None
) -> str | None:
    """What changed, the learning rate of the next step before and after, and the schedules; None: nothing.

    Args:
        saved: the part ``train`` of the checkpoint's `fingerprints`.
        train: the settings now.
        step: steps taken.
        batches: of the run before and now, where they differ.
    """
    known = {**BEFORE_THESE_KEYS, **saved}
    present = train.model_dump(mode="json")
    keys = [key for key in present if key in known and known[key] != present[key]]
    old_batches, new_batches = batches or (None, None)
    if not keys and old_batches == new_batches:
        return None
    before = train.model_copy(update={key: known[key] for key in keys})
    was, now = before.lr_at(step, old_batches), train.lr_at(step, new_batches)
    moved = "as before" if was == now else f"{was:.3g} before"
    old, new = before.learning_rate.describe(), train.learning_rate.describe()
    schedule = f"the schedule is {new}" + (f"; it was {old}" if old != new else "")
    settings = ", ".join(f"{key} {_text(known[key])} -> {_text(getattr(train, key))}" for key in keys)
    changed = f"changed since step {step}: {settings}. " if settings else ""
    return f"{changed}Learning rate of step {step + 1}: {now:.3g}, {moved}; {schedule}"


def _text(value: object) -> str:
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
