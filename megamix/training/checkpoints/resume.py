"""Resume: which checkpoint a run continues from, whether it may, and what changes from there on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megamix.core.errors import InputError, MegamixError, ResumeRefused
from megamix.core.log import get_logger
from megamix.data.blend.blend import Blend
from megamix.mixing.mixers import Mixer, adopt_state, mixed_domains
from megamix.training.checkpoints import store
from megamix.training.checkpoints.batch_change import (
    batch_change,
    continued_config,
    continued_plan,
    saved_batches,
)
from megamix.training.checkpoints.continued_blend import SAID_OF_LENGTH, check_length, check_rest, continued_blend
from megamix.training.checkpoints.fingerprints import (
    changed_parts,
    comparable,
    fingerprints,
    mixture_print,
    refuse_changes,
    sizes_ahead,
    without_keys,
)
from megamix.training.checkpoints.keeping import mend
from megamix.training.checkpoints.state import RunState, read_state
from megamix.training.checkpoints.state_parts import check_parts
from megamix.training.checkpoints.train_change import train_change
from megamix.training.config import RunConfig
from megamix.training.domain_change import DomainChange, find_change
from megamix.training.plan import DataPlan, Plan

T = TypeVar("T")
P = TypeVar("P", bound=DataPlan)


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that a run may continue from.

    Attributes:
        domains: the change to the plan's domains; None where there is none.
        changed: the accepted parts (see `fingerprints`) that differ.
    """

    path: Path
    state: RunState
    domains: DomainChange | None
    changed: tuple[str, ...]

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.state.step

    def blend(self, plan: DataPlan) -> tuple[Blend, dict[str, Any] | None]:
        """See `continued_blend`; of the `adopted` plan."""
        return continued_blend(self.state, plan, self.domains, self.changed)

    def adopted(self, plan: P) -> P:
        """``plan`` with the batches that the run has had so far; see `continued_plan`."""
        saved = saved_batches(self.state.fingerprints)
        return continued_plan(plan, saved, self.step)

    def said_changes(self, config: RunConfig) -> str | None:
        """What another batch or length, or other settings of training, change; None: nothing.

        Args:
            config: of the `adopted` plan.
        """
        saved, found = self.state.fingerprints, []
        batches = saved_batches(saved), config.batches
        if {"batch", "sequence"} & set(self.changed):
            found.append(batch_change(saved, config.train, batches, self.step))
        if "sequence" in self.changed:
            found.append(SAID_OF_LENGTH)
        if {"batch", "sequence", "train"} & set(self.changed):
            found.append(train_change(saved["train"], config.train, self.step, batches))
        return "; ".join(filter(None, found)) or None

    def left_out(self, plan: DataPlan) -> tuple[str, ...]:
        """The domains whose weight stays 0: those of the checkpoint, unless mixture or domains changed."""
        state = self.state.mixer
        if state is None or "mixture" in self.changed:
            return plan.policy.left_out
        before = set(state["domains"]) - set(mixed_domains(state))
        change = self.domains
        if change is None:
            return tuple(name for name in plan.domain_names if name in before)
        whole = (None if parent is None else change.before[parent] for parent in change.parents)
        return tuple(
            name
            for name, parent, added in zip(change.after, whole, change.added.tolist(), strict=True)
            if (added == 0 if parent is None else parent in before)
        )

    def set_mixer(self, mixer: Mixer) -> None:
        """Loads the saved state into ``mixer``, by domain name where the domains differ or others are left out.

        Another mixer (accepted by ``checkpoint.accept_changed``) starts afresh from the weights in effect.
        """
        state = self.state.mixer
        if state is None or state["mixer"] != mixer.name:
            return
        change = self.domains
        if change is not None:
            adopt_state(mixer, state, change.parents, change.rescale(np.array(state["weights"], np.float64)))
        elif mixed_domains(state) != mixed_domains(mixer.state_dict()):
            adopt_state(mixer, state, range(mixer.num_domains), mixer.weights)
        else:
            mixer.load_state_dict(state)


