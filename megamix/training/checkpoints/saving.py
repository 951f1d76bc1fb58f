"""Saving: writing checkpoints from all ranks, beside training, and loading them into an engine."""

from __future__ import annotations

import copy
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from megamix.core.errors import MegamixError, Preempted, RankFailed, ResumeRefused
from megamix.core.files import mode_of_umask, sync_folder
from megamix.core.log import get_logger
from megamix.engines.base import COLLECTIVE_TIMEOUT, Engine, OwnFormat, ParameterState
from megamix.engines.models.pretrained import PretrainedWeights
from megamix.training.checkpoints.keeping import drop_old, give_name, mend
from megamix.training.checkpoints.store import (
    LAYERS,
    PARTIAL,
    PATIENCE_SECONDS,
    STATE,
    Files,
    Listing,
    damage_of_files,
    describe,
    files_in,
    listing_of,
    refusal,
    write_json,
    write_listing,
)
from megamix.training.config import CheckpointConfig

PARTS = ("weight", "exp_avg", "exp_avg_sq")
LEAVE_SECONDS = 30.0
"""How long a failing run waits for the checkpoint under way, which may still finish."""

Layers = Iterable[tuple[int, dict[str, torch.Tensor]]]
Outcome = tuple[Files, str | None]
"""Report of a rank: the files it wrote or hashed, and its error."""


