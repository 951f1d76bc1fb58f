"""Token files, tokenizers, records of runs and command lines for the tests of ``megamix blend``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from typer.testing import CliRunner

from megamix.cli import app
from megamix.core.errors import InputError
from megamix.data.blend.blend import Blend
from megamix.data.tokens.tokenizer import train_tokenizer
from megamix.data.tokens.writer import IndexedWriter

EOD = 0
VOCAB = 270
BATCH, SEQ, STEPS = 6, 8, 50
NAMES = ("web", "code", "books")
SIZES = (600, 200, 100)
SHARDS = (400, 200)
Line = dict[str, Any]


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer.json with at most `VOCAB` entries, whose end-of-document token is `EOD`."""
    path = folder / "tokenizer.json"
    path.write_bytes(train_tokenizer(["in the beginning was the word " * 20], VOCAB))
    return path


def write_documents(prefix: Path, lengths: Sequence[int], dtype: str = "uint16", seed: int = 0) -> list[list[int]]:
    """Writes documents of so many random tokens, `EOD` the last, and returns them."""
    rng = np.random.default_rng(seed)
    documents = [[*rng.integers(1, 256, length - 1).tolist(), EOD] for length in lengths]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return documents


def blend(*arguments: object) -> str:
    """What ``megamix blend ARGUMENTS`` prints on standard output; raises what it raises."""
    result = CliRunner().invoke(app, ["blend", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def error_of(*arguments: object) -> str:
    """The message that ``megamix blend ARGUMENTS`` ends with."""
    result = CliRunner().invoke(app, ["blend", *map(str, arguments)])
    assert isinstance(result.exception, InputError), f"{result.exception!r}\n{result.output}"
    assert result.stdout == ""
    return str(result.exception)


def write_data(folder: Path) -> Path:
    """Three domains with files of their own for validation; the training files of web are two, of 400 and 200
    tokens."""
    raw = folder / "raw"
    for name, size in zip(NAMES, SIZES, strict=True):
        parts = (
            [(f"train-0000{n}-of-00002", part) for n, part in enumerate(SHARDS)] if name == "web" else [("train", size)]
        )
        for part, tokens in parts:
            write_documents(raw / name / part, [10] * (tokens // 10), seed=tokens)
        write_documents(raw / name / "validation", [10] * 5, seed=1)
    web = [f"{raw}/web/train-0000{n}-of-00002" for n in range(2)]
    train = [*web, f"{raw}/code/train", f"{raw}/books/train"]
    valid = [f"{raw}/{name}/validation" for name in NAMES]
    (folder / "blend.json").write_text(json.dumps({"train": train, "valid": valid, "test": None}))
    blend("adopt", "--per-split-data-args-path", folder / "blend.json", "--out", folder / "data", "--tokenizer",
          write_tokenizer(folder))  # fmt: skip
    return folder / "data"


def write_run(run_dir: Path, manifest: Path, lines: Sequence[Line], steps: int = STEPS) -> Path:
    """The record of a run of ``steps`` steps with these lines of weights.jsonl."""
    run_dir.mkdir()
    config = {
        "run_dir": str(run_dir),
        "data": {"manifest": str(manifest), "seq_length": SEQ},
        "model": {"architecture": "neox", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 16},
        "mixer": {"name": "odm"},
        "train": {"steps": STEPS, "global_batch": BATCH, "micro_batch": 2, "lr": 1e-3, "seed": 7},
    }
    (run_dir / "config.resolved.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (run_dir / "weights.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    metrics = {"event": "train", "step": steps, "tokens": steps * BATCH * SEQ, "domain_loss": {}, "loss": 1.0}
    metrics["tokens_per_second"] = 1.0
    (run_dir / "metrics.jsonl").write_text(json.dumps(metrics) + "\n" if steps else "", encoding="utf-8")
    return run_dir


def lines_of(
    changes: Mapping[int, Sequence[float]], names: Sequence[str] = NAMES, state: Blend | None = None
) -> tuple[list[Line], Blend]:
    """Lines of weights.jsonl for weights by position, and the blend that goes on from there."""
    state = state or Blend([50, 20, 10], changes[0], 7)
    lines = []
    for position, weights in changes.items():
        state.set_weights(weights, at=position)
        segment = state.segment_at(position)
        line = {"step": position // BATCH, "position": position, "domain_names": list(names)}
        lines.append({**line, "domain_weights": segment.weights.tolist(), "segment": segment.to_json()})
    return lines, state


def some_changes(seed: int, number: int) -> dict[int, list[float]]:
    """Weights by position: at the beginning, and ``number`` changes between steps."""
    rng = np.random.default_rng(seed)
    positions = [0, *sorted(rng.choice(np.arange(1, STEPS), number, replace=False) * BATCH)]
    return {int(position): rng.dirichlet(np.ones(3)).tolist() for position in positions}


def at_every_position(lines: Sequence[Line], start: int, end: int) -> list[list[float]]:
    """The weights at each of the positions [start, end), looked up one by one."""
    return [
        [line for line in lines if line["position"] <= position][-1]["domain_weights"] for position in range(start, end)
    ]


def as_dict(text: str) -> dict[str, float]:
    """What ``--format json`` prints."""
    return json.loads(text)


def changing_run(data: Path) -> tuple[Path, list[Line], Blend]:
    """A run of 50 steps whose weights changed 12 times, and once more past its end; its ledger and its blend."""
    changes = {**some_changes(1, 12), STEPS * BATCH: [0.1, 0.1, 0.8], (STEPS + 1) * BATCH: [0.2, 0.0, 0.8]}
    lines, state = lines_of(changes)
    return write_run(data.parent / "run", data, lines), lines, state
