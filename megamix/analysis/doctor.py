"""``megamix doctor``: checks of a run's plan and of this machine, before a job waits in a queue.

config -> plan (data, layout, weights: what is wrong is an error) -> memory and disk by formula -> machine -> report
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.analysis.memory import StageMemory, checkpoint_bytes, estimate_memory
from megamix.analysis.mixer_warnings import mixer_warnings
from megamix.core.errors import InputError
from megamix.core.packages import check_extra
from megamix.core.processes import num_cores
from megamix.core.text import ABSENT, Report, Table, gib, most_of, number, plural
from megamix.data.sampler import Slice
from megamix.data.tokens.stream import files_line
from megamix.engines.config import DeepSpeedConfig, EngineConfig, MegatronConfig
from megamix.engines.models.config import ModelConfig
from megamix.mixing.mixers import normalise_weights
from megamix.training.bounds import bound_of
from megamix.training.config import RunConfig
from megamix.training.job.local_ranks import job_world_size
from megamix.training.mix_plan import MixPlan, planned_mix
from megamix.training.mixture import mixture_of
from megamix.training.plan import Plan, check_layout, make_plan

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "deepspeed",
    "megatron-core",
    "transformer-engine",
    "triton",
)
"""Whose versions are shown, where they are installed."""


@dataclass(frozen=True)
class _Shape:
    """Shape of a run, with or without its data.

    Attributes:
        plan: with the data.
        mix: the mixture over the run: the plan, or what follows from the tokens that the data is to have.
    """

    config: RunConfig
    model: ModelConfig
    world_size: int
    data_size: int
    plan: Plan | None = None
    mix: MixPlan | None = None

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one rank in one step."""
        train = self.config.train
        return Slice(train.global_batch, train.micro_batch, 0, self.data_size).num_micro_batches

    @property
    def bubble(self) -> float:
        """Share of a step in which a pipeline stage waits: (p - 1) / (v m + p - 1) with v chunks a stage (Narayanan et
        al., 2021, arXiv 2104.04473, section 2.2)."""
        engine = self.config.engine
        chunks = engine.virtual_pipeline if isinstance(engine, MegatronConfig) else 1
        waiting = engine.pipeline - 1
        return waiting / (chunks * self.num_micro_batches + waiting)


def doctor(config: RunConfig | None = None, *, world_size: int | None = None, plan_only: bool = False) -> Report:
    """Checks the plan of a run and this machine.

    Args:
        config: without one, only the machine is looked at.
        world_size: ranks of the job; default: those of the job this process is in, else the fewest the layout needs.
        plan_only: neither open the data nor look at the machine; for a config whose data or GPUs are elsewhere.

    Raises:
        InputError: anything that would stop the run.
        DataChanged: the data are not those of the manifest.
        ResumeRefused: the run directory holds another run's checkpoint.
    """
    if config is None:
        if plan_only:
            raise InputError(
                "--plan-only checks the plan of a config, and none is given. Name a config, or leave it out."
            )
        return Report([_machine(None)])
    if not plan_only:
        check_extra(config.engine.name, f"engine {config.engine.name}")
    ranks = world_size or job_world_size()
    shape = _shape_without_data(config, ranks) if plan_only else _shape(_plan(config, ranks))
    memory = estimate_memory(
        shape.model,
        config.engine,
        seq_length=config.data.seq_length,
        micro_batch=config.train.micro_batch,
        num_micro_batches=shape.num_micro_batches,
        data_size=shape.data_size,
        local_layers=_local_layers(config.engine, plan_only),
        within_documents=config.data.within_documents,
    )
    names, initial = _mixture(shape)
    warnings = shape.mix.warnings() if shape.mix is not None else []
    if names:
        warnings += mixer_warnings(config, names, initial, None if shape.mix is None else shape.mix.objective_weights)
    if shape.bubble > 0.5:
        warnings.append(
            f"the pipeline stands idle for {shape.bubble:.0%} of a step. Use more micro-batches per step (a larger "
            "global_batch or a smaller micro_batch), or fewer stages."
        )
    parts: list[str | Table] = [_what_runs(shape), _domains(shape, names, initial), _memory(memory)]
    if not plan_only:
        parts += [_machine(config), _start(config, shape.plan)]
        warnings += _machine_warnings(shape, world_size is not None)
        warnings += _disk_warnings(config, shape.model)
    parts.append("\n".join(f"warning: {warning}" for warning in warnings) if warnings else "No warnings.")
    return Report(parts)