def begun(config: RunConfig) -> RunConfig:
    """``config`` with the batches that its run has had so far, by the checkpoint that it would continue from; itself
    where that has the same, or there is none that can be read: `open_checkpoint` says why."""
    try:
        path = find_checkpoint(config)
        if path is None:
            return config
        state = read_state(path)
        return continued_config(config, saved_batches(state.fingerprints), state.step)
    except MegamixError:
        return config


def open_checkpoint(plan: Plan) -> Resumed | None:
    """The checkpoint that the run would continue from, as this process sees it; None to start anew.

    Weights are not read. The ranks of a run call `agree_on_checkpoint`, which logs what is passed over.

    Raises:
        InputError: a given path is no checkpoint, or the config asks for changes that cannot be made.
        ResumeRefused: the checkpoint is damaged, or not of this run.
    """
    path = find_checkpoint(plan.config)
    if path is None:
        check_starts_anew(plan.config)
        return None
    return resume_from(read_state(path), plan, path, fingerprints(plan))


def agree_on_checkpoint(plan: Plan, group: Any) -> Resumed | None:
    """The checkpoint that the run continues from, the same on all ranks, each of which calls this; None to start anew.

    The ranks share the work of checking the files' hashes. A damaged checkpoint is passed over for the next older one,
    unless the config names its path. Rank 0 first clears away what a killed run left in the folder, so no other run may
    be writing there.

    Args:
        group: a process group of all ranks with a CPU backend.

    Raises:
        InputError, ResumeRefused: on every rank, see `open_checkpoint`; or all checkpoints are damaged.
    """
    search = _Search(plan)
    while True:
        offer = _from_main(search.next, group)
        if offer is None:
            check_starts_anew(plan.config)
            return None
        resumed, listing = offer
        problem = _shared_reading(resumed.path, listing, group)
        if problem is None:
            return resumed
        search.pass_over(resumed.path, problem)


