"""Checkpoints of megatron.core.dist_checkpointing, in PyTorch's distributed format: every rank writes and reads its own
parts, and another layout finds its parts by their place in the whole.

Two of the files are pickles: ``common.pt``, which Megatron loads with torch's ``weights_only``, and ``.metadata``,
which torch.distributed.checkpoint unpickles whole. The hashes that are checked first reveal damage, not malice: ask
somebody else for a checkpoint in the format ``layers``.
"""

from __future__ import annotations

import queue
import warnings
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # see model.py
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies import filesystem_async

from megamix.engines.megatron.model import MixChunk


def save(folder: Path, chunks: list[MixChunk], optimizer: Any) -> None:
    """Writes model and optimizer into an empty folder; collective."""
    # A synchronous save needs its results in this process only. For them Megatron would start another process, which
    # takes seconds and runs the main script again.
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist_checkpointing.save(_state(chunks, optimizer, is_loading=False), str(folder))


def load(folder: Path, chunks: list[MixChunk], optimizer: Any) -> None:
    """Loads a folder that `save` wrote in any layout; collective."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Any = dist_checkpointing.load(_state(chunks, optimizer, is_loading=True), str(folder))
    for key, chunk in _named(chunks).items():
        chunk.load_state_dict(loaded[key])
    optimizer.load_state_dict(loaded["optimizer"])


def _named(chunks: list[MixChunk]) -> dict[str, MixChunk]:
    if len(chunks) == 1:
        return {"model": chunks[0]}
    return {f"model{index}": chunk for index, chunk in enumerate(chunks)}


def _state(chunks: list[MixChunk], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        # With the distributed optimizer: every piece is stored by its parameter's place, for any layout.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _named(chunks).items()}
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    return state
