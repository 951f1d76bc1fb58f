"""`doctor`: its report, its warnings and its errors."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megamix.analysis import doctor as module
from megamix.analysis.doctor import doctor
from megamix.analysis.memory import checkpoint_bytes
from megamix.core.config import validate
from megamix.core.errors import InputError, ResumeRefused
from megamix.data.blend.blend import Blend
from megamix.data.tokens.manifest import DomainEntry, Manifest, SplitEntry, TokenizerEntry, ValidationEntry
from megamix.data.tokens.writer import IndexedWriter
from megamix.engines.models.config import ModelConfig
from megamix.mixing import DomainStats
from megamix.mixing.mixers import make_mixer
from megamix.training.config import RunConfig

SEQ = 32
NEOX = ModelConfig(architecture="neox", hidden_size=64, num_layers=3, num_heads=4, ffn_size=192, vocab_size=320)


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
        splits: dict[str, SplitEntry] = {}
        for split, length in (("train", size), ("validation", 200)):
            with IndexedWriter(folder / name / split, "uint16") as writer:
                writer.add_document(np.arange(length) % 250)
            splits[split] = SplitEntry.of(f"{name}/{split}", writer.close())
        validation = ValidationEntry(**dict(splits["validation"]), unigram_nats=5.0)
        entries.append(DomainEntry(name=name, train=splits["train"], validation=validation))
    (folder / "tokenizer.json").write_bytes(b"tokenizer")
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


# The report. ---------------------------------------------------------------------------------------------------------


def test_what_would_run(data: Path, tmp_path: Path) -> None:
    engine = {"pipeline": 2, "data": 2}
    text = doctor(config_of(tmp_path / "new" / "run", data, engine=engine)).text()
    assert f"vocabulary 320: {NEOX.num_parameters():,} parameters" in text
    assert "10 steps, 160 samples, 5,120 tokens" in text
    assert "4 = pipeline 2 x data 2; deepspeed, ZeRO 1, fp32" in text
    # 16 samples are 4 micro-batches of 4, which go into 1, 2 or 4 turns on ranks in pairs.
    assert "2, 4, 8 ranks (2 for a copy of the model; 16 samples in micro-batches of 4)" in text
    # Two micro-batches on two stages: (2 - 1) / (2 + 2 - 1).
    assert "2 micro-batches of 4 samples per step; pipeline bubble 33.3%" in text
    # 160 samples x 3/4 over 93 windows.
    assert any(line.split() == ["web", "3,000", "0.7500", "0.7500", "1.29"] for line in text.splitlines())
    assert f"anew in {tmp_path / 'new' / 'run'}" in text
    (header,) = [line for line in text.splitlines() if line.startswith("memory per rank, GiB, computed from shapes")]
    assert header.split()[-8:] == ["activations", "logits", "total", "linear", "loss", "total", "with", "it"]
    assert torch.__version__ in text
    assert not (tmp_path / "new").exists()


def test_attention_within_documents_is_said_with_the_memory_of_its_masks(tmp_path: Path) -> None:
    """Two samples of 16,384 tokens: a mask takes 2 GiB."""
    activations = []
    for attention in ("sample", "document"):
        data = {"attention": attention, "seq_length": 16_384}
        config = config_of(tmp_path, tmp_path, data=data, model={"vocab_size": 320}, train={"micro_batch": 2})
        text = doctor(config, plan_only=True).text()
        assert ("attention    within documents" in text) == (attention == "document")
        (stage,) = [line.split() for line in text.splitlines() if line.startswith("stage 0")]
        activations.append(float(stage[-5]))
    assert activations[1] - activations[0] == pytest.approx(2, abs=0.002)


def test_an_update_has_few_samples_of_a_domain(data: Path, tmp_path: Path) -> None:
    """16 samples a step, a quarter of them of code: 4 are enough, 3 are not."""

    def warned(mixer: dict[str, Any], batch: int = 12, **changes: Any) -> str:
        train = {"global_batch": batch, "micro_batch": 4}
        text = doctor(config_of(tmp_path, data, mixer=mixer, train=train, **changes)).text()
        return "\n".join(line for line in text.splitlines() if "single samples" in line)

    assert not warned({"name": "odm"}, batch=16)
    text = warned({"name": "odm"})
    assert "mixer odm: an update has 3 samples of domain 'code' at its initial weight, so weights" in text
    more = "Set mixer.reward_over to interval and mixer.update_every to {}, or train.global_batch to 16"
    assert f"{more.format(2)}, or use the mixer recommended" in text
    both = warned({"name": "odm"}, batch=4)
    assert "1 samples of domain 'code' at its initial weight (below 4 too: web)" in both
    assert more.format(4) in both
    assert warned({"name": "odm", "update_every": 2}) == text  # which sees the losses of every second step alone
    whole = {"name": "odm", "reward_over": "interval"}
    assert "Set mixer.update_every to 2 or train.global_batch to 16" in warned(whole)
    assert not warned({**whole, "update_every": 2})
    assert not warned({"name": "odm", "reward_from": "evaluation"})
    assert not warned({"name": "recommended"}, batch=4)
    assert not warned({"name": "odm"}, mixture={"web": 1, "code": 0})


def test_aioli_probes_while_the_learning_rate_rises(data: Path, tmp_path: Path) -> None:
    """Asked for after step n, the first probe begins at step n + weight_lag + 1; the rate has risen at step 20."""

    def warned(first_round: int, warmup: int = 20, **changes: Any) -> str:
        mixer = {"name": "aioli", "lp_steps": 3, "update_steps": 60, "first_round": first_round, "one_hot_factor": 0.6}
        train = {"steps": 100, "warmup_steps": warmup}
        evaluate = {"every": 20, "samples": 2}
        text = doctor(config_of(tmp_path, data, mixer=mixer, train=train, evaluate=evaluate, **changes)).text()
        return "\n".join(line for line in text.splitlines() if "first probe" in line)

    text = warned(1)
    assert "first probe begins at step 3, while the learning rate rises until step 20" in text
    assert "Set mixer.first_round to 19 or more" in text
    assert "begins at step 20," in warned(18)
    assert not warned(19)
    assert not warned(14, data={"weight_lag": 6})
    assert not warned(1, warmup=0)


@pytest.mark.parametrize(
    ("mixer", "first", "keys"),
    [
        ({"name": "recommended", "warmup_steps": 38}, 39, "mixer.warmup_steps"),
        ({"name": "odm", "warmup_steps": 30, "update_every": 13}, 39, "mixer.warmup_steps and update_every"),
        (
            {
                "name": "ado",
                "smoothing_window": 7,
                "fit_from": 10,
                "start": 30,
                "refit_every": 19,
                "smoothing_degree": 3,
            },
            39,
            "mixer.fit_from",
        ),
        ({"name": "aioli", "first_round": 39, "one_hot_factor": 0.6}, 39, "mixer.first_round"),
    ],
)
def test_a_mixer_that_never_acts_is_named(
    data: Path, tmp_path: Path, mixer: dict[str, Any], first: int, keys: str
) -> None:
    """With a lag of 1, what follows from step 39 holds from step 41 on."""

    def warned(steps: int) -> list[str]:
        evaluate = {"every": 20, "samples": 2}
        text = doctor(config_of(tmp_path, data, mixer=mixer, train={"steps": steps}, evaluate=evaluate)).text()
        return [line for line in text.splitlines() if "stay the mixture's" in line]

    assert not warned(41)
    (line,) = warned(40)
    assert f"change after step {first} and act 2 steps later at the earliest, and the run ends after step 40" in line
    assert f"Lower {keys}" in line


@pytest.mark.parametrize(
    ("mixer", "first", "keys"),
    [
        ({}, 11, "Train longer"),
        ({"memory": 0}, 8, "Train longer"),
        ({"update_every": 3}, 33, "Lower mixer.update_every, or train longer"),
    ],
)
def test_recommended_acts_where_it_may_suspect_a_domain(
    data: Path, tmp_path: Path, mixer: dict[str, Any], first: int, keys: str
) -> None:
    """Where it begins with the objective's weights. The losses of a mixer say the same."""

    def warned(steps: int, **keys: Any) -> list[str]:
        config = config_of(
            tmp_path, data, mixer={"name": "recommended", **mixer}, train={"steps": steps}, objective="uniform", **keys
        )
        return [line for line in doctor(config).text().splitlines() if "stay the mixture's" in line]

    assert not warned(first + 2, mixture="uniform")
    (line,) = warned(first + 1, mixture="uniform")
    assert f"change after step {first} and" in line
    assert keys in line
    assert not warned(first + 1, mixture={"web": 3, "code": 2})
    made = make_mixer({"name": "recommended", **mixer}, ["a", "b"], [1.0] * 2, [1.0] * 2)
    moved = []
    for step in range(1, first + 2):
        stats = DomainStats([100 * (9 - math.log(step)), 690.0 + step % 2], [100] * 2)
        moved.append(np.abs(made.update(stats, step) - 0.5).max() > 1e-6)
    assert moved.index(True) + 1 == first


