"""Guard against steps that are not finite and losses that explode (the config's ``guard``).

    engine: tokens of each sample that are not finite --kept--> Guard.judge, once the step's sums are there: names them
    engine: was the step finite? --at its end, the same on all ranks--> Guard.took or Guard.left_out

Every rank has a guard with the same sums, so all ranks end at the same step and each can say the whole reason. Nothing
is read from the device before a step has gone wrong.

The mixer sees a step that is left out too, by its finite tokens: their losses are those of the model before the step,
and the mixer has them before the gradient is known.

``RUN/non_finite.jsonl`` has a line for every such step, with all its samples. It is never cut back on resume.

Legend: K domains, C statistics, M micro-batches, B samples.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamix.core.errors import MegamixError
from megamix.core.files import AppendFile
from megamix.core.log import get_logger
from megamix.core.text import listed
from megamix.data.sampler import StepSamples
from megamix.training.checkpoints.state import GuardState
from megamix.training.checkpoints.store import complete_steps
from megamix.training.config import GuardConfig, RunConfig
from megamix.training.plan import DataPlan
from megamix_kernels import DomainSums

RECORD = "non_finite.jsonl"
SHOWN = 4  # samples in a message


class BadStep(MegamixError):
    """A step that ends the run; every rank raises it before the same step."""


@dataclass(frozen=True)
class BadSample:
    """A sample whose loss was not finite.

    Attributes:
        position: its place in the run, as ``megamix inspect RUN --sample`` takes it.
        domain: a name.
        sample: its number in the domain.
        tokens: number of its tokens that were not finite.
    """

    position: int
    domain: str
    sample: int
    tokens: int


@dataclass(frozen=True)
class _Kept:
    """Samples and counts of a step on a rank with the loss, until its sums are there."""

    samples: StepSamples
    data_rank: int
    counts_MB: torch.Tensor

    @property
    def first(self) -> int:
        """The position of this rank's first sample: the ranks before it have as many."""
        return self.samples.position + self.data_rank * self.samples.domain.size


