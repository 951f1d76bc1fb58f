"""How much memory a rank needs, by formula, before anything is started.

Legend: P parameters of a stage, D data-parallel ranks, p pipeline stages, m micro-batches of a rank per step, B samples
in a micro-batch, S tokens in a sample, H hidden size, F inner size of the feed-forward layer, V vocabulary, e bytes of
a number in the precision of the forward pass (fp32: 4, bf16: 2).
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

from megamix.engines.config import EngineConfig
from megamix.models.config import ModelConfig

FP32 = 4
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class StageMemory:
    """Bytes that one rank of a pipeline stage holds at its fullest.

    - ``weights``: e P.
    - ``gradients``: 4 P; in bf16 another 2 P, the gradients of a micro-batch before they are added to the fp32 sum.
    - ``optimizer``: Adam's moments, 8 P, and an fp32 copy of the weights, 4 P. ZeRO 1 and the bf16 optimizer spread
      both over the D data-parallel ranks; fp32 without ZeRO needs no copy.
    - ``activations``: per token and decoder layer e (11 H + 2 F) for neox (with dropout 2 H more) and
      e (6 H + 2 H_kv + 4 F) + 8 H for llama (H_kv: width of keys; its norms work in fp32), counted on transformers'
      layers with fused attention, which keeps no [S, S] matrix. Stage s of p holds min(m, p - s) micro-batches at once
      (1F1B; s from 0). With activation checkpointing e H per token and decoder layer of each, and one layer in full.
      Each stage also holds its input, e H per token.
    - ``logits``: on the last stage 2 e B S V, one micro-batch's logits and their gradient.

    Not counted: what CUDA, NCCL and the allocator keep for themselves (1 to 2 GiB on a GPU), communication buffers, and
    the loaded libraries.
    """

    stage: int
    first_layer: int
    last_layer: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def layer_parameters(model: ModelConfig) -> list[int]:
    """Parameters of each pipeline layer: embedding, decoder layers, head."""
    embedding = model.vocabulary * model.hidden_size
    ends = model.model_copy(update={"num_layers": 0}).num_parameters()
    decoder = (model.num_parameters() - ends) // model.num_layers
    return [embedding, *[decoder] * model.num_layers, ends - embedding]


def stage_bounds(model: ModelConfig, seq_length: int, num_stages: int) -> list[int]:
    """[num_stages + 1]: the first pipeline layer of each stage, and the number of layers; as DeepSpeed cuts them."""
    costs = model.layer_costs(seq_length)
    if num_stages == 1:
        return [0, len(costs)]
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no GPU
    from deepspeed.runtime.utils import partition_balanced

    return [int(bound) for bound in partition_balanced(costs, num_stages)]


def activation_bytes(model: ModelConfig, precision: str) -> int:
    """Bytes per token that a decoder layer keeps for its backward pass; formula in `StageMemory`."""
    size, hidden, ffn = _bytes(precision), model.hidden_size, model.ffn_size
    if model.architecture == "neox":
        return size * (11 * hidden + 2 * ffn + (2 * hidden if model.dropout else 0))
    key_value = hidden // model.num_heads * model.key_value_heads
    return size * (6 * hidden + 2 * key_value + 4 * ffn) + 2 * FP32 * hidden


def estimate_memory(
    model: ModelConfig,
    engine: EngineConfig,
    *,
    seq_length: int,
    micro_batch: int,
    num_micro_batches: int,
    data_size: int,
) -> list[StageMemory]:
    """The memory of a rank of each stage; formulas in `StageMemory`.

    Args:
        model: its vocabulary settled.
        num_micro_batches: of one rank in one step.
    """
    parameters = layer_parameters(model)
    bounds = stage_bounds(model, seq_length, engine.pipeline)
    size = _bytes(engine.precision)
    spread = engine.zero == 1 or engine.precision == "bf16"
    tokens = micro_batch * seq_length
    stages = []
    for stage, (first, stop) in enumerate(itertools.pairwise(bounds)):
        count = sum(parameters[first:stop])
        decoders = min(stop, model.num_layers + 1) - max(first, 1)
        in_flight = min(num_micro_batches, engine.pipeline - stage)
        layer, boundary = activation_bytes(model, engine.precision), size * model.hidden_size
        if engine.activation_checkpointing:
            kept = tokens * (in_flight * boundary * (decoders + 1) + (layer if decoders else 0))
        else:
            kept = tokens * in_flight * (layer * decoders + boundary)
        state = FP32 * ADAM_MOMENTS * count
        stages.append(
            StageMemory(
                stage=stage,
                first_layer=first,
                last_layer=stop - 1,
                parameters=count,
                weights=size * count,
                gradients=FP32 * count + (size * count if engine.precision == "bf16" else 0),
                optimizer=-(-(state + FP32 * count) // data_size) if spread else state,
                activations=kept,
                logits=2 * size * tokens * model.vocabulary if stage == engine.pipeline - 1 else 0,
            )
        )
    return stages


def checkpoint_bytes(model: ModelConfig) -> int:
    """Size of one checkpoint: weights and Adam's moments in fp32, whatever the layout; the rest of it is small."""
    return FP32 * (1 + ADAM_MOMENTS) * model.num_parameters()


def _bytes(precision: str) -> int:
    return 2 if precision == "bf16" else FP32
