"""torch.compile of decoder layers (``engine.compile``).

Each layer is compiled by itself, all with one graph, as they differ in weights alone; embedding, head, loss and what
the engine does between layers are not.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable
from typing import Any

from megamix.core.errors import InputError
from megamix.engines.config import EngineConfig

BACKEND: Any = "inductor"


def check_compiler(engine: EngineConfig) -> None:
    """Checks that this machine has what ``engine.compile`` compiles with.

    Raises:
        InputError: naming the missing part.
    """
    if not getattr(engine, "compile", False):
        return
    import torch

    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            raise InputError(
                "engine.compile is true, but there is no package triton here, by which torch.compile makes kernels for a GPU. "
                'Install it (pip install "megamix[cuda]"), or leave compile out.'
            )
        return
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        raise InputError(
            f"engine.compile is true, but there is no C++ compiler here ({' or '.join(compilers)}), with which torch.compile makes "
            "code for a CPU. Install one, name one in CXX, or leave compile out."
        )


def compile_decoders(layers: Iterable[Any]) -> None:
    """Has the decoder layers among pipeline layers compiled in place, at their first use; names of parameters stay."""
    from megamix.engines.models.layers import Decoder

    for layer in layers:
        if isinstance(layer, Decoder):
            # Not the Decoder, which remembers tables and masks between calls. Shapes are those of a micro-batch.
            layer.layer.compile(backend=BACKEND, dynamic=False)
