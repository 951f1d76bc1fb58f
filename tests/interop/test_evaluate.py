"""`megamix evaluate`: the run's own evaluation, by its checkpoint and by transformers' model of its export."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jobs import run_job
from readme_code import readme_code
from records import lines
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel
from typer.testing import CliRunner

from megamix.cli import app
from megamix.core.errors import InputError
from megamix.data.tokens.manifest import Manifest
from megamix.interop.evaluation.evaluate import Evaluation, evaluate
from megamix.interop.evaluation.model import EvaluatedModel, open_model
from megamix.interop.evaluation.token_bytes import token_bytes
from megamix.interop.hugging_face.export import export
from megamix.prepare.pipeline import prepare
from megamix.training.evaluate import choose_samples

SEQ, SAMPLES, STEPS = 32, 7, 3
NAMES = ("code", "packages", "tables", "topics")


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    config = {
        "run_dir": str(folder / "run"),
        "data": {
            "manifest": str(data_dir), "seq_length": SEQ, "eod_mask_loss": True, "reset_position_ids": True,
        },
        "model": {"architecture": "neox", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 64},
        "engine": {"pipeline": 1},
        "objective": "uniform",
        "train": {"steps": STEPS, "global_batch": 16, "micro_batch": 8, "lr": 1.0e-2},
        "evaluate": {"every": 1, "samples": SAMPLES},
        "checkpoint": {"every": 1, "keep": 9},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    run_job(1, [(folder / "config.yaml", ())])
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    export(run, run.parent / "model")
    return run.parent / "model"


def recorded(run: Path, step: int) -> dict[str, Any]:
    return next(line for line in lines(run / "metrics.jsonl") if (line["event"], line["step"]) == ("evaluate", step))


def agree(found: Evaluation, wanted: dict[str, Any]) -> None:
    """To fp32 rounding: 60 roundings of a loss of 6 nats are 2e-5."""
    assert set(found.line) == set(wanted) - {"event", "step", "tokens"}
    for key in ("domain_loss", "domain_error"):
        assert found.line[key] == pytest.approx(wanted[key], abs=2e-5)
    for key in ("objective_loss", "objective_error", "macro_loss", "micro_loss", "worst_loss", "objective"):
        assert found.line[key] == pytest.approx(wanted[key], abs=2e-5)
    assert found.line["worst_domain"] == wanted["worst_domain"]
    for name in NAMES:
        row = found.domains[name]
        assert row["loss"] == found.line["domain_loss"][name]
        assert row["loss_error"] == found.line["domain_error"][name]
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["perplexity_error"] == pytest.approx(math.exp(row["loss"]) * row["loss_error"])


def test_the_newest_and_a_named_checkpoint(run: Path) -> None:
    first, last = recorded(run, 1), recorded(run, STEPS)
    assert first["objective_loss"] - last["objective_loss"] > 0.01
    agree(evaluate(run), last)
    agree(evaluate(run / "checkpoints" / "step_1"), first)


def test_the_export_has_the_same_losses(run: Path, exported: Path, data_dir: Path) -> None:
    agree(evaluate(exported, data_dir), recorded(run, STEPS))


@pytest.mark.parametrize("attention", ["document", "sample"])
def test_attention_of_the_run(run: Path, exported: Path, tmp_path: Path, attention: str) -> None:
    """Of a checkpoint and of its export: with documents, each of them by itself; else positions alone restart."""
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(exported, tmp_path / "model")
    config = {**yaml.safe_load((run / "config.resolved.yaml").read_text())}
    config["data"]["attention"] = attention
    (tmp_path / "run" / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    about = json.loads((exported / "megamix.json").read_text())
    about["config"]["data"]["attention"] = attention
    (tmp_path / "model" / "megamix.json").write_text(json.dumps(about))
    tokens = torch.randint(500, (2, SEQ), generator=torch.Generator().manual_seed(2))
    positions = torch.stack([torch.arange(SEQ) % 9, torch.arange(SEQ) % 20])
    models = [open_model(tmp_path / name, torch.device("cpu")).logits for name in ("run", "model")]
    found = [logits(tokens, positions) for logits in models]
    torch.testing.assert_close(found[0], found[1])
    alone = torch.cat([models[1](tokens[1:, a:b], None) for a, b in ((0, 20), (20, SEQ))], 1)
    assert torch.allclose(found[0][1:], alone, atol=1e-5) == (attention == "document")


def test_bits_per_byte(run: Path, data_dir: Path) -> None:
    """Of the decoded text, the ends of documents and masked labels left out."""
    found, manifest = evaluate(run).domains, Manifest.load(data_dir)
    tokenizer, eod = manifest.load_tokenizer(), manifest.tokenizer.eod_id
    for name in ("code", "packages"):
        stream = manifest.open_domain(name, "validation")
        size = tokens = 0
        for sample in choose_samples([stream], SEQ, SAMPLES)[1].tolist():
            window = stream.window(sample, SEQ).tolist()
            counted = [label for before, label in itertools.pairwise(window) if before != eod]
            text = tokenizer.decode([label for label in counted if label != eod])
            assert text.isascii()
            size, tokens = size + len(text), tokens + len(counted)
        row = found[name]
        assert (row["bytes"], row["tokens"]) == (size, tokens)
        assert row["bits_per_byte"] == pytest.approx(row["loss"] * tokens / size / math.log(2))
        assert 0 < row["bits_per_byte_error"] < row["bits_per_byte"]


def test_losses_that_are_not_finite(run: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are left out with their bytes: here after every token with an odd id."""

    def broken(path: Path, device: torch.device) -> EvaluatedModel:
        model = open_model(path, device)

        def logits(tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None) -> torch.Tensor:
            return model.logits(tokens_BS, positions_BS).masked_fill(tokens_BS[..., None] % 2 == 1, math.nan)

        return replace(model, logits=logits)

    monkeypatch.setattr("megamix.interop.evaluation.evaluate.open_model", broken)
    row, manifest = evaluate(run).domains["code"], Manifest.load(data_dir)
    stream, sizes, eod = manifest.open_domain("code", "validation"), token_bytes(manifest), manifest.tokenizer.eod_id
    assert sizes is not None
    windows = [stream.window(sample, SEQ).tolist() for sample in choose_samples([stream], SEQ, SAMPLES)[1].tolist()]
    kept = [b for window in windows for a, b in itertools.pairwise(window) if a % 2 == 0 and a != eod]
    assert 0 < len(kept) < SAMPLES * SEQ / 2 * 1.5
    assert (row["tokens"], row["bytes"]) == (len(kept), sizes[kept].sum())


