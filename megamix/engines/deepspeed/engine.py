"""DeepSpeed engine: its pipeline and ZeRO run megamix's layers, loss and data."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megamix.data.loader import Batch
from megamix.engines.base import COLLECTIVE_TIMEOUT, Engine, ParameterState, Place, local_device
from megamix.engines.compilation import compile_decoders
from megamix.engines.config import GATHERED_LAYERS, REDUCE_BUCKET, DeepSpeedConfig, TrainConfig
from megamix.engines.deepspeed.division import UndividedLoss, leave_outputs_undivided
from megamix.engines.deepspeed.state import gradients, inner_adam, reset_adam, set_whole_state, whole_state
from megamix.engines.deepspeed.whole import WholeModule, evaluation_passes, train_passes
from megamix.engines.loss_form import kernel_of, takes_linear_form
from megamix.engines.loss_scale import LossScale
from megamix.engines.models.config import ModelConfig
from megamix.engines.step_loss import Objective, StepLoss, is_finite_everywhere


def start_distributed() -> None:
    """Joins the job's process group (torchrun's environment), quietly and without compiling DeepSpeed's CPU
    collectives."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        # Building it takes 40 s and a compiler, and a build that was killed leaves a lock that hangs the next one.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # pyright: ignore[reportAttributeAccessIssue]
        # PyTorch has fp16 on every CPU, if slowly; DeepSpeed asks whether the CPU has it.
        vars(get_accelerator())["is_fp16_supported"] = lambda: True
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=COLLECTIVE_TIMEOUT, verbose=False)


