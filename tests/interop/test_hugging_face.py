"""Models to and from Hugging Face's form: the same function, the same bits, and text from transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import run_megamix
from records import record
from safetensors.torch import load_file, save_file
from tiny_models import TINY, build, run, shake
from tolerance import assert_alike, rounding
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, LlamaConfig

from megamix.core.config import validate
from megamix.core.errors import InputError, ResumeRefused
from megamix.core.log import get_logger
from megamix.data.tokens.manifest import Manifest
from megamix.engines.models import ModelConfig
from megamix.engines.models.layers import PipelineLayer
from megamix.engines.models.pretrained import PretrainedWeights, read_pretrained
from megamix.engines.models.pretrained_config import read_pretrained_config
from megamix.interop.hugging_face.export import export
from megamix.training.checkpoints import store

VOCAB = 512
"""Ids of the tokenizer of the test data; the models have more rows, and one of them more ids."""
ROWS = 576
TOKEN_IDS = 520
SEQ_LENGTH = 64
# The widest sum, attention's, has 64 terms; an embedding, three layers and a head; a loss is the mean over two samples.
FORWARD = rounding(terms=SEQ_LENGTH, layers=5)
OF_LOSSES = rounding(terms=SEQ_LENGTH, layers=5, mean_of=SEQ_LENGTH)
SINCE_5 = int(version("transformers").split(".")[0]) >= 5
ROPE = {"rope_type": "default", "rope_theta": 500.0}
ROTARY: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": ROPE} if SINCE_5 else {"rope_theta": 500.0},
    "neox": {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}
    if SINCE_5
    else {"rotary_emb_base": 500, "rotary_pct": 0.5},
}


def model_of(name: str) -> ModelConfig:
    return ModelConfig(**{**TINY[name], "vocab_size": ROWS})


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of two steps; one matrix for embedding and output, with more ids than the tokenizer."""
    folder = tmp_path_factory.mktemp("trained")
    config = {
        "run_dir": str(folder / "run"),
        "data": {"manifest": str(data_dir), "seq_length": SEQ_LENGTH},
        "model": {**TINY["neox"], "vocab_size": ROWS, "token_ids": TOKEN_IDS, "tie_word_embeddings": True},
        "train": {"steps": 2, "global_batch": 4, "micro_batch": 2, "lr": 1e-2},
        "evaluate": {"batches": 1},
        "log": {"every": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    run_megamix("train", folder / "config.yaml")
    return folder / "run"


Make = Callable[[str], tuple[Path, list[PipelineLayer]]]


@pytest.fixture
def run_of(trained: Path, tmp_path: Path) -> Make:
    """A copy of the real run whose checkpoint holds another model, and the layers of that model."""

    def make(name: str) -> tuple[Path, list[PipelineLayer]]:
        folder = tmp_path / "run"
        shutil.copytree(trained, folder)
        source = folder / "checkpoints" / "step_2"
        state = json.loads((source / "state.json").read_text())
        model = model_of(name)
        state["fingerprints"]["model"] = model.identity()
        shutil.rmtree(source / "layers")
        (source / "layers").mkdir()
        layers = build(model, seq_length=SEQ_LENGTH)
        shake(layers)
        files = {"state.json": store.write_json(source / "state.json", state)}
        for layer in layers:
            names = layer.hugging_face_names()
            tensors = {f"weight/{names[name]}": value.detach() for name, value in layer.named_parameters()}
            moments = {key.replace("weight/", f"{part}/", 1): torch.full_like(value, torch.nan)
                       for key, value in tensors.items() for part in ("exp_avg", "exp_avg_sq")}  # fmt: skip
            path = source / "layers" / f"{layer.index:05d}.safetensors"
            save_file({**tensors, **moments}, path)
            files[f"layers/{path.name}"] = store.describe(path)
        store.write_listing(source, store.Listing(2, store.LAYERS, files))
        return folder, layers

    return make


def tokens(vocab_size: int = VOCAB, length: int = SEQ_LENGTH) -> torch.Tensor:
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", TINY)
def test_an_export_computes_what_the_run_does_and_writes_text(name: str, run_of: Make, tmp_path: Path) -> None:
    """Logits of transformers' own class are those of our layers, with the rows of padding gone, and its greedy text
    is what our layers find most likely, token by token."""
    folder, layers = run_of(name)
    out = tmp_path / "out"
    exported = export(folder, out)
    assert exported.source == folder / "checkpoints" / "step_2"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert exported.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert exported.num_bytes == 4 * exported.num_parameters
    assert model.config.vocab_size == VOCAB
    assert model.config.max_position_embeddings == SEQ_LENGTH
    with torch.no_grad():
        assert_alike(model(tokens()).logits, run(layers, tokens())[..., :VOCAB], FORWARD)
        tokenizer = AutoTokenizer.from_pretrained(out)
        prompt = tokenizer("def main(", return_tensors="pt")
        found = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]
        expected = prompt["input_ids"][0]
        for _ in range(8):
            expected = torch.cat([expected, run(layers, expected[None])[0, -1:, :VOCAB].argmax(-1)])
            if expected[-1] == tokenizer.eos_token_id:
                break
    assert found.tolist() == expected.tolist()
    assert tokenizer.decode(found).startswith("def main(")


def test_what_else_an_export_holds(trained: Path, data_dir: Path, tmp_path: Path) -> None:
    """The tokenizer cuts text as that of the data and ends it as they do; provenance; configs that transformers before
    5 reads; and the newest checkpoint is the one of the run."""
    exported = export(trained, tmp_path / "out")
    out, manifest = exported.out, Manifest.load(data_dir)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "generation_config.json", "megamix.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    tokenizer, original = AutoTokenizer.from_pretrained(out), manifest.load_tokenizer()
    text = "Hello, world!  def f(x):\n\treturn x + 1\n Grüße"
    assert tokenizer(text)["input_ids"] == original.encode_batch([text])[0]
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == original.eod_id
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == TOKEN_IDS
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.generation_config.eos_token_id == model.config.eos_token_id == original.eod_id
    origin = json.loads((out / "megamix.json").read_text())
    assert (origin["checkpoint"], origin["step"], origin["tokens"]) == ("step_2", 2, 2 * 4 * SEQ_LENGTH)
    assert sum(origin["samples"].values()) == 2 * 4
    assert sum(origin["weights"].values()) == pytest.approx(1)
    assert origin["config"]["train"]["steps"] == 2
    assert export(trained / "checkpoints" / "step_2", tmp_path / "same").source == exported.source
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["neox", "llama"])
def test_older_programs_find_the_rotary_embedding(name: str, run_of: Make, tmp_path: Path) -> None:
    """Without the key of transformers 5 the older ones still say the same; both kinds are read back here."""
    folder, _ = run_of(name)
    export(folder, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    before, dimensions = AutoConfig.from_pretrained(path.parent), read_pretrained_config(path.parent).dimensions
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    path.write_text(json.dumps({**config, "rope_scaling": None}))
    assert rope == {**ROPE, **({"partial_rotary_factor": 0.5} if name == "neox" else {})}
    after = AutoConfig.from_pretrained(path.parent)
    for key in ROTARY[name]:
        assert getattr(after, key) == getattr(before, key)
    assert read_pretrained_config(path.parent).dimensions == dimensions
    assert dimensions == {key: getattr(model_of(name), key) for key in dimensions}


@pytest.mark.parametrize("name", TINY)
def test_an_import_of_an_export_is_the_same_bits(name: str, run_of: Make, data_dir: Path, tmp_path: Path) -> None:
    """Also from shards, each within the limit but where one tensor is larger. Rows of padding come back as zeros."""
    folder, layers = run_of(name)
    limit = 40_000
    for out, max_bytes in ((tmp_path / "one", 10**9), (tmp_path / "many", limit)):
        export(folder, out, max_shard_bytes=max_bytes)
        keys = {"from_pretrained": str(out), "vocab_size": ROWS}
        model = validate(ModelConfig, keys, "model").with_vocabulary(VOCAB)
        assert model.identity() == {**model_of(name).identity(), "init_std": model.init_std}
        weights = read_pretrained(model, data_dir / "tokenizer.json", VOCAB)
        for layer in layers:
            names, read = layer.hugging_face_names(), weights.layer(layer.index)
            assert set(read) == set(names.values())
            for own, parameter in layer.named_parameters():
                wanted = parameter.detach().clone()
                if len(wanted) == ROWS:
                    wanted[VOCAB:] = 0
                assert torch.equal(read[names[own]], wanted), names[own]
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    for path in shards:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    with torch.no_grad():
        expected = run(layers, tokens())[..., :VOCAB]
        assert_alike(loaded(tokens()).logits, expected, FORWARD)


def test_bf16(run_of: Make, tmp_path: Path) -> None:
    """An export in bf16 is the weights rounded, and says so; it is half as large."""
    folder, layers = run_of("llama")
    exported = export(folder, tmp_path / "out", "bf16")
    assert exported.num_bytes == 2 * exported.num_parameters
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    layer = dict(layers[1].named_parameters())
    for own, name in layers[1].hugging_face_names().items():
        assert torch.equal(tensors[name], layer[own].detach().bfloat16())
    # Since 5 by default; "auto" was there before, under the older name, which 5 takes as well.
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", torch_dtype="auto").dtype == torch.bfloat16


def upstream(name: str, **changes: Any) -> Any:
    """A model of transformers' own making, with random weights that are all unlike each other."""
    shared = {"vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    if name.startswith("llama"):
        changes = {"tie_word_embeddings": name == "llama-tied", **changes}
        other = {"num_key_value_heads": 2, "rms_norm_eps": 1e-3, **ROTARY["llama"]}
        config = LlamaConfig(**{**shared, "intermediate_size": 56, **other, **changes})
    else:
        other = {"layer_norm_eps": 1e-3, **ROTARY["neox"]}
        residual = {"use_parallel_residual": name == "neox-parallel"}
        config = GPTNeoXConfig(**{**shared, "intermediate_size": 48, **other, **residual, **changes})
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.eval()


def imported(folder: Path, **keys: Any) -> tuple[ModelConfig, list[PipelineLayer]]:
    """Our layers with the weights of a folder, as an engine would set them."""
    model = validate(ModelConfig, {"from_pretrained": str(folder), **keys}, "model").with_vocabulary(70)
    weights, layers = PretrainedWeights(folder, model), build(model)
    for layer in layers:
        read = weights.layer(layer.index)
        layer.load_state_dict({own: read[name] for own, name in layer.hugging_face_names().items()})
    return model, layers


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_a_model_made_by_transformers(name: str, shard: str, tmp_path: Path) -> None:
    """Its weights in our layers give its logits, from one file and from shards, with both residuals and with grouped
    queries; the embedding is padded to a multiple of 64."""
    model = upstream(name)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    config, layers = imported(tmp_path)
    assert config.vocabulary == 128
    assert config.identity() == {**ModelConfig(**{**TINY[name], "vocab_size": 128}).identity(), "init_std": 0.02}
    given = tokens(70, 24)
    with torch.no_grad():
        assert_alike(run(layers, given)[..., :70], model(given).logits, FORWARD)
        ends = [layer for layer in layers for value in layer.parameters() if len(value) == 128]
        assert len(ends) == (1 if name == "llama-tied" else 2)
        assert not any(value[70:].any() for layer in ends for value in layer.parameters() if len(value) == 128)


def test_half_precision_old_names_and_constants(tmp_path: Path) -> None:
    """Weights in fp16 become fp32; files of GPT-NeoX may call the output either name, and hold masks and frequencies
    beside the parameters."""
    model = upstream("neox").half()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    _, layers = imported(tmp_path)
    # Transformers before 5 calls the output as the file does.
    names = {name.replace("embed_out", "lm_head"): value for name, value in model.named_parameters()}
    for layer in layers:
        for own, parameter in layer.named_parameters():
            wanted = names[layer.hugging_face_names()[own]]
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter[: len(wanted)], wanted.float())


def test_tied_embeddings_are_copied_if_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with one matrix for both then gives two equal ones, and the logits of the tied model; the log says so. Two
    matrices cannot become one."""
    monkeypatch.setattr(get_logger(), "propagate", True)
    model = upstream("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    _, layers = imported(tmp_path, tie_word_embeddings=False)
    assert torch.equal(layers[0].embedding.weight, layers[-1].output.weight)
    given = tokens(70, 24)
    with torch.no_grad():
        assert_alike(run(layers, given)[..., :70], model(given).logits, FORWARD)
    assert "tie_word_embeddings" in caplog.text
    upstream("llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"tie_word_embeddings is true, but .* has two matrices"):
        imported(tmp_path, tie_word_embeddings=True)


def recorded_losses(folder: Path) -> dict[int, dict[str, float]]:
    """Step -> validation loss of every domain, from the record of a run."""
    return {line["step"]: line["domain_loss"] for line in record(folder)[0] if line["event"] == "evaluate"}


def losses_in_transformers(model: Path, data_dir: Path) -> dict[str, float]:
    """Validation loss of every domain: the run's windows (two of each domain, evenly spaced) through transformers."""
    upstream, manifest = AutoModelForCausalLM.from_pretrained(model), Manifest.load(data_dir)
    losses = {}
    for name in manifest.domain_names:
        stream = manifest.open_domain(name, "validation")
        numbers = (0, stream.num_windows(SEQ_LENGTH) // 2)
        windows = torch.tensor([stream.window(number, SEQ_LENGTH).tolist() for number in numbers])
        with torch.no_grad():
            logits = upstream(windows[:, :-1]).logits
        losses[name] = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    return losses


def test_from_engine_to_engine(trained: Path, data_dir: Path, tmp_path: Path) -> None:
    """DeepSpeed -> export -> Megatron on two tensor-parallel ranks -> export: transformers finds the losses on record
    of each run, and the second run begins where the first ended. To go on, here under the other engine, it needs the
    folder no more."""
    export(trained, tmp_path / "model")
    last = recorded_losses(trained)[2]
    assert losses_in_transformers(tmp_path / "model", data_dir) == pytest.approx(last, rel=OF_LOSSES), "of all ids"
    second = yaml.safe_load((trained / "config.resolved.yaml").read_text())
    second.update(
        run_dir=str(tmp_path / "second"),
        model={"from_pretrained": str(tmp_path / "model")},
        engine={"name": "megatron", "tensor": 2},
        evaluate={"batches": 1, "every": 1},
    )
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(second), encoding="utf-8")
    run_megamix("train", tmp_path / "second.yaml", "train.stop_after=1")
    losses = recorded_losses(tmp_path / "second")
    assert losses[0] == pytest.approx(last, rel=OF_LOSSES)
    assert min(abs(losses[1][name] - losses[0][name]) for name in last) > 1e-3, "the weights moved"
    export(tmp_path / "second", tmp_path / "again")
    assert losses_in_transformers(tmp_path / "again", data_dir) == pytest.approx(losses[1], rel=OF_LOSSES)
    shutil.rmtree(tmp_path / "model")
    run_megamix(
        "train", tmp_path / "second" / "config.resolved.yaml", "train.stop_after=null", "engine={name: deepspeed}"
    )
    assert list(recorded_losses(tmp_path / "second")) == [0, 1, 2]


def test_checkpoints_that_cannot_be_exported(run_of: Make, tmp_path: Path) -> None:
    """Damage, another model's layers, another tokenizer, data that are gone, Megatron's form: each is refused with its
    reason, and nothing is left of the output."""
    folder, _ = run_of("neox")
    source, out = folder / "checkpoints" / "step_2", tmp_path / "out"
    state, listing, layer = source / "state.json", source / "checkpoint.json", source / "layers" / "00001.safetensors"
    before = {path: path.read_bytes() for path in (state, listing, layer)}

    def refused(error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            export(source, out)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        for path, content in before.items():
            path.write_bytes(content)

    def rewrite(path: Path) -> None:
        kept = store.read_listing(source)
        kept.files[str(path.relative_to(source))] = store.describe(path)
        store.write_listing(source, kept)

    layer.write_bytes(before[layer][:-1] + bytes([before[layer][-1] ^ 1]))
    refused(ResumeRefused, r"is damaged: layers/00001.safetensors has SHA-256")
    save_file({name: value[:1] for name, value in load_file(layer).items()}, layer)
    rewrite(layer)
    refused(ResumeRefused, r"has shape \[1.*\], expected .*the checkpoint is of another model")
    save_file({"weight/other": torch.ones(1)}, layer)
    rewrite(layer)
    refused(ResumeRefused, r"the checkpoint is of another model")
    changed = json.loads(before[state])
    changed["fingerprints"]["tokenizer"]["sha256"] = "0" * 64
    state.write_text(json.dumps(changed))
    rewrite(state)
    refused(InputError, r"was trained with a tokenizer of hash 000000000000, but .* has")
    store.write_listing(source, dataclasses.replace(store.read_listing(source), holds="megatron"))
    refused(InputError, r"in a format of engine megatron's own .*engine.checkpoint_format=layers")
    with pytest.raises(InputError, match=r"cannot make /proc/none.partial"):
        export(source, Path("/proc/none"))
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(InputError, match=r"out.partial is there already: another export"):
        export(source, out)
    (tmp_path / "out.partial").rmdir()
    config = folder / "config.resolved.yaml"
    config.write_text(config.read_text().replace("manifest: ", "manifest: /gone"))
    refused(InputError, r"the data of .* cannot be opened")
