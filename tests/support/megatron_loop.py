"""A stand-in for ``megatron.training``, which is not in the wheel of megatron-core: arguments, ``pretrain`` and
checkpoints, as far as the functions it is given can see them.

It follows ``megatron/training/training.py`` of Megatron-LM core_v0.16: what is called with which arguments, on which
ranks and in which order (iterators per model chunk, wrapped for reruns; evaluation with `forward_only`; checkpoints by
all ranks, also of the iteration before where a result was refused twice). Process groups, model, schedules, gradients,
optimizer and the checks of results are the real megatron.core's. `megatron_forms` has
``pretrain`` with the parameters of later versions.

As a script it is one rank of a job: ``megatron_loop.py CONFIG ARGUMENTS_AS_JSON RECORD``.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.num_microbatches_calculator import get_num_microbatches, init_num_microbatches_calculator
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import (
        RerunDataIterator,
        RerunMode,
        RerunState,
        get_rerun_state_machine,
        initialize_rerun_state_machine,
    )
    from megatron.core.transformer import TransformerConfig

LAYERS, WIDTH = 4, 16
_ARGS: list[SimpleNamespace] = []


def get_args() -> SimpleNamespace:
    return _ARGS[0]


def make_args(**given: Any) -> SimpleNamespace:
    """What arguments.py and a small run come to; ``given`` takes precedence."""
    defaults: dict[str, Any] = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "train_iters": 6,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "seq_length": 32,
        "seed": 1234,
        "lr": 0.5,
        "eval_interval": 1000,
        "eval_iters": 0,
        "save": None,
        "load": None,
        "save_interval": None,
        "exit_interval": None,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "dataloader_type": "external",
        "calculate_per_token_loss": False,
        "padded_vocab_size": 512,
        "rampup_batch_size": None,
        "phase_transition_iterations": None,
        "full_validation": False,
        "multiple_validation_sets": False,
        "mtp_num_layers": None,
        "iterations_to_skip": [],
        "eod_mask_loss": False,
        "reset_position_ids": False,
        "rerun_mode": "validate_results",
        "eval_micro_batch_size": None,
        "eval_global_batch_size": None,
        "step_batch_size_schedule": None,
        "reset_attention_mask": False,
        "dataloader_inter_document_masking": False,
        "sft": False,
        "fim_data": False,
        "check_for_spiky_loss": False,
        "hybrid_context_parallel": False,
        "perform_rl_step": False,
        "logits_load_dir": None,
        "export_kd_teacher_load": None,
        "gtp_weight_remat_size": 1,
        "bad_iteration": None,  # of the stand-in: its gradient is not a number
        "bad_once": False,  # of the stand-in: it is one when the step is run again
        "data_from": 0,  # of the stand-in: for the adapter
    }
    assert given.keys() <= defaults.keys(), given.keys() - defaults.keys()
    return SimpleNamespace(**{**defaults, **given})


def initialize(args: SimpleNamespace) -> None:
    """Megatron's groups and global state; the process group is there already."""
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    init_num_microbatches_calculator(
        dist.get_rank(),
        args.rampup_batch_size,
        args.global_batch_size,
        args.micro_batch_size,
        parallel_state.get_data_parallel_world_size(),
    )
    initialize_rerun_state_machine(mode=RerunMode(args.rerun_mode))
    _ARGS[:] = [args]


def make_model(args: SimpleNamespace) -> list[Any]:
    """This rank's chunks, with weights that are the same function of their names in every layout."""
    sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    chunks = args.virtual_pipeline_model_parallel_size
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=sizes[0],
        pipeline_model_parallel_size=sizes[1],
        virtual_pipeline_model_parallel_size=chunks,
        context_parallel_size=args.context_parallel_size,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        batch_p2p_comm=False,
        calculate_per_token_loss=args.calculate_per_token_loss,
    )
    config.finalize_model_grads_func = finalize_model_grads
    model = []
    for chunk in range(chunks or 1):
        vp_stage = chunk if chunks else None
        gpt = GPTModel(
            config,
            get_gpt_layer_local_spec(),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            vp_stage=vp_stage,
        )
        stage = parallel_state.get_pipeline_model_parallel_rank()
        gpt.first_layer = (chunk * sizes[1] + stage) * (LAYERS // (sizes[1] * (chunks or 1)))
        set_weights(gpt)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, check_for_nan_in_grad=True)
        model.append(DistributedDataParallel(config, ddp, gpt))
    return model


def whole_name(gpt: Any, name: str) -> str:
    """A parameter's name in the whole model; chunks count their layers from 0."""
    return re.sub(r"layers\.(\d+)", lambda found: f"layers.{int(found[1]) + gpt.first_layer}", name)


