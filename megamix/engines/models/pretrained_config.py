"""Model dimensions from a Hugging Face config.json; models that the engines do not support are refused.

Reads both forms of the rotary embedding: ``rope_parameters`` (transformers 5) and ``rotary_pct``, ``rotary_emb_base``,
``rope_theta``, ``rope_scaling`` (before). Ignores settings of training alone (dropout, initial standard deviation).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamix.core.errors import InputError
from megamix.core.files import read_json

CLASSES = {"neox": "GPTNeoXForCausalLM", "llama": "LlamaForCausalLM"}
"""Architecture -> the equivalent class of transformers."""
OUTPUT_NAMES = {"neox": "embed_out.weight", "llama": "lm_head.weight"}
"""Architecture -> name of the output projection in files; the model calls it ``lm_head.weight`` in both."""
# Key -> the only value that the engines support, which is also the default of its absence.
_FIXED: dict[str, dict[str, Any]] = {
    "neox": {"hidden_act": "gelu", "attention_bias": True},
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
}
_ABSENT = ("quantization_config", "sliding_window", "auto_map")


@dataclass(frozen=True)
class PretrainedConfig:
    """Contents of a config.json.

    Attributes:
        dimensions: keys of `ModelConfig` that define the function.
        vocab_size: rows of the embedding and the output projection.
        tied: whether these two are one matrix.
    """

    dimensions: dict[str, Any]
    vocab_size: int
    tied: bool


def read_pretrained_config(folder: Path) -> PretrainedConfig:
    """Reads ``folder/config.json``.

    Raises:
        InputError: the file is missing, or the engines do not support the model; names the key and its value.
    """
    path = Path(folder) / "config.json"
    raw = read_json_object(path)
    architecture = _architecture(raw, path)
    for key, expected in (*_FIXED[architecture].items(), *((key, None) for key in _ABSENT)):
        if raw.get(key, expected) != expected:
            raise _unsupported(path, key, raw[key], expected)
    epsilon, default = ("layer_norm_eps", 1e-5) if architecture == "neox" else ("rms_norm_eps", 1e-6)
    dimensions = {
        "architecture": architecture,
        "hidden_size": _size(raw, "hidden_size", path),
        "num_layers": _size(raw, "num_hidden_layers", path),
        "num_heads": _size(raw, "num_attention_heads", path),
        "ffn_size": _size(raw, "intermediate_size", path),
        "norm_epsilon": raw.get(epsilon, default),
        **_rotary(raw, architecture, path),
    }
    if architecture == "neox":
        dimensions["parallel_residual"] = raw.get("use_parallel_residual", True)
    else:
        dimensions["num_key_value_heads"] = raw.get("num_key_value_heads") or dimensions["num_heads"]
        size = dimensions["hidden_size"] / dimensions["num_heads"]
        if (raw.get("head_dim") or size) != size:
            raise _unsupported(path, "head_dim", raw["head_dim"], f"hidden_size / num_attention_heads = {size:g}")
    return PretrainedConfig(dimensions, _size(raw, "vocab_size", path), raw.get("tie_word_embeddings") is True)


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        InputError: the file cannot be read, or holds no object.
    """
    data = read_json(path, lost="Give the folder of a model in Hugging Face's form.", damaged="Copy it again.")
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a {type(data).__name__}, expected an object. Copy it again.")
    return data


def _architecture(raw: Mapping[str, Any], path: Path) -> str:
    names = raw.get("architectures")
    for architecture, name in CLASSES.items():
        if names == [name]:
            return architecture
    raise InputError(
        f"{path}: architectures is {names!r}, expected [{' or '.join(CLASSES.values())}]: the engines compute no other. "
        "Choose another model."
    )


def _rotary(raw: Mapping[str, Any], architecture: str, path: Path) -> dict[str, Any]:
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    given = raw.get(key) or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default" or any(isinstance(value, dict) for value in given.values()):
        raise _unsupported(path, key, given, "rope_type default for all layers")
    if architecture == "neox":
        base, share = raw.get("rotary_emb_base", 10000.0), raw.get("rotary_pct", 0.25)
        share = given.get("partial_rotary_factor", share)
        return {"rotary_base": given.get("rope_theta", base), "rotary_percent": share}
    share = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise _unsupported(path, "partial_rotary_factor", share, 1)
    return {"rotary_base": given.get("rope_theta", raw.get("rope_theta", 10000.0))}


def _size(raw: Mapping[str, Any], key: str, path: Path) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{path}: {key} is {value!r}, expected a whole number above 0. Copy the file again.")
    return value


def _unsupported(path: Path, key: str, value: object, expected: object) -> InputError:
    seen, wanted = json.dumps(value), expected if isinstance(expected, str) else json.dumps(expected)
    seen = seen if len(seen) <= 100 else seen[:97] + "..."
    return InputError(
        f"{path}: {key} is {seen}, expected {wanted}: the engines compute nothing else. Choose another model."
    )
