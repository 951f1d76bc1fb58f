"""Pipeline layers of a model: embedding, transformers' decoder layers, and norm with output projection.

Every parameter has its Hugging Face name (`PipelineLayer.hugging_face_names`). Every layer draws its initial weights
from its own generator, seeded by the run's seed and the layer's index, so the trained function does not depend on the
split into stages.

Legend: B samples, S tokens, H hidden size, V vocabulary, R rotary dimensions.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from megamix.engines.models.config import ModelConfig
from megamix.engines.models.documents import DocumentMasks
from megamix.engines.models.factors import OutputFactors


def hugging_face_config(config: ModelConfig, seq_length: int) -> GPTNeoXConfig | LlamaConfig:
    """Returns the transformers config of the same model."""
    shared = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_size,
        "max_position_embeddings": seq_length,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": False,
        "attn_implementation": "sdpa",
        **_rotary_keys(config),
    }
    if config.architecture == "neox":
        return GPTNeoXConfig(
            **shared,
            layer_norm_eps=config.norm_epsilon,
            use_parallel_residual=config.parallel_residual,
            attention_dropout=config.dropout,
            hidden_dropout=config.dropout,
        )
    return LlamaConfig(
        **shared,
        rms_norm_eps=config.norm_epsilon,
        num_key_value_heads=config.key_value_heads,
    )


def _rotary_keys(config: ModelConfig) -> dict[str, Any]:
    """The rotary embedding as the installed transformers takes it."""
    takes_one_key = "rope_parameters" in inspect.signature(LlamaConfig).parameters
    return rope_parameters(config) if takes_one_key else rotary_keys_before_5(config)


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """The rotary embedding as transformers 5 writes it."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rotary_base}
    if config.architecture == "neox":
        rope["partial_rotary_factor"] = config.rotary_percent
    return {"rope_parameters": rope}


def rotary_keys_before_5(config: ModelConfig) -> dict[str, Any]:
    """The rotary embedding as transformers before 5, and programs made for it, write it: keys of each architecture."""
    if config.architecture == "neox":
        return {"rotary_pct": config.rotary_percent, "rotary_emb_base": config.rotary_base}
    return {"rope_theta": config.rotary_base}


def layer_shapes(config: ModelConfig, index: int) -> dict[str, torch.Size]:
    """Returns Hugging Face name -> shape of the parameters of pipeline layer ``index``, without allocating them."""
    with torch.device("meta"):
        layer = make_layer(config, index, seed=0, seq_length=1)
    names = layer.hugging_face_names()
    return {names[name]: parameter.shape for name, parameter in layer.named_parameters()}


# Data between layers: tokens or hidden states, with their positions, int64 [B, S], where those are not 0 to S - 1.
Flow = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class PipelineLayer(nn.Module, ABC):
    """Pipeline layer: a tensor in, a tensor out; positions, where given, pass through to later layers."""

    def __init__(self, config: ModelConfig, index: int, seed: int) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self._seed = seed

    @abstractmethod
    def hugging_face_names(self) -> dict[str, str]:
        """Parameter name in this layer -> name in the Hugging Face model."""

    def initialise(self) -> None:
        """Draws initial weights: normal for matrices, zero for biases, one for norms."""
        if next(self.parameters()).is_meta:
            return
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + self.index) % 2**63)
        residual_std = self.config.init_std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.constant_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            into_residual = name.endswith(("dense.weight", "dense_4h_to_h.weight", "o_proj.weight", "down_proj.weight"))
            with torch.no_grad():
                parameter.normal_(0.0, residual_std if into_residual else self.config.init_std, generator=generator)


class Embedding(PipelineLayer):
    """Embedding: tokens [B, S] -> hidden states [B, S, H]."""

    def __init__(self, config: ModelConfig, index: int, seed: int) -> None:
        super().__init__(config, index, seed)
        self.embedding = nn.Embedding(config.vocabulary, config.hidden_size)
        self.initialise()

    def hugging_face_names(self) -> dict[str, str]:
        prefix = "gpt_neox.embed_in" if self.config.architecture == "neox" else "model.embed_tokens"
        return {"embedding.weight": f"{prefix}.weight"}

    def forward(self, tokens: Flow) -> Flow:
        if isinstance(tokens, tuple):
            return self.embedding(tokens[0]), tokens[1]
        return self.embedding(tokens)