def set_weights(gpt: Any) -> None:
    """Draws every weight by its name in the whole model, and keeps this rank's part of it."""
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in gpt.named_parameters():
        shape, split = list(parameter.shape), getattr(parameter, "tensor_model_parallel", False) and size > 1
        if split:
            shape[parameter.partition_dim] *= size
        draw = np.random.default_rng(list(whole_name(gpt, name).encode())).standard_normal(shape) * 0.3
        whole = torch.from_numpy(draw).float() + (1.0 if "norm.weight" in name else 0.0)
        with torch.no_grad():
            parameter.copy_(whole.chunk(size, parameter.partition_dim)[rank] if split else whole)


def load_weights(folder: Path, model: list[Any]) -> None:
    saved = {name: value for file in sorted(folder.glob("*.pt")) for name, value in torch.load(file).items()}
    for chunk in model:
        for name, parameter in chunk.module.named_parameters():
            with torch.no_grad():
                parameter.copy_(saved[whole_name(chunk.module, name)])


def make_optimizer(args: SimpleNamespace, model: list[Any]) -> Any:
    config = OptimizerConfig(optimizer="sgd", lr=args.lr, sgd_momentum=0.0, weight_decay=0.0, clip_grad=0.0)
    optimizer = get_megatron_optimizer(config, model)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    return optimizer


def build_data_iterators(provider: Any, args: SimpleNamespace) -> tuple[Any, Any]:
    assert getattr(provider, "is_distributed", False), "else only the first tensor-parallel rank would call it"
    samples = (args.train_iters * args.global_batch_size, args.eval_iters * args.global_batch_size, 0)
    train, valid, test = provider(samples)
    assert train is not None
    assert test is None
    flags = torch.tensor([args.train_iters > 0, valid is not None], dtype=torch.long)
    dist.broadcast(flags, 0)
    args.do_valid = getattr(args, "do_valid", False) or bool(flags[1])
    assert args.dataloader_type == "external"
    return RerunDataIterator(train), None if valid is None else RerunDataIterator(valid)


def pretrain(
    train_valid_test_dataset_provider: Any,
    model_provider: Any,
    model_type: Any,
    forward_step_func: Any,
    process_non_loss_data_func: Any = None,
    extra_args_provider: Any = None,
    args_defaults: Any = None,
    get_embedding_ranks: Any = None,
    get_position_embedding_ranks: Any = None,
    non_loss_data_func: Any = None,
    store: Any = None,
    inprocess_call_wrapper: Any = None,
    *,
    loop: Any = None,
    record: list[Any],
) -> None:
    """``loop``: what a user of the real one finds in the module training.py, here ``save_checkpoint``."""
    assert model_type == "decoder"
    args = get_args()
    model = model_provider()
    optimizer = make_optimizer(args, model)
    if args.load and (Path(args.load) / "latest.txt").exists():
        args.iteration = int((Path(args.load) / "latest.txt").read_text())
        args.consumed_train_samples = args.iteration * args.global_batch_size
        load_weights(Path(args.load) / f"iter_{args.iteration:07d}", model)
        optimizer.reload_model_params()
    if args.virtual_pipeline_model_parallel_size is not None:
        train_data_iterator, valid_data_iterator = [], []
        for vp_stage in range(len(model)):
            assert "vp_stage" in inspect.signature(train_valid_test_dataset_provider).parameters
            provider: Any = functools.partial(train_valid_test_dataset_provider, vp_stage=vp_stage)
            if getattr(train_valid_test_dataset_provider, "is_distributed", False):
                provider.is_distributed = True
            train, valid = build_data_iterators(provider, args)
            train_data_iterator.append(train)
            valid_data_iterator.append(valid)
    else:
        train_data_iterator, valid_data_iterator = build_data_iterators(train_valid_test_dataset_provider, args)
    iteration = args.iteration
    while iteration < args.train_iters:
        args.curr_iteration = iteration
        reports, should_checkpoint, should_exit, exit_code = train_step(
            forward_step_func, train_data_iterator, model, optimizer
        )
        if should_checkpoint:
            loop.save_checkpoint(iteration, model, optimizer, None, 0, {}, train_data_iterator=train_data_iterator)
        if should_exit:
            sys.exit(exit_code)
        iteration += 1
        args.consumed_train_samples += args.global_batch_size
        record.append({"iteration": iteration, **_total(reports)})
        if args.eval_interval and iteration % args.eval_interval == 0 and args.do_valid:
            record.append({"evaluated": iteration, **_total(evaluate(forward_step_func, valid_data_iterator, model))})
        if args.save and args.save_interval and iteration % args.save_interval == 0:
            loop.save_checkpoint(iteration, model, optimizer, None, 0, {}, train_data_iterator=train_data_iterator)
        if args.exit_interval and iteration % args.exit_interval == 0:
            break


