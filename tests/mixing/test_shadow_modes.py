"""Shadows beside runs of every kind: drawn independently, on several ranks, over a change of domains, in other people's
trainers. In each, a shadow with the run's own mixer asks for what the run asks for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from jobs import run_job
from records import lines, record, samples
from tolerance import rounding

from megamix.core.config import validate
from megamix.interop.trainers.host import HostRun, load_state, save_state
from megamix.training.config import MixConfig
from megamix.training.plan import make_data_plan

STEPS, BATCH, SEQ, HALF = 12, 8, 32, 6
# Of weights, which follow the losses of a vocabulary of 512; an embedding, a layer and a head.
LIMIT = math.log(512) * rounding(terms=BATCH * SEQ, layers=3, steps=STEPS, mean_of=SEQ)
OWN = {"name": "odm", "preset": "official", "warmup_steps": 2}
SHADOWS = [OWN, {"name": "doremi", "apply": "sampling", "eta": 0.5}, {"name": "recommended"}]
NAMES = ["odm-official", "doremi", "recommended"]


def config(folder: Path, data_dir: Path, name: str, **data: Any) -> Path:
    given = {
        "run_dir": str(folder / name),
        "data": {"manifest": str(data_dir), "seq_length": SEQ, **data},
        "model": {"architecture": "neox", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 32},
        "mixer": OWN,
        "shadow": SHADOWS,
        "train": {"steps": STEPS, "global_batch": BATCH, "micro_batch": 4, "lr": 5.0e-3, "warmup": 0.1},
        "evaluate": {"every": 0, "batches": 1},
        "checkpoint": {"every": 0},
        "log": {"every": 5, "samples": True},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return path


def shadow(run: Path, name: str) -> list[dict[str, Any]]:
    return lines(run / "shadow" / f"{name}.jsonl")


@pytest.fixture(scope="module")
def runs(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``iid`` and, stopped half-way, ``iid-halves``; ``one`` and ``two`` (data-parallel ranks); ``changed``, which goes
    on with a domain added and one removed."""
    folder = tmp_path_factory.mktemp("shadows")
    stop = (f"train.stop_after={HALF}",)
    whole, halves = (config(folder, data_dir, name, sampling="iid") for name in ("iid", "iid-halves"))
    one, two = (config(folder, data_dir, name) for name in ("one", "two"))
    changed = config(folder, data_dir, "changed", domains=["code", "packages", "tables"])
    run_job(1, [(whole, ()), (halves, stop), (one, ()), (changed, stop)])
    change = "checkpoint.domains={add: {topics: 0.25}, remove: [packages]}"
    run_job(1, [(halves, ()), (changed, ("data.domains=[code, tables, topics]", change))])
    run_job(2, [(two, ("engine.data=2",))])
    return folder


@pytest.mark.parametrize("name", ["iid", "two", "changed"])
def test_the_runs_own_mixer_as_a_shadow(runs: Path, name: str) -> None:
    """Writes the lines of weights.jsonl once more, those of the change included."""
    own = lines(runs / name / "weights.jsonl")
    assert own[-1]["step"] == STEPS
    assert len({tuple(line["domain_weights"]) for line in own}) > STEPS // 2
    assert shadow(runs / name, NAMES[0]) == own


def test_independent_draws_stop_and_resume(runs: Path) -> None:
    for name in NAMES:
        assert shadow(runs / "iid-halves", name) == shadow(runs / "iid", name)
    assert record(runs / "iid-halves") == record(runs / "iid")
    assert samples(runs / "iid") != samples(runs / "one")


def test_on_more_ranks(runs: Path) -> None:
    """What they ask for does not depend on the number of ranks."""
    for name in NAMES:
        one, two = (shadow(runs / run, name) for run in ("one", "two"))
        assert [line["step"] for line in one] == [line["step"] for line in two]
        for line, twin in zip(one, two, strict=True):
            assert line["domain_weights"] == pytest.approx(twin["domain_weights"], abs=LIMIT)


def test_over_a_change_of_domains(runs: Path) -> None:
    """Every shadow goes on over the new domains, by name, from its own weights."""
    for name in NAMES:
        written = shadow(runs / "changed", name)
        begun = [line for line in written if "change" in line]
        assert {line["step"] for line in begun} == {HALF}
        assert begun[0]["change"]["domains"]["added"] == ["topics"]
        before = next(line for line in reversed(written) if line["effective_step"] <= HALF and "change" not in line)
        old = dict(zip(before["domain_names"], before["domain_weights"], strict=True))
        new = dict(zip(begun[0]["domain_names"], begun[0]["domain_weights"], strict=True))
        assert before["domain_names"] == ["code", "packages", "tables"]
        assert new["topics"] == pytest.approx(0.25)
        assert new["code"] / new["tables"] == pytest.approx(old["code"] / old["tables"])
        assert written[-1]["domain_names"] == ["code", "tables", "topics"]
    assert shadow(runs / "changed", NAMES[1])[-1]["step"] == STEPS


def test_in_other_trainers(data_dir: Path, tmp_path: Path) -> None:
    """Through what all adapters are made of, with a trainer whose logits are random: the same lines, also when it
    stops, saves and goes on."""
    mix = {
        "data": {"manifest": str(data_dir), "seq_length": SEQ},
        "mixer": OWN,
        "shadow": SHADOWS,
        "train": {"steps": STEPS, "global_batch": BATCH, "micro_batch": 4},
    }
    plan = make_data_plan(validate(MixConfig, mix, "test"), 1, verify=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    try:
        for folder, stops in ((tmp_path / "whole", [STEPS]), (tmp_path / "halves", [HALF, STEPS])):
            for number, stop in enumerate(stops):
                resumed = load_state(folder / "state.json", plan, stops[number - 1]) if number else None
                run = HostRun(
                    plan, data_rank=0, reads_data=True, has_loss=True, device=torch.device("cpu"), record_dir=folder,
                    resumed=resumed,
                )  # fmt: skip
                while run.step < stop:
                    batch = run.next_batch()
                    assert batch is not None
                    run.begin_step(batch, 2.0)
                    torch.manual_seed(run.step)
                    for labels, domains in zip(batch.labels, batch.domains, strict=True):
                        logits = torch.randn(*labels.shape, plan.vocab_size)
                        # Domains differ in how far off their logits are.
                        run.loss(logits * (1 + domains[..., None]), (labels, domains))
                save_state(folder / "state.json", run.state())
                run.close()
    finally:
        dist.destroy_process_group()
    own = lines(tmp_path / "whole" / "weights.jsonl")
    assert own[-1]["step"] == STEPS
    assert max(own[-1]["domain_weights"]) > 0.3
    assert shadow(tmp_path / "whole", NAMES[0]) == own
    for name in NAMES:
        assert shadow(tmp_path / "halves", name) == shadow(tmp_path / "whole", name)
