"""What is refused of models in Hugging Face's form, and with which words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from megamix.core.config import validate
from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.engines.models import ModelConfig
from megamix.engines.models.pretrained import read_pretrained
from megamix.interop.hugging_face.export import export

SIZES = {"vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small model of transformers' making, its config.json changed by keyword arguments (None removes)."""

    def write(architecture: str = "llama", **changes: Any) -> Path:
        path = tmp_path / "model"
        config = LlamaConfig(**SIZES) if architecture == "llama" else GPTNeoXConfig(**SIZES)
        torch.manual_seed(5)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        change_json(path / "config.json", **changes)
        return path

    return write


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")


def model_from(path: Path, **keys: Any) -> ModelConfig:
    return validate(ModelConfig, {"from_pretrained": str(path), **keys}, "model").with_vocabulary(70)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("llama", {"architectures": ["MistralForCausalLM"]}, 'architectures is ["MistralForCausalLM"], expected [GPTN'),
        ("llama", {"architectures": ["LlamaModel"]}, 'architectures is ["LlamaModel"]'),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, 'rope_parameters is {"rope_type": "lla'),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, 'rope_scaling is {"type": "linear"},'),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "expected rope_type default for all la",
        ),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, expected 1:"),
        ("llama", {"attention_bias": True}, "attention_bias is true, expected false"),
        ("llama", {"mlp_bias": True}, "mlp_bias is true, expected false"),
        ("llama", {"hidden_act": "gelu"}, 'hidden_act is "gelu", expected silu'),
        ("llama", {"head_dim": 16}, "head_dim is 16, expected hidden_size / num_attention_heads = 8"),
        ("llama", {"sliding_window": 4096}, "sliding_window is 4096, expected null"),
        ("llama", {"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}, expected null'),
        ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map is"),
        ("llama", {"num_hidden_layers": None}, "num_hidden_layers is None, expected a whole number above 0"),
        ("llama", {"num_attention_heads": 3, "head_dim": None}, "hidden_size 32 does not divide by num_heads 3"),
        ("neox", {"hidden_act": "gelu_fast"}, 'hidden_act is "gelu_fast", expected gelu'),
        ("neox", {"attention_bias": False}, "attention_bias is false, expected true"),
        ("neox", {"rope_scaling": {"type": "dynamic"}, "rope_parameters": None}, "rope_scaling is"),
    ],
)
def test_models_that_the_engines_do_not_compute(
    folder: Callable[..., Path], architecture: str, changes: dict[str, Any], message: str
) -> None:
    """The message names the key, its value and the one that would do."""
    with pytest.raises(InputError) as error:
        model_from(folder(architecture, **changes))
    assert message in str(error.value).replace("'", '"')


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_layers": 3}, "model.num_layers is 3, but model.from_pretrained {} has 2. Leave one of them out."),
        ({"architecture": "neox"}, "model.architecture is neox, but model.from_pretrained {} has llama."),
        ({"preset": "neox-2m"}, "model.architecture is neox, but model.from_pretrained {} has llama."),
        ({"rotary_base": 500.0}, "model.rotary_base is 500.0, but model.from_pretrained {} has 10000.0."),
        ({"vocab_size": 60}, "model.vocab_size is 60, but the tokenizer of the data has 70 ids"),
        (
            {"token_ids": 69},
            "model.token_ids is 69 (by default the rows of {}), but the tokenizer of the data has 70 ids",
        ),
        ({"vocab_size": 72, "token_ids": 73}, "token_ids is 73, but vocab_size, the rows that there are, is 72"),
    ],
)
def test_keys_that_contradict(folder: Callable[..., Path], keys: dict[str, Any], message: str) -> None:
    path = folder()
    with pytest.raises(InputError) as error:
        model_from(path, **keys)
    assert message.format(path) in str(error.value)


