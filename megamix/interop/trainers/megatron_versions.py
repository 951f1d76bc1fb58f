"""Functions of Megatron-LM whose parameters changed between core_v0.14 and its main branch (0.20), called by what the
installed one takes.

    get_batch_on_this_cp_rank   0.14 (batch)
                                0.16 (batch, cp_group=None)
                                0.18 (batch, is_hybrid_cp, cp_group=None, ...)
    pretrain                    0.14 (provider, model_provider, model_type, forward_step_func, ...)
                                0.18 (cfg_container, provider, model_provider, model_type, forward_step_func, ...)
                                0.19 (cfg_container, provider, model_type, forward_step_func, model_provider=None, ...)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from megamix.core.errors import InputError
from megamix.interop.trainers.megatron_arguments import HOST

SEEN = "core_v0.14.0, 0.15.3, 0.16.1, 0.17.1, 0.18.2, 0.19.0 and main (0.20) of August 2026"


def context_parallel_part(batch: dict[str, Any], split: Callable[..., Any], group: Callable[[], Any]) -> dict[str, Any]:
    """The part of ``batch`` that this context-parallel rank computes; may change ``batch``.

    Args:
        split: Megatron's ``get_batch_on_this_cp_rank``.
        group: returns the context-parallel group.

    Raises:
        InputError: ``split`` is of a form that is not known.
    """
    names = _parameters(split)
    # Newer versions take the whole world for the group that is left out; older ones take none.
    given = {"is_hybrid_cp": False, "cp_group": group()} if "cp_group" in names else {}
    options = {name: value for name, value in given.items() if name in names}
    _refuse_missing(split, {"batch", *options})
    return split(batch, **options)


def call_pretrain(pretrain: Callable[..., Any], given: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Calls ``pretrain`` with the arguments that it takes.

    Args:
        given: the adapter's and the model's by name; None: not given.
        options: more of the user's.

    Raises:
        InputError: an argument is missing or has no place, or ``pretrain`` is of a form that is not known.
    """
    names = _parameters(pretrain)
    arguments = {**{name: value for name, value in given.items() if value is not None}, **options}
    if "cfg_container" in names and "cfg_container" not in arguments:
        raise InputError(
            f"this {HOST}'s pretrain() begins with cfg_container. Give "
            "cfg_container=pretrain_cfg_container_from_args(parse_and_validate_args(...)), as its pretrain_gpt.py does."
        )
    for name in arguments:
        if name not in names:
            raise InputError(
                f"this {HOST}'s pretrain() takes no {name}. It takes {', '.join(names)}. Installed: {_installed()}."
            )
    _refuse_missing(pretrain, arguments.keys())
    return pretrain(**arguments)


@functools.cache
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _refuse_missing(function: Callable[..., Any], given: Any) -> None:
    """Raises InputError where ``function`` needs an argument that is not in ``given``."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = _parameters(function)
    needed = [name for name, each in parameters.items() if each.default is each.empty and each.kind not in kinds]
    missing = [name for name in needed if name not in given]
    if missing:
        raise InputError(
            f"{HOST}'s {function.__name__}({', '.join(parameters)}) needs {', '.join(missing)}, which was not given or is "
            f"not known here. Installed: {_installed()}. Versions seen to train: {SEEN}."
        )


def _installed() -> str:
    """Name and version of the installed Megatron-LM, which has those of its core."""
    from megatron.core import __version__

    return f"core_v{__version__}"
