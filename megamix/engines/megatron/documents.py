"""Attention within documents in megatron.core.

Its own layers take a mask. Transformer Engine's causal attention takes none; it takes all documents of a micro-batch as
one row of tokens with the places where they end (megatron.core's packed sequences, the format "thd").

Legend: B samples, S tokens.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # see model.py
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer import ModuleSpec
    from megatron.core.transformer.enums import AttnMaskType

from megamix.engines.config import MegatronConfig
from megamix.engines.megatron.layout import uses_transformer_engine
from megamix.engines.models.documents import attended, document_ends


def packs_documents(config: MegatronConfig) -> bool:
    """Whether the layers take documents as one row of tokens, [1, B S], instead of samples and a mask."""
    return uses_transformer_engine(config)


def take_masks(spec: ModuleSpec) -> None:
    """Makes megatron.core's own attention take masks: as causal attention, its fused softmax would leave them out."""
    attention: Any = spec.submodules
    attention.self_attention.params["attn_mask_type"] = AttnMaskType.arbitrary


def attention_options(positions_BS: torch.Tensor, *, packed: bool) -> dict[str, Any]:
    """Arguments of `GPTModel.forward` that keep attention within documents.

    Args:
        positions_BS: int64, as the model gets its tokens: [1, B S] where ``packed``.
    """
    if not packed:
        return {"attention_mask": ~attended(positions_BS)[:, None]}  # True: not attended to
    ends, longest = document_ends(positions_BS), int(positions_BS.max()) + 1
    return {
        "attention_mask": None,
        "packed_seq_params": PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
        ),
    }
