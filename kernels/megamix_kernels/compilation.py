"""The place of the loss in a compiled model: beside it.

The calls read options, check values and launch kernels of their own, of which a compiler makes many small graphs. Taken
out as a whole, a call is one break, and what stands before and after it compiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function that torch.compile calls as it is.

    `torch.compiler.disable` imports the compiler, which takes seconds, and costs microseconds a call: only a compiler
    that traces the call sees it.
    """

    outside: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        if not outside:
            outside.append(torch.compiler.disable(function))  # pyright: ignore[reportArgumentType]
        return outside[0](*args, **kwargs)

    return call
