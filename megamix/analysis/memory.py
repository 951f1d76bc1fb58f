"""Memory of a rank, by formula, before a job starts.

Legend: P parameters on a rank (of its stage; with tensor parallelism its shard), p pipeline stages, v chunks per stage,
t tensor-parallel ranks, c context-parallel ranks, D ranks that share the optimizer's state, m micro-batches of a rank
per step, B samples in a micro-batch, S tokens in a sample, H hidden size, H_kv width of the keys, F inner size of the
feed-forward layer, V vocabulary, e bytes of a number in the precision of the forward pass (fp32: 4, bf16 and fp16: 2).
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

from megamix.engines.config import GATHERED_LAYERS, REDUCE_BUCKET, DeepSpeedConfig, EngineConfig, MegatronConfig
from megamix.engines.models.config import ModelConfig

FP32 = 4
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class StageMemory:
    """Peak bytes of one rank of a pipeline stage.

    ``chunks`` are the pipeline layers (embedding 0, decoder layers, head) of each of the stage's v chunks. Under
    DeepSpeed (counted on transformers' layers with fused attention, which keeps no [S, S] matrix):

    - ``weights``: e P.
    - ``gradients``: 4 P; in bf16 and fp16 another 2 P, the gradients of a micro-batch before they are added to the
      fp32 sum.
    - ``optimizer``: Adam's moments, 8 P, and an fp32 copy of the weights, 4 P. ZeRO spreads both over the D
      data-parallel ranks; fp32 without ZeRO needs no copy.
    - ZeRO 2 spreads ``gradients``, too: 4 P / D for the sum of a step and as much again for what is added to it or
      taken from it, and, before they are reduced, 4 min(P, 5 10^8) for those of a micro-batch. ZeRO 3 also spreads
      ``weights``: e P / D, and e for each parameter of the two largest layers, which are gathered.
    - ``activations``: per token and decoder layer e (11 H + 2 F) for neox (with dropout 2 H more; with a parallel
      residual H less, also under Megatron) and e (6 H + 2 H_kv + 4 F) + 8 H for llama (its norms work in fp32). Stage s
      of p holds min(m, p - s) micro-batches at once (1F1B; s from 0). With activation checkpointing e H per token and
      decoder layer of each, and one layer in full. Each stage also holds its input, e H per token, and for attention
      within documents a mask for all its layers, e S per token.
    - ``logits``: on the last stage 2 e B S V, one micro-batch's logits and their gradient. (Triton's gradient takes the
      place of the logits: half of that.)
    - ``linear``: what the linear form of the loss takes in their place, 2 e R V for a chunk of R rows, which have 2^28
      logits or are the whole micro-batch, and the gradients that it computes with the loss, e B S H of the hidden
      states and 4 V H of the weight.

    Under Megatron:

    - ``weights``, ``gradients``, ``optimizer``: e P, 4 P in one buffer, and Adam's 8 P with, in bf16, an fp32 copy of
      4 P. The distributed optimizer spreads the last over the D data- and context-parallel ranks: 6 + 12 / D bytes a
      parameter in bf16, 8 + 8 / D in fp32 (Megatron Core's developer guide, "Distributed Optimizer"). Matrices and the
      biases of their columns are split in t, norms and the other biases are not.
    - ``activations``: per token and decoder layer e (4 H / s + (4 H + 2 F) / t) for neox and
      e (4 H / s + (2 H + 2 H_kv + 3 F) / t) for llama, where s is t with sequence parallelism and 1 without:
      Korthikanti et al., 2022 (arXiv 2205.05198), table 2, without dropout (whose masks add 2 H / s) and without the
      [S, S] matrix of each of the a heads, which fused attention does not keep. Megatron's own layers, used without
      Transformer Engine, keep that and more, counted on them: e (4 H / s + (6 H + 2 F + a S) / t) for neox and
      e (6 H / s + (4 H + 5 F + a S) / t) for llama. A rank has B S / c tokens of a micro-batch.
      With v chunks a stage, min(m v, 2 (p - s - 1) + (v - 1) p + 1) chunks are held at once (interleaved 1F1B,
      Narayanan et al., 2021, arXiv 2104.04473). With activation checkpointing e H / s per token and layer of each.
      Attention within documents takes masks of S bytes per token, none with Transformer Engine.
    - ``logits``: 2 e B S V / (c t).
    - ``linear``: 2 e R V / t, and e B S H / c; the gradient of the weight is added to its buffer.

    With ``tie_word_embeddings`` and more than one stage the last one has a copy of the embedding: under Megatron a
    parameter like any other, under DeepSpeed weights and gradients without the optimizer's state.

    Not counted: the memory of CUDA, NCCL and the allocator (1 to 2 GiB on a GPU), communication buffers, and loaded
    libraries.
    """

    stage: int
    chunks: tuple[tuple[int, int], ...]
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    linear: int

    @property
    def total(self) -> int:
        """With whole logits."""
        return self.total_linear - self.linear + self.logits

    @property
    def total_linear(self) -> int:
        """With the linear form of the loss."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.linear


def layer_parameters(model: ModelConfig, tensor: int = 1) -> list[int]:
    """Parameters of each pipeline layer (embedding, decoder layers, head) on one of ``tensor`` ranks."""
    hidden, embedding = model.hidden_size, model.vocabulary * model.hidden_size
    ends = model.model_copy(update={"num_layers": 0}).num_parameters()
    output = 0 if model.tie_word_embeddings else embedding
    norm = ends - embedding - output
    decoder = (model.num_parameters() - ends) // model.num_layers
    # Norms, and the biases of the projections that sum over the tensor-parallel ranks.
    whole = 2 * norm + (2 * hidden if model.architecture == "neox" else 0)
    decoder = (decoder - whole) // tensor + whole
    return [embedding // tensor, *[decoder] * model.num_layers, output // tensor + norm]


def stage_chunks(model: ModelConfig, engine: EngineConfig, seq_length: int) -> list[tuple[tuple[int, int], ...]]:
    """(first, last) pipeline layer of each chunk of each stage, as the engine cuts them."""
    if isinstance(engine, DeepSpeedConfig):
        bounds = _deepspeed_bounds(model, engine, seq_length)
        return [((first, stop - 1),) for first, stop in itertools.pairwise(bounds)]
    from megamix.engines.megatron.layout import stage_layers

    sizes = stage_layers(model, engine.pipeline * engine.virtual_pipeline, seq_length)
    # The embedding joins the first chunk, the head the last; chunk k is on stage k % p.
    bounds = [0, *(1 + stop for stop in itertools.accumulate(sizes))]
    bounds[-1] += 1
    chunks = [(first, stop - 1) for first, stop in itertools.pairwise(bounds)]
    return [tuple(chunks[stage :: engine.pipeline]) for stage in range(engine.pipeline)]


def _deepspeed_bounds(model: ModelConfig, engine: DeepSpeedConfig, seq_length: int) -> list[int]:
    """[p + 1]: the first pipeline layer of each stage, and the number of layers."""
    costs = model.layer_costs(seq_length)
    if engine.pipeline == 1:
        return [0, len(costs)]
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no GPU
    from deepspeed.runtime.utils import partition_balanced

    return [int(bound) for bound in partition_balanced(costs, engine.pipeline)]


def activation_bytes(model: ModelConfig, engine: EngineConfig, seq_length: int, local_layers: bool = False) -> int:
    """Bytes per token that a decoder layer keeps for its backward pass; formulas in `StageMemory`.

    Args:
        local_layers: under Megatron, its own layers instead of Transformer Engine's.
    """
    size, hidden, ffn = engine.number_bytes, model.hidden_size, model.ffn_size
    neox, key_value = model.architecture == "neox", hidden // model.num_heads * model.key_value_heads
    # A parallel residual has no sum of input and attention that the second norm would keep.
    whole = (3 if model.parallel_residual else 4) * hidden
    if isinstance(engine, DeepSpeedConfig):
        if neox:
            return size * (whole + 7 * hidden + 2 * ffn + (2 * hidden if model.dropout else 0))
        return size * (6 * hidden + 2 * key_value + 4 * ffn) + 2 * FP32 * hidden
    if local_layers:
        whole += 0 if neox else 2 * hidden
        split = (6 * hidden + 2 * ffn if neox else 4 * hidden + 5 * ffn) + model.num_heads * seq_length
    else:
        split = 4 * hidden + 2 * ffn if neox else 2 * hidden + 2 * key_value + 3 * ffn
    masks = 2 * hidden if model.dropout else 0
    return (size * whole + masks) // (engine.tensor if engine.sequence_parallel else 1) + size * split // engine.tensor


def estimate_memory(
    model: ModelConfig,
    engine: EngineConfig,
    *,
    seq_length: int,
    micro_batch: int,
    num_micro_batches: int,
    data_size: int,
    local_layers: bool = False,
    within_documents: bool = False,
) -> list[StageMemory]:
    """The memory of a rank of each stage; formulas in `StageMemory`.

    Args:
        model: its vocabulary settled.
        num_micro_batches: of one rank in one step.
        data_size: data-parallel ranks.
        local_layers: under Megatron, its own layers instead of Transformer Engine's.
        within_documents: whether attention stays within documents.
    """
    megatron = engine if isinstance(engine, MegatronConfig) else None
    tensor, context, chunks_per_stage = (
        (megatron.tensor, megatron.context, megatron.virtual_pipeline) if megatron else (1, 1, 1)
    )
    size, tokens = engine.number_bytes, micro_batch * seq_length // context
    parameters = layer_parameters(model, tensor)
    layer = activation_bytes(model, engine, seq_length, local_layers)
    boundary = size * model.hidden_size // (tensor if megatron and megatron.sequence_parallel else 1)
    logits, linear = _loss_bytes(model, engine, seq_length, micro_batch)
    stages = []
    for stage, chunks in enumerate(stage_chunks(model, engine, seq_length)):
        is_last = stage == engine.pipeline - 1
        count = sum(sum(parameters[first : last + 1]) for first, last in chunks)
        held_twice = parameters[0] if model.tie_word_embeddings and is_last and stage > 0 else 0
        present, count = count + held_twice, count + (held_twice if megatron else 0)
        decoders = max(min(last, model.num_layers) - max(first, 1) + 1 for first, last in chunks)
        held = _chunks_held(engine.pipeline, stage, chunks_per_stage, num_micro_batches)
        if engine.activation_checkpointing:
            kept = tokens * (held * boundary * (decoders + 1) + (layer if decoders else 0))
        else:
            kept = tokens * held * (layer * decoders + boundary)
        if within_documents:
            kept += tokens * held * seq_length * (size if megatron is None else int(local_layers))
        stages.append(
            StageMemory(
                stage=stage,
                chunks=chunks,
                parameters=count,
                weights=_weight_bytes(engine, present, data_size, parameters),
                gradients=_gradient_bytes(engine, present, data_size),
                optimizer=_optimizer_bytes(engine, count, data_size * context),
                activations=kept,
                logits=logits if is_last else 0,
                linear=linear if is_last else 0,
            )
        )
    return stages


def checkpoint_bytes(model: ModelConfig) -> int:
    """Size of one checkpoint: weights and Adam's moments in fp32, whatever the layout; the rest is small."""
    return FP32 * (1 + ADAM_MOMENTS) * model.num_parameters()


def _chunks_held(stages: int, stage: int, chunks: int, num_micro_batches: int) -> int:
    """Passes through a chunk whose activations a stage holds at once: its warm-up and the current one."""
    if chunks == 1:
        return min(num_micro_batches, stages - stage)
    return min(num_micro_batches * chunks, 2 * (stages - stage - 1) + (chunks - 1) * stages + 1)


def _loss_bytes(model: ModelConfig, engine: EngineConfig, seq_length: int, micro_batch: int) -> tuple[int, int]:
    """Returns (logits, linear) of the last stage; formulas in `StageMemory`."""
    from megamix.engines.loss_form import logits_shape
    from megamix_kernels.linear import default_chunk_rows

    size, hidden = engine.number_bytes, model.hidden_size
    tokens, width = logits_shape(model, engine, seq_length=seq_length, micro_batch=micro_batch)
    gradients = size * tokens * hidden + (FP32 * width * hidden if isinstance(engine, DeepSpeedConfig) else 0)
    return 2 * size * tokens * width, 2 * size * min(tokens, default_chunk_rows(width)) * width + gradients


def _weight_bytes(engine: EngineConfig, count: int, sharers: int, layers: list[int]) -> int:
    if isinstance(engine, DeepSpeedConfig) and engine.zero == 3:
        count = -(-count // sharers) + sum(sorted(layers)[-GATHERED_LAYERS:])
    return engine.number_bytes * count


def _gradient_bytes(engine: EngineConfig, count: int, sharers: int) -> int:
    if isinstance(engine, DeepSpeedConfig) and not engine.has_pipeline:
        return 2 * FP32 * -(-count // sharers) + FP32 * min(count, REDUCE_BUCKET)
    of_micro_batch = isinstance(engine, DeepSpeedConfig) and engine.precision != "fp32"
    return FP32 * count + (engine.number_bytes * count if of_micro_batch else 0)


def _optimizer_bytes(engine: EngineConfig, count: int, sharers: int) -> int:
    moments, copy = FP32 * ADAM_MOMENTS * count, FP32 * count
    is_half = engine.precision != "fp32"
    if isinstance(engine, DeepSpeedConfig):
        return -(-(moments + copy) // sharers) if engine.zero or is_half else moments
    state = moments + (copy if is_half else 0)
    return -(-state // sharers) if engine.distributed_optimizer else state
