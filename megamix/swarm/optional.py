"""Packages that only some steps of a swarm need."""

from __future__ import annotations

import importlib
from typing import Any

from megamix.errors import InputError


def need(module: str, purpose: str) -> Any:
    """Imports a package of the extra ``swarm``.

    Args:
        purpose: what needs it, to begin the message with.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(
            f'{purpose} needs the package {package}: {error}. Install it: pip install "megamix[swarm]"'
        ) from error
