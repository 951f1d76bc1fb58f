"""Optional packages: the extra of this distribution that brings each, and the message where one is missing.

What every command needs is always installed. The rest is imported where it is used. PyTorch, too, is an extra: a
cluster has its own build, which an installation must not replace.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from megamix.core.errors import InputError

MODULES = {
    "torch": ("torch",),
    "prepare": ("tokenizers", "regex", "zstandard", "pyarrow"),
    "remote": ("fsspec",),
    "datasets": ("datasets",),
    "sentencepiece": ("sentencepiece", "google"),  # google.protobuf
    "hf": ("transformers", "accelerate", "safetensors", "tokenizers", "torch"),
    "deepspeed": ("deepspeed", "transformers", "safetensors", "torch"),
    "megatron": ("megatron", "safetensors", "torch"),
    "swarm": ("cvxpy", "lightgbm", "sklearn"),
    "plot": ("matplotlib",),
    "cuda": ("triton",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}
"""Extra -> the modules that it brings; of several extras that have one, a message names the first."""


def missing_package(error: ModuleNotFoundError, purpose: str = "this command") -> InputError | None:
    """What to tell a user whose import failed.

    Args:
        purpose: what needs the package, to begin the message with.

    Returns:
        None: the module is of no extra, so its absence is a defect.
    """
    module = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in MODULES.items() if module in modules), None)
    return None if extra is None else _lacks(purpose, module, extra)


def need(module: str, purpose: str) -> Any:
    """Imports a module of an extra.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        told = missing_package(error, purpose)
        if told is None:
            raise
        raise told from error
    except ImportError as error:
        raise InputError(
            f"{purpose} needs the package {module.partition('.')[0]}, which does not work here: {error}. Repair it."
        ) from error


def check_extra(extra: str, purpose: str) -> None:
    """Checks that all modules of an extra are installed, without importing them.

    Raises:
        InputError: naming the first that is not.
    """
    for module in _missing(extra):
        raise _lacks(purpose, module, extra)


def has_extra(extra: str) -> bool:
    """Whether all modules of an extra are installed, without importing them."""
    return not any(_missing(extra))


def _missing(extra: str) -> Iterator[str]:
    return (module for module in MODULES[extra] if importlib.util.find_spec(module) is None)


def _lacks(purpose: str, module: str, extra: str) -> InputError:
    return InputError(f"{purpose} needs the package {module}, which is not installed: pip install 'megamix[{extra}]'.")
