"""`doctor`: its formulas against real layers, and what it lets pass."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megamix import doctor as module
from megamix.config import validate
from megamix.data.manifest import DomainEntry, Manifest, SplitEntry, TokenizerEntry, ValidationEntry
from megamix.data.writer import IndexedWriter
from megamix.doctor import doctor
from megamix.engines.config import EngineConfig
from megamix.errors import InputError, ResumeRefused
from megamix.memory import activation_bytes, checkpoint_bytes, estimate_memory, layer_parameters, stage_bounds
from megamix.models.config import ModelConfig
from megamix.models.layers import Decoder, Embedding, Head
from megamix.run_config import RunConfig

SEQ = 32
NEOX = ModelConfig(architecture="neox", hidden_size=64, num_layers=3, num_heads=4, ffn_size=192, vocab_size=320)
LLAMA = ModelConfig(
    architecture="llama", hidden_size=64, num_layers=5, num_heads=4, num_key_value_heads=2, ffn_size=160, vocab_size=448
)


@pytest.fixture(autouse=True)
def outside_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    entries = []
    for name, size in (("web", 3000), ("code", 1000)):
        (folder / name).mkdir()
        splits: dict[str, dict[str, Any]] = {}
        for split, length in (("train", size), ("validation", 200)):
            with IndexedWriter(folder / name / split, "uint16") as writer:
                writer.add_document(np.arange(length) % 250)
                done = writer.close()
            prefix, counts = f"{name}/{split}", {"tokens": done.tokens, "documents": done.documents}
            splits[split] = {"prefixes": (prefix,), **counts, "max_token": done.max_token, "sha256": (done.sha256,)}
        validation = ValidationEntry(**splits["validation"], unigram_nats=5.0)
        entries.append(DomainEntry(name=name, train=SplitEntry(**splits["train"]), validation=validation))
    sha256 = hashlib.sha256(b"tokenizer").hexdigest()
    entry = TokenizerEntry(file="tokenizer.json", sha256=sha256, vocab_size=300, eod_id=0)
    Manifest.build(folder, tokenizer=entry, dtype="uint16", validation_fraction=0.02, domains=entries).save()
    return folder


def config_of(run_dir: Path, manifest: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "data": {"manifest": str(manifest), "seq_length": SEQ},
        "model": {"architecture": "neox", "hidden_size": 64, "num_layers": 3, "num_heads": 4, "ffn_size": 192},
        "train": {"steps": 10, "global_batch": 16, "micro_batch": 4, "lr": 1e-3},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) and key != "mixture" else value
    return validate(RunConfig, values, "test")


# The formulas. -------------------------------------------------------------------------------------------------------


def real_parameters(model: ModelConfig) -> list[int]:
    """Counted on the layers themselves, without memory for them."""
    with torch.device("meta"):
        layers: list[torch.nn.Module] = [Embedding(model, 0, 1)]
        layers += [Decoder(model, index + 1, 1, SEQ) for index in range(model.num_layers)]
        layers.append(Head(model, model.num_layers + 1, 1))
    return [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]


@pytest.mark.parametrize("model", [NEOX, LLAMA], ids=["neox", "llama"])
def test_parameters_are_those_of_the_real_layers(model: ModelConfig) -> None:
    assert layer_parameters(model) == real_parameters(model)
    assert model.num_parameters() == sum(real_parameters(model))
    assert checkpoint_bytes(model) == 12 * sum(real_parameters(model))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [NEOX, LLAMA], ids=["neox", "llama"])
def test_activations_are_what_autograd_keeps(model: ModelConfig, precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layer = Decoder(model, 1, 1, SEQ).to(dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            # The tensor too, so that its address is not given to another one.
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden = torch.randn(2, SEQ, model.hidden_size, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / (2 * SEQ)
    # Rotary tables and the statistics of norms are left out of the formula.
    assert activation_bytes(model, precision) == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_stages_hold_the_whole_model(stages: int) -> None:
    engine = EngineConfig(pipeline=stages)
    memory = estimate_memory(NEOX, engine, seq_length=SEQ, micro_batch=4, num_micro_batches=4, data_size=2)
    real, bounds = real_parameters(NEOX), stage_bounds(NEOX, SEQ, stages)
    assert bounds[0] == 0
    assert bounds[-1] == len(real)
    for stage in memory:
        count = sum(real[stage.first_layer : stage.last_layer + 1])
        assert stage.parameters == count
        assert (stage.weights, stage.gradients) == (4 * count, 4 * count)
        # Moments and master weights, spread over two ranks.
        assert stage.optimizer == 12 * count // 2
    assert [stage.logits > 0 for stage in memory] == [False] * (stages - 1) + [True]
    assert memory[-1].logits == 2 * 4 * 4 * SEQ * 320
    assert sum(stage.parameters for stage in memory) == NEOX.num_parameters()


def test_the_first_stage_holds_most_micro_batches() -> None:
    def activations(stages: int, micro_batches: int, **engine: Any) -> list[int]:
        model = NEOX.model_copy(update={"num_layers": 8, "vocab_size": 64})
        config = EngineConfig(pipeline=stages, **engine)
        memory = estimate_memory(
            model, config, seq_length=SEQ, micro_batch=1, num_micro_batches=micro_batches, data_size=1
        )
        return [stage.activations for stage in memory]

    layer, hidden = SEQ * activation_bytes(NEOX, "fp32"), SEQ * 4 * 64
    assert activations(2, 8) == [2 * (4 * layer + hidden), 4 * layer + hidden]
    assert activations(2, 1) == [4 * layer + hidden, 4 * layer + hidden]
    assert activations(1, 8, activation_checkpointing=True) == [9 * hidden + layer]


def test_bf16_and_zero_0() -> None:
    def first(**engine: Any) -> Any:
        shape = {"seq_length": SEQ, "micro_batch": 1, "num_micro_batches": 1, "data_size": 4}
        return estimate_memory(NEOX, EngineConfig(**engine), **shape)[0]

    count = NEOX.num_parameters()
    half = first(precision="bf16")
    assert (half.weights, half.gradients, half.optimizer) == (2 * count, 6 * count, 3 * count)
    assert first(zero=0).optimizer == 8 * count


# The report. ---------------------------------------------------------------------------------------------------------


def test_what_would_run(data: Path, tmp_path: Path) -> None:
    engine = {"pipeline": 2, "data": 2}
    text = doctor(config_of(tmp_path / "new" / "run", data, engine=engine)).text()
    assert f"vocabulary 320: {NEOX.num_parameters():,} parameters" in text
    assert "10 steps, 160 samples, 5,120 tokens" in text
    assert "4 = pipeline 2 x tensor 1 x data 2" in text
    # Two micro-batches on two stages: (2 - 1) / (2 + 2 - 1).
    assert "2 micro-batches of 4 samples per rank and step; pipeline bubble 33.3%" in text
    # 160 samples x 3/4 over 93 windows.
    assert any(line.split() == ["web", "3,000", "0.7500", "0.7500", "1.29"] for line in text.splitlines())
    assert f"anew in {tmp_path / 'new' / 'run'}" in text
    assert torch.__version__ in text
    assert not (tmp_path / "new").exists()


def test_warnings_are_not_errors(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "num_cores", lambda: 1)
    monkeypatch.setattr(module, "_devices", list)
    changes: dict[str, Any] = {"engine": {"pipeline": 3}, "train": {"micro_batch": 16, "steps": 100}}
    changes["mixer"] = {"name": "odm", "min_exploration_rate": 0.9}
    text = doctor(config_of(tmp_path, data, **changes)).text()
    assert "warning: domain 'web': weight 0.7500 reads it 12.9 times" in text
    assert "warning: the pipeline stands idle for 67% of a step" in text
    assert "warning: 3 ranks for 1 core" in text
    assert "warning: odm: min_exploration_rate 0.9 x 2 domains is 1 or more" in text
    monkeypatch.setattr(module, "_devices", lambda: ["a GPU"])
    assert "warning: 3 ranks for 1 CUDA device here" in doctor(config_of(tmp_path, data, **changes)).text()
    # A job that runs elsewhere has the machines it was given.
    assert "ranks for" not in doctor(config_of(tmp_path, data, **changes), world_size=3).text()


def test_little_room(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, data)
    size = checkpoint_bytes(NEOX)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * size))
    assert "checkpoint.keep 2 takes up to" in doctor(config).text()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(InputError, match="and a checkpoint takes"):
        doctor(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"pipeline": 4}}, "model has 3 decoder layers"),
        ({"train": {"global_batch": 6}}, "does not divide"),
        ({"mixture": {"web": 1.0, "cod": 1.0}}, "cod"),
        ({"mixture": {"web": 1.0, "code": -1.0}}, "code"),
        ({"model": {"vocab_size": 64}}, "vocab_size is 64"),
        ({"data": {"seq_length": 500}}, "seq_length 500"),
        ({"data": {"max_epochs": 1}, "train": {"steps": 100}}, "max_epochs 1 allows"),
    ],
)
def test_what_would_stop_the_run_is_an_error(data: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        doctor(config_of(tmp_path, data, **changes))


def test_a_run_dir_that_cannot_be(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is not a directory"):
        doctor(config_of(tmp_path / "file" / "run", data))


def test_another_runs_checkpoint_is_refused(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step_5"
    path.mkdir(parents=True)
    state = json.dumps({"fingerprints": {"data": {"domains": {"web": "other", "code": "other"}}}, "step": 5}).encode()
    (path / "state.json").write_bytes(state)
    files = {"state.json": {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}}
    listing = {"format": "megamix-checkpoint", "version": 1, "step": 5, "files": files}
    (path / "checkpoint.json").write_text(json.dumps(listing))
    with pytest.raises(ResumeRefused, match="made with other data: the data of domain 'web' was other"):
        doctor(config_of(tmp_path, data))


# Without data, without a config. -------------------------------------------------------------------------------------


def test_the_plan_alone_needs_neither_data_nor_machine(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(InputError, match=r"model\.vocab_size is not given"):
        doctor(config_of(tmp_path, nowhere), plan_only=True)
    config = config_of(tmp_path, nowhere, model={"vocab_size": 1000}, engine={"pipeline": 2}, mixture={"a": 3, "b": 1})
    text = doctor(config, world_size=4, plan_only=True).text()
    assert "4 = pipeline 2 x tensor 1 x data 2" in text
    assert any(line.split() == ["a", "-", "-", "0.7500", "-"] for line in text.splitlines())
    assert "cores" not in text
    assert (
        "known once the data is there"
        in doctor(config_of(tmp_path, nowhere, model={"vocab_size": 1000}), plan_only=True).text()
    )


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"engine": {"pipeline": 4}}, None, "model has 3 decoder layers"),
        ({"train": {"global_batch": 6}}, None, "does not divide"),
        ({"engine": {"pipeline": 2}}, 3, "does not make the 3 ranks"),
        ({"mixture": {"a": -1.0, "b": 2.0}}, None, "mixture: the weight of domain 'a'"),
    ],
)
def test_the_plan_alone_finds_what_needs_no_data(
    tmp_path: Path, changes: dict[str, Any], world_size: int | None, message: str
) -> None:
    changes = {**changes, "model": {"vocab_size": 1000}}
    with pytest.raises(InputError, match=message):
        doctor(config_of(tmp_path, tmp_path / "nowhere", **changes), world_size=world_size, plan_only=True)


def test_the_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    text = doctor().text()
    assert torch.__version__ in text
    assert "cores" in text
    with pytest.raises(InputError, match="Name a config"):
        doctor(plan_only=True)
    monkeypatch.setattr(module, "PACKAGES", ("no-such-package",))
    with pytest.raises(InputError, match="no-such-package is not installed"):
        doctor()
