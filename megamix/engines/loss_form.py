"""Form of the loss: from the whole logits of a micro-batch, or linear, from hidden states and the output weight."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megamix.core.log import get_logger
from megamix.core.text import gib
from megamix.engines.config import EngineConfig, MegatronConfig
from megamix.engines.models.config import ModelConfig

LINEAR_SHARE = 0.1
"""Share of a GPU's memory above which ``auto`` does without whole logits."""


def logits_shape(model: ModelConfig, engine: EngineConfig, *, seq_length: int, micro_batch: int) -> tuple[int, int]:
    """Returns the tokens of a micro-batch and the vocabulary of a rank of the last stage."""
    tensor, context = (engine.tensor, engine.context) if isinstance(engine, MegatronConfig) else (1, 1)
    return micro_batch * seq_length // context, model.vocabulary // tensor


def takes_linear_form(
    implementation: str,
    model: ModelConfig,
    engine: EngineConfig,
    *,
    seq_length: int,
    micro_batch: int,
    device: torch.device,
) -> bool:
    """Returns whether the loss takes the linear form: if asked for, or by ``auto`` on a GPU whose memory is short.

    Collective for ``auto`` on GPUs: the smallest decides for the job, as ranks that share a vocabulary must agree.
    """
    if implementation != "auto" or device.type != "cuda":
        return implementation == "linear"
    total = smallest_memory(device)
    tokens, width = logits_shape(model, engine, seq_length=seq_length, micro_batch=micro_batch)
    num_bytes = engine.number_bytes * tokens * width
    is_linear = num_bytes > LINEAR_SHARE * total
    if is_linear and dist.get_rank() == 0:
        get_logger().info(
            "loss.implementation auto: linear, as the logits of a micro-batch would take %s of a GPU's %s",
            gib(num_bytes), gib(total),
        )  # fmt: skip
    return is_linear


def smallest_memory(device: torch.device) -> int:
    """Returns the bytes of the smallest GPU of the job; collective."""
    memory = torch.tensor(torch.cuda.get_device_properties(device).total_memory, device=device)
    dist.all_reduce(memory, dist.ReduceOp.MIN)
    return int(memory)


def kernel_of(implementation: str) -> str:
    """Returns what computes the loss of given logits, as `megamix_kernels.LossOptions` names it."""
    return "auto" if implementation == "linear" else implementation
