"""Mean weights of a run or of a part of it: exact integrals of its ledger."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError, did_you_mean
from megamix.core.text import by_name
from megamix.data.batches import Batches
from megamix.training.records.ledger import Ledger
from megamix.training.records.recorded_run import RecordedMix

WHICH = ("mean", "final", "initial", "realised")


def run_weights(run: RecordedMix, which: str) -> dict[str, float]:
    """The weights of a run by domain.

    A mixer whose result is not what it samples with says so by ``average_weights`` in its record, as DoReMi does: its
    mean is that, and its final weights are the ``loss_weights`` beside it, where there are such.

    Args:
        which: mean: the mean of the weights over the tokens trained on; realised: the shares of the tokens, which the
            mean determines within a few samples; final: the last weights the mixer computed; initial: those the run
            began with.

    Raises:
        InputError: nothing trained yet, or an unknown ``which``.
    """
    if which not in WHICH:
        raise InputError(f"--which {which}: no such weights." + did_you_mean(which, WHICH))
    last = run.ledger.lines[-1]
    if which == "initial" and run.ledger.starts[0] != 0:
        raise InputError(
            f"{run.run_dir}: the weights that the run began with are not on record, only those from sample "
            f"{run.ledger.starts[0]} on. It continued another run's checkpoint, or lost lines of weights.jsonl. Use --which final."
        )
    if which == "initial":
        return by_name(run.ledger.lines[0]["domain_names"], run.ledger.lines[0]["domain_weights"])
    if which == "final":
        key = "loss_weights" if "average_weights" in last and "loss_weights" in last else "domain_weights"
        return by_name(last["domain_names"], last[key])
    if run.position == 0:
        raise InputError(f"the run {run.run_dir} has not trained yet: no weights to average. Use --which initial.")
    if which == "mean":
        if "average_weights" in last:
            return by_name(last["domain_names"], last["average_weights"])
        return mean_weights(run.ledger, 0, run.position, run.config.batches)
    return {name: tokens / run.tokens for name, tokens in run.tokens_read().items()}


def mean_weights(ledger: Ledger, start: int, end: int, batches: Batches | None = None) -> dict[str, float]:
    """The mean of the weights over the positions [start, end), by domain: over their tokens where ``batches`` says that
    samples had several lengths.

    A line's weights hold from its position to the next line's. A domain that was not in the run for a while has weight
    0 there. Sums are rounded once (`math.fsum`), so the mean does not depend on how many changes there were.

    Returns:
        The mean of every domain that ever was in the run, those of its end first; they sum to 1.

    Raises:
        InputError: an empty stretch, or positions that do not rise from 0.
    """
    if not 0 <= start < end:
        raise InputError(f"no weights between the positions {start} and {end}: the run has to be trained first.")
    lengths = lengths_between(ledger, start, end)
    if batches is not None and batches.past:
        # A change of length has a line of its own, so the samples of a line are equal.
        lengths *= np.array([batches.length(batches.step(at)) for at in np.maximum(ledger.starts, start).tolist()])
    rows = lengths > 0
    terms = ledger.weights[rows] * lengths[rows, None]
    sums = [math.fsum(column) for column in terms.T.tolist()]
    return {name: total / int(lengths.sum()) for name, total in zip(ledger.names, sums, strict=True)}


def lengths_between(ledger: Ledger, start: int, end: int) -> NDArray[np.int64]:
    """int64 [lines]: for how many of the positions [start, end) the weights of each line hold.

    Raises:
        InputError: positions that do not rise from 0.
    """
    starts = ledger.starts
    wrong = np.flatnonzero(np.diff(starts, prepend=0) < 0)
    if starts[0] != 0 or wrong.size:
        at = int(wrong[0]) if wrong.size else 0
        raise InputError(
            f"weights.jsonl: line {at + 1} of those that hold is at position {starts[at]}, expected positions that rise"
            " from 0. Lines are missing or out of order: use the file as the run wrote it."
        )
    ends = np.append(starts[1:], max(end, int(starts[-1])))
    return np.clip(np.minimum(ends, end) - np.maximum(starts, start), 0, None)
