"""The adapter for Megatron-LM, driven by a stand-in for its training loop (`megatron_loop` says what that is) over real
megatron.core ranks, against a loop in plain PyTorch (`megatron_reference`)."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_forms
import megatron_loop
import megatron_reference
import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from commands import SUPPORT
from megatron.core import parallel_state
from megatron.core import utils as core_utils
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.core.rerun_state_machine import (
    RerunMode,
    destroy_rerun_state_machine,
    initialize_rerun_state_machine,
)
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron_loop import LAYERS, make_args
from ranks import run_ranks
from tolerance import rounding

from megamix.core.errors import InputError, MegamixError, ResumeRefused
from megamix.data.tokens.manifest import Manifest
from megamix.engines.megatron.cpu import cpu_stand_ins
from megamix.interop.blend_files.export import export_blend
from megamix.interop.trainers.megatron_lm import MegatronMix
from megamix.mixing.steering.journal import append_command

INSTALLED = "core_v" + re.escape(version("megatron-core"))
COMMON = {"train_iters": 6, "eval_interval": 3, "eval_iters": 2}
# Embedding and head are two more layers. A mean loss is over one sample of 32 tokens or more, and weights follow it.
TOLERANCE = rounding(terms=8 * 32, layers=LAYERS + 2, steps=COMMON["train_iters"], mean_of=32)


@pytest.fixture(scope="module")
def config(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some labels do not count, so that micro-batches differ in their number of tokens."""
    path = tmp_path_factory.mktemp("mix") / "mix.yaml"
    sections = {
        "data": {"manifest": str(data_dir), "seq_length": 32, "eod_mask_loss": True},
        "mixer": {"name": "odm", "preset": "paper", "min_exploration_rate": 0.05},
    }
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def one_rank() -> Any:
    """Megatron's groups of a single rank, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    with cpu_stand_ins():
        megatron_loop.initialize(make_args())
    yield
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reference(config: Path, one_rank: None) -> dict[str, Any]:
    with cpu_stand_ins():
        return megatron_reference.train(yaml.safe_load(config.read_text()), make_args(**COMMON))


def job(config: Path, folder: Path, num_ranks: int, **given: Any) -> list[dict[str, Any]]:
    """One run of the stand-in; what each rank recorded."""
    arguments = json.dumps({**COMMON, "eod_mask_loss": True, **given})
    run_ranks(SUPPORT / "megatron_loop.py", num_ranks, config, arguments, folder / "rank", cwd=folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]


def read_samples(ranks: list[dict[str, Any]], per_step: int) -> list[list[Any]]:
    """Per step the domains and first tokens of the rows that ``ranks`` read, one after the other; ``per_step``
    micro-batches are a rank's part of a step."""
    steps = []
    for begin in range(0, len(ranks[0]["samples"]), per_step):
        parts = [part for rank in ranks for part in rank["samples"][begin : begin + per_step]]
        steps.append([[row for part in parts for row in part[column]] for column in range(2)])
    return steps


