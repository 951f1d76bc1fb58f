"""Standard errors of validation losses, by documents: against the formula token by token, in every kind of layout.

Legend: n samples, S tokens in a sample.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jobs import run_job
from records import lines

from megamix.data.documents import label_documents
from megamix.data.tokens.manifest import Manifest
from megamix.interop.hugging_face.export import export
from megamix.training.domain_losses import DocumentSums, ratio
from megamix.training.evaluate import choose_samples

SEQ, SAMPLES = 32, 10
OBJECTIVE = {"code": 3.0, "packages": 0.0, "tables": 1.0, "topics": 4.0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "pipeline": {"name": "deepspeed", "pipeline": 2, "zero": 1},
    "data": {"name": "deepspeed", "pipeline": 1, "data": 2},
    "tensor": {"name": "megatron", "tensor": 2},
    "chunks": {"name": "megatron", "pipeline": 2, "virtual_pipeline": 2},
}


@pytest.fixture(scope="module")
def runs(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every layout, two steps long."""
    folder = tmp_path_factory.mktemp("errors")
    config = {
        "data": {"manifest": str(data_dir), "seq_length": SEQ, "eod_mask_loss": True},
        "model": {"architecture": "llama", "hidden_size": 32, "num_layers": 4, "num_heads": 2, "ffn_size": 64},
        "objective": OBJECTIVE,
        "train": {"steps": 2, "global_batch": 16, "micro_batch": 4, "lr": 1.0e-2},
        "evaluate": {"every": 0, "samples": SAMPLES},
        "checkpoint": {"every": 0},
    }
    job = []
    for name, engine in LAYOUTS.items():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**config, "run_dir": str(folder / name), "engine": engine}), encoding="utf-8")
        job.append((path, ()))
    run_job(2, job)
    return folder


def last(run: Path) -> dict[str, Any]:
    return lines(run / "metrics.jsonl")[-1]


def by_hand(nats: list[float], tokens: list[int]) -> tuple[float, float]:
    """(loss, standard error) of one domain."""
    loss = sum(nats) / sum(tokens)
    spread = sum((s - loss * t) ** 2 for s, t in zip(nats, tokens, strict=True))
    return loss, math.sqrt(spread * len(nats) / (len(nats) - 1)) / sum(tokens)


@pytest.fixture(scope="module")
def wanted(runs: Path, data_dir: Path) -> dict[str, tuple[float, float]]:
    """(loss, standard error) by domain, by transformers' model in float64, with the document of each label looked up by
    itself."""
    from transformers import AutoModelForCausalLM

    out = runs / "exported"
    export(runs / "pipeline", out)
    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").double().eval()
    manifest, found = Manifest.load(data_dir), {}
    for entry in manifest.domains:
        stream = manifest.open_domain(entry.name, "validation")
        _, chosen = choose_samples([stream], SEQ, SAMPLES)
        assert 2 <= len(chosen) <= SAMPLES
        nats, tokens = defaultdict(float), defaultdict(int)
        for sample in chosen.tolist():
            window = torch.from_numpy(stream.window(sample, SEQ).astype(np.int64))
            with torch.no_grad():
                logits = model(window[None, :-1]).logits[0].double()
            loss = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
            for place in range(SEQ):
                file, document, offset = stream.document_at(sample * SEQ + place + 1)
                if offset > 0:  # the first token of a document is masked
                    nats[file, document] += float(loss[place])
                    tokens[file, document] += 1
        found[entry.name] = by_hand(list(nats.values()), list(tokens.values()))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_errors_of_every_layout(runs: Path, wanted: dict[str, tuple[float, float]], name: str) -> None:
    line = last(runs / name)
    assert line["step"] == 2
    for domain, (loss, error) in wanted.items():
        assert line["domain_loss"][domain] == pytest.approx(loss, abs=1e-4)
        assert line["domain_error"][domain] == pytest.approx(error, rel=1e-3)
        assert error > 1e-3
    weights = {domain: weight / 8 for domain, weight in OBJECTIVE.items()}
    assert line["objective"] == weights
    assert line["objective_loss"] == pytest.approx(sum(weights[d] * wanted[d][0] for d in weights), abs=1e-4)
    error = math.sqrt(sum((weights[d] * wanted[d][1]) ** 2 for d in weights))
    assert line["objective_error"] == pytest.approx(error, rel=1e-3)
    assert line["worst_loss"] == max(line["domain_loss"].values()) == line["domain_loss"][line["worst_domain"]]


def test_the_document_of_every_label(data_dir: Path) -> None:
    """All windows in any order: long documents reach over several, and short ones share one."""
    manifest = Manifest.load(data_dir)
    names = [entry.name for entry in manifest.domains]
    streams = [manifest.open_domain(name, "train") for name in names]
    rng = np.random.default_rng(3)
    domain_n = rng.integers(len(names), size=200)
    sample_n = np.array([rng.integers(streams[domain].num_windows(SEQ)) for domain in domain_n])
    sample_n[1::7], domain_n[1::7] = sample_n[::7][: len(sample_n[1::7])] + 1, domain_n[::7][: len(domain_n[1::7])]
    fits = np.array(
        [sample < streams[domain].num_windows(SEQ) for domain, sample in zip(domain_n, sample_n, strict=True)]
    )
    domain_n, sample_n = domain_n[fits], sample_n[fits]
    found = label_documents(streams, domain_n, sample_n, SEQ)
    rows = rng.integers(domain_n.size, size=300)
    seen: dict[tuple[int, int, int], int] = {}
    for row, document_s in zip(rows.tolist(), found.of(rows).tolist(), strict=True):
        domain = int(domain_n[row])
        for place, document in enumerate(document_s):
            file, index, _ = streams[domain].document_at(int(sample_n[row]) * SEQ + place + 1)
            assert seen.setdefault((domain, file, index), document) == document
            assert found.domain[document] == domain
    assert len(set(seen.values())) == len(seen)
    assert len(seen) > 50


def test_the_formula() -> None:
    nats, tokens = np.array([3.0, 10.0, 1.5]), np.array([2, 5, 1])
    loss, error = ratio(nats, tokens)
    assert (loss, error) == pytest.approx(by_hand(nats.tolist(), tokens.tolist()), rel=1e-12)
    assert ratio(nats[:1], tokens[:1]) == (1.5, None)
    assert ratio(nats[:0], tokens[:0]) == (None, None)
    # Equal documents of one token: the standard error of a mean.
    values = np.random.default_rng(1).normal(5, 1, 50)
    assert ratio(values, np.ones(50, np.int64))[1] == pytest.approx(values.std(ddof=1) / math.sqrt(50), rel=1e-12)


def test_losses_that_are_not_finite_are_left_out() -> None:
    sums = DocumentSums(4)
    document = torch.tensor([0, 0, 1, 1, 2, 3])
    loss = torch.tensor([1.0, math.nan, 2.0, math.inf, 7.0, math.nan])
    sums.add(document, loss, torch.tensor([True, True, True, True, False, True]))
    found = sums.losses(np.array([0, 0, 1, 1]), ("a", "b"))
    assert found.loss == {"a": 1.5, "b": None}
    assert found.error == {"a": pytest.approx(0.5), "b": None}
    line = found.line({"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5})
    assert (line["objective_loss"], line["micro_loss"], line["macro_loss"]) == (1.5, None, 1.5)
    assert line["objective_error"] == pytest.approx(0.5)
    assert json.loads(json.dumps(line, allow_nan=False)) == line
