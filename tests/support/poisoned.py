"""A model that a chosen token makes NaN of, and which tokens a run reads when: losses go wrong in known samples.

The token's embedding is large but finite; the norm after it overflows, in its sample and in no other.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megamix.data.tokens.manifest import Manifest
from megamix.data.tokens.upgrade import with_contents

VOCAB = 512
SEQ_LENGTH = 64
Tokens = frozenset[int]


@dataclass(frozen=True)
class Read:
    """A sample that a run reads.

    Attributes:
        position: its place in the run.
        domain: a name.
        sample: its number in the domain.
        tokens: those that go into the model.
    """

    position: int
    domain: str
    sample: int
    tokens: Tokens


def read_by(config: Path, *overrides: str) -> list[list[Read]]:
    """What each step of a run with fixed weights reads, worked out without training."""
    from megamix.core.config import load_config
    from megamix.training.config import RunConfig
    from megamix.training.plan import make_plan

    plan = make_plan(load_config(RunConfig, config, list(overrides)))
    blend, batch = plan.blend(), plan.config.train.global_batch
    steps = []
    for step in range(plan.config.train.steps):
        taken = zip(*(numbers.tolist() for numbers in blend.take(batch)), strict=True)
        steps.append(
            [
                Read(
                    step * batch + row,
                    plan.domain_names[domain],
                    sample,
                    frozenset(plan.domains[domain].window(sample, SEQ_LENGTH)[:-1].tolist()),
                )
                for row, (domain, sample) in enumerate(taken)
            ]
        )
    return steps


def plant(data_dir: Path, folder: Path, places: Sequence[Iterable[Read]]) -> list[int]:
    """Copies a data set; the last tokens of its vocabulary are then in the training samples of ``places``, and nowhere
    else.

    What a token's samples are would otherwise depend on the text, and so on the machine.

    Args:
        data_dir: of `megamix prepare`, one token file for each domain.
        folder: for the copy.
        places: samples for each token.

    Returns:
        The tokens.
    """
    shutil.copytree(data_dir, folder)
    tokens = list(range(VOCAB - len(places), VOCAB))
    files = {path.parent.name: np.memmap(path, np.uint16, "r+") for path in folder.glob("*/train.bin")}
    for content in files.values():
        content[content >= tokens[0]] = 1
    for token, reads in zip(tokens, places, strict=True):
        for read in reads:
            files[read.domain][read.sample * SEQ_LENGTH + SEQ_LENGTH // 2] = token
    for content in files.values():
        content.flush()
    with_contents(Manifest.load(folder)).save()  # the hashes of what is there now
    return tokens


def with_any(steps: list[list[Read]], tokens: Iterable[int]) -> list[list[Read]]:
    """Of each step, the samples with one of the tokens."""
    return [[read for read in step if not read.tokens.isdisjoint(tokens)] for step in steps]


def poisoned_model(folder: Path, tokens: Iterable[int]) -> dict[str, Any]:
    """Writes a model of the tests' size to start from; gives what names it in the ``model`` section."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    sizes: Mapping[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(GPTNeoXConfig(**sizes)).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.embed_in.weight"][list(tokens)] = torch.tensor([3e38, -3e38]).repeat(16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return {"from_pretrained": str(folder)}
