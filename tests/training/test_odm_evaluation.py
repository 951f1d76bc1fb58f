"""ODM's rewards from an evaluation phase, in real runs: which losses they are, in any layout, and across a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import run_job
from records import largest_difference, record
from tolerance import rounding

from megamix.core.config import validate
from megamix.core.errors import InputError
from megamix.data.blend.blend import Blend
from megamix.data.tokens.manifest import Manifest
from megamix.interop.hugging_face.export import export
from megamix.mixing.mixers import OdmConfig, make_mixer
from megamix.mixing.shadow import Shadow

NUM_SAMPLES = 5
EVALUATION = {
    "name": "odm", "preset": "official", "alpha": 0.0, "reward_from": "evaluation", "num_eval_samples": NUM_SAMPLES,
    "update_every": 3, "warmup_steps": 4, "update_times": 3,
}  # fmt: skip


def losses_by_transformers(run: Path, data: Path, seq_length: int) -> list[float]:
    """Each domain's mean loss over evenly spaced windows of its training tokens, by other people's model code."""
    transformers = pytest.importorskip("transformers")
    export(run, run / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "hf").eval()
    found = []
    for entry in Manifest.load(data).domains:
        tokens = np.fromfile(data / f"{entry.train.prefixes[0]}.bin", np.uint16).astype(np.int64)
        number = (tokens.size - 1) // seq_length
        starts = [i * number // NUM_SAMPLES * seq_length for i in range(NUM_SAMPLES)]
        rows = torch.from_numpy(np.stack([tokens[start : start + seq_length + 1] for start in starts]))
        with torch.no_grad():
            logits = model(rows[:, :-1]).logits
        found.append(torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), rows[:, 1:].flatten()).item())
    return found


def test_rewards_are_the_losses_of_the_evaluation(
    tiny_config: Callable[..., Path], data_dir: Path, tmp_path: Path
) -> None:
    """With alpha 0 the estimated rewards are those of the last evaluation, so log R is the loss of the model as it
    stands after that step; the update at step 12 is the third and last."""
    pipeline, data = {"engine": {"pipeline": 2}}, {"engine": {"data": 2}}
    tensor, stages = ({"engine": {"name": "megatron", part: 2}} for part in ("tensor", "pipeline"))

    def config(name: str, **sections: Any) -> Path:
        written = tiny_config(run_dir=str(tmp_path / name), mixer=EVALUATION, train={"steps": 14}, **sections)
        return written.rename(tmp_path / f"{name}.yaml")

    stopped = config("stopped", **pipeline)
    run_job(
        2,
        [
            (config("pipeline", **pipeline), ("train.stop_after=12",)),
            (config("data", **data), ("train.stop_after=12",)),
            (config("megatron-tensor", **tensor), ("train.stop_after=12",)),
            (config("megatron-pipeline", **stages), ("train.stop_after=12",)),
            (stopped, ("train.stop_after=8",)),
            (stopped, ("train.stop_after=12",)),
        ],
    )
    _, weights = record(tmp_path / "pipeline")
    assert [line["step"] for line in weights] == [0, 6, 9, 12]
    expected = losses_by_transformers(tmp_path / "pipeline", data_dir, 64)
    assert weights[-1]["log_estimated_rewards"] == pytest.approx(expected, rel=rounding(terms=64, layers=4))
    # Not those of the tokens trained on, which are in the line as well.
    trained = np.array(weights[-1]["statistics"]["nats"]) / weights[-1]["statistics"]["tokens"]
    assert np.abs(trained - expected).max() > 0.02
    share, rate = np.exp(expected) / np.exp(expected).sum(), weights[-1]["exploration_rate"]
    k = len(expected)
    assert rate == pytest.approx(math.sqrt(math.log(k) / (k * 12)))
    assert weights[-1]["domain_weights"] == pytest.approx(
        (1 - k * rate) * share + rate, abs=math.log(512) * rounding(terms=64, layers=4)
    )
    assert record(tmp_path / "stopped") == record(tmp_path / "pipeline")
    for other in ("data", "megatron-tensor", "megatron-pipeline"):
        loss, weight = largest_difference(tmp_path / other, tmp_path / "pipeline")
        # A domain has one sample of 64 tokens in a step or more; an embedding, two layers and a head.
        limit = math.log(512) * rounding(terms=8 * 64, layers=4, steps=12, mean_of=64)
        assert loss < limit
        assert weight < limit


def test_which_steps_end_in_an_evaluation() -> None:
    def steps(**options: Any) -> list[int]:
        config = validate(OdmConfig, {"reward_from": "evaluation", **options}, "test")
        return [step for step in range(1, 31) if config.evaluates_at(step, 1, 4)]

    assert steps() == list(range(1, 31))
    assert steps(update_every=7) == [7, 14, 21, 28]
    assert steps(update_every=7, warmup_steps=14) == [21, 28]
    assert steps(update_every=7, warmup_steps=15, update_times=1) == [21]
    assert steps(update_every=7, update_times=0) == []
    assert not OdmConfig(update_every=1).evaluates_at(1, 1, 4)


def test_a_trainer_without_evaluations_is_told_so(data_dir: Path) -> None:
    from megamix.training.config import MixConfig
    from megamix.training.data_loop import MixedData
    from megamix.training.plan import make_data_plan

    mixing = {
        "data": {"manifest": str(data_dir), "seq_length": 64},
        "mixer": EVALUATION,
        "train": {"steps": 14, "global_batch": 8, "micro_batch": 2},
    }
    plan = make_data_plan(validate(MixConfig, json.loads(json.dumps(mixing)), "test"), 1, verify=False)
    with pytest.raises(InputError, match="reward_from is evaluation, which only `megamix train` has"):
        MixedData(plan, data_rank=0, reads_data=True, device=torch.device("cpu"))


def test_a_shadow_has_no_evaluations() -> None:
    blend = Blend([100, 100], [1.0, 1.0], seed=1)
    mixer = make_mixer(EVALUATION, ["a", "b"], [1.0, 1.0])
    with pytest.raises(InputError, match="shadow 'b-side': reward_from is evaluation"):
        Shadow("b-side", mixer, blend, None)  # type: ignore[arg-type]
