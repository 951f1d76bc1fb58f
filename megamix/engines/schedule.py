"""Learning rate of a run as a function of the step alone: it rises, stays level and falls.

cosine, linear    rise ---- fall, from the end of the rise to the last step
constant          rise ---- level
wsd               rise ---- level ---- fall over the last decay_steps steps
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["cosine", "linear", "constant", "wsd"]
Shape = Literal["cosine", "linear", "sqrt"]

_LEFT: dict[Shape, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "sqrt": lambda done: 1 - math.sqrt(done),
}
"""What is left of the way from lr to min_lr, after a share of the steps of a fall; sqrt is that of Hägele et al., 2024
(arXiv 2405.18392)."""


@dataclass(frozen=True)
class Schedule:
    """Schedule of a run; its steps count from 0.

    Attributes:
        lr: peak learning rate.
        min_lr: learning rate of the last step, where there is a fall.
        warmup_steps: steps of the rise; the last of them has ``lr``.
        steps: of the whole run.
        fall_from: last step before the fall; None where there is none.
        shape: of the fall.
    """

    name: ScheduleName
    lr: float
    min_lr: float
    warmup_steps: int
    steps: int
    fall_from: int | None
    shape: Shape

    def at(self, step: float) -> float:
        """The learning rate of ``step``, which may be broken; past the end that of the last step."""
        if step < self.warmup_steps:
            return self.lr * min(step + 1, self.warmup_steps) / self.warmup_steps
        if self.fall_from is None or step < self.fall_from:
            return self.lr
        done = (step - self.fall_from) / max(1, self.steps - 1 - self.fall_from)
        return self.min_lr + (self.lr - self.min_lr) * _LEFT[self.shape](min(1.0, done))

    def describe(self) -> str:
        """``wsd, up to 0.003 in 20 steps, level to step 900, down to 0.0003 at step 1,000 (linear)``; steps count from
        1."""
        parts: list[str] = [self.name]
        parts.append(f"up to {self.lr:.3g} in {self.warmup_steps:,} steps" if self.warmup_steps else f"{self.lr:.3g}")
        if self.fall_from is None:
            return ", ".join([*parts, "level to the end"])
        if self.name == "wsd":
            parts.append(f"level to step {self.fall_from + 1:,}")
        fall = f"down to {self.min_lr:.3g} at step {self.steps:,}"
        return ", ".join([*parts, f"{fall} ({self.shape})" if self.name == "wsd" else fall])