class Guard:
    """Judges the steps of one rank of a run.

    Args:
        config: the policy.
        domains: K names.
        vocab_size: a uniform guess has the loss ln(vocab_size).
        run: the config, for messages and the record; None in another trainer than megamix's.
        data_rank: which of the data-parallel slices of every global batch this rank reads.
        state: of the run so far.

    Attributes:
        skips: steps left out so far.
    """

    def __init__(
        self,
        config: GuardConfig,
        domains: tuple[str, ...],
        vocab_size: int,
        *,
        run: RunConfig | None = None,
        data_rank: int = 0,
        state: GuardState | None = None,
    ) -> None:
        self._config = config
        self._domains = domains
        self._limit = config.explosion * math.log(vocab_size) if config.explosion else math.inf
        self._run = run
        self._data_rank = data_rank
        self._kept: dict[int, _Kept] = {}
        self._found: dict[int, str] = {}
        self._end: BadStep | None = None
        self.skips, self._in_a_row = (0, 0) if state is None else (state.skips, state.in_a_row)

    @classmethod
    def of(cls, plan: DataPlan, data_rank: int, state: GuardState | None) -> Guard:
        """The guard of a plan; in another trainer than megamix's it stops at a non-finite loss and has no limit."""
        run = plan.config if isinstance(plan.config, RunConfig) else None
        return cls(
            GuardConfig(explosion=0) if run is None else run.guard,
            plan.domain_names,
            plan.vocab_size,
            run=run,
            data_rank=data_rank,
            state=state,
        )

    def state(self) -> GuardState:
        """The state for a checkpoint."""
        return GuardState(self.skips, self._in_a_row)

    def keep(self, step: int, samples: StepSamples | None, counts_MB: torch.Tensor | None) -> None:
        """Keeps the samples of ``step`` for the messages of `judge`; called before the step's sums are submitted.

        Args:
            samples: of this rank; None where it reads nothing.
            counts_MB: int32, on the device: tokens of each that are not finite; None where it has no loss.
        """
        if samples is not None and counts_MB is not None:
            self._kept[step] = _Kept(samples, self._data_rank, counts_MB)

    def judge(self, step: int, sums_KC: torch.Tensor, evaluated_KC: torch.Tensor, group: Any) -> None:
        """Judges the sums of ``step`` over all ranks, in step order; every rank calls it with the same.

        Args:
            sums_KC: int64, on the CPU.
            evaluated_KC: the same of the evaluation after the step; [0, C] where there was none.
            group: a process group of all ranks with a CPU backend, not used elsewhere meanwhile.

        Raises:
            BadStep: the run ends here; also for every step after it.
        """
        kept = self._kept.pop(step, None)
        if self._end is not None:
            raise self._end
        sums = DomainSums.from_buffer(sums_KC)
        if sums.non_finite.any():
            samples = _gather(kept, self._domains, group)
            self._found[step] = self._describe(sums, samples)
            self._write(step, sums, samples)
        problem = self._problem(step, sums, evaluated_KC)
        if problem is not None:
            self._end = BadStep(problem)
            raise self._end

    def took(self) -> None:
        """The step was taken."""
        self._in_a_row = 0

    def scaled(self, step: int, scaling: str | None) -> str | None:
        """Counts ``step``, after it was judged, if the engine left it out for its loss scale alone; returns the reason.

        Args:
            scaling: of the engine; None where the loss scale is not at fault.
        """
        if scaling is None or step in self._found:
            return None
        self.skips += 1
        return f"step {step + 1} left out: {scaling}"

    def left_out(self, step: int) -> str:
        """Counts ``step``, which the engine found not finite on all ranks, after it was judged; returns the reason.

        Raises:
            BadStep: such a step, or so many in a row, end the run.
        """
        what = self._found.pop(step, None)
        if what is None:
            what = "the gradient is not finite, though every loss is"
            self._write(step, None, [])
        if self._config.non_finite == "stop":
            raise BadStep(f"step {step + 1}: {what}. {self._remedy()}")
        self.skips += 1
        self._in_a_row += 1
        if self._in_a_row >= self._config.max_skips:
            raise BadStep(
                f"step {step + 1}: {what}. It is the last of {self._in_a_row} steps in a row that were left out "
                f"(guard.max_skips {self._config.max_skips}). {self._remedy_of(step + 1 - self._in_a_row)}"
            )
        return f"step {step + 1} left out, {self._in_a_row} in a row: {what}"

    def _problem(self, step: int, sums: DomainSums, evaluated_KC: torch.Tensor) -> str | None:
        """The reason to end the run, or None."""
        if self._config.non_finite == "stop":
            if step in self._found:
                return f"step {step + 1}: {self._found[step]}. {self._remedy()}"
            if len(evaluated_KC) and (evaluated := DomainSums.from_buffer(evaluated_KC)).non_finite.any():
                what = f"the loss is not finite in {self._by_domain(evaluated)}"
                return f"the evaluation after step {step + 1}: {what}. {self._remedy()}"
        tokens = int(sums.tokens.sum())
        if not tokens or (loss := float(sums.nats.sum()) / tokens) <= self._limit:
            return None
        return self._explosion(step, loss, sums)

    def _explosion(self, step: int, loss: float, sums: DomainSums) -> str:
        assert self._run is not None
        mean_K = sums.nats / sums.tokens.clamp(min=1)
        worst = int(mean_K.argmax())
        before = self._saved_before(step)
        start = "the start, as no checkpoint is before it" if before is None else (
            f"one before it: checkpoint.resume={before}, or an earlier one if the loss was rising there already"
        )  # fmt: skip
        return (
            f"step {step + 1}: the mean loss is {loss:.3f} with a learning rate of {self._run.train.lr_at(step):.3g}, above "
            f"{self._limit:.3f} (guard.explosion: {self._config.explosion:g} times the loss of a guess); the highest is that of "
            f"'{self._domains[worst]}', {float(mean_K[worst]):.3f}. Lower train.lr or lengthen its warm-up (train.warmup_steps; with "
            f"checkpoint.accept_changed=[train]) and go on from {start}."
        )

    def _saved_before(self, step: int) -> Path | None:
        """The newest checkpoint of at most ``step`` steps."""
        assert self._run is not None
        folder = self._run.run_dir / "checkpoints"
        before = max((saved for saved in complete_steps(folder) if saved <= step), default=None)
        return None if before is None else folder / f"step_{before}"

    def _remedy_of(self, good: int) -> str:
        """What to do where all steps after the first ``good`` were left out: the weights are those of before them."""
        before = None if self._run is None else self._saved_before(good)
        if before is None:
            return self._remedy()
        return (
            "Lower train.lr, lengthen its warm-up (train.warmup_steps) or tighten train.clip (with checkpoint.accept_changed=[train]), and go on "
            f"from before them: checkpoint.resume={before}, or an earlier one if the weights were wrong there already."
        )

    def _describe(self, sums: DomainSums, samples: list[BadSample]) -> str:
        text = f"the loss is not finite in {self._by_domain(sums)}"
        if not sums.tokens.any():
            text += ", which is all of the step: the weights are at fault rather than a sample"
        if samples:
            words = [f"{bad.position} (sample {bad.sample} of '{bad.domain}', {bad.tokens} tokens)" for bad in samples]
            where = f" (see {RECORD})" if len(samples) > SHOWN else ""
            text += f"; at position {listed(words, SHOWN)}{where}"
            if self._run is not None:
                text += f"; `megamix inspect {self._run.run_dir} --sample {samples[0].position}` shows the documents"
        return text

    def _by_domain(self, sums: DomainSums) -> str:
        counts = zip(self._domains, sums.non_finite.tolist(), strict=True)
        return ", ".join(f"'{name}' ({count} tokens)" for name, count in counts if count)

    def _remedy(self) -> str:
        if self._run is None:
            return "Lower the learning rate, lengthen its warmup or clip gradients, and go on from the last checkpoint."
        skip = "" if self._config.non_finite == "skip" else "; guard.non_finite=skip leaves such steps out"
        return (
            "Lower train.lr, lengthen its warm-up (train.warmup_steps) or tighten train.clip (with checkpoint.accept_changed=[train]), and go on "
            f"from the last checkpoint{skip}."
        )

    def _write(self, step: int, sums: DomainSums | None, samples: list[BadSample]) -> None:
        """The line of a step, once."""
        if self._run is None or dist.get_rank() != 0:
            return
        counts = {} if sums is None else dict(zip(self._domains, sums.non_finite.tolist(), strict=True))
        line: dict[str, Any] = {
            "step": step + 1,
            "policy": self._config.non_finite,
            "tokens": {name: count for name, count in counts.items() if count},
            "samples": [asdict(bad) for bad in samples],
        }
        try:
            file = AppendFile(Path(self._run.run_dir) / RECORD)
            file.write_line(line)
            file.close()
        except MegamixError as error:  # it must not take the place of what went wrong
            get_logger().warning("%s", error)


def _gather(kept: _Kept | None, domains: tuple[str, ...], group: Any) -> list[BadSample]:
    """The bad samples of all ranks, by position; every rank calls it. Ranks that share a sample add up."""
    mine: list[BadSample] = []
    if kept is not None:
        rows = zip(kept.samples.domain.ravel().tolist(), kept.samples.sample.ravel().tolist(), strict=True)
        mine = [
            BadSample(kept.first + row, domains[domain], sample, count)
            for row, ((domain, sample), count) in enumerate(zip(rows, kept.counts_MB.flatten().tolist(), strict=True))
            if count
        ]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, mine, group=group)
    found: dict[int, BadSample] = {}
    for bad in (bad for part in gathered for bad in part):
        before = found[bad.position].tokens if bad.position in found else 0
        found[bad.position] = BadSample(bad.position, bad.domain, bad.sample, before + bad.tokens)
    return [found[position] for position in sorted(found)]