def test_config_files_as_they_were_before_transformers_5(tmp_path: Path) -> None:
    """A GPT-NeoX of the Pythia family (parallel residual, which older files may leave to its default) and a Llama with
    grouped queries, whose heads and rotary embedding go by other keys."""
    pythia = {
        "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
        "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
        "use_cache": True, "vocab_size": 50304,
    }  # fmt: skip
    llama = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 5632, "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000.0, "vocab_size": 32000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(pythia))
    model = validate(ModelConfig, {"preset": "neox-70m", "from_pretrained": str(tmp_path)}, "model")
    assert model.parallel_residual
    assert model.with_vocabulary(50277).num_parameters() == 70_426_624
    (tmp_path / "config.json").write_text(json.dumps(llama))
    model = validate(ModelConfig, {"from_pretrained": str(tmp_path)}, "model")
    assert (model.key_value_heads, model.rotary_base, model.parallel_residual) == (4, 50000.0, False)
    assert model.with_vocabulary(32000).num_parameters() == 1_100_048_384


def test_keys_that_agree_and_keys_of_training(folder: Callable[..., Path]) -> None:
    """What agrees may be said again; dropout and the initial standard deviation belong to the run. A resolved config
    is itself when read again, and still when the folder is gone."""
    path = folder("neox")
    model = model_from(path, hidden_size=32, dropout=0.1, init_std=0.5)
    assert (model.dropout, model.init_std, model.parallel_residual) == (0.1, 0.5, True)
    resolved = model.model_dump(mode="json")
    assert validate(ModelConfig, resolved, "model").with_vocabulary(70) == model
    shutil.rmtree(path)
    assert validate(ModelConfig, resolved, "model") == model
    with pytest.raises(InputError, match=r"cannot read .*config.json: No such file"):
        model_from(path)


def read(path: Path, tokenizer: Path, size: int = 70) -> None:
    read_pretrained(model_from(path), tokenizer, size)


def test_files_of_weights(folder: Callable[..., Path], tmp_path: Path) -> None:
    """Missing, pickled, damaged, quantised, and tensors that are not the model's."""
    path = folder()
    weights = path / "model.safetensors"
    # Copies: what the library hands out lies in the file, which is overwritten below.
    tensors, content = {name: value.clone() for name, value in load_file(weights).items()}, weights.read_bytes()

    def refused(message: str, error: type[Exception] = InputError) -> None:
        with pytest.raises(error, match=message):
            read(path, tmp_path / "none.json")

    def put(**changes: torch.Tensor | None) -> None:
        merged = {**tensors, **{key.replace("__", "."): value for key, value in changes.items()}}
        save_file({name: value for name, value in merged.items() if value is not None}, weights, {"format": "pt"})

    weights.write_bytes(content[: len(content) // 2])
    refused(r"model.safetensors cannot be read")
    put(model__norm__weight=None)
    refused(r"has no tensor 'model.norm.weight', unlike .*\(1 missing, 0 too many\)")
    put(model__layers__2__mlp__up_proj__weight=torch.ones(48, 32))
    refused(r"has a tensor 'model.layers.2.mlp.up_proj.weight', .*\(0 missing, 1 too many\)")
    put(model__norm__weight=torch.ones(31))
    refused(r"model.norm.weight has shape \[31\], but config.json means \[32\]")
    put(lm_head__weight=torch.ones(69, 32))
    refused(r"lm_head.weight has shape \[69, 32\], but config.json means \[70, 32\]")
    put(model__norm__weight=torch.ones(32, dtype=torch.int8))
    refused(r"model.norm.weight is stored as I8, expected F32, F16, BF16")
    weights.unlink()
    refused(r"has neither model.safetensors nor model.safetensors.index.json")
    (path / "pytorch_model.bin").write_bytes(b"")
    refused(r"as a pickle \(pytorch_model.bin\).*save_pretrained")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "a.safetensors"}}')
    refused(r"has no a.safetensors, which its index names")
    (path / "model.safetensors.index.json").write_text("{}")
    refused(r"has no weight_map")


