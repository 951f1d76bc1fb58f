"""Dynamic loss scaling of fp16 (Micikevicius et al., 2018, arXiv 1710.03740, section 3.2).

The smallest fp16 number is 6e-8, and gradients are often smaller. So the loss is multiplied by a scale before the
backward pass, and gradients are divided by it, in fp32, before anything else reads them. A scale that is too large
shows: gradients are infinite. Such a step is left out, and the scale halves; it doubles after many steps without.

Scales are powers of two, so that scaling rounds nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FIRST_SCALE, LEAST_SCALE, LARGEST_SCALE = 2.0**16, 1.0, 2.0**24
STEPS_TO_DOUBLE = 1000


@dataclass
class LossScale:
    """Scale of the loss, alike on all ranks.

    Attributes:
        scale: of the next step.
        good_steps: taken since the scale last changed.
    """

    scale: float = FIRST_SCALE
    good_steps: int = 0

    def update(self, is_finite: bool) -> str | None:
        """Takes notice of a step.

        Args:
            is_finite: whether all its gradients were.

        Returns:
            What to say of a step that was left out for the scale; None for others, also for one that was not finite
            with the least scale: that scale is not what is wrong.
        """
        if is_finite:
            self.good_steps += 1
            if self.good_steps == STEPS_TO_DOUBLE:
                self.scale, self.good_steps = min(2 * self.scale, LARGEST_SCALE), 0
            return None
        if self.scale <= LEAST_SCALE:
            return None
        before, self.scale, self.good_steps = self.scale, self.scale / 2, 0
        return f"its gradients exceed fp16 with loss scale {before:,.0f}, which is {self.scale:,.0f} from here on"

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
