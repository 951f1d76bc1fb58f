"""Small data sets and runs for tests of what reads them, recorded by the trainer's own classes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megamix.core.config import load_config
from megamix.data.sampler import Sampler
from megamix.data.tokens.manifest import DomainEntry, Manifest, SplitEntry, TokenizerEntry, ValidationEntry
from megamix.data.tokens.tokenizer import train_tokenizer
from megamix.data.tokens.writer import IndexedWriter
from megamix.mixing.exchange import MixReport
from megamix.mixing.mixers import DomainStats
from megamix.training.config import RunConfig
from megamix.training.plan import make_plan
from megamix.training.records.run_record import RunRecord

NAMES = ("web", "c_$1$", "_books")
TRAIN_TOKENS = (3000, 1000, 500)
UNIGRAM = 5.0
STEPS, BATCH, SEQ = 40, 8, 16


def write_data(folder: Path) -> Manifest:
    """Three domains of text, in documents of 50 words."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = [f"word{number}" for number in range(50)]
    tokenizer = train_tokenizer([" ".join(words)] * 3, 300)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    entries = []
    for name, size in zip(NAMES, TRAIN_TOKENS, strict=True):
        (folder / name).mkdir()
        splits: dict[str, SplitEntry] = {}
        for split, left in (("train", size), ("validation", 200)):
            with IndexedWriter(folder / name / split, "uint16") as writer:
                while left > 0:
                    length = min(left, int(rng.integers(10, 60)))
                    writer.add_document(rng.integers(1, 250, length))
                    left -= length
            splits[split] = SplitEntry.of(f"{name}/{split}", writer.close())
        validation = ValidationEntry(**dict(splits["validation"]), unigram_nats=UNIGRAM)
        entries.append(DomainEntry(name=name, train=splits["train"], validation=validation))
    sha256 = hashlib.sha256(tokenizer).hexdigest()
    entry = TokenizerEntry(file="tokenizer.json", sha256=sha256, vocab_size=300, eod_id=0)
    manifest = Manifest.build(folder, tokenizer=entry, dtype="uint16", validation_fraction=0.02, domains=entries)
    manifest.save()
    return manifest


def write_config(run_dir: Path, manifest: Path, recorded_as: Path | None = None) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    config = {
        "run_dir": str(recorded_as or run_dir),
        "data": {"manifest": str(manifest), "seq_length": SEQ},
        "model": {"architecture": "neox", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 16},
        "mixer": {"name": "odm"},
        "train": {"steps": STEPS, "global_batch": BATCH, "micro_batch": 4, "lr": 1e-3, "seed": 7},
    }
    (run_dir / "config.resolved.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def evaluation(step: int) -> dict[str, Any]:
    losses = {"web": 6.0 - step / 20, "c_$1$": 6.0 - step / 10, "_books": 6.0 - step / 80}
    macro = sum(losses.values()) / 3
    tokens = step * BATCH * SEQ
    return {"step": step, "tokens": tokens, "domain_loss": losses, "macro_loss": macro, "worst_domain": "_books"}


def write_run(run_dir: Path, manifest: Path, steps: int = STEPS, recorded_as: Path | None = None) -> list[list[int]]:
    """Records a run whose weights change every fifth step; returns the samples taken before each step, by domain."""
    write_config(run_dir, manifest, recorded_as)
    plan = make_plan(load_config(RunConfig, run_dir / "config.resolved.yaml"))
    sampler = Sampler(plan.blend(), plan.share(0))
    record = RunRecord(run_dir, NAMES, None)
    record.announce(0, [(0, sampler.segment_at(0))], {"is_warmup": False})
    record.evaluate(evaluation(0))
    rng, counts = np.random.default_rng(5), [[0, 0, 0]]
    for step in range(steps):
        dealt = sampler.deal()
        counts.append((np.array(counts[-1]) + np.bincount(dealt.domain.ravel(), minlength=3)).tolist())
        if step % 5 == 4:
            weights = rng.dirichlet(np.ones(3))
            sampler.set_weights(weights, step + 2)
            stats = DomainStats(nats=np.ones(3), tokens=np.full(3, 4))
            segment = sampler.segment_at(step + 2)
            record.weights(MixReport(step, stats, step + 2, (step + 2) * BATCH, segment, {"is_warmup": False}, True))
            line = {"step": step + 1, "tokens": (step + 1) * BATCH * SEQ, "loss": 5.0, "tokens_per_second": 1.0}
            losses = {"web": 6.0 - step / 20, "c_$1$": None, "_books": 6.0 - step / 80}
            record.train({**line, "domain_loss": losses})
        if step % 20 == 19:
            record.evaluate(evaluation(step + 1))
    record.close()
    return counts
