"""Set-up of megatron.core: process groups, wrapped chunks, and the optimizer with its state."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
import torch.distributed as dist

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # see model.py
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

from megamix.engines.base import Place, local_device
from megamix.engines.config import MegatronConfig, TrainConfig
from megamix.engines.megatron.model import MixChunk

__all__ = ["get_forward_backward_func", "parallel_state", "tensor_parallel"]


def start_groups(engine: MegatronConfig) -> None:
    """Creates Megatron's process groups; replaces an earlier engine's in this process."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=engine.tensor,
        pipeline_model_parallel_size=engine.pipeline,
        virtual_pipeline_model_parallel_size=engine.virtual_pipeline if engine.virtual_pipeline > 1 else None,
        context_parallel_size=engine.context,
        create_gloo_process_groups=False,
    )


def place(engine: MegatronConfig, *, reads_all_stages: bool) -> Place:
    """Returns this rank's place in the process groups."""
    return Place(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        num_stages=engine.pipeline,
        device=local_device(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        reads_all_stages=reads_all_stages,
    )


def wrap(engine: MegatronConfig, config: TransformerConfig, chunks: list[MixChunk]) -> list[Any]:
    """Wraps the chunks for the pipeline schedules: in bf16 if configured, with gradients summed in fp32 over
    data-parallel ranks."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=True,
        use_distributed_optimizer=engine.distributed_optimizer,
        average_in_collective=False,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        inner = Float16Module(config, chunk) if engine.precision == "bf16" else chunk
        # Only the first chunk's gradients are ready early enough for several buckets to pay.
        wrapped.append(DistributedDataParallel(config, ddp_config, inner, disable_bucketing=index > 0))
    no_sync = [chunk.no_sync for chunk in wrapped]
    config.no_sync_func = cast(Any, no_sync if len(wrapped) > 1 else no_sync[0])
    config.finalize_model_grads_func = _finish_gradients
    return wrapped


def _finish_gradients(chunks: list[Any], _num_tokens: torch.Tensor | None, **options: Any) -> None:
    """Runs Megatron's reductions without its division by the number of tokens, which the loss includes."""
    finalize_model_grads(chunks, None, **options)


def unwrap(wrapped: Any) -> MixChunk:
    while not isinstance(wrapped, MixChunk):
        wrapped = wrapped.module
    return wrapped


def make_optimizer(engine: MegatronConfig, train: TrainConfig, wrapped: list[Any]) -> Any:
    """Builds AdamW; matrices decay, biases and norms do not."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        adam_eps=train.epsilon,
        clip_grad=train.clip,
        bf16=engine.precision == "bf16",
        params_dtype=torch.bfloat16 if engine.precision == "bf16" else torch.float32,
        use_distributed_optimizer=engine.distributed_optimizer,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = get_megatron_optimizer(config, wrapped, use_gloo_process_groups=False)
    set_decay(optimizer, train)
    return optimizer


def set_decay(optimizer: Any, train: TrainConfig) -> None:
    """Sets each parameter group's decay and Adam settings from the config: Megatron leaves the decay to its scheduler,
    and loading a checkpoint restores the settings of its run."""
    for group in optimizer.param_groups:
        group["weight_decay"] = train.weight_decay * group["wd_mult"]
        group["betas"], group["eps"] = (train.beta1, train.beta2), train.epsilon


def held_state(optimizer: Any, parameter: torch.nn.Parameter) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the trained fp32 weight and its Adam moments, without copies."""
    weight = getattr(parameter, "main_param", parameter)
    state = optimizer.optimizer.state[weight]
    return weight.data, state["exp_avg"], state["exp_avg_sq"]


def reset_adam(optimizer: Any, steps: int) -> None:
    """Zeroes every parameter's moments and sets the step count."""
    adam = optimizer.optimizer
    for group in adam.param_groups:
        own_steps = isinstance(adam, torch.optim.AdamW)
        if not own_steps:
            group["step"] = steps  # Transformer Engine's and Apex's Adam count once for all
        for parameter in group["params"]:
            adam.state[parameter] = {
                **({"step": torch.tensor(float(steps))} if own_steps else {}),
                "exp_avg": torch.zeros_like(parameter.data),
                "exp_avg_sq": torch.zeros_like(parameter.data),
            }
