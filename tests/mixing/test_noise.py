"""What mixers do with a domain that cannot be learnt: six domains of real text and one of random bytes, which the
objective counts as one of seven.

Takes minutes (``-m slow``). It needs the text of ``megamix corpus data/text``, which ``make demo`` fetches; the
variable MEGAMIX_TEXT names another folder of it.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zstandard
from commands import ROOT
from jobs import run_job
from records import lines

from megamix.prepare.pipeline import prepare

TEXT = Path(os.environ.get("MEGAMIX_TEXT", ROOT / "data" / "text"))
SHARES = {
    "biology": 32,
    "encyclopedia-en": 16,
    "encyclopedia-fr": 13,
    "licences": 12,
    "music": 14,
    "recipes": 11,
    "noise": 2,
}
"""Per cent of the whole text's tokens, and a little noise."""
DOMAINS = [name for name in SHARES if name != "noise"]
CHARACTERS = 900_000
"""Of text taken of each domain, and of random bytes."""
STEPS, BATCH, SEQ = 800, 16, 128
MIXERS: dict[str, dict[str, Any]] = {
    "official": {"mixer": {"name": "odm", "preset": "official"}},
    "recommended": {"mixer": {"name": "recommended"}, "objective": "uniform"},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((TEXT / f"{name}.jsonl.zst").is_file() for name in DOMAINS),
        reason=f"there is no text in {TEXT}: run `megamix corpus data/text`, or set MEGAMIX_TEXT to its folder",
    ),
]


def real_text(name: str) -> list[str]:
    """The first lines of a domain, about `CHARACTERS` of text."""
    kept, size = [], 0
    with (TEXT / f"{name}.jsonl.zst").open("rb") as file:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8"):
            kept.append(line)
            size += len(json.loads(line)["text"])
            if size > CHARACTERS:
                break
    return kept


def noise() -> list[str]:
    """Documents of 2000 random bytes below 128, each a character of UTF-8 by itself."""
    rows = np.random.default_rng(3).integers(0, 128, (CHARACTERS // 2000, 2000), np.uint8)
    return [json.dumps({"text": row.tobytes().decode("ascii")}) + "\n" for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each mixer."""
    folder = tmp_path_factory.mktemp("noise")
    (folder / "text").mkdir()
    for name, documents in {**{name: real_text(name) for name in DOMAINS}, "noise": noise()}.items():
        (folder / "text" / f"{name}.jsonl").write_text("".join(documents), encoding="utf-8")
    prepare([str(folder / "text")], folder / "data", tokenizer="train:300", workers=1, progress=False)
    jobs = []
    for name in MIXERS:
        config = {
            "run_dir": str(folder / name),
            "data": {"manifest": str(folder / "data"), "seq_length": SEQ, "domains": list(SHARES)},
            "model": {"architecture": "neox", "hidden_size": 128, "num_layers": 2, "num_heads": 4, "ffn_size": 512},
            "mixture": SHARES,
            "engine": {"zero": 0},
            "train": {
                "steps": STEPS,
                "global_batch": BATCH,
                "micro_batch": BATCH,
                "lr": 5.0e-3,
                "min_lr": 2.0e-4,
                "warmup": 0.05,
            },
            "evaluate": {"every": 0, "samples": 64},
            "checkpoint": {"every": 0, "keep": 1},
            **MIXERS[name],
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        jobs.append((path, ()))
    run_job(1, jobs)
    return folder


def mean_loss(run: Path) -> float:
    """The last validation loss, mean over the domains of real text."""
    last = [line for line in lines(run / "metrics.jsonl") if line["event"] == "evaluate"][-1]
    assert last["step"] == STEPS
    return float(np.mean([last["domain_loss"][name] for name in DOMAINS]))


def share_of_noise(run: Path) -> float:
    """Of the tokens trained on."""
    counts = [line["domain_tokens"] for line in lines(run / "metrics.jsonl") if line["event"] == "train"]
    return sum(count["noise"] for count in counts) / sum(sum(count.values()) for count in counts)


def test_official_chases_noise_and_recommended_does_not(runs: Path) -> None:
    official, recommended = runs / "official", runs / "recommended"
    assert share_of_noise(official) > 0.3
    assert share_of_noise(recommended) < 0.08
    assert mean_loss(recommended) < mean_loss(official) - 0.1
    # The one ends by giving most of all to it, the other no more than its exploration.
    weights = {}
    for run in (official, recommended):
        last = lines(run / "weights.jsonl")[-1]
        weights[run] = dict(zip(last["domain_names"], last["domain_weights"], strict=True))
    assert max(weights[official], key=weights[official].__getitem__) == "noise"
    assert weights[recommended]["noise"] == pytest.approx(0.05 / len(SHARES), rel=0.5)
