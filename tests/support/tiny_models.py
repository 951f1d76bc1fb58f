"""Models that cost nothing to compute, as our pipeline layers."""

from __future__ import annotations

from typing import Any

import torch

from megamix.engines.models import ModelConfig
from megamix.engines.models.documents import DocumentMasks
from megamix.engines.models.layers import PipelineLayer, make_layer, tie_ends

SEQ_LENGTH = 24
SEED = 7
# Numbers unlike every default, so that one that is not passed on shows.
TINY: dict[str, dict[str, Any]] = {
    "neox": {
        "architecture": "neox",
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "ffn_size": 48,
        "vocab_size": 70,
        "rotary_percent": 0.5,
        "rotary_base": 500.0,
        "norm_epsilon": 1e-3,
    },
    "llama": {
        "architecture": "llama",
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "ffn_size": 56,
        "vocab_size": 70,
        "rotary_base": 500.0,
        "norm_epsilon": 1e-3,
    },
}
TINY["neox-parallel"] = {**TINY["neox"], "parallel_residual": True}
TINY["llama-tied"] = {**TINY["llama"], "tie_word_embeddings": True}


def model_config(architecture: str, **changes: Any) -> ModelConfig:
    return ModelConfig(**{**TINY[architecture], **changes})


def build(
    config: ModelConfig, seed: int = SEED, seq_length: int = SEQ_LENGTH, masks: DocumentMasks | None = None
) -> list[PipelineLayer]:
    layers = [make_layer(config, index, seed, seq_length, masks) for index in range(config.num_layers + 2)]
    tie_ends(layers)
    return layers


def run(layers: list[PipelineLayer], inputs: Any) -> torch.Tensor:
    for layer in layers:
        inputs = layer(inputs)
    return inputs


def one_document_at_a_time(
    layers: list[PipelineLayer], tokens_BS: torch.Tensor, positions_BS: torch.Tensor
) -> torch.Tensor:
    """Logits [B, S, V] of samples whose documents, which begin where positions are 0, pass the layers by themselves."""
    rows = []
    for tokens_S, positions_S in zip(tokens_BS, positions_BS, strict=True):
        starts = (positions_S == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], tokens_S.numel()]
        rows.append(torch.cat([run(layers, tokens_S[None, a:b])[0] for a, b in zip(starts, ends, strict=True)]))
    return torch.stack(rows)


def shake(layers: list[PipelineLayer]) -> None:
    """Moves every parameter, so that norms and biases, which start at 1 and 0, cannot be mixed up unseen."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