@pytest.mark.parametrize(("mixer", "times", "needed"), [("odm", 0, 1), ("recommended", 0, 11), ("recommended", 10, 11)])
def test_too_few_updates_are_named(data: Path, tmp_path: Path, mixer: str, times: int, needed: int) -> None:
    changes: dict[str, Any] = {"mixer": {"name": mixer, "update_times": times}, "train": {"steps": 300}}
    text = doctor(config_of(tmp_path, data, objective="uniform", mixture="uniform", **changes)).text()
    assert f"no weight changes before update {needed}" in text
    assert "Raise mixer.update_times" in text


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


@pytest.mark.parametrize(
    ("prints", "message"),
    [
        (
            {"data": {"domains": {"web": "other", "code": "other"}}},
            "made with other data: the data of domain 'web' was other",
        ),
        ({}, r"step_5 holds no state of a run \(fingerprints.data: Field required"),
    ],
)
def test_another_runs_checkpoint_is_refused(data: Path, tmp_path: Path, prints: dict[str, Any], message: str) -> None:
    path = tmp_path / "checkpoints" / "step_5"
    path.mkdir(parents=True)
    blend = Blend([9, 9], [0.5, 0.5], 7).state_dict()
    mixer = make_mixer({"name": "static"}, ["web", "code"], [0.5, 0.5]).state_dict()
    content = {"fingerprints": prints, "step": 5, "sampler": {"blend": blend}, "mixer": mixer, "manifest": "data"}
    state = json.dumps(content).encode()
    (path / "state.json").write_bytes(state)
    files = {"state.json": {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}}
    listing = {"format": "megamix-checkpoint", "version": 1, "step": 5, "files": files}
    (path / "checkpoint.json").write_text(json.dumps(listing))
    with pytest.raises(ResumeRefused, match=message):
        doctor(config_of(tmp_path, data))


