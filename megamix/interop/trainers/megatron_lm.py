"""Adapter for Megatron-LM's training loop, at the places of ``pretrain_gpt.py``.

Conforms to Megatron-LM core_v0.14 to main (``pretrain_gpt.py``, ``megatron/training/training.py``; see
`megatron_versions`):

    mix = MegatronMix("mix.yaml")
    mix.pretrain(training, ModelType.encoder_or_decoder, model_provider=...)     # training: megatron.training.training

with ``--dataloader-type external``. Megatron's arguments set steps, batches, seed and sample length. Samples are a
function of the position, so every rank reads for itself and nothing goes through the tensor-parallel group. All stages
have iterators, which mark the beginning of a step. Every rank takes part in one all-reduce of integers a step: the loss
of the last micro-batch starts it, or the beginning of the step where there is no loss. Validation reads all domains in
equal shares and reports the loss of each.

Legend: M micro-batches, B samples, S tokens, V vocabulary, K domains.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from megamix.core.errors import InputError
from megamix.data.blend.blend import Blend
from megamix.data.loader import IGNORED_LABEL, Batch
from megamix.data.sampler import Slice
from megamix.engines.base import local_device
from megamix.interop.trainers.host import HostRun, host_plan, load_state, save_state
from megamix.interop.trainers.megatron_arguments import HOST, check_args, check_plan
from megamix.interop.trainers.megatron_versions import call_pretrain, context_parallel_part

FOLDER = "megamix"
"""Folder, beside Megatron's checkpoints, of weights.jsonl and of one state of the data for each checkpoint."""


class MicroBatch(NamedTuple):
    """Tensors of a micro-batch: the five of ``pretrain_gpt.py``, then two more; all None on a stage that needs none.

    Attributes:
        tokens, labels: int64 [B, S]; ``IGNORED_LABEL`` where the label does not count.
        loss_mask: float32 [B, S], 1 where the label counts.
        attention_mask: None: causal.
        position_ids: int64 [B, S].
        domains: int32 [B, S].
        reference: float32 [B, S], losses of a reference model in nats; None without one.
    """

    tokens: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    domains: torch.Tensor | None = None
    reference: torch.Tensor | None = None


@dataclass(frozen=True)
class _Item:
    """Validation micro-batch between an iterator and `MegatronMix.get_batch`; no batch on a rank that reads none."""

    batch: Batch | None
    index: int


Place = tuple[int, int]
"""Training micro-batch between an iterator and `MegatronMix.get_batch`: step and number. Plain integers, since Megatron
pickles the items of a step that is to be run again into its checkpoint."""


