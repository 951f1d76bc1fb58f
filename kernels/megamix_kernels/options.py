"""Settings of the domain loss."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

IMPLEMENTATIONS = ("auto", "torch", "triton")


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Settings of `domain_cross_entropy` and `linear_domain_cross_entropy`.

    Raises:
        TypeError: a setting has a wrong type.
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
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))

    def changed(self, settings: Mapping[str, Any]) -> LossOptions:
        """Returns the options with other values, like `dataclasses.replace` in a fifth of its time.

        Raises:
            TypeError: a setting is unknown or has a wrong type.
            ValueError: as for the class.
        """
        if not settings:
            return self
        changed = object.__new__(LossOptions)
        values = changed.__dict__
        values.update(self.__dict__)
        for name, value in settings.items():
            if name not in values:
                raise TypeError(f"unexpected keyword argument '{name}'; settings are {', '.join(values)}")
            if name in _CHECKS:
                _CHECKS[name](name, value)
            values[name] = value
        return changed


def settled(options: LossOptions, settings: Mapping[str, Any]) -> LossOptions:
    """Returns the options of a call: an object, of which its keywords replace fields."""
    if not isinstance(options, LossOptions):
        seen = type(options).__name__
        raise TypeError(f"options must be a LossOptions, got {seen}; settings can be keywords too (z_loss=1e-4)")
    return options.changed(settings)


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be a number (0 is off), got {value!r}")


def _check_coefficient(name: str, value: Any) -> None:
    _check_number(name, value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative (0 is off), got {value}")


def _check_share(name: str, value: Any) -> None:
    _check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def _check_whole(name: str, value: object) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")


def _check_vocab_size(name: str, value: object) -> None:
    if value is not None:
        _check_whole(name, value)


def _check_group(name: str, value: object) -> None:
    if value is not None and not isinstance(value, dist.ProcessGroup):
        raise TypeError(f"{name} must be a ProcessGroup or None, got {value!r}; a DeviceMesh has one (get_group())")


def _check_implementation(name: str, value: object) -> None:
    if value not in IMPLEMENTATIONS:
        raise ValueError(f"{name} must be one of {', '.join(IMPLEMENTATIONS)}; got {value!r}")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "ignore_index": _check_whole,
    "z_loss": _check_coefficient,
    "softcap": _check_coefficient,
    "label_smoothing": _check_share,
    "vocab_size": _check_vocab_size,
    "process_group": _check_group,
    "implementation": _check_implementation,
}
