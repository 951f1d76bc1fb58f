"""Settings of the domain loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

IMPLEMENTATIONS = ("auto", "torch", "triton")


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Settings of `domain_cross_entropy` and `linear_domain_cross_entropy`.

    Raises:
        ValueError: a coefficient is out of range, or the implementation is unknown.
    """

    ignore_index: int = -100
    """Label of rows to ignore."""
    z_loss: float = 0.0
    """Coefficient of lse**2; 0 is off."""
    softcap: float = 0.0
    """Bound of the logits; 0 is off."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread evenly over the valid vocabulary, in [0, 1)."""
    vocab_size: int | None = None
    """Number of valid leading columns where the vocabulary is padded; the others join no softmax and get a zero
    gradient. None: all columns. Counts the columns of all ranks of ``process_group``."""
    normaliser: float | Tensor | None = None
    """Divisor of the weighted sum: a positive number, or a tensor with one element on the logits' device or the CPU,
    which may be 0 if no row is counted. None: the number of counted tokens of the call, or 1 if there are none. The
    loss is 0 where no row is counted."""
    gradient_scale: float | Tensor | None = None
    """Mode A: a promise that this gradient will reach ``loss``, as a number or a tensor with one element on the logits'
    device or the CPU. The gradient is then ready when the call returns, and the backward pass hands it on once. A
    broken promise raises on the CPU; elsewhere raising would wait for the device, and the promised gradient is used
    unless ``check_promise``."""
    check_promise: bool = False
    """Whether the device compares the incoming gradient with the promised one, in a few small launches that nobody
    waits for. A difference is a failed assertion on the device, which ends the process at its next wait."""
    return_token_loss: bool = False
    """Whether to return the token losses."""
    process_group: dist.ProcessGroup | None = None
    """Ranks that share the vocabulary; None: the logits hold all of it."""
    implementation: str = "auto"
    """torch; triton, for fp32, fp16 and bf16 logits with adjacent columns on a GPU (or under Triton's interpreter,
    TRITON_INTERPRET=1); auto: triton on a GPU where it can be used, else torch."""

    def __post_init__(self) -> None:
        for name in ("z_loss", "softcap"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative (0 is off), got {value}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {self.implementation!r}")

    def changed(self, settings: Mapping[str, Any]) -> LossOptions:
        """Returns the options with other values, like `dataclasses.replace` in a third of its time.

        Raises:
            TypeError: a setting is unknown.
        """
        if not settings:
            return self
        if not settings.keys() <= self.__dict__.keys():
            unknown = min(settings.keys() - self.__dict__.keys())
            raise TypeError(f"unexpected keyword argument '{unknown}'; settings are {', '.join(self.__dict__)}")
        changed = object.__new__(LossOptions)
        changed.__dict__.update(self.__dict__)
        changed.__dict__.update(settings)
        changed.__post_init__()
        return changed
