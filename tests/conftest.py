"""Real text for the tests, from what every machine with Python has, and ways to run megamix as a user would."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from commands import LAUNCH_VARIABLES, STDLIB, run_megamix

from megamix.core.log import get_logger

# Files that take tens of seconds, the longest first: begun last, one of them would keep one of two workers idle.
LONGEST = [
    "test_engines", "test_survival", "test_doremi_run", "test_checkpoint_kills", "test_slurm_scripts",
    "test_slurm_launch", "test_slurm_studies", "test_slurm_training", "test_swarm_run", "test_train", "test_guard_run", "test_preemption",
    "test_swarm_job", "test_arena_run", "test_watchdog", "test_swarm_fit", "test_swarm_law", "test_swarm_propose", "test_swarm_generate",
    "test_checkpoint_bad_days", "test_loss_implementation", "test_megatron_engine", "test_tied", "test_triton", "test_packaging",
    "test_guard_engines", "test_domain_change", "test_bad_input", "test_hugging_face", "test_prepare_resume",
    "test_megatron_lm", "test_reference_engines", "test_documents_boundaries", "test_own_mixer", "test_shadow",
    "test_replay", "test_odm_evaluation", "test_step_cost", "test_tensor_parallel", "test_hugging_face_trainer",
    "test_ddp_loop",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order of `LONGEST`, then all others."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def _documents() -> Iterator[tuple[str, list[str]]]:
    """Four clearly different domains: code, reference prose, character tables and package descriptions."""
    code = sorted(STDLIB.glob("*.py"))[:60]
    tables = sorted((STDLIB / "encodings").glob("cp*.py"))[:20]
    yield "code", [path.read_text(encoding="utf-8") for path in code]
    yield "tables", [path.read_text(encoding="utf-8") for path in tables]
    topics = (STDLIB / "pydoc_data" / "topics.py").read_text(encoding="utf-8")
    yield "topics", [part.replace("\\n'\n", "\n") for part in re.split(r"\n '\w[\w-]*': ", topics)]
    packages = sorted(Path(sysconfig.get_paths()["purelib"]).glob("*.dist-info/METADATA"))[:40]
    yield "packages", [path.read_text(encoding="utf-8") for path in packages]


@pytest.fixture
def outside_of_a_job() -> Iterator[None]:
    """No trace of another job in the environment, and none left behind."""
    with mock.patch.dict(os.environ):
        for name in list(os.environ):
            if name.startswith("SLURM_") or name in LAUNCH_VARIABLES:
                del os.environ[name]
        yield


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One .jsonl file per domain."""
    folder = tmp_path_factory.mktemp("text")
    for name, documents in _documents():
        lines = [json.dumps({"text": document}) + "\n" for document in documents]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def data_dir(text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared data set of `text_dir`, with a vocabulary of 512."""
    from megamix.prepare.pipeline import prepare

    folder = tmp_path_factory.mktemp("data")
    prepare([str(text_dir)], folder, tokenizer="train:512", validation_fraction=0.1, workers=1, progress=False)
    return folder


@pytest.fixture
def tiny_config(data_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a config of a model that trains in seconds; keyword arguments are merged over it, as an override is."""
    from megamix.core.config_files import merge
    from megamix.training.config import KINDS

    def write(**sections: Any) -> Path:
        config: dict[str, Any] = {
            "run_dir": str(tmp_path / "run"),
            "data": {"manifest": str(data_dir), "seq_length": 64},
            "model": {"architecture": "neox", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 64},
            "mixer": {"name": "odm", "preset": "official", "warmup_steps": 3},
            "engine": {"pipeline": 1, "zero": 1},
            "train": {"steps": 12, "global_batch": 8, "micro_batch": 2, "lr": 3.0e-3, "warmup": 0.1},
            "evaluate": {"every": 5, "batches": 2},
            "checkpoint": {"every": 4},
            "log": {"every": 1, "samples": True},
        }
        config = merge(config, sections, KINDS)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    return write


@pytest.fixture
def megamix() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_megamix`."""
    return run_megamix


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The lines of the log so far."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    get_logger().addHandler(handler)
    yield lines
    get_logger().removeHandler(handler)
