"""Map between Hugging Face's parameters and megatron.core's: names, layouts and tensor-parallel shards.

    Hugging Face parameters --join--> whole Megatron parameter --shard--> part of a tensor-parallel rank

Legend: G groups of key/value heads, Q query heads in a group, D dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megamix.engines.models.config import ModelConfig

Split = Literal["whole", "rows", "columns", "both halves"]


@dataclass(frozen=True)
class ParameterMap:
    """Composition of one parameter of a `GPTModel`.

    Attributes:
        name: name in its module: the chunk, or the decoder layer.
        sources: Hugging Face names of its parts; three are joined group by group (query, key, value), two one below the
            other (gate, up).
        split: what tensor parallelism divides: nothing, rows, columns, or the rows of each half of a gate/up pair.
        query_heads: Q, with three ``sources``.
    """

    name: str
    sources: tuple[str, ...]
    split: Split = "whole"
    query_heads: int = 1
    num_groups: int = 1

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Joins Hugging Face's parameters to the whole parameter."""
        if len(parts) == 1:
            return parts[0]
        if len(parts) == 2:
            return torch.cat(tuple(parts))
        grouped = [part.view(self.num_groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def part(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Inverse of `join`."""
        if len(self.sources) == 1:
            return [whole]
        if len(self.sources) == 2:
            return list(whole.chunk(2))
        grouped = whole.view(self.num_groups, -1, *whole.shape[1:])
        head = grouped.shape[1] // (self.query_heads + 2)
        return [part.flatten(0, 1) for part in grouped.split([self.query_heads * head, head, head], dim=1)]

    def shard(self, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """Returns the part of tensor-parallel rank ``rank`` of ``size``."""
        if self.split == "rows":
            return whole.chunk(size)[rank]
        if self.split == "columns":
            return whole.chunk(size, dim=1)[rank]
        if self.split == "both halves":
            return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
        return whole

    def gather(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """Joins the parts of all tensor-parallel ranks, in rank order."""
        if len(shards) == 1 or self.split == "whole":
            return shards[0]
        if self.split == "both halves":
            halves = [shard.chunk(2) for shard in shards]
            return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        return torch.cat(tuple(shards), dim=1 if self.split == "columns" else 0)


def parameter_maps(config: ModelConfig, layer: int, *, fused_norms: bool) -> list[ParameterMap]:
    """Returns the parameters of a pipeline layer: 0 embedding, then decoder layers, ``num_layers + 1`` norm and output.

    Args:
        fused_norms: whether a decoder layer's norms are in the linear layers behind them, as in Transformer Engine.
    """
    neox = config.architecture == "neox"
    if layer == 0:
        source = "gpt_neox.embed_in.weight" if neox else "model.embed_tokens.weight"
        return [ParameterMap("embedding.word_embeddings.weight", (source,), "rows")]
    if layer == config.num_layers + 1:
        norm = "gpt_neox.final_layer_norm" if neox else "model.norm"
        output = ParameterMap("output_layer.weight", ("lm_head.weight",), "rows")
        return [*_norm(config, "decoder.final_layernorm.", norm), *([] if config.tie_word_embeddings else [output])]
    names = ("input_layernorm.", "pre_mlp_layernorm.")
    if fused_norms:
        names = ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_")
    prefix = f"gpt_neox.layers.{layer - 1}" if neox else f"model.layers.{layer - 1}"
    norms = _norm(config, names[0], f"{prefix}.input_layernorm") + _norm(
        config, names[1], f"{prefix}.post_attention_layernorm"
    )
    return norms + (_neox(prefix) if neox else _llama(config, prefix))


def _norm(config: ModelConfig, name: str, source: str) -> list[ParameterMap]:
    kinds = ("weight", "bias") if config.architecture == "neox" else ("weight",)
    return [ParameterMap(f"{name}{kind}", (f"{source}.{kind}",)) for kind in kinds]


def _neox(prefix: str) -> list[ParameterMap]:
    """GPT-NeoX joins query, key and value head by head, as Megatron does."""
    modules: list[tuple[str, str, Split, Split]] = [
        ("self_attention.linear_qkv", "attention.query_key_value", "rows", "rows"),
        ("self_attention.linear_proj", "attention.dense", "columns", "whole"),
        ("mlp.linear_fc1", "mlp.dense_h_to_4h", "rows", "rows"),
        ("mlp.linear_fc2", "mlp.dense_4h_to_h", "columns", "whole"),
    ]
    maps = []
    for name, source, weight, bias in modules:
        maps.append(ParameterMap(f"{name}.weight", (f"{prefix}.{source}.weight",), weight))
        maps.append(ParameterMap(f"{name}.bias", (f"{prefix}.{source}.bias",), bias))
    return maps


def _llama(config: ModelConfig, prefix: str) -> list[ParameterMap]:
    attention = tuple(f"{prefix}.self_attn.{kind}_proj.weight" for kind in "qkv")
    groups = config.key_value_heads
    return [
        ParameterMap("self_attention.linear_qkv.weight", attention, "rows", config.num_heads // groups, groups),
        ParameterMap("self_attention.linear_proj.weight", (f"{prefix}.self_attn.o_proj.weight",), "columns"),
        ParameterMap(
            "mlp.linear_fc1.weight",
            (f"{prefix}.mlp.gate_proj.weight", f"{prefix}.mlp.up_proj.weight"),
            "both halves",
        ),
        ParameterMap("mlp.linear_fc2.weight", (f"{prefix}.mlp.down_proj.weight",), "columns"),
    ]
