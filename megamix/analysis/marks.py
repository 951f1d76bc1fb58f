"""Marks on the weights of a run: resumes, changes, steering, stages, and the largest jumps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megamix.analysis.series import recorded_tokens
from megamix.core.text import number
from megamix.training.mixture import StagedMixture
from megamix.training.records.events import EVENTS
from megamix.training.records.lines import EventLine, read_lines
from megamix.training.records.recorded_run import RecordedRun

Kind = Literal["resumed", "changed", "steered", "stage", "jump"]
WORDS: dict[Kind, str] = {
    "resumed": "resumed",
    "changed": "changed on resume",
    "steered": "steered",
    "stage": "stage of the mixture",
    "jump": "jump",
}
_MOST, _MOST_JUMPS = 20, 6
_JUMP = 0.1
"""A weight that moves by at least this in one change jumps."""


@dataclass(frozen=True)
class Mark:
    """A moment of a run.

    Attributes:
        tokens: trained on before it.
        step: steps taken before it.
    """

    tokens: int
    step: int
    kind: Kind
    text: str


def marks(run: RecordedRun) -> list[Mark]:
    """The marks of a run, by tokens: of jumps the largest six, of other kinds the last twenty."""
    kinds: dict[Kind, list[Mark]] = {}
    for mark in (*_resumes(run), *_changes(run)):
        kinds.setdefault(mark.kind, []).append(mark)
    found = itertools.chain.from_iterable(kept[-_MOST:] for kept in kinds.values())
    return sorted(found, key=lambda mark: (mark.tokens, mark.kind))


def _resumes(run: RecordedRun) -> Iterator[Mark]:
    batches = run.config.batches
    for line in read_lines(run.run_dir / EVENTS, EventLine):
        if line["event"] == "resumed":
            yield Mark(batches.tokens(line["step"]), line["step"], "resumed", f"resumed at step {line['step']:,}")


def _changes(run: RecordedRun) -> Iterator[Mark]:
    end, jumps = recorded_tokens(run), list[tuple[float, Mark]]()
    mixture = run.config.mixture
    batches = run.config.batches
    stages = mixture.starts(batches) if isinstance(mixture, StagedMixture) else []
    for earlier, line in itertools.pairwise(run.ledger.lines):
        tokens = batches.tokens_at(line["position"])
        if tokens > end:
            break
        step = line["effective_step"] if "effective_step" in line else line["step"]
        if line.get("change"):
            parts = ", ".join(line["change"].get("parts", [])) or "domains"
            yield Mark(tokens, step, "changed", f"{parts} changed on resume at step {step:,}")
        elif (steering := line.get("steering")) is not None:
            for command in steering.get("commands", ()):
                why = f" ({command['note']})" if "note" in command else ""
                yield Mark(tokens, step, "steered", f"steered at step {step:,}: {command['what']}{why}")
        elif "statistics" not in line or line.get("is_warmup") or run.config.mixer.name == "static":
            if step in stages:  # and not on a ramp between two
                yield Mark(tokens, step, "stage", f"a stage of the mixture began at step {step:,}")
        elif line["domain_names"] == earlier["domain_names"]:
            by = np.asarray(line["domain_weights"], np.float64) - np.asarray(earlier["domain_weights"], np.float64)
            k = int(np.abs(by).argmax())
            if abs(by[k]) >= _JUMP:
                before, after = float(earlier["domain_weights"][k]), float(line["domain_weights"][k])
                name = line["domain_names"][k]
                text = (
                    f"{name} {number(before, 3)} -> {number(after, 3)} at step {step:,}: megamix why {run.run_dir} "
                    f"--domain {name} --step {line['step']}"
                )
                jumps.append((abs(float(by[k])), Mark(tokens, step, "jump", text)))
    yield from (mark for _, mark in sorted(jumps, key=lambda jump: -jump[0])[:_MOST_JUMPS])