def _shape(plan: Plan) -> _Shape:
    return _Shape(plan.config, plan.model, plan.world_size, plan.data_size, plan, plan)


def _shape_without_data(config: RunConfig, world_size: int | None) -> _Shape:
    """The checks of `make_plan` that need no data."""
    ranks, data_size = check_layout(config, world_size)
    if config.model.vocab_size is None:
        raise InputError(
            "model.vocab_size is not given, and --plan-only opens no data to take it from. "
            "Add model.vocab_size=N (the tokenizer's entries), or leave --plan-only out."
        )
    return _Shape(config, config.model, ranks, data_size, mix=planned_mix(config))


def _local_layers(engine: EngineConfig, plan_only: bool) -> bool:
    """Whether Megatron uses its own layers; for a machine elsewhere only the config can tell."""
    if not isinstance(engine, MegatronConfig):
        return False
    from megamix.engines.megatron.layout import uses_transformer_engine

    return engine.transformer_engine == "off" if plan_only else not uses_transformer_engine(engine)


def _mixture(shape: _Shape) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Domains and initial weights; none without data, unless the config spells them out."""
    if shape.mix is not None:
        return shape.mix.domain_names, shape.mix.policy.initial_weights
    given = mixture_of(shape.config.mixture).given()
    return ((), np.zeros(0)) if given is None else (tuple(given), normalise_weights(given, tuple(given), "mixture"))


def _what_runs(shape: _Shape) -> str:
    config, model = shape.config, shape.model
    train = config.train
    batches, samples = config.batches, config.total_samples
    equal = f" = {batches.tokens_of(0):,} tokens" if len(batches.sizes) == 1 and not batches.past else ""
    micro_batches = plural(shape.num_micro_batches, "micro-batch", "micro-batches")
    delay = plural(config.data.weight_lag + 1, "step")
    lines = (
        ("run_dir", f"{config.run_dir}"),
        *_data_line(shape.plan),
        ("model", f"{model.architecture}, {model.num_layers} layers of width {model.hidden_size}, vocabulary "
                  f"{model.vocabulary:,}{' (tied)' if model.tie_word_embeddings else ''}: {model.num_parameters():,} parameters"),
        ("step", f"{batches.describe()} samples x {config.data.seq_length} tokens{equal}"),
        ("run", f"{plural(train.steps, 'step')}, {samples:,} samples, {batches.tokens(train.steps):,} tokens"),
        ("schedule", train.learning_rate.describe()),
        ("ranks", f"{shape.world_size} = {_factors(config.engine)} x data {shape.data_size}; {_engine(config.engine)}"),
        ("other sizes", _other_sizes(config)),
        ("per rank", f"{micro_batches} of {train.micro_batch} samples per step; pipeline bubble {shape.bubble:.1%}"),
        ("mixture", _mixture_line(shape)),
        ("mixer", f"{config.mixer.name}; weights act {delay} after the one they follow from"),
        ("checkpoint", f"{gib(checkpoint_bytes(model))} each, {config.checkpoint.keep} kept"),
        *([("attention", "within documents")] if config.data.within_documents else []),
        *([("token files", files_line(shape.plan.domains))] if shape.plan is not None else []),
    )  # fmt: skip
    return "\n".join(f"{name:<12} {value}" for name, value in lines)


def _data_line(plan: Plan | None) -> list[tuple[str, str]]:
    if plan is None:
        return []
    found = []
    losses = getattr(plan.config.mixer, "reference", None)
    for name, path, verified in (
        ("data", plan.config.data.manifest, plan.verified),
        ("reference", losses, plan.verified_losses),
    ):
        if verified is not None and verified.warning is None:
            found.append((name, f"{path}: {verified.line()}"))
    return found


def _factors(engine: EngineConfig) -> str:
    return " x ".join(f"{name} {factor}" for name, factor in engine.layout.items())


def _engine(engine: EngineConfig) -> str:
    """The engine and its options, in words."""
    said = [engine.name]
    if isinstance(engine, DeepSpeedConfig):
        said += [f"ZeRO {engine.zero}", *(["compiled layers"] if engine.compile else [])]
    else:
        if engine.virtual_pipeline > 1:
            said.append(f"{engine.virtual_pipeline} chunks a stage")
        switches = ("sequence_parallel", "distributed_optimizer", "gradient_accumulation_fusion")
        said += [name.replace("_", " ") for name in switches if getattr(engine, name)]
    said.append(engine.precision)
    if engine.activation_checkpointing:
        said.append("activation checkpointing")
    return ", ".join(said)


def _other_sizes(config: RunConfig) -> str:
    """Numbers of ranks that this layout and batch allow: multiples of the ranks of one copy of the model."""
    train, unit = config.train, config.engine.model_ranks
    turns = math.gcd(*(size for _, size in config.batches.sizes)) // train.micro_batch
    sizes = ", ".join(str(size * unit) for size in range(1, turns + 1) if turns % size == 0)
    return f"{sizes} ranks ({unit} for a copy of the model; {config.batches.describe()} samples in micro-batches of {train.micro_batch})"


def _mixture_line(shape: _Shape) -> str:
    """Source and bounds of the weights."""
    data, said = shape.config.data, [mixture_of(shape.config.mixture).describe()]
    if data.sampling == "iid":
        said.append("drawn independently")
    bounds = {"at least": (data.min_weight, 0.0), "at most": (data.max_weight, 1.0)}
    for words, (value, default) in bounds.items():
        if value != default:
            said.append(f"{words} {bound_of(value).describe()}")
    if data.max_epochs is not None:
        said.append(f"max_epochs {data.max_epochs}, then {data.on_exhausted}")
    return "; ".join(said)


def _domains(shape: _Shape, names: Sequence[str], initial: NDArray[np.float64]) -> str | Table:
    mix, columns = shape.mix, ["domain", "tokens", "natural share", "initial weight", "planned epochs"]
    if mix is None:
        if not names:
            return f"domains      known once the data is there; initial weights: {mixture_of(shape.config.mixture).describe()}"
        rows = [(name, ABSENT, ABSENT, number(weight), ABSENT) for name, weight in zip(names, initial, strict=True)]
        return Table(columns, most_of(rows, initial))
    if shape.plan is not None:
        tokens = [domain.num_tokens for domain in shape.plan.domains]
    else:
        columns[1] = "tokens expected"
        tokens = [(shape.config.data.token_counts or {})[name] for name in names]
    rows = [
        (name, f"{count:,.0f}", number(share), number(weight), number(epochs, 2))
        for name, count, share, weight, epochs in zip(
            names, tokens, mix.natural_weights, initial, mix.epochs, strict=True
        )
    ]
    return Table(columns, most_of(rows, initial))


def _memory(stages: Sequence[StageMemory]) -> Table:
    columns = ["memory per rank, GiB, computed from shapes", "layers", "parameters"]
    columns += ["weights", "gradients", "Adam", "activations", "logits", "total", "linear loss", "total with it"]
    rows = []
    for stage in stages:
        sizes = (stage.weights, stage.gradients, stage.optimizer, stage.activations)
        sizes += (stage.logits, stage.total, stage.linear, stage.total_linear)
        layers = ", ".join(f"{first}-{last}" for first, last in stage.chunks)
        rows.append(
            (f"stage {stage.stage}", layers, f"{stage.parameters:,}", *(f"{size / 2**30:.3f}" for size in sizes))
        )
    return Table(columns, rows)


def _machine(config: RunConfig | None) -> str:
    lines = [f"python       {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for package in PACKAGES:
        version = _version(package)
        if version is not None:
            lines.append(f"{package:<12} {version}")
    devices = _devices()
    lines.append(f"devices      {', '.join(devices) if devices else 'no CUDA device: runs on the CPU'}")
    lines.append(f"cores        {num_cores()}")
    if config is not None:
        lines.append(f"disk         {gib(shutil.disk_usage(_existing(config.run_dir)).free)} free at {config.run_dir}")
    return "\n".join(lines)


def _plan(config: RunConfig, ranks: int | None) -> Plan:
    from megamix.training.checkpoints.resume import begun

    return make_plan(config, ranks, begun=begun)


def _start(config: RunConfig, plan: Plan | None) -> str:
    """Whether the run would start or resume, by training's own checks, references and pretrained weights included."""
    from megamix.training.checkpoints.resume import open_checkpoint
    from megamix.training.reference.cache import open_reference

    if plan is None:
        return f"start        anew in {config.run_dir}"
    resumed = open_checkpoint(plan)
    plan = plan if resumed is None else resumed.adopted(plan)
    open_reference(plan)
    if resumed is None:
        plan.pretrained()
        return f"start        anew in {config.run_dir}"
    blend, change = resumed.blend(plan)
    lines = [f"start        from {resumed.path} (step {resumed.step} of {config.train.steps})"]
    if (said := resumed.said_changes(plan.config)) is not None:
        lines.append(f"train        {said}")
    if change is not None:
        weights = ", ".join(f"{name} {w:.4f}" for name, w in zip(plan.domain_names, blend.weights, strict=True))
        lines.append(
            f"changes      {', '.join((*change['parts'], *_domain_changes(change['domains'])))}; weights: {weights}"
        )
    return "\n".join(lines)


