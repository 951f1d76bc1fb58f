"""Another global batch, or other lengths of samples, on resume: steps before the checkpoint stay what they were, later
ones are of the config.

Position, optimizer and mixer stay. The run's resolved config then says all of it, as a ``train.batch_ramp`` and a
``data.seq_length_before``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from megamix.core.errors import InputError, ResumeRefused
from megamix.data.batches import Batches
from megamix.engines.config import BatchStage, TrainConfig
from megamix.training.config import EarlierLength, MixConfig
from megamix.training.mix_plan import document_tokens, make_policy
from megamix.training.plan import DataPlan

C = TypeVar("C", bound=MixConfig)
P = TypeVar("P", bound=DataPlan)
Fingerprints = Mapping[str, Mapping[str, Any]]


def saved_batches(saved: Fingerprints) -> Batches:
    """The batches of the run that wrote a checkpoint with these fingerprints.

    Raises:
        ResumeRefused: they do not say how long its samples are.
    """
    length, sizes = saved.get("order", {}).get("seq_length"), saved.get("batch", {}).get("sizes")
    if length is None:
        raise ResumeRefused(
            "the checkpoint's fingerprints have no order.seq_length, so it is not of this run. Continue from another checkpoint."
        )
    if sizes is None:  # of before they could change
        return Batches.equal(saved["order"]["global_batch"], length)
    past = saved["batch"].get("past_lengths", ())
    return Batches(tuple((first, size) for first, size in sizes), length, tuple((length, end) for length, end in past))


def batch_fingerprint(batches: Batches) -> dict[str, Any]:
    """What `saved_batches` reads, JSON-serialisable."""
    found: dict[str, Any] = {"sizes": [list(each) for each in batches.sizes]}
    return {**found, "past_lengths": [list(each) for each in batches.past]} if batches.past else found


def continued_plan(plan: P, saved: Batches, step: int) -> P:
    """``plan`` with the batches ``saved`` up to ``step``, and those of its config from there on.

    Raises:
        InputError: a stage of ``train.batch_ramp`` that no step is left for; or see `make_policy`.
    """
    config = continued_config(plan.config, saved, step)
    if config is plan.config:
        return plan
    lengths = document_tokens(plan.entries)
    policy = make_policy(config, plan.domain_names, plan.num_samples, plan.natural_weights, lengths)
    return replace(plan, config=config, policy=policy)


def continued_config(config: C, saved: Batches, step: int) -> C:
    """``config`` with the batches ``saved`` up to ``step``; itself where these are its own.

    Raises:
        InputError: a stage of ``train.batch_ramp`` that no step is left for.
    """
    here = saved.tokens(step)
    ends = [first for first, _ in saved.sizes[1:] if first < step]
    past = [
        BatchStage(global_batch=saved.size(end - 1), until_tokens=saved.tokens(end)) for end in (*ends, step) if end > 0
    ]
    ahead = [stage for stage in config.train.batch_ramp if stage.until_tokens > here]
    stages = [*past, *ahead]
    sizes = [*(stage.global_batch for stage in stages), config.train.global_batch]
    # One that goes on as the next is a part of it.
    ramp = tuple(stage for stage, size, then in zip(stages, sizes, sizes[1:], strict=False) if size != then)
    train = config.train.model_copy(update={"batch_ramp": ramp})
    lengths = list(saved.past)
    if saved.seq_length != config.data.seq_length and step > (lengths[-1][1] if lengths else 0):
        lengths.append((saved.seq_length, step))
    before = tuple(EarlierLength(seq_length=length, until_step=end) for length, end in lengths)
    data = config.data.model_copy(update={"seq_length_before": before})
    found = config.model_copy(update={"train": train, "data": data})
    try:
        return config if found.batches == config.batches else found
    except ValueError as problem:
        raise InputError(f"train.batch_ramp, after the {step:,} steps that the run has taken: {problem}") from problem


def batch_change(saved: Fingerprints, train: TrainConfig, batches: tuple[Batches, Batches], step: int) -> str:
    """What another global batch, or another length, changes: what is left of the run, and where it ends.

    Args:
        saved: `fingerprints` of the checkpoint.
        batches: of the run before and now.
        step: steps taken.
    """
    was, now = batches
    steps_before = int(saved.get("train", {}).get("steps", train.steps))
    ends = was.tokens(steps_before), now.tokens(train.steps)
    lengths = (
        ("", "") if was.seq_length == now.seq_length else tuple(f" of {each.seq_length} tokens" for each in batches)
    )
    left = [
        f"{end_step - step:,} steps of {each.describe(step)} samples{length}"
        for end_step, each, length in ((steps_before, was, lengths[0]), (train.steps, now, lengths[1]))
    ]
    what = "another batch" if was.seq_length == now.seq_length else "another sequence length"
    text = (
        f"{what} from step {step + 1} on: {left[1]} are left, before {left[0]}; the run ends after {ends[1]:,} tokens"
    )
    if ends[0] == ends[1]:
        return f"{text}, as before"
    text += f", before after {ends[0]:,}"
    steps = now.nearest_step(ends[0])
    return f"{text} (as near as can be with train.steps={steps})" if steps > step else text