class CheckpointWriter:
    """Writer of the checkpoints of a run. Every rank has one and makes the same calls.

    With ``checkpoint.asynchronous``, `save` returns once this rank has copied its part into host memory; a thread
    writes it, agrees with the other ranks and renames the checkpoint while training goes on. An engine's own format is
    written before `save` returns, because its collectives run on the main thread.

    As a context manager it waits at the end of the block for the checkpoint under way, for `LEAVE_SECONDS` where the
    block fails. An error in writing becomes the error of the block.

    Args:
        folder: the run's ``checkpoints`` directory.
        group: a process group of the ranks of the job. The writer makes another like it, so that its thread meets no
            collective of the main thread.

    Attributes:
        last_step: the step of the last call of `save`; None before the first.
    """

    def __init__(self, folder: Path, engine: Engine, config: CheckpointConfig, group: Any) -> None:
        self._folder = folder
        self._home = _identity(folder.parent)
        self._engine = engine
        self._config = config
        self._own = engine if isinstance(engine, OwnFormat) and engine.saves_own_format else None
        self._is_main = dist.get_rank() == 0
        ranks = dist.get_process_group_ranks(group)
        self._group: Any = dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT, backend="gloo")
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.last_step: int | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Saves the checkpoint of ``step`` (steps taken), after waiting for the one before.

        Args:
            state: JSON-serialisable; rank 0's is written.

        Raises:
            MegamixError: this checkpoint, or with ``checkpoint.asynchronous`` the one before, could not be written, or
                the model is not finite. Every rank raises, and there is no checkpoint of that step.
        """
        self.wait()
        self.last_step = step
        state = {**copy.deepcopy(dict(state)), "step": step} if self._is_main else {}
        if self._own is not None or not self._config.asynchronous:
            self._write(step, self._layers(), state)
            return
        arguments = (step, list(self._layers()), state)
        # Must not keep the process when the main thread has failed.
        self._thread = threading.Thread(target=self._in_background, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises an error of the background thread, without waiting."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Waits until every checkpoint is on disk under its name; raises an error of the thread."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Preempted):
            self.wait()
        elif isinstance(error, Exception) and self._thread is not None:
            self._thread.join(LEAVE_SECONDS)
            # All ranks know of a failure in writing; the first to raise it closes the others' connections.
            if self._error is not None and not isinstance(error, MegamixError):
                raise self._error from error

    def _in_background(self, step: int, layers: Layers, state: dict[str, Any]) -> None:
        try:
            self._write(step, layers, state)
        except BaseException as error:
            self._error = error

    def _write(self, step: int, layers: Layers, state: dict[str, Any]) -> None:
        """From the first file to the last rename; all ranks."""
        started = time.monotonic()
        partial = self._folder / f"step_{step}{PARTIAL}"
        holds = format_of(self._engine)

        def start() -> None:
            if self._home is not None and self._home != _identity(self._folder.parent):
                raise MegamixError(
                    f"{self._folder.parent} was moved, removed or replaced while the run was in it. Put it back where it was, "
                    "or start the run where it is now (run_dir); the same command goes on from the last checkpoint in it."
                )
            mend(self._folder)
            (partial / holds).mkdir(parents=True)

        def finish() -> None:
            after_skips = state.get("guard", {}).get("in_a_row", 0) > 0
            write_listing(partial, Listing(step, holds, files, after_skips))
            sync_folder(partial / holds)
            sync_folder(partial)
            give_name(partial)

        try:
            self._agree(step, ({}, self._ruined_own() or self._on_main(start, partial)))
            own = self._own
            outcome = _write_layers(partial, layers) if own is None else self._write_own(step, partial, own)
            files = self._agree(step, self._write_state(partial, state, outcome))
            self._agree(step, ({}, self._on_main(finish, partial)))
        except MegamixError:
            if self._is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if self._is_main:
            get_logger().info("saved %s (%.1f s)", partial.with_suffix(""), time.monotonic() - started)
            drop_old(self._folder, step, self._config.keep, self._config.keep_every)

    def _layers(self) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Copies of the layers that this rank writes. Every rank takes part in gathering a layer it holds a part of, so
        this must be read to its end."""
        place = self._engine.place
        is_writer = place.data_rank == 0 and place.is_first_copy
        for layer in self._engine.layers() if self._own is None else ():
            tensors = {}
            for name, state in self._engine.layer_state(layer):
                for part in PARTS if is_writer else ():
                    held = getattr(state, part).detach()
                    tensors[f"{part}/{name}"] = held.to("cpu", torch.float32, copy=True).contiguous()
            if is_writer:
                yield layer, tensors

    def _write_state(self, partial: Path, state: dict[str, Any], outcome: Outcome) -> Outcome:
        files, error = outcome
        if not self._is_main or error is not None:
            return outcome
        try:
            return {**files, STATE: write_json(partial / STATE, state)}, None
        except ValueError as problem:
            return {}, f"the run's state has a number that is not finite ({problem}). {_RUINED}"
        except OSError as problem:
            return {}, _cannot_write(partial / STATE, problem)

    def _ruined_own(self) -> str | None:
        """What is NaN or infinite in this rank's part of the own format, or None."""
        return None if self._own is None else _not_finite(f"rank {dist.get_rank()}", self._own.own_tensors())

    def _write_own(self, step: int, partial: Path, engine: OwnFormat) -> Outcome:
        """The engine writes, then each file is hashed by one rank.

        A rank that cannot write raises at once: the others may be waiting for it inside the engine.
        """
        folder = partial / engine.own_format
        try:
            folder.mkdir(parents=True, exist_ok=True)
            engine.save_own(folder)
        except (OSError, RuntimeError, CheckpointException) as problem:
            raise MegamixError(_not_written(step, _cannot_write(folder, problem))) from problem
        # Each rank sees its own files; those of others may not have appeared yet.
        seen = self._gather(step, files_in(partial, engine.own_format))
        mine = [name for name, rank in _shared_out(seen).items() if rank == dist.get_rank(self._group)]
        try:
            return {name: describe(partial / name) for name in mine}, None
        except OSError as problem:
            return {}, f"cannot read back {folder}: {problem.strerror or problem}"

    def _on_main(self, act: Callable[[], None], path: Path) -> str | None:
        """Runs ``act``, which changes ``path``, on rank 0; returns its error."""
        try:
            if self._is_main:
                act()
        except OSError as problem:
            return _cannot_write(path, problem)
        except MegamixError as problem:
            return str(problem)
        return None

    def _agree(self, step: int, outcome: Outcome) -> Files:
        """The files of all ranks.

        Raises:
            MegamixError: on every rank, the error of one.
            RankFailed: a rank is gone.
        """
        outcomes = self._gather(step, outcome)
        errors = [error for _, error in outcomes if error]
        if errors:
            raise MegamixError(_not_written(step, errors[0]))
        return {name: entry for files, _ in outcomes for name, entry in files.items()}

    def _gather(self, step: int, given: Any) -> list[Any]:
        gathered: list[Any] = [None] * dist.get_world_size(self._group)
        try:
            dist.all_gather_object(gathered, given, group=self._group)
        except RuntimeError as problem:
            raise RankFailed(
                f"the checkpoint of step {step} was given up: another rank is gone ({problem}). The same command resumes "
                "the run from the checkpoint before it."
            ) from problem
        return gathered