def check(ranks: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    """The last rank's losses and the weights that follow from them are the reference's."""
    for line, expected in zip(ranks[-1]["record"], reference["record"], strict=True):
        assert line == pytest.approx(expected, rel=TOLERANCE)
    check_weights(ranks, reference)


def check_weights(ranks: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    blend = ranks[0]["state"]["sampler"]["blend"]
    assert blend["position"] == COMMON["train_iters"] * 8
    assert np.abs(np.array(reference["weights"][-1]) - reference["weights"][0]).max() > 0.01, "the weights moved"
    np.testing.assert_allclose(ranks[0]["state"]["mixer"]["weights"], reference["last"], rtol=0, atol=TOLERANCE)


def test_interleaved_pipeline(config: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    """Two stages of two chunks each: the first and the last rank read the same samples, chunks in between none; losses,
    validation of every domain and weights are the reference's."""
    ranks = job(
        config, tmp_path, 2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, save=str(tmp_path)
    )
    check(ranks, reference)
    assert read_samples(ranks[:1], 4) == read_samples(ranks[1:], 4) == reference["samples"]
    assert ranks[1]["record"][3].keys() >= {"evaluated", "lm loss", "loss of code", "loss of tables"}
    lines = [json.loads(line) for line in (tmp_path / "megamix" / "weights.jsonl").read_text().splitlines()]
    by_step = {line["effective_step"]: line["domain_weights"] for line in lines}
    for step, weights in enumerate(reference["weights"]):
        if step != 1:  # nothing is decided at step 1 yet: those of step 0 go on
            np.testing.assert_allclose(by_step[step], weights, rtol=0, atol=TOLERANCE)
    exported = json.loads(export_blend(tmp_path / "megamix", "json").text)
    np.testing.assert_allclose(list(exported.values()), np.mean(reference["weights"], axis=0), rtol=0, atol=TOLERANCE)


def test_tensor_parallel_with_per_token_loss(config: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    """The vocabulary over two ranks, and Megatron's own division by the tokens of the global batch."""
    ranks = job(config, tmp_path, 2, tensor_model_parallel_size=2, calculate_per_token_loss=True)
    check(ranks, reference)
    assert ranks[0]["record"] == ranks[1]["record"], "also the validation losses, on every tensor-parallel rank"
    assert read_samples(ranks[:1], 4) == read_samples(ranks[1:], 4) == reference["samples"]


def test_stops_and_goes_on_in_another_layout(config: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    """Two pipeline stages, stopped at half; two data-parallel ranks go on, with the losses and samples of the
    reference, which nobody stopped."""
    save = {"save": str(tmp_path), "save_interval": 3, "eval_iters": 0}
    first = job(config, tmp_path, 2, **save, exit_interval=3, pipeline_model_parallel_size=2)
    second = job(config, tmp_path, 2, **save, load=str(tmp_path))
    losses = [line for line in reference["record"] if "iteration" in line]
    for line, expected in zip(first[1]["record"] + second[1]["record"], losses, strict=True):
        assert line == pytest.approx(expected, rel=TOLERANCE)
    assert read_samples(first[:1], 4) == read_samples(first[1:], 4) == reference["samples"][:3]
    assert read_samples(second, 2) == reference["samples"][3:]
    check_weights(second, reference)
    kept = sorted(path.name for path in (tmp_path / "megamix").glob("iter_*.json"))
    assert kept == ["iter_0000003.json", "iter_0000006.json"]


def test_is_steered_from_the_folder_of_its_record(config: Path, data_dir: Path, tmp_path: Path) -> None:
    """Under two pipeline stages, of which the second has the losses and the first the mixer."""
    first = Manifest.load(data_dir).domain_names[0]
    (tmp_path / "megamix").mkdir()
    append_command(tmp_path / "megamix", {"pin": {first: 0.7}, "at_step": 3})
    job(config, tmp_path, 2, pipeline_model_parallel_size=2, save=str(tmp_path), eval_iters=0)
    lines = [json.loads(line) for line in (tmp_path / "megamix" / "weights.jsonl").read_text().splitlines()]
    held = {line["effective_step"]: line["domain_weights"][0] for line in lines}
    assert held[2] != pytest.approx(0.7, abs=1e-6)
    assert [held[step] for step in (3, 4, 5)] == pytest.approx([0.7] * 3, abs=1e-12)


def installed(batch: dict[str, Any], cp_group: Any = None) -> dict[str, Any]:
    """core_v0.16's function, under the name of the installed one."""
    return get_batch_on_this_cp_rank(batch, cp_group)


def of_014(batch: dict[str, Any]) -> dict[str, Any]:
    return get_batch_on_this_cp_rank(batch)


def of_018(
    batch: dict[str, Any], is_hybrid_cp: bool, cp_group: Any = None, hybrid_cp_group_func: Any = None
) -> dict[str, Any]:
    """Without a group it slices by the world, which is one rank here."""
    assert not is_hybrid_cp
    return get_batch_on_this_cp_rank(batch, cp_group or dist.group.WORLD)


@pytest.mark.parametrize("split", [installed, of_014, of_018])
def test_context_parallel_ranks_share_every_sample(
    one_rank: None, config: Path, monkeypatch: pytest.MonkeyPatch, split: Callable[..., Any]
) -> None:
    """Each of two ranks has its half of every tensor, and together they have every token once.

    megatron.core's attention on a CPU has no context parallelism, so the ranks are only claimed here.
    """
    args = make_args(eod_mask_loss=True)
    monkeypatch.setattr(core_utils, "get_batch_on_this_cp_rank", split)
    parts = []
    for size, rank in ((1, 0), (2, 0), (2, 1)):
        group = SimpleNamespace(size=lambda size=size: size, rank=lambda rank=rank: rank)
        monkeypatch.setattr(parallel_state, "get_context_parallel_group", lambda group=group: group)
        monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda size=size: size)
        monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda rank=rank: rank)
        mix = MegatronMix(config, get_args=lambda: args)
        parts.append(mix.get_batch(mix.train_valid_test_datasets_provider((48, 0, 0))[0]))
        mix.close()
    whole, *halves = parts
    for name in ("tokens", "labels", "loss_mask", "position_ids", "domains"):
        expected_BS, first_BS, second_BS = (getattr(part, name) for part in parts)
        joined_BS = torch.cat((first_BS[:, :8], second_BS, first_BS[:, 8:]), dim=1)
        assert torch.equal(joined_BS, expected_BS), name
    assert whole.position_ids is not None
    assert whole.loss_mask is not None
    assert whole.position_ids[0].tolist() == list(range(32))
    assert sum(int(half.loss_mask.sum()) for half in halves if half.loss_mask is not None) == int(whole.loss_mask.sum())


# In this process


def train_here(config: Path, **given: Any) -> tuple[list[Any], list[Any]]:
    """One run of the stand-in on this rank: its record, and the domains and first tokens of the rows it read."""
    args = make_args(**{**COMMON, "eod_mask_loss": True, **given})
    megatron_loop._ARGS[:] = [args]
    destroy_rerun_state_machine()
    initialize_rerun_state_machine(mode=RerunMode(args.rerun_mode))
    loop = SimpleNamespace(save_checkpoint=megatron_loop.save_checkpoint, pretrain=megatron_loop.pretrain)
    mix, record = MegatronMix(config, data_from=args.data_from, get_args=megatron_loop.get_args), []
    samples = megatron_loop._note_samples(mix)
    with cpu_stand_ins():
        model = functools.partial(megatron_loop.make_model, args)
        try:
            mix.pretrain(loop, "decoder", model_provider=model, loop=loop, record=record)
        except SystemExit as ending:
            record.append(ending.code)
    return record, samples


def alike(record: list[Any], expected: list[Any]) -> None:
    for line, other in zip(record, expected, strict=True):
        assert line == pytest.approx(other, rel=TOLERANCE)


@pytest.mark.parametrize(("only_once", "exit_code"), [(False, 16), (True, 17)])
def test_a_result_that_is_refused(
    one_rank: None, config: Path, reference: dict[str, Any], tmp_path: Path, only_once: bool, exit_code: int
) -> None:
    """Megatron runs the step again, saves the iteration before and ends with 16, or with 17 if the result was another
    then; the run goes on from there, the step anew, with the losses of one without the fault."""
    common = {"eval_iters": 0, "save": str(tmp_path)}
    first, again = train_here(config, **common, bad_iteration=4, bad_once=only_once)
    assert first.pop() == exit_code
    assert again[-4:] == again[-8:-4], "the micro-batches of the step, once more"
    assert [path.name for path in (tmp_path / "megamix").glob("iter_*.json")] == ["iter_0000003.json"]
    second, rows = train_here(config, **common, load=str(tmp_path))
    alike(first + second, [line for line in reference["record"] if "iteration" in line])
    assert read_samples([{"samples": rows}], 4) == reference["samples"][3:]


def test_items_of_a_step_are_plain(one_rank: None, config: Path) -> None:
    """Megatron pickles them into a checkpoint and reads them with ``weights_only``."""
    mix = MegatronMix(config, get_args=lambda: make_args(eod_mask_loss=True))
    item = next(mix.train_valid_test_datasets_provider((48, 0, 0))[0])
    mix.close()
    assert item == (0, 0)


def test_validation_with_batches_of_its_own(one_rank: None, config: Path, reference: dict[str, Any]) -> None:
    """Micro-batches of another size: the same validation losses. Another global batch: more samples."""
    alike(train_here(config, eval_micro_batch_size=4)[0], reference["record"])
    halved, _ = train_here(config, eval_micro_batch_size=1, eval_global_batch_size=4, eval_iters=4)
    alike(halved, reference["record"])


def test_a_checkpoint_that_is_not_the_adapter_s(
    one_rank: None, config: Path, reference: dict[str, Any], tmp_path: Path
) -> None:
    """Iteration and weights are the checkpoint's; the data begins there, and goes on from later checkpoints."""
    common = {"eval_iters": 0, "save": str(tmp_path), "save_interval": 3}
    train_here(config, **common, exit_interval=3)
    (tmp_path / "megamix" / "iter_0000003.json").unlink()
    record, rows = train_here(config, **common, load=str(tmp_path), data_from=3)
    assert [line["iteration"] for line in record] == [4, 5, 6]
    assert read_samples([{"samples": rows}], 4) == reference["samples"][:3]
    assert record[0]["lm loss"] != pytest.approx(reference["record"][0]["lm loss"], rel=TOLERANCE), "trained weights"
    more, _ = train_here(config, **common, load=str(tmp_path), data_from=3, train_iters=7)
    assert [line["iteration"] for line in more] == [7]
    with pytest.raises(ResumeRefused, match="after step 3, but the checkpoint is of step 6"):
        train_here(config, **common, load=str(tmp_path), train_iters=7)
    with pytest.raises(InputError, match="data_from is 9, but Megatron-LM stands at iteration 6"):
        train_here(config, **common, load=str(tmp_path), data_from=9, train_iters=12)


def test_pretrain_of_every_version(config: Path) -> None:
    """Parameters as in the sources of core_v0.14 to main; another form is refused with its parameters."""
    mix = MegatronMix(config, get_args=make_args)
    ours = {
        "train_valid_test_dataset_provider": mix.train_valid_test_datasets_provider,
        "forward_step_func": mix.forward_step,
        "model_type": "decoder",
    }

    def call(pretrain: Any, **given: Any) -> Any:
        loop = SimpleNamespace(save_checkpoint=print, pretrain=pretrain)
        found = mix.pretrain(loop, "decoder", **given)
        assert loop.save_checkpoint is not print
        return found

    for pretrain, given in (
        (megatron_forms.pretrain_of_018, {"cfg_container": "cfg", "model_provider": "model", "store": "store"}),
        (megatron_forms.pretrain_of_019, {"cfg_container": "cfg"}),
        (megatron_forms.pretrain_of_019, {"cfg_container": "cfg", "model_provider": "model"}),
    ):
        found = call(pretrain, **given)
        assert {name: value for name, value in found.items() if value} == {**ours, **given}
    with pytest.raises(
        InputError, match=r"begins with cfg_container. Give cfg_container=pretrain_cfg_container_from_args"
    ):
        call(megatron_forms.pretrain_of_018, model_provider="model")
    with pytest.raises(InputError, match=r"takes no args_defaults\. It takes cfg_container"):
        call(megatron_forms.pretrain_of_019, cfg_container="cfg", args_defaults={})
    with pytest.raises(InputError, match=r"takes no cfg_container\. It takes train_valid_test_dataset_provider"):
        call(megatron_loop.pretrain, cfg_container="cfg", model_provider="model", record=[])
    with pytest.raises(InputError, match=rf"needs model_provider, which was not given.*Installed: {INSTALLED}"):
        call(megatron_forms.pretrain_of_018, cfg_container="cfg")

    def pretrain_of_later(everything: Any, train_valid_test_dataset_provider: Any, **more: Any) -> None: ...

    with pytest.raises(InputError, match=rf"takes no model_type\. It takes everything.*Installed: {INSTALLED}"):
        call(pretrain_of_later)


def test_a_slicing_function_of_an_unknown_form(one_rank: None, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def split(batch: Any, plan: Any, cp_group: Any = None) -> Any: ...

    monkeypatch.setattr(core_utils, "get_batch_on_this_cp_rank", split)
    mix = provide(config)
    with pytest.raises(
        InputError, match=rf"split\(batch, plan, cp_group\) needs plan, .*Installed: {INSTALLED}\. Versions seen"
    ):
        mix.get_batch(mix.train_valid_test_datasets_provider((48, 0, 0))[0])
    mix.close()


# Refusals


def provide(config: Path, *overrides: str, **given: Any) -> MegatronMix:
    args = make_args(**{"eod_mask_loss": True, **given})
    mix = MegatronMix(config, overrides, get_args=lambda: args)
    mix.train_valid_test_datasets_provider((48, 0, 0))
    return mix


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataloader_type": "single"}, r"--dataloader-type is 'single', expected 'external'"),
        ({"rampup_batch_size": ["4", "4", "100"]}, r"--rampup-batch-size is \['4'.*one size"),
        ({"iterations_to_skip": [7]}, "--iterations-to-skip"),
        ({"step_batch_size_schedule": "0:8 1M:16"}, "--step-batch-size-schedule is '0:8 1M:16', expected None"),
        ({"reset_attention_mask": True}, "--reset-attention-mask is True, expected False"),
        ({"dataloader_inter_document_masking": True}, "--dataloader-inter-document-masking"),
        ({"sft": True}, "--sft is True, expected False"),
        ({"fim_data": True}, "--fim-data"),
        ({"check_for_spiky_loss": True}, "--check-for-spiky-loss"),
        ({"hybrid_context_parallel": True}, "--hybrid-context-parallel"),
        ({"perform_rl_step": True}, "--perform-rl-step"),
        ({"logits_load_dir": "logits"}, "--logits-load-dir"),
        ({"export_kd_teacher_load": "teacher"}, "--export-kd-teacher-load is 'teacher', expected None"),
        ({"gtp_weight_remat_size": 2}, "--tensor-parallel-num-weight-shards"),
        ({"seq_length": 64}, r"--seq-length is 64, expected 32. Make it and data.seq_length"),
        ({"eod_mask_loss": False}, "--eod-mask-loss is False, expected True"),
        ({"padded_vocab_size": 384}, "padded vocabulary has 384 entries, but the data's tokenizer knows 512"),
        ({"global_batch_size": 7}, "global_batch 7 does not divide"),
    ],
)
def test_arguments_that_do_not_fit(one_rank: None, config: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        provide(config, **given)


def test_config_that_does_not_fit(one_rank: None, config: Path) -> None:
    with pytest.raises(InputError, match="steps, batches and seed are Megatron-LM's here"):
        provide(config, "train.steps=5")
    with pytest.raises(InputError, match="on_exhausted is stop, but Megatron-LM decides"):
        provide(config, "data.max_epochs=3", "data.on_exhausted=stop")
    with pytest.raises(InputError, match="unknown key 'mixr'"):
        provide(config, "mixr.name=odm")
    with pytest.raises(InputError, match=r"data\.attention is document, but Megatron-LM's attention is causal"):
        provide(config, "data.attention=document")


def test_a_checkpoint_without_the_data_s_state(one_rank: None, config: Path, tmp_path: Path) -> None:
    with pytest.raises(ResumeRefused, match=r"iter_0000003.json cannot be read"):
        provide(config, iteration=3, load=str(tmp_path))
    with pytest.raises(InputError, match="--save and --load must name a folder"):
        provide(config, iteration=3)


def test_a_state_of_another_step_or_run(one_rank: None, config: Path, tmp_path: Path) -> None:
    mix = provide(config, save=str(tmp_path))
    mix.save(0)
    with pytest.raises(MegamixError, match="iteration 5 cannot be saved: the data stands after 0 steps"):
        mix.save(5)
    mix.close()
    state = tmp_path / "megamix" / "iter_0000000.json"
    state.rename(state.with_name("iter_0000003.json"))
    with pytest.raises(ResumeRefused, match="after step 0, but the checkpoint is of step 3"):
        provide(config, iteration=3, load=str(tmp_path))
    saved = json.loads(state.with_name("iter_0000003.json").read_text())
    state.with_name("iter_0000003.json").write_text(json.dumps({**saved, "step": 3}))
    with pytest.raises(ResumeRefused, match="another order: seed was 1234, now 7"):
        provide(config, iteration=3, load=str(tmp_path), seed=7)


def test_a_step_whose_losses_are_missing(one_rank: None, config: Path) -> None:
    """A loss of one's own in place of the adapter's would leave the mixer without statistics."""
    args = make_args(eod_mask_loss=True)
    mix = MegatronMix(config, get_args=lambda: args)
    training, _, _ = mix.train_valid_test_datasets_provider((48, 0, 0))
    for _ in range(4):
        mix.get_batch(training)
    with pytest.raises(MegamixError, match="the losses of step 1 are not complete"):
        mix.get_batch(training)
    mix.close()
