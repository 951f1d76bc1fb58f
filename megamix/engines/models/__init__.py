"""Models to train: GPT-NeoX and Llama decoders from transformers, as pipeline layers."""

from megamix.engines.models.config import ModelConfig

__all__ = ["ModelConfig"]
