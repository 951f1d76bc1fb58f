"""Steering command: one line of a run's journal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pydantic

from megamix.core.config import Config
from megamix.core.text import listed


class SteerCommand(Config):
    """A change of a run's weights, asked for by a person. Its parts act in the order of the keys."""

    id: str = pydantic.Field(min_length=1)
    """Unique in the journal."""
    time: float = 0.0
    """When it was given, seconds since 1970."""
    who: str = ""
    """User and machine."""
    note: str = ""
    """Why, in the user's words."""
    at_step: int | None = pydantic.Field(default=None, ge=0)
    """Steps taken before the first one with its effect. Default: the run's first chance."""
    ramp_tokens: float = pydantic.Field(default=0.0, ge=0, allow_inf_nan=False)
    """Tokens over which the weights approach it."""
    undo: str | None = None
    """The command that is taken back; then there is nothing else."""
    mixer: dict[str, Any] | None = None
    """The rule from here on, as in a config."""
    unpin: tuple[str, ...] = ()
    """Domains that are no longer pinned."""
    mixture: dict[str, float] | None = None
    """The weights of all domains."""
    set: dict[str, float] = pydantic.Field(default={})
    """Weights of some domains; the others keep their ratios."""
    pin: dict[str, float] = pydantic.Field(default={})
    """Weights that stay; the rule divides the rest."""
    bounds: dict[str, tuple[float, float]] = pydantic.Field(default={})
    """The least and the largest weight of a domain, within ``data.min_weight`` and ``data.max_weight``."""
    hold: bool | None = None
    """True: weights stay as they are, whatever the rule asks for; False: no longer."""

    @pydantic.model_validator(mode="after")
    def _is_whole(self) -> SteerCommand:
        acts = any((self.mixer, self.unpin, self.mixture, self.set, self.pin, self.bounds, self.hold is not None))
        if self.undo is not None and acts:
            raise ValueError("undo stands alone: give what is to follow as the next command.")
        if self.undo is None and not acts:
            raise ValueError("there is nothing to do. Say what changes, for example --set code=0.3.")
        bounds = [bound for pair in self.bounds.values() for bound in pair]
        shares = [("set", [*self.set.values()]), ("pin", [*self.pin.values()]), ("bounds", bounds)]
        for key, values in [*shares, ("mixture", [*(self.mixture or {}).values()])]:
            for value in values:
                if not (math.isfinite(value) and 0 <= value <= 1):
                    raise ValueError(f"{key}: {value:g} is no weight, expected a number from 0 to 1.")
        return self

    def describe(self) -> str:
        """What it does, in a line."""
        parts = [
            f"undo {self.undo}" if self.undo is not None else "",
            f"mixer {_inline(self.mixer)}" if self.mixer is not None else "",
            f"unpin {listed(self.unpin)}" if self.unpin else "",
            f"mixture {shares_text(self.mixture)}" if self.mixture is not None else "",
            f"set {shares_text(self.set)}" if self.set else "",
            f"pin {shares_text(self.pin)}" if self.pin else "",
            f"bounds {listed(f'{name}={low:g}..{high:g}' for name, (low, high) in self.bounds.items())}"
            if self.bounds
            else "",
            {True: "hold", False: "release", None: ""}[self.hold],
            f"over {self.ramp_tokens:,.0f} tokens" if self.ramp_tokens else "",
        ]
        return "; ".join(part for part in parts if part)


def shares_text(weights: Mapping[str, float]) -> str:
    """``web=0.4, code=0.6``."""
    return listed(f"{name}={weight:.6g}" for name, weight in weights.items())


def _inline(mixer: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in mixer.items()) + "}"
