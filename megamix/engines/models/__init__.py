"""The models that are trained: GPT-NeoX and Llama decoders from transformers, cut into pipeline layers."""

from megamix.engines.models.config import ModelConfig

__all__ = ["ModelConfig"]
