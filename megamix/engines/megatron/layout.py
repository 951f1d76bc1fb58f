"""Megatron's layout: layers per pipeline chunk, and checks before any process group exists."""

from __future__ import annotations

import importlib.util
from functools import cache

from megamix.core.errors import InputError
from megamix.engines.config import MegatronConfig
from megamix.engines.models.config import ModelConfig


def uses_transformer_engine(config: MegatronConfig) -> bool:
    """Whether the layers are Transformer Engine's."""
    if config.transformer_engine == "auto":
        import torch

        return torch.cuda.is_available() and _installed("transformer_engine")
    return config.transformer_engine == "on"


def stage_layers(model: ModelConfig, num_chunks: int, seq_length: int) -> list[int]:
    """Returns the decoder layers of each pipeline chunk, in data order: at least one, and the least possible work
    (`ModelConfig.layer_costs`) in the busiest chunk."""
    costs = model.layer_costs(seq_length)
    layer, head = costs[1], costs[-1]

    @cache
    def best(layers: int, chunks: int) -> tuple[int, tuple[int, ...]]:
        """Returns the busiest chunk's work and the sizes, for the last ``chunks`` chunks and ``layers`` layers."""
        if chunks == 1:
            return layers * layer + head, (layers,)
        options = []
        for first in range(1, layers - chunks + 2):
            busiest, others = best(layers - first, chunks - 1)
            options.append((max(first * layer, busiest), (first, *others)))
        # Ties go to the sizes that differ least.
        return min(options, key=lambda option: (option[0], max(option[1]) - min(option[1])))

    return list(best(model.num_layers, num_chunks)[1])


def check_megatron_layout(
    config: MegatronConfig, model: ModelConfig, seq_length: int, micro_batches: int, vocab_size: int | None = None
) -> None:
    """Checks that the model can have the layout, on any machine.

    Args:
        micro_batches: micro-batches of one data-parallel rank in a step.
        vocab_size: rows of the embedding; None if not known yet.

    Raises:
        InputError: with the arithmetic.
    """
    _check_tensor(config, model, vocab_size)
    _check_pipeline(config, model, micro_batches)
    _check_sequence(config, seq_length)
    if config.distributed_optimizer and config.checkpoint_format == "layers":
        raise InputError(
            "engine.distributed_optimizer holds pieces of parameters that only megatron.core puts together. "
            "Set engine.checkpoint_format to dist."
        )


def _check_tensor(config: MegatronConfig, model: ModelConfig, vocab_size: int | None) -> None:
    divided = {
        "model.num_heads": model.num_heads,
        "model.num_key_value_heads": model.key_value_heads,
        "model.ffn_size": model.ffn_size,
        "the vocabulary (the tokenizer's, rounded up to a multiple of 64, or model.vocab_size)": vocab_size,
    }
    for name, value in divided.items():
        if value is not None and value % config.tensor:
            raise InputError(
                f"engine.tensor {config.tensor} does not divide {name}: {value} = {value // config.tensor} x {config.tensor} + "
                f"{value % config.tensor}. Choose a divisor of {value} for engine.tensor, or another size for the model."
            )


def _check_pipeline(config: MegatronConfig, model: ModelConfig, micro_batches: int) -> None:
    chunks = config.pipeline * config.virtual_pipeline
    if chunks > model.num_layers:
        raise InputError(
            f"engine.pipeline {config.pipeline} x virtual_pipeline {config.virtual_pipeline} = {chunks} chunks, but the model has "
            f"{model.num_layers} decoder layers. Use at most one chunk per layer."
        )
    if config.virtual_pipeline > 1 and config.pipeline == 1:
        raise InputError(
            f"engine.virtual_pipeline is {config.virtual_pipeline} and engine.pipeline is 1, but only the stages of a pipeline can be "
            "interleaved. Set pipeline to 2 or more, or leave virtual_pipeline out."
        )
    if config.virtual_pipeline > 1 and micro_batches % config.pipeline:
        raise InputError(
            f"engine.virtual_pipeline sends micro-batches in groups of engine.pipeline {config.pipeline}, but a data-parallel rank "
            f"has {micro_batches} in a step. Change train.global_batch or train.micro_batch so that it has a multiple of "
            f"{config.pipeline}, or leave virtual_pipeline out."
        )


def _check_sequence(config: MegatronConfig, seq_length: int) -> None:
    if config.sequence_parallel and config.tensor == 1:
        raise InputError(
            "engine.sequence_parallel splits what engine.tensor leaves whole, but engine.tensor is 1. "
            "Set tensor to 2 or more, or leave sequence_parallel out."
        )
    parts = 2 * config.context if config.context > 1 else 1
    if seq_length % parts:
        raise InputError(
            f"engine.context {config.context} cuts a sample into 2 x {config.context} = {parts} parts, but data.seq_length is {seq_length} = "
            f"{seq_length // parts} x {parts} + {seq_length % parts}. Choose a multiple of {parts}."
        )
    length = seq_length // config.context
    if config.sequence_parallel and length % config.tensor:
        raise InputError(
            f"engine.sequence_parallel divides the {length} tokens that a rank has of a sample by engine.tensor {config.tensor}, which leaves "
            f"{length % config.tensor}. Choose a data.seq_length that is a multiple of {config.context * config.tensor}."
        )


def check_within_documents(config: MegatronConfig) -> None:
    """Checks that attention can stay within documents.

    Raises:
        InputError: it cannot.
    """
    if config.context > 1:
        raise InputError(
            f"engine.context is {config.context}, which divides every sample over the ranks, and data.attention is document: documents "
            "are not divided. Set context to 1 (more tensor-parallel ranks or activation_checkpointing save memory, too), or leave "
            "data.attention out."
        )


def check_megatron_machine(config: MegatronConfig) -> None:
    """Checks that this machine has the GPU, Transformer Engine or Apex that the layout needs.

    Raises:
        InputError: naming the missing part.
    """
    import torch

    cuda, engine, apex = torch.cuda.is_available(), uses_transformer_engine(config), _installed("apex")
    if engine and not (cuda and _installed("transformer_engine")):
        what = "no GPU" if not cuda else "no package transformer_engine"
        raise InputError(f"engine.transformer_engine is on, but there is {what} here. Set it to auto or off.")
    if config.context > 1 and not engine:
        raise InputError(
            f"engine.context is {config.context}, but megatron.core's own attention wants whole samples; only Transformer Engine's can "
            "divide them. Install Transformer Engine on a GPU, or set context to 1."
        )
    if config.sequence_parallel and not (engine or (cuda and apex)):
        raise InputError(
            "engine.sequence_parallel needs the norms of Transformer Engine or Apex, and neither can be used here. "
            "Install one of them on a GPU, or leave sequence_parallel out."
        )
    if config.distributed_optimizer and not (cuda and (_installed("transformer_engine") or apex)):
        raise InputError(
            "engine.distributed_optimizer needs a GPU and the Adam of Transformer Engine or Apex: with PyTorch's, megatron.core resumes with "
            "another step count in silence. Leave distributed_optimizer out, or install one of them."
        )
    if config.gradient_accumulation_fusion and not (cuda and (engine or _installed("fused_weight_gradient_mlp_cuda"))):
        raise InputError(
            "engine.gradient_accumulation_fusion needs the kernel of Transformer Engine or Apex (fused_weight_gradient_mlp_cuda), and neither "
            "can be used here. Leave it out."
        )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