class DeepSpeedEngine(Engine):
    """Pipeline and data parallelism with ZeRO 0 or 1, by DeepSpeed's `PipelineEngine`; data parallelism alone with ZeRO
    2 or 3, by its `DeepSpeedEngine`."""

    def __init__(
        self,
        engine: DeepSpeedConfig,
        model: ModelConfig,
        train: TrainConfig,
        *,
        seq_length: int,
        num_domains: int,
        vocab_size: int,
        loss_implementation: str,
        skip_non_finite: bool = False,
        within_documents: bool = False,
    ) -> None:
        import deepspeed

        world_size = dist.get_world_size()
        data_size = engine.data_size(world_size)
        device = local_device()
        self._loss = StepLoss(num_domains, vocab_size, device, kernel_of(loss_implementation))
        self._undivided = UndividedLoss(self._loss)
        linear = takes_linear_form(
            loss_implementation,
            model,
            engine,
            seq_length=seq_length,
            micro_batch=train.micro_batch,
            device=device,
        )
        self._empty_sums = torch.zeros_like(self._loss.evaluation_sums)
        if engine.zero == 3:
            # DeepSpeed's gathers, at every layer, in the words of an older PyTorch.
            warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        self._is_whole = not engine.has_pipeline
        # DeepSpeed prints, at any log level: its pipeline the layers, its bf16 optimizer the memory.
        with contextlib.redirect_stdout(io.StringIO()):
            self._module = _make_module(
                engine,
                model,
                data_size,
                seed=train.seed,
                seq_length=seq_length,
                loss=self._undivided,
                linear=linear,
                checkpoint_layers=engine.activation_checkpointing,
                within_documents=within_documents,
            )
            # Untyped: the class that DeepSpeed returns depends on its config.
            self._engine: Any = deepspeed.initialize(
                model=self._module,
                optimizer=_make_optimizer(self._module, train),
                config=_deepspeed_config(engine, train, data_size, self._module),
            )[0]
        self._optimizer: Any = self._engine.optimizer
        leave_outputs_undivided(self._engine)
        if engine.compile:
            compile_decoders(self._module.own_layers())
        if model.tie_word_embeddings:
            self._module.tie()
        self.place = Place(
            rank=dist.get_rank(),
            world_size=world_size,
            data_rank=dist.get_rank() if self._is_whole else self._engine.grid.get_data_parallel_rank(),
            data_size=data_size,
            stage=0 if self._is_whole else self._engine.grid.get_stage_id(),
            num_stages=engine.pipeline,
            device=device,
        )
        self._micro_batch = train.micro_batch
        self._num_micro_batches = self._engine.gradient_accumulation_steps()
        if engine.zero == 0 and train.clip > 0:
            self._engine.clip_fp32_gradients = self._clip_gradients
        self._is_finite = True
        self.loss_scale = LossScale() if engine.precision == "fp16" else None
        if self.loss_scale is not None:
            # DeepSpeed's own scaler would be one more state, and ends the run where the scale cannot fall.
            vars(self._optimizer.loss_scaler)["update_scale"] = lambda overflow: None
        if skip_non_finite:
            self._engine._take_model_step = self._take_step_if_finite
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
        if micro_batches != self._engine.gradient_accumulation_steps():
            self._engine.set_train_batch_size(micro_batches * self._micro_batch * self.place.data_size)
        if self.place.has_loss:
            # Undoes DeepSpeed's average over data-parallel ranks: the objective is one sum.
            scaled = replace(objective, normaliser=objective.normaliser / self.place.data_size)
            scale = self._undivided.gradient = 1.0 if self.loss_scale is None else self.loss_scale.scale
            self._loss.start_step(micro_batches, scaled, scale, on_statistics)
        else:
            on_statistics(self._empty_sums)
        if self.loss_scale is not None:
            self._optimizer.loss_scaler.cur_scale = self.loss_scale.scale
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._module.tied is not None:
            self._module.tied.refresh()
            self._module.tied.changed()
        data = _micro_batches(batch) if batch is not None else None
        if data is not None and self._is_whole:
            train_passes(self._engine, data, micro_batches)
        else:
            self._engine.train_batch(data)
        # Under ZeRO, DeepSpeed always skips a step whose norm is not finite.
        overflows = getattr(self._optimizer, "overflow", False)
        is_finite = self._is_finite and not overflows
        self._steps += is_finite
        if self.loss_scale is not None:
            # Of a step with a bad reference loss the gradients are finite, and the scale is right.
            self.scaling = self.loss_scale.update(not overflows)
        return is_finite

    def _forward(self, batch: Batch | None, num_micro_batches: int) -> None:
        data = _micro_batches(batch) if batch is not None else None
        if self._module.tied is not None:
            self._module.tied.refresh()
        if data is not None and self._is_whole:
            evaluation_passes(self._engine, data)
            return
        self._engine.eval_batch(data, reduce_output=None, bcast_loss=False, num_micro_batches=num_micro_batches)

    def grad_norm(self) -> float | None:
        if not self._is_finite:
            return None  # ZeRO 3 takes the norm in float64, and that may be finite
        norm = self._engine.get_global_grad_norm()
        return None if norm is None or not math.isfinite(norm) else float(norm)

    def _take_step_if_finite(self, lr_kwargs: Any = None) -> None:
        """Replaces `DeepSpeedEngine._take_model_step`: does the same, but skips the optimizer's step unless it is
        finite."""
        self._is_finite = is_finite_everywhere(gradients(self._optimizer, self._module), self._loss.non_finite_tokens)
        with contextlib.nullcontext() if self._is_finite else _at_rest(inner_adam(self._optimizer)):
            type(self._engine)._take_model_step(self._engine, lr_kwargs)

    def _clip_gradients(self) -> None:
        """Replaces `DeepSpeedEngine.clip_fp32_gradients`, which takes each pipeline stage's norm alone."""
        held = gradients(self._optimizer, self._module)
        squares = torch.stack([gradient.float().square().sum() for gradient in held]).sum()
        dist.all_reduce(squares, group=self._engine.grid.get_pipe_parallel_group())
        norm = squares.sqrt()
        scale = torch.clamp(self._engine.gradient_clipping() / (norm + 1e-6), max=1.0)
        for gradient in held:
            gradient.mul_(scale)
        self._engine._global_grad_norm = norm

    def layers(self) -> list[int]:
        return [layer.index for layer in self._module.own_layers()]

    def layer_state(self, layer: int) -> Iterator[tuple[str, ParameterState]]:
        module = self._module.own_layer(layer)
        names = module.hugging_face_names()
        for name, parameter in module.named_parameters():
            yield names[name], whole_state(self._optimizer, parameter)

    def load_layer_state(self, layer: int, state: dict[str, ParameterState]) -> None:
        module = self._module.own_layer(layer)
        names = module.hugging_face_names()
        if self._module.tied is not None:
            self._module.tied.changed()
        for name, parameter in module.named_parameters():
            set_whole_state(self._optimizer, parameter, state[names[name]])

    @property
    def optimizer_steps(self) -> int:
        return self._steps

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        self._steps = steps
        reset_adam(self._optimizer, steps)


