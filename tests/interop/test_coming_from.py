"""The tables of other projects' options name every option of their documents, and keys that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megamix.mixing.mixers import DoremiConfig, OdmConfig
from megamix.studies.swarm.fit.config import FitConfig
from megamix.studies.swarm.generate.config import GenerateConfig
from megamix.studies.swarm.propose.config import ProposeConfig

README = Path(__file__).parents[2] / "megamix" / "interop" / "README.md"
# DataFlex's documentation of its ODM and DoReMi mixers with their logs, its components.yaml and its code.
DATAFLEX = [
    "train_type",
    "components_cfg_file",
    "component_name",
    "mixture_sample_rule",
    "init_mixture_proportions",
    "warmup_step",
    "update_step",
    "update_times",
    "alpha",
    "warmup_steps",
    "num_eval_samples",
    "eval_batch_size",
    "initial_proportions",
    "train_step",
    "num_train_epochs",
    "mixers",
    "name",
    "params",
    "step",
    "timestamp",
    "domain_names",
    "is_warmup",
    "exploration_rate",
    "cumulative_estimated_rewards",
    "perdomain_scores",
    "static",
    "null",
    "static_mix",
    "proportions",
    "reference_model_path",
    "reweight_eta",
    "reweight_eps",
    "domain_weights",
    "reward_scale",
    "min_exploration_rate",
    "stratified",
    "uniform",
]
# olmix/fit/config.py and olmix/aliases.py.
OLMIX = [
    "ratios",
    "metrics",
    "relative_sizes",
    "token_counts",
    "type",
    "seed",
    "n_test",
    "train_split",
    "aggregate_task_families",
    "temperature",
    "kl_reg",
    "fit_only",
    "make_worst_mix",
    "enabled",
    "target_tokens",
    "repetition_factor",
    "drop_metrics",
    "obj_weights",
    "variants",
    "mix_temperature",
    "min_strength",
    "max_strength",
    "minimum_weight",
    "minimum_source_weight",
    "minimum_topic_weight",
    "nonzero_weight",
    "manual_prior",
    "manual_topic_prior",
    "sample_multiplier",
    "existing_mix_file",
    "enable_bound",
    "max_tokens",
    "dtype",
    "proxy_model_id",
    "tokenizer",
    "chinchilla_multiple",
    "device_batch_size",
    "global_batch_size",
    "checkpoint_path",
    "train_type",
    "eval_interval",
    "no_eval",
    "instance_filter",
]


def rows(project: str) -> list[tuple[str, str]]:
    """Both cells of each row of a project's table."""
    section = README.read_text(encoding="utf-8").split(f"### {project}\n")[1].split("\n### ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("|--")]
    return [(left, right) for left, right in (line.strip("| ").split(" | ", 1) for line in lines[1:])]


@pytest.mark.parametrize(("project", "options"), [("DataFlex", DATAFLEX), ("Olmix", OLMIX)])
def test_every_option_has_a_row(project: str, options: list[str]) -> None:
    named = {
        word
        for left, _ in rows(project)
        for quoted in re.findall("`([^`]+)`", left)
        for word in re.findall(r"\w+", quoted)
    }
    assert sorted(set(options) - named) == []


@pytest.mark.parametrize("project", ["DataFlex", "ODM's repository", "DoReMi's repository", "Olmix"])
def test_every_key_of_a_mixer_or_swarm_exists(project: str) -> None:
    known = {
        "mixer": {*OdmConfig.model_fields, *DoremiConfig.model_fields},
        "swarm.generate": {*GenerateConfig.model_fields},
    }
    cells = " ".join(right for _, right in rows(project))
    for section, keys in known.items():
        seen = re.findall(rf"`{section}\.(\w+)", cells)
        assert sorted(set(seen) - keys) == []
    flags = [flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", cells)]
    others = {"seed", "ratios", "metrics", "out", "format", "tokenizer"}
    assert sorted(set(flags) - {*ProposeConfig.model_fields} - others) == []
    fits = re.findall(r"`(\w+)=", cells)
    assert sorted(set(fits) - {*FitConfig.model_fields}) == []


def test_numbers_in_the_table_are_those_of_the_preset() -> None:
    (cell,) = [right for left, right in rows("DataFlex") if "`reward_scale`" in left]
    preset = OdmConfig.model_validate({"preset": "dataflex"})
    assert f"{preset.reward_scale:g} and {preset.min_exploration_rate:g} with `preset: dataflex`" in cell