def test_a_damaged_tensor_file_is_found_when_its_layer_is_read(folder: Callable[..., Path], tmp_path: Path) -> None:
    """Between looking at the heads and reading, a file may vanish."""
    path = folder()
    weights = read_pretrained(model_from(path), tmp_path / "none.json", 70)
    (path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model.safetensors cannot be read"):
        weights.layer(1)


@pytest.fixture
def with_tokenizer(folder: Callable[..., Path], data_dir: Path) -> Path:
    path = folder(vocab_size=512)
    tensors = load_file(path / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = torch.ones(512, 32)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    shutil.copy(data_dir / "tokenizer.json", path)
    return path


def test_the_same_tokenizer_written_otherwise(with_tokenizer: Path, data_dir: Path) -> None:
    """Other spaces, an older way to write merges, another order of the vocabulary: it is the same tokenizer. With BPE
    dropout, too, which `prepare` switches off."""
    path = with_tokenizer / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["dropout"] = 0.5
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    data["model"]["vocab"] = dict(reversed(data["model"]["vocab"].items()))
    path.write_text(json.dumps(data))
    read(with_tokenizer, data_dir / "tokenizer.json", 512)


@pytest.mark.parametrize("what", ["ids", "merges", "rules", "damaged"])
def test_another_tokenizer_is_refused(with_tokenizer: Path, data_dir: Path, what: str) -> None:
    path = with_tokenizer / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
    if what == "ids":
        vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
        message = f"the id of 'A' is {vocabulary['A']} in the model's and {vocabulary['B']} in the data's"
    elif what == "merges":
        merges[0], merges[1] = merges[1], merges[0]
        message = "their merges differ"
    elif what == "rules":
        data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        message = "they cut the same text differently"
    else:
        data["model"]["type"] = "nothing"
        message = "is not a tokenizer.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as error:
        read(with_tokenizer, data_dir / "tokenizer.json", 512)
    assert message in str(error.value)


def test_a_tokenizer_larger_than_the_model(folder: Callable[..., Path], data_dir: Path) -> None:
    path = folder()
    given = validate(ModelConfig, {"from_pretrained": str(path)}, "model")
    with pytest.raises(
        InputError, match=r"token_ids is 70 \(by default the rows of .*\), but the tokenizer of the data has 512"
    ):
        given.with_vocabulary(512)
    wider = given.model_copy(update={"token_ids": None}).with_vocabulary(512)
    with pytest.raises(InputError, match=r"knows 70 token ids, but the tokenizer of the data has 512"):
        read_pretrained(wider, data_dir / "tokenizer.json", 512)


def test_no_tokenizer_to_compare_is_said(
    folder: Callable[..., Path],
    data_dir: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(get_logger(), "propagate", True)
    read(folder(), data_dir / "tokenizer.json")
    assert "has no tokenizer.json" in caplog.text


def test_what_export_refuses(tmp_path: Path, megamix: Callable[..., Any]) -> None:
    """Paths that are no run, and an output that is there."""
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    with pytest.raises(InputError, match=r"full is there already and not an empty folder"):
        export(tmp_path, full)
    with pytest.raises(InputError, match=r"file is there already"):
        export(tmp_path, full / "file")
    with pytest.raises(InputError, match=r"full is neither a run .* nor a checkpoint"):
        export(full, tmp_path / "out")
    with pytest.raises(InputError, match=r"--dtype is 'fp16'. Did you mean 'bf16'\?"):
        export(full, tmp_path / "out", "fp16")
    (full / "config.resolved.yaml").write_text("")
    with pytest.raises(InputError, match=r"the run .*full has no complete checkpoint"):
        export(full, tmp_path / "out")
    done = megamix("export", tmp_path / "nowhere", "--out", tmp_path / "out", code=2)
    assert "nowhere is neither a run" in done.stderr
    assert not (tmp_path / "out").exists()