def train_step(
    forward_step_func: Any, data_iterator: Any, model: list[Any], optimizer: Any
) -> tuple[list[Any], bool, bool, int]:
    args, rerun = get_args(), get_rerun_state_machine()
    losses_reduced: list[Any] = []
    while rerun.should_run_forward_backward(data_iterator):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        bad = args.curr_iteration + 1 == args.bad_iteration
        bad = bad and (rerun.state is RerunState.INITIAL_RUN or not args.bad_once)
        with bad_gradient(model) if bad else nullcontext():
            losses_reduced = run_schedule(forward_step_func, data_iterator, model, args, forward_only=False)
    ending = rerun.should_checkpoint_and_exit()
    if not ending[1]:
        optimizer.step()
    return losses_reduced, *ending


@contextmanager
def bad_gradient(model: list[Any]) -> Iterator[None]:
    """Gradients that are not numbers, after sound losses."""
    parameter = next(iter(model[-1].parameters()))
    hook = parameter.register_hook(lambda gradient: gradient * torch.nan)
    yield
    hook.remove()


def evaluate(forward_step_func: Any, data_iterator: Any, model: list[Any]) -> list[Any]:
    args, rerun = get_args(), get_rerun_state_machine()
    batch = args.eval_global_batch_size or args.global_batch_size  # core_v0.18 and later
    micro = args.eval_micro_batch_size or args.micro_batch_size
    size = batch // (micro * parallel_state.get_data_parallel_world_size()), micro
    mode = rerun.get_mode()
    rerun.set_mode(RerunMode.DISABLED)
    for chunk in model:
        chunk.eval()
    reports = []
    with torch.no_grad():
        for _ in range(args.eval_iters):
            reports += run_schedule(forward_step_func, data_iterator, model, args, forward_only=True, size=size)
            args.consumed_valid_samples += batch
    for chunk in model:
        chunk.train()
    rerun.set_mode(mode)
    return reports


def run_schedule(
    step: Any,
    data_iterator: Any,
    model: list[Any],
    args: SimpleNamespace,
    *,
    forward_only: bool,
    size: tuple[int, int] | None = None,
) -> Any:
    num_microbatches, micro_batch_size = size or (get_num_microbatches(), args.micro_batch_size)
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=data_iterator,
        model=model if len(model) > 1 else model[0],
        num_microbatches=num_microbatches,
        seq_length=args.seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def _total(reports: list[Any]) -> dict[str, float]:
    """What training_log prints: sums over micro-batches and ranks, divided by their tokens."""
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return {}
    found = {}
    for key in reports[0]:
        total = torch.vstack([report[key].view(-1) for report in reports]).sum(dim=0)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        found[key] = float(total[0] / total[1])
    return found


def save_checkpoint(iteration: int, model: list[Any], *_others: Any, **_options: Any) -> None:
    args = get_args()
    folder = Path(args.save) / f"iter_{iteration:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    weights = {whole_name(c.module, name): value for c in model for name, value in c.module.named_parameters()}
    torch.save(weights, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    if dist.get_rank() == 0:
        (Path(args.save) / "latest.txt").write_text(str(iteration))


def main() -> None:
    """A user's script: the adapter in pretrain()'s places, and a record of what came of it."""
    from megamix.engines.megatron.cpu import cpu_stand_ins
    from megamix.interop.trainers.megatron_lm import MegatronMix

    config, given, record_to = sys.argv[1:]
    args = make_args(**json.loads(given))
    loop = SimpleNamespace(save_checkpoint=save_checkpoint, pretrain=pretrain)
    mix, record, states = MegatronMix(config, data_from=args.data_from, get_args=get_args), [], []
    samples, close = _note_samples(mix), mix.close
    run: Any = mix
    mix.close = lambda: (states.append(run._run.state().to_json()), close())  # pyright: ignore[reportAttributeAccessIssue]
    dist.init_process_group("gloo")
    with cpu_stand_ins():
        initialize(args)
        mix.pretrain(loop, "decoder", model_provider=lambda: make_model(args), loop=loop, record=record)
    lines = {"record": record, "samples": samples, "state": states[0] if dist.get_rank() == 0 else None}
    Path(f"{record_to}{dist.get_rank()}.json").write_text(json.dumps(lines))
    dist.barrier()
    dist.destroy_process_group()


def _note_samples(mix: Any) -> list[Any]:
    """Collects the first tokens and the domain of every row of the training micro-batches that `get_batch` gives."""
    samples, get_batch = [], mix.get_batch

    def noted(data_iterator: Any, vp_stage: Any = None) -> Any:
        micro = get_batch(data_iterator, vp_stage)
        if micro.tokens is not None and torch.is_grad_enabled():
            samples.append([micro.domains[:, 0].tolist(), micro.tokens[:, :4].tolist()])
        return micro

    mix.get_batch = noted
    return samples


if __name__ == "__main__":
    main()