@contextlib.contextmanager
def _at_rest(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Makes the optimizer's step do nothing."""
    vars(optimizer)["step"] = lambda: None
    try:
        yield
    finally:
        del vars(optimizer)["step"]


def _micro_batches(batch: Batch) -> Iterator[tuple[Any, tuple[torch.Tensor, ...]]]:
    """Yields (tokens, or tokens with positions; targets of `StepLoss`) of each micro-batch."""
    inputs = batch.tokens if batch.positions is None else zip(batch.tokens, batch.positions, strict=True)
    return zip(inputs, zip(*batch.targets, strict=True), strict=True)


def _make_module(engine: DeepSpeedConfig, model: ModelConfig, data_size: int, **options: Any) -> Any:
    """Returns a `WholeModule`, or this rank's part of a `MixPipelineModule`; both take the options."""
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
    from deepspeed.utils import groups

    from megamix.engines.deepspeed.module import MixPipelineModule

    if not engine.has_pipeline:
        groups.mpu = None  # an earlier engine's pipeline in this process; its groups are not those of all ranks
        return WholeModule(model, **options)
    topology = PipeDataParallelTopology(num_pp=engine.pipeline, num_dp=data_size)
    return MixPipelineModule(model, topology=topology, **options)


def _make_optimizer(module: torch.nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """Matrices decay; biases and norms do not. Of two groups, the non-empty ones."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
        fused=torch.cuda.is_available(),
    )


def _zero_config(engine: DeepSpeedConfig, module: Any) -> dict[str, Any]:
    """ZeRO's settings; buffers and gathered weights as `megamix.analysis.memory` counts them."""
    if engine.has_pipeline:
        return {"stage": engine.zero}
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in module.own_layers()]
    return {
        "stage": engine.zero,
        # Otherwise it takes as much for a model of any size.
        "reduce_bucket_size": min(REDUCE_BUCKET, sum(sizes)),
        # By default a model of up to a billion parameters stays whole on every rank.
        "stage3_max_live_parameters": GATHERED_LAYERS * max(sizes),
        "stage3_max_reuse_distance": max(sizes),
        "stage3_prefetch_bucket_size": max(sizes),
        # Norms and biases stay on every rank, whatever the size of the model.
        "stage3_param_persistence_threshold": max(sizes) // 100,
    }


def _deepspeed_config(engine: DeepSpeedConfig, train: TrainConfig, data_size: int, module: Any) -> dict[str, Any]:
    is_half = engine.precision != "fp32"
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.global_batch // (train.micro_batch * data_size),
        "gradient_clipping": train.clip,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": _zero_config(engine, module),
        "bf16": {"enabled": engine.precision == "bf16"},
        # The scale is set before every step.
        "fp16": {"enabled": engine.precision == "fp16", "loss_scale": 1.0},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if is_half else {}),
        # ZeRO 2 and 3 reduce the gradients of every micro-batch, which would be rounded before they are summed; and
        # DeepSpeed would reduce in fp16 by itself.
        **({} if engine.has_pipeline and engine.precision != "fp16" else {"communication_data_type": "fp32"}),
        # Reentrant checkpointing rejects inputs without a gradient, such as integer tokens.
        "pipeline": {"use_reentrant": False},
        "wall_clock_breakdown": False,
    }
