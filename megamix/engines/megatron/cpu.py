"""Megatron-core without a GPU: inside `cpu_stand_ins`, its many uses of the device "cuda" mean the CPU.

Covers only the calls of this package's training steps and checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects tensors for "cuda" to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer distinguishes dtypes by names such as torch.cuda.FloatTensor.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)


class _NoStream:
    """Stream of the CPU, on which every call has finished when it returns."""

    def wait_stream(self, _other: object) -> None: ...

    def synchronize(self) -> None: ...


def _get_state(*_args: Any, **_options: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *_args: Any, **_options: Any) -> None:
    torch.set_rng_state(state)


def _stand_ins() -> list[tuple[Any, str, Any]]:
    stream = _NoStream()
    return [
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "current_stream", lambda *_: stream),
        (torch.cuda, "default_stream", lambda *_: stream),
        (torch.cuda, "get_rng_state", _get_state),
        (torch.cuda, "set_rng_state", _set_state),
        (torch.cuda, "manual_seed", torch.default_generator.manual_seed),
        (megatron_random, "_get_cuda_rng_state", _get_state),
        (megatron_random, "_set_cuda_rng_state", _set_state),
    ]


@contextlib.contextmanager
def cpu_stand_ins() -> Iterator[None]:
    """Context in which megatron.core runs on a machine without a GPU; does nothing where there is one."""
    if torch.cuda.is_available():
        yield
        return
    # Megatron's GPU generator is the CPU's here, so dropout advances "the CPU's" too, and it would warn each time.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    replaced = [(owner, name, getattr(owner, name), value) for owner, name, value in _stand_ins()]
    for owner, name, _, value in replaced:
        setattr(owner, name, value)
    try:
        with _CudaMeansCpu():
            yield
    finally:
        for owner, name, original, _ in replaced:
            setattr(owner, name, original)