class MegatronMix:
    """Functions for Megatron-LM's ``pretrain``, with their common state.

    Args:
        config: YAML with the sections data, mixture and mixer.
        overrides: ``key.path=value`` over it.
        loss_implementation: ``auto``, ``triton`` or ``torch``.
        data_from: iteration of Megatron's at which the data begins, that of a checkpoint without a state of the data to
            continue from; later checkpoints need it as well.
        get_args: returns Megatron's arguments; default: ``megatron.training.get_args``.
    """

    def __init__(
        self,
        config: str | Path,
        overrides: Sequence[str] = (),
        *,
        loss_implementation: str = "auto",
        data_from: int = 0,
        get_args: Callable[[], Any] | None = None,
    ) -> None:
        self._config = config
        self._overrides = overrides
        self._loss_implementation = loss_implementation
        self._data_from = data_from
        self._get_args = get_args or _megatron_args
        self._run: HostRun | None = None
        self._batch: Batch | None = None
        self._normaliser = 1.0

    def pretrain(
        self, training: Any, model_type: Any, *, model_provider: Any = None, cfg_container: Any = None, **options: Any
    ) -> Any:
        """Calls ``training.pretrain``, with `saving` in place of ``training.save_checkpoint``.

        Args:
            training: Megatron's module ``megatron.training.training``.
            model_type, model_provider, cfg_container, options: arguments of ``pretrain``, as far as it takes them.

        Raises:
            InputError: ``pretrain`` takes other arguments.
        """
        training.save_checkpoint = self.saving(training.save_checkpoint)
        given = {
            "cfg_container": cfg_container,
            "train_valid_test_dataset_provider": self.train_valid_test_datasets_provider,
            "model_provider": model_provider,
            "model_type": model_type,
            "forward_step_func": self.forward_step,
        }
        try:
            return call_pretrain(training.pretrain, given, options)
        finally:
            self.close()

    # Arguments of pretrain().

    def train_valid_test_datasets_provider(
        self, train_val_test_num_samples: Any, vp_stage: int | None = None
    ) -> tuple[Iterator[Place], Iterator[_Item] | None, None]:
        """Iterators over training and validation micro-batches for one chunk of the model; no test data.

        Raises:
            InputError: Megatron's arguments do not fit the config or the adapter.
            ResumeRefused: the checkpoint to continue from has no state of the data, or has another run's.
        """
        args = self._get_args()
        if self._run is None:
            self._run = self._open(args)
        run = self._run
        first = run.step
        training = _TrainIterator(functools.partial(self._train_item, first))
        if not args.eval_iters:
            return training, None, None
        return training, _validation(run, args), None

    # Megatron builds the iterators on every rank, not on the first of each tensor-parallel group alone.
    train_valid_test_datasets_provider.is_distributed = True  # pyright: ignore[reportFunctionMemberAccess]

    def get_batch(self, data_iterator: Iterator[Place | _Item], vp_stage: int | None = None) -> MicroBatch:
        """Next micro-batch of this rank; with context parallelism, its part of every sample."""
        from megatron.core import parallel_state
        from megatron.core.utils import get_batch_on_this_cp_rank

        item = next(data_iterator)
        batch, m = (item.batch, item.index) if isinstance(item, _Item) else (self._batch, item[1])
        at_end = parallel_state.is_pipeline_first_stage(
            ignore_virtual=False, vp_stage=vp_stage
        ) or parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        if batch is None or not at_end:
            return MicroBatch()
        labels_BS = batch.labels[m]
        positions_BS = torch.arange(labels_BS.shape[1], device=labels_BS.device).expand_as(labels_BS)
        whole = {
            "tokens": batch.tokens[m],
            "labels": labels_BS,
            "loss_mask": (labels_BS != IGNORED_LABEL).float(),
            "attention_mask": None,
            "position_ids": (positions_BS if batch.positions is None else batch.positions[m]).contiguous(),
            "domains": batch.domains[m],
            "reference": None if batch.reference is None else batch.reference[m],
        }
        return MicroBatch(
            **context_parallel_part(whole, get_batch_on_this_cp_rank, parallel_state.get_context_parallel_group)
        )

    def forward_step(
        self, data_iterator: Iterator[Place | _Item], model: torch.nn.Module, return_schedule_plan: bool = False
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        """Output of the model for the next micro-batch, and the function that computes its loss on the last stage."""
        from megatron.core.utils import get_attr_wrapped_model

        if return_schedule_plan:
            raise InputError(f"{HOST}'s --overlap-moe-expert-parallel-comm is not supported here. Leave it out.")
        vp_stage: Any = get_attr_wrapped_model(model, "vp_stage")
        micro = self.get_batch(data_iterator, vp_stage)
        # Without labels the last stage returns logits, for this rank's part of the vocabulary.
        output = model(micro.tokens, micro.position_ids, micro.attention_mask)
        return output, functools.partial(self.loss_func, micro.loss_mask, model=model, micro=micro)

    def loss_func(
        self,
        loss_mask: torch.Tensor | None,
        output_tensor: torch.Tensor,
        model: torch.nn.Module | None = None,
        *,
        micro: MicroBatch,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of a micro-batch, from logits [B, S, V / T].

        Returns:
            The scalar to differentiate; the number of tokens by which Megatron divides it; sums and tokens to report.
        """
        assert self._run is not None
        assert loss_mask is not None
        assert micro.labels is not None
        assert micro.domains is not None
        targets = (micro.labels, micro.domains)
        if micro.reference is not None:
            targets = (*targets, micro.reference)
        tokens = loss_mask.sum()
        if not torch.is_grad_enabled():
            return self._evaluation_loss(output_tensor, targets, tokens)
        loss = self._run.loss(output_tensor, targets)
        divided_by = tokens if self._get_args().calculate_per_token_loss else torch.ones_like(tokens)
        report = torch.stack((loss.detach() * self._normaliser, tokens))
        return loss, divided_by.to(torch.int), {"lm loss": report}

    # Checkpoints.

    def saving(self, save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps Megatron's ``save_checkpoint(iteration, ...)`` so that the state of the data is written first."""

        @functools.wraps(save_checkpoint)
        def save(iteration: int, *args: Any, **kwargs: Any) -> Any:
            self.save(iteration)
            return save_checkpoint(iteration, *args, **kwargs)

        return save

    def save(self, iteration: int) -> None:
        """Writes the state of the data after ``iteration`` steps to ``SAVE/megamix/iter_ITERATION.json``, on rank 0.

        Raises:
            MegamixError: ``iteration`` is neither that of the step just taken nor, where Megatron validates results and
                may give a step up, the one before.
        """
        if self._run is None or dist.get_rank() != 0:
            return
        save_state(_state_path(self._get_args().save, iteration), self._run.state(iteration - self._data_from))

    def close(self) -> None:
        """Stops the background threads; call it when ``pretrain`` returns."""
        if self._run is not None:
            self._run.close()
            self._run = None

    # Internal.

    def _open(self, args: Any) -> HostRun:
        from megatron.core import parallel_state

        check_args(args)
        step = args.iteration - self._data_from
        if step < 0:
            raise InputError(
                f"data_from is {self._data_from}, but {HOST} stands at iteration {args.iteration}. Give the iteration of the "
                "checkpoint at which the data begins (--load and --ckpt-step), or leave data_from out."
            )
        data_size = parallel_state.get_data_parallel_world_size()
        train = {
            "steps": args.train_iters - self._data_from,
            "global_batch": args.global_batch_size,
            "micro_batch": args.micro_batch_size,
            "seed": args.seed,
        }
        plan = host_plan(self._config, self._overrides, train, data_size, HOST)
        check_plan(args, plan)
        anew = f"begin the data anew there, with MegatronMix(..., data_from={args.iteration})"
        resumed = load_state(_state_path(args.load, args.iteration), plan, step, anew) if step else None
        sharded = parallel_state.get_tensor_model_parallel_world_size() > 1
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        return HostRun(
            plan,
            data_rank=parallel_state.get_data_parallel_rank(),
            reads_data=is_last or parallel_state.is_pipeline_first_stage(ignore_virtual=True),
            has_loss=is_last,
            device=local_device(),
            record_dir=Path(args.save) / FOLDER if args.save else None,
            resumed=resumed,
            loss_implementation=self._loss_implementation,
            process_group=parallel_state.get_tensor_model_parallel_group() if sharded else None,
            keeps_previous=getattr(args, "rerun_mode", "disabled") == "validate_results",
        )

    def _train_item(self, first_step: int, index: int) -> Place:
        """Micro-batch ``index`` since ``first_step``. The first call for a step, in any chunk, begins the step."""
        assert self._run is not None
        step, micro_batch = divmod(index, self._run.num_micro_batches)
        if first_step + step == self._run.begun:
            self._begin_step(self._run)
        return first_step + step, micro_batch

    def _begin_step(self, run: HostRun) -> None:
        from megatron.core import parallel_state

        batch = run.next_batch()
        self._batch = None if batch is None else batch.to(local_device())
        divided_by = 1.0
        if batch is not None and self._get_args().calculate_per_token_loss:
            # Megatron counts the tokens that `loss_func` returns over micro-batches and ranks.
            divided_by = float(max(batch.num_tokens, 1))
        elif batch is not None:
            # Megatron divides by the micro-batches, and averages over the ranks that hold copies of the parameters.
            copies = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
            divided_by = float(run.num_micro_batches * copies)
        self._normaliser = 1.0 if batch is None else max(batch.num_tokens, 1) / divided_by
        run.begin_step(batch, divided_by)

    def _evaluation_loss(
        self, logits: torch.Tensor, targets: tuple[torch.Tensor, ...], tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """As `loss_func`, with a report for every domain.

        Uses the token losses, which all tensor-parallel ranks have; only the first of these ranks has the sums.
        """
        assert self._run is not None
        names = self._run.plan.domain_names
        self._run.loss.start_evaluation(keep_token_losses=True)
        loss = self._run.loss(logits, targets)
        kept = self._run.loss.token_losses()
        assert kept is not None
        labels_BS, domain_BS = targets[:2]
        both = torch.stack((kept[0].flatten(), (labels_BS != IGNORED_LABEL).flatten().float()), dim=1)
        sums = both.new_zeros(len(names), 2).index_add_(0, domain_BS.flatten().long(), both)
        reports = {f"loss of {name}": sums[k] for k, name in enumerate(names)}
        return loss, tokens.to(torch.int), {"lm loss": sums.sum(0), **reports}


class _TrainIterator(Iterator[Place]):
    """Iterator over the micro-batches of one chunk of the model."""

    def __init__(self, item: Callable[[int], Place]) -> None:
        self._item = item
        self._index = 0

    def __next__(self) -> Place:
        item = self._item(self._index)
        self._index += 1
        return item


def _validation(run: HostRun, args: Any) -> Iterator[_Item]:
    """Endless micro-batches of validation samples, from all domains that have some in equal shares."""
    plan = run.plan
    share = Slice(
        getattr(args, "eval_global_batch_size", None) or args.global_batch_size,
        getattr(args, "eval_micro_batch_size", None) or args.micro_batch_size,
        run.data_rank,
        plan.data_size,
    )
    windows = np.array([domain.num_windows(plan.config.data.seq_length) for domain in plan.validation])
    shares = (windows > 0).astype(float)
    blend = Blend(np.maximum(windows, 1), shares, plan.config.train.seed, domain_keys=plan.domain_keys)
    blend.take(getattr(args, "consumed_valid_samples", 0))
    reader = plan.reader(plan.validation)
    rows = np.arange(share.global_batch)[share.samples]
    device = local_device()
    while True:
        domain_n, sample_n = blend.take(share.global_batch)
        batch = None
        if run.reads_data:
            shape = (share.num_micro_batches, share.micro_batch)
            batch = reader.batch(domain_n, sample_n, rows, shape).to(device)
        for index in range(share.num_micro_batches):
            yield _Item(batch, index)


def _megatron_args() -> Any:
    from megatron.training import get_args  # pyright: ignore[reportMissingImports]

    return get_args()


def _state_path(folder: Any, iteration: int) -> Path:
    if not folder:
        raise InputError(f"{HOST}'s --save and --load must name a folder: the state of the data is kept there.")
    return Path(folder) / FOLDER / f"iter_{iteration:07d}.json"
