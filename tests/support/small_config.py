"""A small training config, to be changed by overrides."""

from __future__ import annotations

from megamix.core.config import validate
from megamix.core.config_files import apply_overrides
from megamix.core.yaml_text import parse_yaml
from megamix.training.config import KINDS, RunConfig

SMALL = """\
run_dir: runs/small
data: {manifest: data/manifest.json, seq_length: 32}
model: {preset: neox-2m}
mixer: {name: odm, preset: paper, warmup_steps: 5}
train: {steps: 10, global_batch: 4, micro_batch: 2, lr: 1e-3}
"""


def small(*overrides: str, text: str = SMALL) -> RunConfig:
    return validate(RunConfig, apply_overrides(parse_yaml(text, "small.yaml"), list(overrides), KINDS), "small.yaml")
