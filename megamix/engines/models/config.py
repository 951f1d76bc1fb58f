"""Model dimensions, given directly or by a preset in ``configs/models/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pydantic

from megamix.core.config import Config
from megamix.core.config_files import read_yaml
from megamix.core.errors import InputError, check_known
from megamix.core.files import shipped_folder
from megamix.core.paths import expand
from megamix.engines.models.pretrained_config import read_pretrained_config


class ModelConfig(Config):
    """Decoder-only transformer. ``preset`` fills every key that is not given, ``from_pretrained`` those that define the
    function."""

    preset: str | None = None
    """A file of configs/models/ without its ending, for example neox-2m; keys given beside it win."""
    from_pretrained: Path | None = None
    """A folder with a model in Hugging Face's form (config.json and safetensors; GPTNeoXForCausalLM or
    LlamaForCausalLM): a run that starts anew starts from its weights. Dimensions given beside it must be its own."""
    architecture: Literal["neox", "llama"]
    """neox: LayerNorm, biases, GELU, partial rotary (Pythia, GPT-NeoX). llama: RMSNorm, no biases, SwiGLU, full
    rotary."""
    hidden_size: int = pydantic.Field(gt=0, le=2**20)
    """Width of the residual stream."""
    num_layers: int = pydantic.Field(gt=0, le=10_000)
    """Decoder layers."""
    num_heads: int = pydantic.Field(gt=0, le=2**16)
    """Attention heads."""
    num_key_value_heads: int | None = pydantic.Field(default=None, gt=0)
    """Key/value heads (llama only); default: num_heads."""
    ffn_size: int = pydantic.Field(gt=0, le=2**24)
    """Inner width of the feed-forward layers."""
    vocab_size: int | None = pydantic.Field(default=None, gt=0, lt=2**31)
    """Rows of the embedding; default: `token_ids`, rounded up to a multiple of 64."""
    token_ids: int | None = pydantic.Field(default=None, gt=0, lt=2**31)
    """Rows that join the softmax and that an export holds; the rest is padding. Default: the rows of from_pretrained,
    else the tokenizer's vocabulary."""
    tie_word_embeddings: bool = False
    """One matrix for embedding and output projection. Default with from_pretrained: as there; false then makes two of
    one, which start alike."""
    rotary_percent: float = pydantic.Field(default=0.25, gt=0, le=1)
    """Share of each head's dimensions that the rotary embedding turns (neox only; llama turns all)."""
    rotary_base: float = pydantic.Field(default=10000.0, gt=0)
    """Base of the rotary frequencies."""
    parallel_residual: bool = False
    """Attention and feed-forward both read the layer's input (neox only; Pythia has it so)."""
    norm_epsilon: float = pydantic.Field(default=1e-5, gt=0)
    """Added to the variance in the norms."""
    init_std: float = pydantic.Field(default=0.02, gt=0)
    """Standard deviation of the initial weights; projections into the residual stream get init_std / sqrt(2
    num_layers)."""
    dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)
    """Dropout of attention and residual branches (neox only)."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") is not None:
            data = {**preset(str(data["preset"])), **data}
        if isinstance(data, dict) and data.get("from_pretrained") is not None:
            data = _fill_from_pretrained(data)
        return data

    @pydantic.model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide by num_heads {self.num_heads}. Choose a multiple."
            )
        if self.rotary_size % 2 or not self.rotary_size:
            share = f" x rotary_percent {self.rotary_percent:g}" if self.architecture == "neox" else ""
            raise ValueError(
                f"the rotary embedding turns hidden_size {self.hidden_size} / num_heads {self.num_heads}{share} = "
                f"{self.rotary_size} dimensions of a head, but it turns them in pairs. Choose values that make it even."
            )
        if self.num_heads % self.key_value_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide by num_key_value_heads {self.key_value_heads}. Choose a divisor."
            )
        if self.architecture == "neox" and self.key_value_heads != self.num_heads:
            raise ValueError("num_key_value_heads is for architecture llama; GPT-NeoX has as many as num_heads.")
        if self.architecture == "llama" and self.dropout:
            raise ValueError("dropout is for architecture neox; Llama models have none.")
        if self.architecture == "llama" and self.parallel_residual:
            raise ValueError("parallel_residual is for architecture neox; Llama models have a sequential one.")
        if self.vocab_size is not None and (self.token_ids or 0) > self.vocab_size:
            raise ValueError(
                f"token_ids is {self.token_ids}, but vocab_size, the rows that there are, is {self.vocab_size}. Leave vocab_size out, "
                "or give at least that many."
            )
        return self

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_heads

    @property
    def rotary_size(self) -> int:
        """Dimensions of each head that the rotary embedding turns."""
        head_size = self.hidden_size // self.num_heads
        return int(head_size * self.rotary_percent) if self.architecture == "neox" else head_size

    def with_vocabulary(self, tokenizer_size: int) -> ModelConfig:
        """Returns the config with ``vocab_size`` set for a tokenizer with ``tokenizer_size`` ids, and ``token_ids``
        where these are more.

        Raises:
            InputError: the configured vocab_size or token_ids is too small for the tokenizer.
        """
        if self.vocab_size is not None and self.vocab_size < tokenizer_size:
            raise InputError(
                f"model.vocab_size is {self.vocab_size}, but the tokenizer of the data has {tokenizer_size} ids. "
                "Leave vocab_size out, or give at least that many."
            )
        if self.token_ids is not None and self.token_ids < tokenizer_size:
            source = "" if self.from_pretrained is None else f" (by default the rows of {self.from_pretrained})"
            raise InputError(
                f"model.token_ids is {self.token_ids}{source}, but the tokenizer of the data has {tokenizer_size} ids. Prepare the "
                "data with the model's tokenizer, or give at least that many."
            )
        token_ids = self.token_ids or tokenizer_size
        rows = self.vocab_size or -(-token_ids // 64) * 64
        return self.model_copy(
            update={"vocab_size": rows, "token_ids": None if token_ids == tokenizer_size else token_ids}
        )

    def identity(self) -> dict[str, Any]:
        """Returns the dimensions that a resume must match, JSON-serialisable, without their source."""
        found = self.model_dump(mode="json", exclude={"preset", "from_pretrained"})
        # Older checkpoints lack these keys; their models have the defaults.
        later = ("parallel_residual", "tie_word_embeddings", "token_ids")
        return {key: value for key, value in found.items() if value or key not in later}

    def num_parameters(self) -> int:
        """Number of parameters of the whole model; ``vocab_size`` must be set."""
        ends = (1 if self.tie_word_embeddings else 2) * self.vocabulary * self.hidden_size + self._norm_size()
        return ends + self.num_layers * self._layer_parameters()

    @property
    def vocabulary(self) -> int:
        """``vocab_size``, which must be set."""
        if self.vocab_size is None:
            raise InputError("model.vocab_size is not known before the data is. Give it, or prepare the data first.")
        return self.vocab_size

    def _norm_size(self) -> int:
        return self.hidden_size * (2 if self.architecture == "neox" else 1)

    def _layer_parameters(self) -> int:
        hidden, ffn = self.hidden_size, self.ffn_size
        if self.architecture == "neox":
            attention = 4 * hidden * hidden + 4 * hidden
            feed_forward = 2 * hidden * ffn + ffn + hidden
        else:
            key_value = hidden // self.num_heads * self.key_value_heads
            attention = 2 * hidden * hidden + 2 * hidden * key_value
            feed_forward = 3 * hidden * ffn
        return attention + feed_forward + 2 * self._norm_size()

    def layer_costs(self, seq_length: int) -> list[int]:
        """Multiply-adds per token of each pipeline layer (embedding, decoder layers, head), which stages balance."""
        layer = self._layer_parameters() + seq_length * self.hidden_size
        return [0, *[layer] * self.num_layers, self.hidden_size * self.vocabulary]


def preset(name: str) -> dict[str, Any]:
    """Returns the keys of configs/models/NAME.yaml.

    Raises:
        InputError: the preset does not exist.
    """
    known = {path.stem: path for path in (shipped_folder("configs") / "models").glob("*.yaml")}
    check_known([name], known, "model.preset: unknown")
    return read_yaml(known[name])


def _fill_from_pretrained(data: dict[str, Any]) -> dict[str, Any]:
    """Returns the config's keys with the dimensions of its ``from_pretrained``.

    Raises:
        InputError: the model does not exist, the engines do not support it, or a key contradicts it.
    """
    given_path = data["from_pretrained"]
    folder = Path(expand(given_path) if isinstance(given_path, str) else str(given_path))
    given = {key: value for key, value in data.items() if value is not None}
    required = {name for name, field in ModelConfig.model_fields.items() if field.is_required()}
    if not folder.exists() and required <= given.keys():
        # A run's resolved config after its pretrained model was removed: only a fresh start needs the folder.
        return data
    source = read_pretrained_config(folder)
    dimensions = source.dimensions
    for key, value in dimensions.items():
        if given.get(key, value) != value:
            raise InputError(
                f"model.{key} is {given[key]}, but model.from_pretrained {folder} has {value}. Leave one of them out."
            )
    if given.get("tie_word_embeddings") in (True, "true") and not source.tied:
        raise InputError(
            f"model.tie_word_embeddings is true, but model.from_pretrained {folder} has two matrices, which differ. Leave it "
            "out."
        )
    rows = given.get("vocab_size")
    token_ids = min(source.vocab_size, rows) if isinstance(rows, int) else source.vocab_size
    return {**dimensions, "tie_word_embeddings": source.tied, "token_ids": token_ids, **given}