class _Search:
    """Search through the checkpoints of a run, on rank 0; the other ranks know what was passed over."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._passed_over: list[tuple[Path, str]] = []

    def next(self) -> tuple[Resumed, store.Listing] | None:
        """The newest usable checkpoint that was not passed over; None to start anew."""
        config = self._plan.config
        folder = config.run_dir / "checkpoints"
        if config.checkpoint.resume != "auto":
            path = find_checkpoint(config, store.PATIENCE_SECONDS)
            return None if path is None else self._open(path)
        if not self._passed_over:
            _mend(folder)
        done = [path for path, _ in self._passed_over]
        for path in store.candidates(folder):
            if path in done:
                continue
            problem = store.damage(path, store.PATIENCE_SECONDS)
            if problem is None:
                return self._open(path)
            self.pass_over(path, problem)
        store.refuse_damaged(folder, self._passed_over)
        return None

    def pass_over(self, path: Path, problem: str) -> None:
        """Excludes a damaged checkpoint.

        Raises:
            ResumeRefused: the config names its path.
        """
        if self._plan.config.checkpoint.resume != "auto":
            raise store.refusal(path, problem)
        self._passed_over.append((path, problem))
        import torch.distributed as dist

        if dist.get_rank() == 0:
            get_logger().warning("passing over %s: %s", path, problem)

    def _open(self, path: Path) -> tuple[Resumed, store.Listing]:
        state = read_state(path, store.PATIENCE_SECONDS)
        resumed = resume_from(state, self._plan, path, fingerprints(self._plan))
        return resumed, store.read_listing(path)


def _mend(folder: Path) -> None:
    try:
        mend(folder)
    except OSError as problem:
        raise InputError(
            f"cannot clear away what a killed run left in {folder}: {problem.strerror or problem}. Choose another run_dir, or "
            "make that one writable."
        ) from problem


def _from_main(look: Callable[[], T], group: Any) -> T:
    """The result of ``look`` on rank 0, or its error, on every rank."""
    import torch.distributed as dist

    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = look()
        except MegamixError as error:
            found[1] = error
    dist.broadcast_object_list(found, src=0, group=group)
    if found[1] is not None:
        raise found[1]
    return found[0]


def _shared_reading(path: Path, listing: store.Listing, group: Any) -> str | None:
    """Checks every file of a checkpoint on one of the ranks; returns the problem of the first damaged one on all."""
    import torch.distributed as dist

    by_size = sorted(listing.files, key=lambda name: (listing.files[name]["bytes"], name))
    mine = by_size[dist.get_rank() :: dist.get_world_size()]
    deadline = time.monotonic() + store.PATIENCE_SECONDS
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, store.damage_of_files(path, listing, mine, deadline), group=group)
    return next((problem for problem in problems if problem is not None), None)


def resume_from(state: RunState, plan: DataPlan, path: Path, present: Mapping[str, Mapping[str, Any]]) -> Resumed:
    """The checkpoint with ``state`` at ``path``, checked against ``plan``.

    Args:
        present: `fingerprints` of the run now, or in another trainer its `data_fingerprints`.

    Raises:
        InputError, ResumeRefused: see `open_checkpoint`.
    """
    accepted = plan.config.checkpoint.accept_changed
    saved = state.fingerprints
    check_parts(state, path)
    domains = find_change(saved["data"]["domains"], plan, "data" in accepted, str(path))
    batches = saved_batches(saved)
    plan = continued_plan(plan, batches, state.step)
    saved = comparable(saved, present["mixer"], domains is not None)
    # The sizes from here on, in words; and stages by the steps that they had.
    saved["batch"] = {"global_batch": sizes_ahead(batches, state.step)}
    saved["sequence"] = {"seq_length": batches.seq_length}
    present = {
        **present,
        "order": without_keys(present["order"], "seq_length"),
        "sequence": {"seq_length": plan.config.data.seq_length},
        "batch": {"global_batch": sizes_ahead(plan.config.batches, state.step)},
        "mixture": mixture_print(plan, batches),
    }
    changed = changed_parts(saved, present)
    if domains is not None:
        # A mixture by name cannot stay what it was when the names change; the rules say what the weights become.
        accepted = (*accepted, "data")
        changed = {part: key for part, key in changed.items() if part != "mixture" or part in accepted}
    refuse_changes(saved, present, {part: key for part, key in changed.items() if part not in accepted}, path)
    if "sequence" in changed:
        check_length(state, plan, domains)
    check_rest(state, plan, domains, tuple(changed))
    return Resumed(path, state, domains, tuple(changed))


def check_starts_anew(config: RunConfig) -> None:
    """Raises InputError where the config asks for a change of domains, or has the lengths of a resumed run, and there
    is no checkpoint to change."""
    if config.data.seq_length_before:
        raise InputError(
            f"data.seq_length_before is what a resume with another data.seq_length fills in, but {config.run_dir} has no "
            "checkpoint. Leave it out: a new run has one length."
        )
    asked = [key for key, value in config.checkpoint.domains if value]
    if asked:
        raise InputError(
            f"checkpoint.domains.{asked[0]} changes the domains of a run that goes on, but {config.run_dir} has no checkpoint. "
            "Let the run before it save one, or leave out checkpoint.domains: a run begins with all of data.domains."
        )


def find_checkpoint(config: RunConfig, patience: float = 0.0) -> Path | None:
    """The checkpoint to continue from by ``checkpoint.resume``; None to start anew.

    Args:
        patience: seconds to wait for the one that a path names.

    Raises:
        InputError: a given path is no checkpoint.
        ResumeRefused: ``never``, but the run directory holds a checkpoint; or all that it holds are damaged.
    """
    folder = config.run_dir / "checkpoints"
    resume = config.checkpoint.resume
    if resume == "auto":
        return store.newest(folder, quiet=True)
    if resume == "never":
        if store.complete_steps(folder):
            raise ResumeRefused(
                f"{config.run_dir} holds checkpoints of a run, and checkpoint.resume is never. Choose another run_dir, remove that one, "
                "or resume it (checkpoint.resume=auto)."
            )
        return None
    path = Path(resume)
    if not store.wait_for(path / store.LISTING, time.monotonic() + patience):
        raise InputError(
            f"checkpoint.resume: {path} is no complete checkpoint. Give auto, never or a RUN/checkpoints/step_N directory."
        )
    return path
