"""Megatron-core engine: tensor, pipeline, context and data parallelism around megamix's loss and data.

Legend: M micro-batches, B samples, S tokens, V vocabulary, T tensor-parallel ranks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamix.data.blend.permute import hash_words
from megamix.data.loader import Batch
from megamix.engines.base import COLLECTIVE_TIMEOUT, Engine, OwnFormat, ParameterState
from megamix.engines.config import MegatronConfig, TrainConfig
from megamix.engines.loss_form import kernel_of, takes_linear_form
from megamix.engines.megatron import checkpoint, setup
from megamix.engines.megatron.context import context_part, whole_samples
from megamix.engines.megatron.cpu import cpu_stand_ins
from megamix.engines.megatron.documents import attention_options, packs_documents
from megamix.engines.megatron.layout import uses_transformer_engine
from megamix.engines.megatron.model import MixChunk, build_chunks, transformer_config
from megamix.engines.megatron.names import ParameterMap, parameter_maps
from megamix.engines.megatron.setup import get_forward_backward_func, parallel_state, tensor_parallel
from megamix.engines.models.config import ModelConfig
from megamix.engines.models.layers import make_layer
from megamix.engines.step_loss import Objective, StepLoss, is_finite_everywhere


def start_distributed() -> None:
    """Joins the job's process group (torchrun's environment)."""
    # Megatron's overlap of reductions with matrix products needs kernels to start in the order of their launches.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=COLLECTIVE_TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)


class MegatronEngine(Engine, OwnFormat):
    """Tensor, pipeline (also interleaved), context and data parallelism by megatron.core."""

    own_format = "megatron"

    def __init__(
        self,
        engine: MegatronConfig,
        model: ModelConfig,
        train: TrainConfig,
        *,
        seq_length: int,
        num_domains: int,
        vocab_size: int,
        loss_implementation: str,
        skip_non_finite: bool = False,
        reset_position_ids: bool = False,
        within_documents: bool = False,
    ) -> None:
        self._config = engine
        self._skip_non_finite = skip_non_finite
        self._model = model
        self._train = train
        self._seq_length = seq_length
        self._within_documents = within_documents
        self._packs = within_documents and packs_documents(engine)
        self._num_micro_batches = train.global_batch // (train.micro_batch * engine.data_size(dist.get_world_size()))
        self.micro_batch_multiple = engine.pipeline if engine.virtual_pipeline > 1 else 1
        with cpu_stand_ins():
            setup.start_groups(engine)
            self.place = setup.place(engine, reads_all_stages=reset_position_ids or within_documents)
            self._tensor_group = parallel_state.get_tensor_model_parallel_group()
            self._context_group = parallel_state.get_context_parallel_group()
            tensor_parallel.model_parallel_cuda_manual_seed(train.seed % 2**31)
            config = transformer_config(engine, model, seq_length)
            self._linear = takes_linear_form(
                loss_implementation,
                model,
                engine,
                seq_length=seq_length,
                micro_batch=train.micro_batch,
                device=self.place.device,
            )
            masked = within_documents and not self._packs
            self._chunks: list[MixChunk] = build_chunks(
                engine, model, config, seq_length, linear=self._linear, masked=masked
            )
            # Before the optimizer, which copies them.
            self._set_initial_weights()
            self._wrapped = setup.wrap(engine, config, self._chunks)
            self._optimizer: Any = setup.make_optimizer(engine, train, self._wrapped)
        self._loss = StepLoss(
            num_domains,
            vocab_size,
            self.place.device,
            kernel_of(loss_implementation),
            process_group=self._tensor_group if engine.tensor > 1 else None,
            sample_dim=0 if self._packs else 1,
        )
        self._empty_sums = torch.zeros_like(self._loss.evaluation_sums)
        self._grad_norm: float | None = None
        self.optimizer_steps = 0

    def train_step(
        self,
        batch: Batch | None,
        objective: Objective,
        lr: float,
        on_statistics: Callable[[torch.Tensor], None],
        num_micro_batches: int | None = None,
    ) -> bool:
        micro_batches = num_micro_batches or self._num_micro_batches
        if self.place.has_loss:
            # Gradients are summed without scaling over micro-batches, and over data- and context-parallel ranks.
            self._loss.start_step(micro_batches, objective, 1.0, on_statistics)
        else:
            on_statistics(self._empty_sums)
        with cpu_stand_ins():
            self._seed_dropout()
            for chunk in self._wrapped:
                chunk.zero_grad_buffer()
            self._optimizer.zero_grad()
            self._run(batch, micro_batches, forward_only=False)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            is_finite = self._step_optimizer()
        self._steps += is_finite
        return is_finite

    def _step_optimizer(self) -> bool:
        """Takes the step unless it must be skipped; returns whether the step is known to be finite."""
        self._grad_norm = None
        if self._skip_non_finite:
            bad_tokens = self._loss.non_finite_tokens  # 0 where there is no loss
            if not is_finite_everywhere([p.main_grad for p in self._parameters_held()], bad_tokens):
                return False
        _, norm, _ = self._optimizer.step()
        # Megatron has read the norm on the host, with or without clipping.
        is_finite = math.isfinite(norm)
        self._grad_norm = norm if is_finite else None
        return is_finite

    def _parameters_held(self) -> Iterator[Any]:
        """Trained parameters of this rank, which hold the gradients that Megatron sums."""
        return (p for chunk in self._chunks for p in chunk.parameters() if p.requires_grad)

    def token_losses(self, batch: Batch | None, num_micro_batches: int) -> torch.Tensor | None:
        loss_MSB = super().token_losses(batch, num_micro_batches)
        if loss_MSB is None:
            return None
        return whole_samples(loss_MSB if self._packs else loss_MSB.transpose(1, 2), self._context_group)

    def _forward(self, batch: Batch | None, num_micro_batches: int) -> None:
        with cpu_stand_ins(), torch.no_grad():
            for chunk in self._wrapped:
                chunk.eval()
            self._run(batch, num_micro_batches, forward_only=True)
            for chunk in self._wrapped:
                chunk.train()

    def _run(self, batch: Batch | None, num_micro_batches: int, *, forward_only: bool) -> None:
        data = [self._micro_batches(batch, num_micro_batches) for _ in self._wrapped]
        interleaved = len(data) > 1
        samples = self._train.micro_batch
        get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=data if interleaved else data[0],
            model=self._wrapped if interleaved else self._wrapped[0],
            num_microbatches=num_micro_batches,
            seq_length=self._seq_length * samples if self._packs else self._seq_length,
            micro_batch_size=1 if self._packs else samples,
            forward_only=forward_only,
        )

    def _micro_batches(self, batch: Batch | None, number: int) -> Iterator[tuple[Any, ...]]:
        """Yields (tokens, positions, targets of `StepLoss`) of each micro-batch: [B, S] each, this rank's part of the
        samples."""
        if batch is None:
            return iter([(None, None, None)] * number)
        part = partial(context_part, rank=self.place.context_rank, size=self._config.context)
        positions = [None] * number if batch.positions is None else part(batch.positions)
        targets = zip(*(part(target) for target in batch.targets), strict=True)
        return zip(part(batch.tokens), positions, targets, strict=True)

    def _forward_step(
        self, data: Iterator[tuple[Any, ...]], wrapped: Any
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        tokens_BS, positions_BS, targets = next(data)
        chunk = setup.unwrap(wrapped)
        options: dict[str, Any] = {"attention_mask": None}
        if self._packs:
            tokens_BS, positions_BS = tokens_BS.view(1, -1), positions_BS.view(1, -1)
        if self._within_documents:
            options = attention_options(positions_BS, packed=self._packs)
        chunk.rotary_pos_emb.positions_BS = positions_BS
        if chunk.post_process:
            options["labels"] = targets[0]
            if self._config.precision == "bf16":
                options["fp32_output"] = False  # of the logits; the loss computes in fp32 itself
        output = wrapped(tokens_BS, None, **options)
        return output, partial(self._sum_up, targets, chunk)

    def _sum_up(
        self, targets: Sequence[torch.Tensor], chunk: MixChunk, output: torch.Tensor
    ) -> tuple[torch.Tensor, int, dict[str, Any]]:
        """Returns the scalar to differentiate, and two values for Megatron's averages, which are not used."""
        if not self._packs:
            targets = [target_BS.t().contiguous() for target_BS in targets]
        return self._loss(chunk.factors(output) if self._linear else output, tuple(targets)), 0, {}

    def _seed_dropout(self) -> None:
        """Seeds dropout by the step, alike on the tensor-parallel ranks for what they all compute."""
        if self._model.dropout:
            place = self.place
            words = (self._train.seed, self._steps, place.data_rank, place.context_rank, place.stage)
            tensor_parallel.model_parallel_cuda_manual_seed(int(hash_words(*words)) % 2**31)

    def grad_norm(self) -> float | None:
        return self._grad_norm

    def layers(self) -> list[int]:
        found = []
        for chunk in self._chunks:
            found += [0] if chunk.pre_process else []
            found += [layer.layer_number for layer in chunk.decoder.layers]
            found += [self._model.num_layers + 1] if chunk.post_process else []
        return sorted(found)

    def layers_to_load(self) -> list[int]:
        # Stage num_stages - 1 trains a copy of a tied embedding, with the gradients of both and a state of its own.
        is_copied = (
            self._model.tie_word_embeddings and self._chunks[-1].post_process and not self._chunks[0].pre_process
        )
        return [0, *self.layers()] if is_copied else self.layers()

    def layer_state(self, layer: int) -> Iterator[tuple[str, ParameterState]]:
        for entry, parameter in self._parameters(layer):
            held = setup.held_state(self._optimizer, parameter)
            parts = [entry.part(self._gather(entry, tensor)) for tensor in held]
            for name, *state in zip(entry.sources, *parts, strict=True):
                yield name, ParameterState(*state)

    def load_layer_state(self, layer: int, state: dict[str, ParameterState]) -> None:
        for entry, parameter in self._parameters(layer):
            held = setup.held_state(self._optimizer, parameter)
            for name, target in zip(("weight", "exp_avg", "exp_avg_sq"), held, strict=True):
                whole = entry.join([getattr(state[source], name) for source in entry.sources])
                target.copy_(self._shard(entry, whole))
            parameter.data.copy_(held[0])

    def _set_initial_weights(self) -> None:
        """Sets the initial weights of every engine: each layer draws its own, on the CPU, one layer at a time."""
        for index in self.layers_to_load():
            source = make_layer(self._model, index, self._train.seed, self._seq_length)
            names = source.hugging_face_names()
            weights = {names[name]: parameter.detach() for name, parameter in source.named_parameters()}
            for entry, parameter in self._parameters(index):
                whole = entry.join([weights[name] for name in entry.sources])
                parameter.data.copy_(self._shard(entry, whole))

    def _parameters(self, layer: int) -> Iterator[tuple[ParameterMap, torch.nn.Parameter]]:
        """Yields this rank's part of each parameter of a layer."""
        module: torch.nn.Module
        if layer == 0:
            module = self._chunks[0]
        elif layer == self._model.num_layers + 1:
            module = self._chunks[-1]
        else:
            decoders = [inner for chunk in self._chunks for inner in chunk.decoder.layers]
            module = next(inner for inner in decoders if inner.layer_number == layer)
        for entry in parameter_maps(self._model, layer, fused_norms=uses_transformer_engine(self._config)):
            name = entry.name
            if layer == 0 and not self._chunks[0].pre_process:
                module, name = self._chunks[-1], "output_layer.weight"
            yield entry, module.get_parameter(name)

    def _shard(self, entry: ParameterMap, whole: torch.Tensor) -> torch.Tensor:
        return entry.shard(whole, self.place.tensor_rank, self._config.tensor)

    def _gather(self, entry: ParameterMap, shard: torch.Tensor) -> torch.Tensor:
        if self._config.tensor == 1 or entry.split == "whole":
            return shard
        shards = [torch.empty_like(shard) for _ in range(self._config.tensor)]
        dist.all_gather(shards, shard.contiguous(), group=self._tensor_group)
        return entry.gather(shards)

    @property
    def optimizer_steps(self) -> int:
        return self._steps

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        self._steps = steps
        setup.reset_adam(self._optimizer, steps)

    @property
    def saves_own_format(self) -> bool:
        return self._config.checkpoint_format == "dist"

    def own_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for chunk in self._chunks:
            yield from chunk.named_parameters()
        # The distributed optimizer holds pieces that have no names.
        for number, state in enumerate(self._optimizer.optimizer.state.values()):
            for part in ("exp_avg", "exp_avg_sq"):
                yield f"{part} of parameter {number}", state[part]

    def save_own(self, folder: Path) -> None:
        with cpu_stand_ins():
            checkpoint.save(folder, self._chunks, self._optimizer)

    def load_own(self, folder: Path, steps: int) -> None:
        with cpu_stand_ins():
            checkpoint.load(folder, self._chunks, self._optimizer)
        setup.set_decay(self._optimizer, self._train)
        self._steps = steps