class Decoder(PipelineLayer):
    """Decoder layer: hidden states [B, S, H] -> the same shape; causal attention.

    Args:
        masks: shared by the layers of a stage, whose input has positions: attention stays within documents; None: it is
            over the whole sample.
    """

    def __init__(
        self, config: ModelConfig, index: int, seed: int, seq_length: int, masks: DocumentMasks | None = None
    ) -> None:
        super().__init__(config, index, seed)
        self._masks = masks
        upstream = hugging_face_config(config, seq_length)
        # A tuple keeps it from being a submodule: casting the model to bf16 would round its frequencies.
        self._rotary: tuple[nn.Module]
        if isinstance(upstream, GPTNeoXConfig):
            self.layer, self._rotary = GPTNeoXLayer(upstream, index - 1), (GPTNeoXRotaryEmbedding(upstream),)
        else:
            self.layer, self._rotary = LlamaDecoderLayer(upstream, index - 1), (LlamaRotaryEmbedding(upstream),)
        self._rotary_of: tuple[tuple[int, torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] | None = None
        self.initialise()

    def hugging_face_names(self) -> dict[str, str]:
        prefix = "gpt_neox.layers" if self.config.architecture == "neox" else "model.layers"
        return {name: f"{prefix}.{self.index - 1}.{name.removeprefix('layer.')}" for name, _ in self.named_parameters()}

    def forward(self, hidden: Flow) -> Flow:
        if isinstance(hidden, tuple):
            hidden_BSH, positions_BS = hidden
            cos, sin = (table[0, positions_BS] for table in self._rotary_table(hidden_BSH))
            mask = None if self._masks is None else self._masks.of(positions_BS, hidden_BSH.dtype)
            return self._output(hidden_BSH, (cos, sin), mask), positions_BS
        assert self._masks is None, "attention within documents needs positions"
        return self._output(hidden, self._rotary_table(hidden))

    def _output(
        self, hidden_BSH: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        found = self.layer(hidden_BSH, attention_mask=mask, position_embeddings=rotary)
        return found[0] if isinstance(found, tuple) else found  # a tuple: transformers 4

    def _rotary_table(self, hidden_BSH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosine and sine of every position of a sample, [1, S, R] each."""
        key = (hidden_BSH.shape[1], hidden_BSH.dtype, hidden_BSH.device)
        if self._rotary_of is None or self._rotary_of[0] != key:
            # Later passes may need gradients, and an inference tensor would break their backward pass.
            with torch.inference_mode(False):
                positions = torch.arange(hidden_BSH.shape[1], device=hidden_BSH.device)[None]
                self._rotary_of = (key, self._rotary[0].to(hidden_BSH.device)(hidden_BSH, positions))
        return self._rotary_of[1]


class HasWeight(Protocol):
    """What has the matrix of a tied output projection, float [V, H]."""

    @property
    def weight(self) -> torch.Tensor: ...


class Head(PipelineLayer):
    """Last norm and output projection: hidden states [B, S, H] -> logits [B, S, V], or their factors.

    With ``tie_word_embeddings`` the projection is no parameter of this layer; `tie` says whose it is.

    Args:
        multiplies: whether the output is the logits.
    """

    def __init__(self, config: ModelConfig, index: int, seed: int, multiplies: bool = True) -> None:
        super().__init__(config, index, seed)
        self._multiplies = multiplies
        norm = nn.LayerNorm if config.architecture == "neox" else LlamaRMSNorm
        self.norm = norm(config.hidden_size, eps=config.norm_epsilon)
        # A tuple keeps a module from being a submodule.
        self._tied: tuple[HasWeight, ...] = ()
        if not config.tie_word_embeddings:
            self.output = nn.Linear(config.hidden_size, config.vocabulary, bias=False)
        self.initialise()

    def tie(self, owner: HasWeight) -> None:
        """Projects by the weight that ``owner`` has at the time."""
        self._tied = (owner,)

    def hugging_face_names(self) -> dict[str, str]:
        norm = "gpt_neox.final_layer_norm" if self.config.architecture == "neox" else "model.norm"
        names = {
            name: name.replace("norm.", f"{norm}.") for name, _ in self.named_parameters() if name != "output.weight"
        }
        return names if self.config.tie_word_embeddings else {**names, "output.weight": "lm_head.weight"}

    def forward(self, hidden: Flow) -> torch.Tensor | OutputFactors:
        hidden_BSH = self.norm(hidden[0] if isinstance(hidden, tuple) else hidden)
        (owner,) = self._tied if self.config.tie_word_embeddings else (self.output,)
        if self._multiplies:
            return F.linear(hidden_BSH, owner.weight)
        # A view, so that the gradient passes an output of the module before it reaches the parameter: DeepSpeed begins
        # a backward pass when the gradient of the first output comes.
        return OutputFactors(hidden_BSH, owner.weight.view_as(owner.weight))


def tie_ends(layers: Sequence[PipelineLayer]) -> None:
    """Ties the head to the embedding, of a model whose config says so, where both are among ``layers``."""
    first, last = layers[0], layers[-1]
    if last.config.tie_word_embeddings and isinstance(first, Embedding) and isinstance(last, Head):
        last.tie(first.embedding)


def make_layer(
    config: ModelConfig, index: int, seed: int, seq_length: int, masks: DocumentMasks | None = None
) -> PipelineLayer:
    """Builds pipeline layer ``index``: 0 the embedding, 1 to num_layers decoder layers, num_layers + 1 the head.

    Args:
        masks: see `Decoder`.
    """
    if index == 0:
        return Embedding(config, index, seed)
    if index <= config.num_layers:
        return Decoder(config, index, seed, seq_length, masks)
    return Head(config, index, seed)