def _domain_changes(change: dict[str, Any] | None) -> list[str]:
    """The changes of the domain set, in words."""
    if change is None:
        return []
    found = [f"domain '{name}' {verb}" for verb in ("added", "removed", "replaced") for name in change[verb]]
    return found + [f"domain '{whole}' split into {', '.join(parts)}" for whole, parts in change["split"].items()]


def _machine_warnings(shape: _Shape, elsewhere: bool) -> list[str]:
    """Too many ranks for this machine; nothing where the job runs elsewhere."""
    if elsewhere or job_world_size() is not None:
        return []
    found = []
    ranks, devices, cores = shape.world_size, len(_devices()), num_cores()
    if devices and ranks > devices:
        found.append(
            f"{ranks} ranks for {plural(devices, 'CUDA device')} here: start the job on more nodes, or use fewer ranks "
            "(engine.pipeline, engine.data)."
        )
    elif not devices and ranks > cores:
        found.append(
            f"{ranks} ranks for {plural(cores, 'core')}: they will take turns. Use fewer ranks "
            "(engine.pipeline, engine.data)."
        )
    return found


def _disk_warnings(config: RunConfig, model: ModelConfig) -> list[str]:
    """Checks that run_dir can be written and holds the checkpoints.

    Raises:
        InputError: it cannot be written, or not even one checkpoint fits.
    """
    place = _existing(config.run_dir)
    if not place.is_dir():
        raise InputError(f"run_dir {config.run_dir}: {place} is not a directory. Choose another run_dir.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(
            f"run_dir {config.run_dir}: {place} is not writable. Choose another run_dir, or change its permissions."
        )
    free, size = shutil.disk_usage(place).free, checkpoint_bytes(model)
    if free < size:
        raise InputError(
            f"run_dir {config.run_dir}: {gib(free)} are free, and a checkpoint takes {gib(size)}. "
            "Make room, or choose another."
        )
    # The newest is written before the oldest goes.
    wanted = (config.checkpoint.keep + 1) * size
    if free < wanted:
        return [
            f"{gib(free)} are free at {config.run_dir}; checkpoint.keep {config.checkpoint.keep} takes up to "
            f"{gib(wanted)}. Make room, or keep fewer."
        ]
    return []


def _existing(path: Path) -> Path:
    """The path itself or its nearest ancestor that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"{properties.name} ({gib(properties.total_memory)})")
    return found