# Without data, without a config. -------------------------------------------------------------------------------------


def test_the_plan_alone_needs_neither_data_nor_machine(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(InputError, match=r"model\.vocab_size is not given"):
        doctor(config_of(tmp_path, nowhere), plan_only=True)
    config = config_of(tmp_path, nowhere, model={"vocab_size": 1000}, engine={"pipeline": 2}, mixture={"a": 3, "b": 1})
    text = doctor(config, world_size=4, plan_only=True).text()
    assert "4 = pipeline 2 x data 2; deepspeed, ZeRO 1, fp32" in text
    assert any(line.split() == ["a", "-", "-", "0.7500", "-"] for line in text.splitlines())
    assert "cores" not in text
    assert (
        "known once the data is there"
        in doctor(config_of(tmp_path, nowhere, model={"vocab_size": 1000}), plan_only=True).text()
    )


def test_the_plan_alone_counts_epochs_of_the_tokens_to_come(tmp_path: Path) -> None:
    """3201 and 321 tokens are 100 and 10 samples of 32; half of the run's 160 samples each is 0.8 and 8 epochs."""
    changes: dict[str, Any] = {"model": {"vocab_size": 1000}, "mixture": {"a": 1, "b": 1}}

    def planned(**data: Any) -> str:
        data = {"token_counts": {"a": 3201, "b": 321}, **data}
        return doctor(config_of(tmp_path, tmp_path / "nowhere", **changes, data=data), plan_only=True).text()

    text = planned()
    assert any(line.split() == ["a", "3,201", "0.9089", "0.5000", "0.80"] for line in text.splitlines())
    assert any(line.split() == ["b", "321", "0.0911", "0.5000", "8.00"] for line in text.splitlines())
    assert "tokens expected" in text
    assert "warning: domain 'b': weight 0.5000 reads it 8.0 times; more than 4 epochs" in text
    # A cap of 2 epochs leaves 20 of the 160 samples to b.
    assert any(line.split() == ["b", "321", "0.0911", "0.1250", "2.00"] for line in planned(max_epochs=2).splitlines())
    with pytest.raises(InputError, match=r"max_epochs 1 allows 110 samples of the 2 domains .* asks for 160"):
        planned(max_epochs=1)
    changes["mixture"] = "natural"
    assert any(line.split() == ["b", "321", "0.0911", "0.0911", "1.46"] for line in planned().splitlines())
    assert any(
        line.split() == ["b", "321", "1.0000", "1.0000", "16.00"] for line in planned(domains=["b"]).splitlines()
    )
    with pytest.raises(InputError, match=r"token_counts has no domain 'bb'\. Did you mean 'b'"):
        planned(domains=["bb"])
    with pytest.raises(InputError, match=r"domain 'b' has 32 tokens, and one sample of seq_length 32 needs 33"):
        planned(token_counts={"a": 100, "b": 32})


def test_the_plan_of_an_interleaved_pipeline(tmp_path: Path) -> None:
    """(p - 1) / (v m + p - 1) with 2 stages of 2 chunks and 4 micro-batches."""
    engine = {"name": "megatron", "pipeline": 2, "virtual_pipeline": 2, "tensor": 2, "activation_checkpointing": True}
    changes: dict[str, Any] = {"model": {"vocab_size": 1024, "num_layers": 4}, "engine": engine}
    text = doctor(config_of(tmp_path, tmp_path / "nowhere", **changes), plan_only=True).text()
    assert "4 = pipeline 2 x tensor 2 x context 1 x data 1; megatron, 2 chunks a stage, fp32, activation checkp" in text
    assert "pipeline bubble 11.1%" in text
    # Half of 1024 x 64, and of each of two layers half of 41,344 and all of 6 x 64.
    assert any(line.split()[:5] == ["stage", "0", "0-1,", "3-3", "74,880"] for line in text.splitlines())


def test_the_package_of_the_engine_is_needed(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron", None)
    assert "cores" in doctor(config_of(tmp_path, data)).text()
    with pytest.raises(InputError, match=r"engine megatron needs the package megatron, which .*megamix\[megatron\]"):
        doctor(config_of(tmp_path, data, engine={"name": "megatron"}))


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"engine": {"pipeline": 4}}, None, "model has 3 decoder layers"),
        ({"train": {"global_batch": 6}}, None, "does not divide"),
        ({"engine": {"pipeline": 2}}, 3, "makes a multiple of 2 ranks, and this job has 3"),
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
    assert "no-such-package" not in doctor().text()