def test_bytes_of_tokens(tmp_path: Path) -> None:
    """Of SentencePiece's kind, and where they are not known."""

    def of(decoder: Any) -> np.ndarray | None:
        vocabulary = {"<0x0A>": 0, "\u2581ab": 1, "é": 2, "</s>": 3, "extra": 4}
        model = {"type": "BPE", "vocab": vocabulary, "merges": []}
        base = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
        added = [
            {"id": 3, "content": "</s>", "special": True, **base},
            {"id": 4, "content": "extra", "special": False, **base},
        ]
        (tmp_path / "tokenizer.json").write_text(
            json.dumps({"model": model, "decoder": decoder, "added_tokens": added})
        )
        entry = type("Entry", (), {"file": "tokenizer.json", "vocab_size": 5, "eod_id": 3})
        manifest: Any = type("Data", (), {"folder": tmp_path, "tokenizer": entry})
        return token_bytes(manifest)

    parts = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}]
    found = of({"type": "Sequence", "decoders": parts})
    assert found is not None
    assert found.tolist() == [1, 3, 2, 0, 5]
    assert of({"type": "WordPiece", "prefix": "##", "cleanup": True}) is None


def test_the_command(run: Path, exported: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = [
        str(exported), "--data", str(data_dir), "--samples", "all",
        "--objective", "{code: 1, packages: 0, tables: 0, topics: 0}",
    ]  # fmt: skip
    done = CliRunner().invoke(app, ["evaluate", *arguments, "--split", "validation", "--json", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    code = found["domains"]["code"]
    assert (found["objective_loss"], found["objective_error"]) == (code["loss"], code["loss_error"])
    manifest = Manifest.load(data_dir)
    assert code["samples"] == manifest.open_domain("code", "validation").num_windows(SEQ) > SAMPLES
    assert code["loss_error"] < evaluate(run).domains["code"]["loss_error"]
    assert f"{code['loss']:.4f}" in done.output
    assert "objective (as given)" in done.output
    train = evaluate(run, samples=3, split="train")
    assert {row["samples"] for row in train.domains.values()} == {3}


def test_a_domain_of_one_document_is_named() -> None:
    """Nothing else says why it, and the objective, have no standard error."""
    numbers = dict.fromkeys(("perplexity", "perplexity_error", "bits_per_byte", "bits_per_byte_error", "bytes"))
    row = {"loss": 2.0, "loss_error": 0.1, "tokens": 64, "documents": 3, "samples": 2, **numbers}
    line = {"objective_loss": 2.0, "objective_error": None, "macro_loss": 2.0}
    settings = dict.fromkeys(("model", "data", "split", "seq_length", "objective_name"), "x") | {"without": []}
    domains = {"web": row, "law": {**row, "loss_error": None, "documents": 1}}
    assert "one document, and so without one: law, and" in Evaluation(line, domains, settings).report().text()
    assert "one document" not in Evaluation(line, {"web": row}, settings).report().text()


def test_what_cannot_be_evaluated(run: Path, exported: Path, text_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is neither a run"):
        evaluate(tmp_path)
    with pytest.raises(InputError, match="which data it is to be evaluated on is not known"):
        evaluate(exported)
    other = tmp_path / "other"
    prepare([str(text_dir)], other, tokenizer="train:300", validation_fraction=0.1, workers=1, progress=False)
    with pytest.raises(InputError, match=r"was trained with a tokenizer of hash \w+, but .*other has"):
        evaluate(run, other)
    with pytest.raises(InputError, match="the tokenizer of the data, is not"):
        evaluate(exported, other)
    with pytest.raises(InputError, match="the objective is 'macro', expected natural, uniform"):
        evaluate(run, objective="macro")
    with pytest.raises(InputError, match="objective: no weight for packages"):
        evaluate(run, objective={"code": 1.0})
    small = tmp_path / "small"
    model = AutoModelForCausalLM.from_pretrained(exported)
    model.resize_token_embeddings(64)
    model.save_pretrained(small)
    with pytest.raises(InputError, match=r"small knows 64 token ids, but the tokenizer of .*other has 300"):
        evaluate(small, other)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    with pytest.raises(InputError, match="transformers cannot open the model"):
        evaluate(broken, other)
    part, tensors = tmp_path / "part", load_file(exported / "model.safetensors")
    shutil.copytree(exported, part)
    gone = next(name for name in tensors if "dense_h_to_4h.weight" in name)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != gone}, part / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match=rf"part has no weights for {re.escape(gone)} of GPTNeoXForCausalLM"):
        evaluate(part, other)
    sees_all = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16,
        initializer_range=0.5,
    )  # fmt: skip
    BertLMHeadModel(sees_all).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="bert: BertLMHeadModel sees the tokens after those it reads"):
        evaluate(tmp_path / "bert", other)
    done = CliRunner().invoke(app, ["evaluate", str(run), "--samples", "none"])
    assert done.exit_code == 2
    assert "expected a number above 0, or all" in done.output


def test_the_recipe_of_lm_evaluation_harness(exported: Path, tmp_path: Path) -> None:
    """The page's task and command, on a text whose bits per byte are worked out from the model's own tokens."""
    pytest.importorskip("lm_eval")
    text = "def f(x):\n    return x + 1\n"
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "held_out.yaml").write_text(readme_code("interop", "task: held_out", "yaml"))
    (tmp_path / "demo-hf").symlink_to(exported)
    command = readme_code("interop", "lm_eval --model hf", "sh").rstrip() + " --output_path out"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command.replace("lm_eval --model", f"{sys.executable} -m lm_eval --model"),
        shell=True, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())["results"]["held_out"]["bits_per_byte,none"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum")
    assert found == pytest.approx(float(nats) / math.log(2) / len(text), rel=1e-4)