def _identity(folder: Path) -> tuple[int, int] | None:
    """Which directory a path names now; None where there is none."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


_RUINED = "Resume from the checkpoint before it, with a lower train.lr."


def _not_written(step: int, problem: str) -> str:
    return f"the checkpoint of step {step} was not written: {problem}"


def _cannot_write(path: Path, problem: BaseException) -> str:
    reason: object = problem
    if isinstance(problem, OSError) and problem.strerror:
        reason = problem.strerror
    elif isinstance(problem, CheckpointException):  # says each rank's traceback
        reason = "; ".join(sorted({str(error) for error, _ in problem.failures.values()}))
    return (
        f"cannot write {path}: {reason}. Free space; the same command then goes on from the checkpoint before it. Or "
        "choose another run_dir."
    )


def _write_layers(partial: Path, layers: Layers) -> Outcome:
    """Writes layers, up to the first that cannot be written."""
    files: Files = {}
    error: str | None = None
    for layer, tensors in layers:
        if error is not None:
            continue  # gathering the others is the work of all ranks
        error = _not_finite(f"layer {layer}", tensors.items())
        if error is not None:
            continue
        path = partial / _layer_file(layer)
        try:
            # Rank 0 has made it, which this machine may not have noticed.
            path.parent.mkdir(parents=True, exist_ok=True)
            with mode_of_umask(path):
                save_file(tensors, path)
            files[_layer_file(layer)] = describe(path)
        except (OSError, SafetensorError) as problem:
            error = _cannot_write(path, problem)
    return files, error


def _not_finite(where: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """What is NaN or infinite, or None."""
    for name, tensor in tensors:
        # One pass without a copy; NaN anywhere makes both NaN.
        low, high = torch.aminmax(tensor.detach())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            count = int((~torch.isfinite(tensor)).sum())
            return f"{count:,} of {tensor.numel():,} values of {name} ({where}) are not finite. {_RUINED}"
    return None


def _shared_out(seen: list[list[str]]) -> dict[str, int]:
    """File -> a rank that sees it, balanced over ranks."""
    shared: dict[str, int] = {}
    load = [0] * len(seen)
    for name in sorted({name for names in seen for name in names}):
        rank = min((rank for rank, names in enumerate(seen) if name in names), key=lambda rank: load[rank])
        load[rank] += 1
        shared[name] = rank
    return shared


def load_engine(path: Path, engine: Engine, optimizer_steps: int, *, verified: bool = False) -> None:
    """Sets the engine's weights and optimizer state; each rank reads the layers it holds.

    Layers are safetensors files. An own format is read by its engine; Megatron's holds pickled files, which it opens
    only after their hashes are checked (`megamix.engines.megatron.checkpoint`).

    Args:
        verified: whether all hashes were checked just now (`megamix.training.checkpoints.resume.agree_on_checkpoint`).

    Raises:
        ResumeRefused: a file is damaged, or only another engine can read it.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    listing = listing_of(path, PATIENCE_SECONDS)

    def check(names: list[str]) -> None:
        problem = damage_of_files(path, listing, names, deadline, hashes=not verified)
        if problem is not None:
            raise refusal(path, problem)

    if listing.holds != LAYERS:
        if not isinstance(engine, OwnFormat) or engine.own_format != listing.holds:
            raise ResumeRefused(
                f"the checkpoint {path} was written by engine {listing.holds} in a format of its own (engine.checkpoint_format dist), which no "
                f"other engine reads. Resume it with engine.name={listing.holds}; there, engine.checkpoint_format=layers writes the next one "
                "for all engines."
            )
        names = sorted(name for name in listing.files if name.startswith(f"{listing.holds}/"))
        check(names if verified else names[dist.get_rank() :: dist.get_world_size()])
        engine.load_own(path / listing.holds, optimizer_steps)
        return
    engine.optimizer_steps = optimizer_steps
    for layer in engine.layers_to_load():
        name = _layer_file(layer)
        if name not in listing.files:
            raise ResumeRefused(f"the checkpoint {path} has no {name}: it is of another model.")
        check([name])
        engine.load_layer_state(layer, _unflatten(load_file(path / name)))


def format_of(engine: Engine) -> str:
    """The form of the engine's checkpoints, see `megamix.training.checkpoints.store.Listing.holds`."""
    return engine.own_format if isinstance(engine, OwnFormat) and engine.saves_own_format else LAYERS


def load_weights(weights: PretrainedWeights, engine: Engine) -> None:
    """Loads pretrained weights with a fresh optimizer; each rank reads the layers it holds."""
    engine.optimizer_steps = 0
    for layer in engine.layers_to_load():
        state = {
            name: ParameterState(weight, torch.zeros_like(weight), torch.zeros_like(weight))
            for name, weight in weights.layer(layer).items()
        }
        engine.load_layer_state(layer, state)


def _layer_file(layer: int) -> str:
    return f"{LAYERS}/{layer:05d}.safetensors"


def _unflatten(tensors: dict[str, torch.Tensor]) -> dict[str, ParameterState]:
    names = [key.partition("/")[2] for key in tensors if key.startswith("weight/")]
    return {name: ParameterState(*(tensors[f"{part}/{name}"] for part in PARTS)) for name in names}
