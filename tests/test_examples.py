"""The worked examples of the chapters, line by line, on small files and a small model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import run_megamix
from interop_files import write_documents, write_tokenizer
from readme_code import readme_code

STEPS = 8
MODEL = {"architecture": "llama", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 32}
TRAIN = {"steps": STEPS, "global_batch": 4, "micro_batch": 4, "lr": 1e-2}


def run_example(page: str, containing: str, folder: Path) -> dict[str, str]:
    """Runs the block of a page that has ``containing`` in it, with a stop at half of the steps.

    Returns:
        Command -> what the last one of it said.
    """
    said = {}
    text = readme_code(page, containing, "sh").replace("\\\n", " ").replace("train.stop_after=40", "train.stop_after=4")
    for place in ("/data/", " data/mine", "mine.yaml", "runs/"):
        text = text.replace(
            place, f"{' ' * place.startswith(' ')}{folder}/{place.strip(' /')}{'/' * place.endswith('/')}"
        )
    for line in text.splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "megamix"
        done = run_megamix(*words)
        said[words[0]] = done.stdout + done.stderr
        if words[0] == "init":
            made = folder / "mine.yaml"
            config = yaml.safe_load(made.read_text())
            config.update(model=MODEL, train=TRAIN, evaluate={"every": 4, "samples": 4}, checkpoint={"every": 4})
            config["data"]["seq_length"] = 32
            made.write_text(yaml.safe_dump(config))
    return said


def last_weights(run: Path) -> dict[str, float]:
    line = json.loads((run / "weights.jsonl").read_text().splitlines()[-1])
    return dict(zip(line["domain_names"], line["domain_weights"], strict=True))


@pytest.mark.slow
def test_two_mixtures_of_a_megatron_corpus_and_a_run_that_is_steered(tmp_path: Path) -> None:
    """The second example goes on with the config of the first."""
    (tmp_path / "data").mkdir()
    write_tokenizer(tmp_path / "data")
    lengths = np.random.default_rng(3).integers(20, 200, 300).tolist()
    web = write_documents(tmp_path / "data" / "web_text_document", lengths)
    code = write_documents(tmp_path / "data" / "code_text_document", lengths[:150], seed=1)

    said = run_example("interop", "megamix init data/mine", tmp_path)
    tokens = [sum(map(len, documents[: round(0.98 * len(documents))])) for documents in (web, code)]
    assert last_weights(tmp_path / "runs" / "natural")["code"] == pytest.approx(tokens[1] / sum(tokens))
    assert last_weights(tmp_path / "runs" / "even") == {"web": 0.5, "code": 0.5}
    assert "even     given weights" in said["compare"]
    assert "differences are from natural" in said["compare"]

    said = run_example("training", "--note 'too little code'    #", tmp_path)
    assert "4 of 8" in said["inspect"]
    assert last_weights(tmp_path / "runs" / "steered") == {"web": 0.5, "code": 0.5}
    assert "Mostly by steering (pin code=0.5)" in said["why"]
