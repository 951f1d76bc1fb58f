"""Export of a run as phases of constant weights for Megatron.

Megatron cannot change a blend while it runs. With ``--phase-transition-iterations`` it saves and ends at each of these
iterations, and the restarted job reads another blend. A phase counts its samples from 0 and begins every file anew, in
another order, so a sample may come again in a later phase before all samples of its domain came once. The batch size
must not change between phases.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamix.core.errors import InputError
from megamix.interop.blend_files.export import WHOLE_SPLIT, DataSet, render, write_text
from megamix.training.records.mean_weights import lengths_between, mean_weights
from megamix.training.records.recorded_run import RecordedMix


@dataclass(frozen=True)
class Phase:
    """Iterations [first, end), counted from 0, with the mean of the weights over them."""

    first: int
    end: int
    weights: dict[str, float]


def make_phases(run: RecordedMix, cuts: Sequence[int]) -> list[Phase]:
    """Phases between ``cuts``, rising iterations inside the run."""
    batches, bounds = run.config.batches, [0, *cuts, run.steps]
    return [
        Phase(first, end, mean_weights(run.ledger, batches.position(first), batches.position(end)))
        for first, end in itertools.pairwise(bounds)
    ]


@dataclass(frozen=True)
class Deviation:
    """How far the weights of a run are from those of its phases.

    Attributes:
        most: the largest difference of a domain's weight from that of its phase.
        domain, iteration: where that is.
        mean: the mean over samples of half the sum of the differences over domains: the share of samples that are of
            other domains.
    """

    most: float
    domain: str
    iteration: int
    mean: float

    def describe(self) -> str:
        return (
            f"The phases are the run but for {self.mean:.2%} of its samples, which are of other domains; a weight differs by "
            f"at most {self.most:.4f} ({self.domain}, iteration {self.iteration})."
        )


def deviation_of(run: RecordedMix, phases: Sequence[Phase]) -> Deviation:
    """The deviation of ``phases`` from the run that they are of."""
    batches, names, found, total = run.config.batches, run.ledger.names, Deviation(0.0, "", 0, 0.0), 0.0
    for phase in phases:
        start, end = batches.position(phase.first), batches.position(phase.end)
        lengths = lengths_between(run.ledger, start, end)
        rows = np.flatnonzero(lengths)
        far = np.abs(run.ledger.weights[rows] - np.array([phase.weights[name] for name in names]))
        total += float(lengths[rows] @ far.sum(axis=1)) / 2
        row, k = np.unravel_index(int(far.argmax()), far.shape)
        if far[row, k] >= found.most:
            at = batches.step(max(int(run.ledger.starts[rows[row]]), start))
            found = Deviation(float(far[row, k]), names[k], at, 0.0)
    return dataclasses.replace(found, mean=total / batches.position(phases[-1].end))


def equal_cuts(run: RecordedMix, stages: int) -> list[int]:
    """Iterations that cut the recorded run into equal phases, to the nearest iteration.

    Raises:
        InputError: more phases than iterations, or fewer than 1.
    """
    if not 1 <= stages <= run.steps:
        raise InputError(
            f"--stages {stages}: {run.run_dir} has {run.steps} iterations on record. Give 1 to {run.steps}."
        )
    return [round(number * run.steps / stages) for number in range(1, stages)]


def cuts_at(run: RecordedMix, tokens: str) -> list[int]:
    """Iterations nearest to numbers of tokens, as "1e9,2e9".

    Raises:
        InputError: no numbers, or a phase without an iteration.
    """
    batches = run.config.batches
    try:
        numbers = [float(word) for word in tokens.split(",")]
        cuts = [batches.nearest_step(number) for number in numbers]
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"--stages-at {tokens}: expected numbers of tokens with commas, for example 1e9,2e9."
        ) from error
    bounds = [0, *cuts, run.steps]
    for first, end in itertools.pairwise(bounds):
        if end <= first:
            raise InputError(
                f"--stages-at {tokens} cuts at the iterations {', '.join(map(str, cuts))} ({batches.tokens_of(0)} tokens each), which"
                f" leaves a phase from {first} to {end}. Give rising numbers between {batches.tokens(1)} and"
                f" {batches.tokens(run.steps - 1)}: {run.run_dir} has {run.steps} iterations on record."
            )
    return cuts


def export_phases(run: RecordedMix, cuts: Sequence[int], format: str, out: Path) -> tuple[list[Path], list[str]]:
    """Writes a blend per phase, ``phases.json`` and, for Megatron's formats, ``phases.sh`` into ``out``.

    Returns:
        The files written, and notes.

    Raises:
        InputError: see `render`, or a file that cannot be written.
    """
    if len(run.config.batches.sizes) > 1:
        raise InputError(
            f"{run.run_dir} has steps of {run.config.batches.describe()} samples, and Megatron's phases need one batch size. "
            "Export one blend of the whole run instead: leave out --stages."
        )
    batches = run.config.batches
    if batches.past:
        raise InputError(
            f"{run.run_dir} has had samples of {batches.length(0)} tokens and now of {batches.seq_length}, and Megatron's phases need one "
            "sequence length. Export one blend of the whole run instead: leave out --stages."
        )
    suffix = "txt" if format == "megatron" else "json"
    data, written, entries = DataSet.of_run(run), [], []
    notes: dict[str, list[int]] = {}  # phases by note
    phases = make_phases(run, cuts)
    deviation = deviation_of(run, phases)
    for number, phase in enumerate(phases, start=1):
        source = f"{run.run_dir}, phase {number} (iterations {phase.first} to {phase.end})"
        blend = render(phase.weights, format, dataclasses.replace(data, source=source))
        written.append((out / f"phase_{number}.{suffix}", blend.text))
        for note in blend.notes:
            notes.setdefault(note, []).append(number)
        start, end = batches.position(phase.first), batches.position(phase.end)
        entries.append(
            {
                "file": f"phase_{number}.{suffix}",
                "iterations": [phase.first, phase.end],
                "samples": end - start,
                "tokens": (end - start) * batches.seq_length,
                "weights": phase.weights,
            }
        )
    content = {
        "global_batch_size": run.config.train.global_batch,
        "seq_length": batches.seq_length,
        "train_samples": run.position,
        "phase_transition_iterations": list(cuts),
        "deviation": dataclasses.asdict(deviation),
        "phases": entries,
    }
    written.append((out / "phases.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n"))
    if format in ("megatron", "per-split-json"):
        split = run.manifest.split if run.manifest is not None else None
        names = [path.name for path, _ in written[:-1]]
        written.append((out / "phases.sh", _shell(run, cuts, names, format, split or WHOLE_SPLIT)))
    for path, text in written:
        write_text(path, text)
    said = [
        note if len(numbers) == len(entries) else f"Phase {', '.join(map(str, numbers))}: {note}"
        for note, numbers in notes.items()
    ]
    return [path for path, _ in written], [*said, deviation.describe()]


def _shell(run: RecordedMix, cuts: Sequence[int], names: Sequence[str], format: str, split: str) -> str:
    """Shell functions that set PHASE_ARGS, Megatron's arguments for the phase of a checkpoint's iteration."""
    data = f"--split {split} --data-args-path" if format == "megatron" else "--per-split-data-args-path"
    transitions = f" --phase-transition-iterations {','.join(map(str, cuts))}" if cuts else ""
    cases = [
        f'    if [ "$iteration" -lt {cut} ]; then file={name}; return; fi'
        for cut, name in zip(cuts, names[:-1], strict=True)
    ]
    return "\n".join(
        [
            f"# Phases of {shlex.quote(str(run.run_dir))}. In the script that starts Megatron, with CHECKPOINTS what --save names:",
            '#     source phases.sh; pick_phase CHECKPOINTS; torchrun ... pretrain_gpt.py ... "${PHASE_ARGS[@]}"',
            "# Megatron saves and ends at the end of each phase; start it again for the next. Learning rates are to be",
            "# given in samples (--lr-decay-samples, --lr-warmup-samples), as --train-samples asks for.",
            "phase_of() {",
            "    local iteration=$1",
            *cases,
            f"    file={names[-1]}",
            "}",
            "pick_phase() {",
            "    local file folder iteration=0",
            '    folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)',
            '    if [ -f "$1/latest_checkpointed_iteration.txt" ]; then iteration=$(cat "$1/latest_checkpointed_iteration.txt"); fi',
            '    phase_of "$iteration"',
            f"    PHASE_ARGS=(--global-batch-size {run.config.train.global_batch} --seq-length {run.config.data.seq_length}"
            f' --train-samples {run.position}{transitions} {data} "$folder/$file")',
            "}",
            "",
        ]
    )
